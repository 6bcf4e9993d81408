"""The guide to metrics: its example runs as written, and its metric is everywhere without another file."""

import csv
import io
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from helpers import module_at

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "add-a-metric.md").read_text(encoding="utf-8")
EVERYWHERE = """
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path

os.chdir("example")
runpy.run_path("perfect.py", run_name="__main__")
os.chdir("..")
for stream in (sys.stdout, sys.stderr):
    print("END OF THE EXAMPLE", file=stream, flush=True)

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.cli import main
from grace_bench.results.reading import read_result
from grace_bench.results.summary import summary
from grace_bench.run.loggers.progress import ProgressLogger
from grace_bench.run.loggers.wandb import WandbLogger

settings = RunSettings(schedule=Schedule(max_edits=3, eval_every=1, max_upstream=20))
for editor in ("ft", "none"):
    folder = Path("runs", editor)
    loggers = [ProgressLogger(), WandbLogger(folder, mode="offline")]
    run_benchmark("toy", editor=editor, settings=settings, folder=folder, loggers=loggers)
for fmt in ("table", "csv", "latex"):
    with Path(fmt).open("w") as file, redirect_stdout(file):
        main(["leaderboard", "runs", "--format", fmt])
main(["report", "runs", "--out", "report"])
main(["figure", "curves", "runs", "--out", "figures"])
Path("summary").write_text(summary(read_result(Path("runs/ft/result.json")), folder))
"""


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return str(found)


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    # With W&B's variables it would hand its records to the process of an earlier test.
    own = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment = {**own, "COLUMNS": "120", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def without_times(text: str) -> list[str]:
    """The lines that are not empty, with the seconds an edit took and the time left taken out."""
    lines = [re.sub(r", about \d+ s left|\d+\.\d+ +(?=– +1$)", "", line.rstrip()) for line in text.splitlines()]
    return [" ".join(line.split()) for line in lines if line and "──" not in line]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], list[str]]:
    """The folder of a process that runs the example and then others with its metric, and what each part printed."""
    folder = tmp_path_factory.mktemp("everywhere")
    (folder / "example").mkdir()
    (folder / "example" / "perfect.py").write_text(block("python"), encoding="utf-8")
    (folder / "everywhere.py").write_text(EVERYWHERE, encoding="utf-8")
    ended = run(folder, "everywhere.py")
    return folder, *(stream.split("END OF THE EXAMPLE\n") for stream in (ended.stdout, ended.stderr))


@pytest.fixture(scope="module")
def made(done: tuple[Path, list[str], list[str]]) -> tuple[Path, str]:
    """A folder of runs measured with the guide's metric and all that was made from them, and what the runs printed."""
    folder, _, (_, printed) = done
    return folder, printed


def test_the_example_runs_as_it_stands_and_prints_what_the_guide_says(
    done: tuple[Path, list[str], list[str]],
) -> None:
    _, (out, _), (err, _) = done
    assert without_times(err + out) == without_times(block("text"))


def last_value(folder: Path, editor: str) -> float:
    value = json.loads((folder / "runs" / editor / "result.json").read_bytes())["metrics"]["Perfect"]
    assert 0 <= value <= 1
    return float(value)


def test_it_is_in_every_evaluation_on_disk(made: tuple[Path, str]) -> None:
    lines = (made[0] / "runs" / "ft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line).get("Perfect") for line in lines]
    assert values[0] is None
    assert all(value is not None for value in values[1:])
    assert values[-1] == last_value(made[0], "ft")


def test_it_is_in_the_leaderboard_as_a_table_and_as_latex(made: tuple[Path, str]) -> None:
    folder, _ = made
    title, header, *_ = (folder / "table").read_text(encoding="utf-8").strip().splitlines()[::2]
    assert "toy" in title
    names = header.split()
    assert names.index("Perfect") == names.index("Holdout") + 1
    latex = (folder / "latex").read_text(encoding="utf-8")
    assert r"Method & TRR & ERR & Avg. & Perfect & \#E \\" in latex
    (row,) = (line for line in latex.splitlines() if line.startswith("none & "))
    assert row.removesuffix(r" \\").split(" & ")[4].endswith(f"{last_value(folder, 'none'):.3f}")


def test_it_is_in_the_csv(made: tuple[Path, str]) -> None:
    folder, _ = made
    records = list(csv.DictReader(io.StringIO((folder / "csv").read_text(encoding="utf-8"))))
    found = {record["editor"]: float(record["Perfect_mean"]) for record in records}
    assert found == {editor: last_value(folder, editor) for editor in ("ft", "none")}
    names = list(records[0])
    assert names.index("Perfect_mean") == names.index("Holdout_n") + 1


def test_it_is_in_the_report_as_a_column_and_a_chart(made: tuple[Path, str]) -> None:
    page = (made[0] / "report" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<button [^>]*>Perfect</button>", page)
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    (chart,) = (chart for chart in json.loads(data)["charts"] if chart["title"] == "Perfect")
    assert chart["note"] == "the share of the edited requests whose main score is 1."
    assert sorted(series["y"][-1] for series in chart["series"]) == sorted(
        last_value(made[0], editor) for editor in ("ft", "none")
    )


def test_it_has_a_panel_in_the_figure_of_curves(made: tuple[Path, str]) -> None:
    svg = ET.parse(made[0] / "figures" / "curves-toy.svg")
    texts = ["".join(node.itertext()).strip() for node in svg.iter() if node.tag.endswith("}text")]
    assert "Perfect" in texts


def test_it_is_in_the_progress_line_and_in_the_summary_of_the_run(made: tuple[Path, str]) -> None:
    folder, printed = made
    (line,) = (line for line in printed.splitlines() if line.startswith("none on toy: 3/3"))
    assert line.endswith(f"Perfect {last_value(folder, 'none'):.3f}")
    assert f", Perfect {last_value(folder, 'ft'):.3f}, n_edits " in (folder / "summary").read_text(encoding="utf-8")


def test_it_is_in_an_offline_run_of_wandb(made: tuple[Path, str]) -> None:
    folder, _ = made
    reader: Any = module_at(ROOT / "tests" / "run" / "loggers" / "test_wandb.py", name="wandb_reader")
    (file,) = (folder / "runs" / "none" / "wandb").glob("offline-run-*/run-*.wandb")
    records = list(reader.records_of(file))
    history = [reader.items_of(record.history.item) for record in records if record.HasField("history")]
    values = {row["n_edits"]: row["Perfect"] for row in history if "Perfect" in row}
    assert values == {n: last_value(folder, "none") for n in (1, 2, 3)}
    summaries = [reader.items_of(record.summary.update) for record in records if record.HasField("summary")]
    assert {"final/Perfect": last_value(folder, "none")}.items() <= {
        k: v for s in summaries for k, v in s.items()
    }.items()
