"""A package of somebody else's brings an editor, a stream and a metric, and the harness runs them unchanged."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from grace_bench.results.reading import read_result

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "add-an-editor.md").read_text(encoding="utf-8")
STREAM = '''
from grace_bench.streams import EditRequest, EditStream, StreamData, StreamMetadata, register_stream


@register_stream("parity")
class Parity(EditStream):
    """Points of the plane whose class is asked for anew."""

    task = "classification"
    metadata = StreamMetadata(source="made up", revision="1", license="MIT")
    default_model = "toy"
    default_layer = "second"

    def __init__(self, *, n_requests: int = 6):
        self.n_requests = n_requests

    def load(self):
        spots = [f"({-1.2 + 0.05 * i:.4f}, {1.8 - 0.05 * i:.4f})" for i in range(self.n_requests)]
        return StreamData(
            edits=tuple(EditRequest(id=f"turned-{i}", prompt=spot, target=0) for i, spot in enumerate(spots)),
            upstream=(EditRequest(id="kept", prompt="(0.0000, -2.0000)", target=0),),
        )
'''
METRIC = '''
from grace_bench.metrics import EditMetric, register_metric


@register_metric("n_candidates_seen")
class CandidatesSeen(EditMetric):
    """Counts candidates, edited or not."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def after_candidate(self, strategy):
        self.seen += 1
        return [self.value(strategy, self.seen)]

    def result(self):
        return self.seen
'''

MORE_ENTRY_POINTS = """
[project.entry-points."grace_bench.streams"]
parity = "grace_bench_offset.stream:Parity"

[project.entry-points."grace_bench.metrics"]
n_candidates_seen = "grace_bench_offset.metric:CandidatesSeen"
"""


def block(language: str) -> str:
    found, *_ = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, installed by pip into a folder of its own."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    package = source / "grace_bench_offset"
    package.mkdir()
    for name, text in {"__init__": "", "editor": block("python"), "stream": STREAM, "metric": METRIC}.items():
        (package / f"{name}.py").write_text(text, encoding="utf-8")
    (source / "pyproject.toml").write_text(block("toml") + MORE_ENTRY_POINTS, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True)
    return target


def run(site: Path, arguments: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": str(site)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_guide_shows_an_editor_in_under_forty_lines() -> None:
    assert len(block("python").splitlines()) < 40


def test_what_an_installed_package_brings_is_listed_with_its_origin(site: Path, tmp_path: Path) -> None:
    done = run(site, ["grace_bench", "list"], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("offset", "parity", "n_candidates_seen"):
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert line.split(maxsplit=1)[1].strip() == "An offset for every answer. [grace-bench-offset]"


RUN_AND_RANK = """
from grace_bench.cli import main

options = ["stream=parity", "stream.n_requests=4", "editor=offset", "editor.lr=0.5"]
assert main(["run", *options, "out=runs", "wandb.mode=disabled"]) == 0
assert main(["leaderboard", "runs", "--format", "json"]) == 0
"""


def test_an_installed_editor_stream_and_metric_run_with_the_unchanged_harness(site: Path, tmp_path: Path) -> None:
    (tmp_path / "both.py").write_text(RUN_AND_RANK, encoding="utf-8")
    done = run(site, ["both"], tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "parity" / "toy" / "offset").iterdir()
    result = read_result(folder / "result.json")
    assert result.stream.name == "parity"
    assert result.editor.model_dump() == {"name": "offset", "lr": 0.5, "n_iter": 20}
    assert result.metrics["ES"] == 1.0
    assert result.metrics["n_candidates_seen"] == result.metrics["n_candidates"] == 4
    assert result.environment["plugins"] == {"grace_bench_offset": {"version": "1.0", "git": None}}
    evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert evaluations[-1]["n_candidates_seen"] == 4
    assert "offset" in done.stdout.partition("[")[2], "the leaderboard in JSON"


SCRIPT = """
import sys
from grace_bench.cli import main

if __name__ == "__main__":
    assert main(["list"]) == 0
    sys.exit(main(sys.argv[1:]))
"""


def test_what_a_script_registers_itself_is_listed_run_and_measured_like_any_other(tmp_path: Path) -> None:
    parts = (block("python"), STREAM, METRIC)
    (tmp_path / "own.py").write_text("\n".join(parts) + SCRIPT, encoding="utf-8")

    command = [sys.executable, "own.py", "run", "stream=parity", "editor=offset", "out=runs", "wandb.mode=disabled"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("offset", "parity", "n_candidates_seen"):
        assert re.search(rf"^ *{name} .* \[__main__\] *$", done.stdout, re.MULTILINE)
    (folder,) = (tmp_path / "runs" / "parity" / "toy" / "offset").iterdir()
    result = read_result(folder / "result.json")
    assert result.metrics["n_candidates_seen"] == result.metrics["n_candidates"] == 6
    evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert evaluations[-1]["n_candidates_seen"] == 6


@pytest.mark.slow
def test_the_editor_of_the_guide_keeps_every_contract(site: Path) -> None:
    contracts = ROOT / "tests" / "contracts" / "test_editors.py"
    done = run(site, ["pytest", "-q", "-p", "no:cacheprovider", "-k", "offset", str(contracts)], ROOT)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 20
