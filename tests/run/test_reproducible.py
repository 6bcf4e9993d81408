"""One configuration and seed, one result: whoever computes it, in which batches, and however often it is evaluated."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_bench.cli import main
from grace_bench.registry import EDITORS
from grace_bench.results.schema import RunResult
from grace_bench.run.settings import Schedule
from helpers import read_lines

DECISIONS = ("index", "id", "was_error", "edited", "n_edits", "op", "key", "n_keys", "failed")
SCORE, LOSS = 1e-4, 1e-3

RunFacts = Callable[..., RunResult]
OTHERS: dict[str, dict[str, Any]] = {
    "batches-of-three": {"batch_size": 3},
    "evaluated-after-every-edit": {"schedule": Schedule(eval_every=1, max_edits=4)},
}
each_editor = pytest.mark.parametrize("editor", list(EDITORS.entries()))


def timeless(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for what it cost and how it was started."""
    result = json.loads((folder / "result.json").read_bytes())
    for name in ("cost", "files", "digest"):
        del result[name]
    del result["environment"]["command"]
    names = ("metrics.jsonl", "predictions.parquet", "editor/editor.json", "editor/editor.safetensors")
    return {
        "result.json": result,
        "edits.jsonl": [json.dumps({**line, "seconds": None}) for line in read_lines(folder / "edits.jsonl")],
        **{name: (folder / name).read_bytes() for name in names},
    }


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart: the largest absolute difference of scores and of losses and distances."""

    scores: float
    losses: float


def difference(one: Path, other: Path) -> Difference:
    """Compares two runs that must have decided the same, at the evaluations that both have."""
    pairs = list(zip(read_lines(one / "edits.jsonl"), read_lines(other / "edits.jsonl"), strict=True))
    for a, b in pairs:
        assert {name: a[name] for name in DECISIONS} == {name: b[name] for name in DECISIONS}
    measured = [{line["n_edits"]: line for line in read_lines(folder / "metrics.jsonl")} for folder in (one, other)]
    common = measured[0].keys() & measured[1].keys()
    assert {0, max(measured[0])} <= common
    return Difference(
        scores=max(
            *(gap(a, b) for n in common for a, b in named(measured[0][n], measured[1][n])),
            *(gap(a[name], b[name]) for a, b in pairs for name in ("score_before", "score_after")),
        ),
        losses=max(gap(a[name], b[name]) for a, b in pairs for name in ("loss", "distance")),
    )


def named(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[Any, Any]]:
    assert one.keys() == other.keys()
    return [(value, other[name]) for name, value in one.items()]


def gap(one: float | None, other: float | None) -> float:
    assert (one is None) == (other is None)
    return 0.0 if one is None or other is None else abs(one - other)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of the runs that others are compared with, by editor, as tests come to need them."""
    return {editor: tmp_path_factory.mktemp(editor) / "run" for editor in EDITORS.entries()}


@pytest.fixture
def run_editor(run_facts: RunFacts, done: dict[str, Path]) -> Callable[..., None]:
    """Runs an editor in a folder, and once as it is."""

    def run(folder: Path, editor: str, **options: Any) -> None:
        common = {
            "editor": editor,
            "task": EDITORS.get(editor).supported_tasks[0],
            "checkpoint_every": 1000,
            "schedule": Schedule(eval_every=3, max_edits=4),
            "n_requests": 4,
        }
        if not done[editor].exists():
            run_facts(done[editor], **common)
        run_facts(folder, **{**common, **options})

    return run


@each_editor
def test_the_same_configuration_and_seed_give_the_same_files(
    tmp_path: Path, run_editor: Callable[..., None], done: dict[str, Path], editor: str
) -> None:
    # Whatever the process did before.
    torch.manual_seed(hash(editor) % 1000)
    run_editor(tmp_path / "again", editor)
    expected = timeless(done[editor])
    assert any(json.loads(line)["edited"] for line in expected["edits.jsonl"])
    assert timeless(tmp_path / "again") == expected


@pytest.mark.parametrize(
    ("editor", "other"),
    # A quarter of the pairs is a share of every other editor.
    [
        pytest.param(editor, other, id=f"{editor}-{name}", marks=() if (i + 2 * j) % 4 == 0 else pytest.mark.slow)
        for i, editor in enumerate(EDITORS.entries())
        for j, (name, other) in enumerate(OTHERS.items())
    ],
)
def test_another_batch_size_or_evaluation_frequency_decides_the_same_and_scores_within_the_bounds(
    tmp_path: Path, run_editor: Callable[..., None], done: dict[str, Path], editor: str, other: dict[str, Any]
) -> None:
    run_editor(tmp_path / "other", editor, **other)
    found = difference(done[editor], tmp_path / "other")
    assert found.scores <= SCORE
    assert found.losses <= LOSS


def test_a_run_leaves_the_next_one_of_its_process_the_threads_it_found(tmp_path: Path, run_facts: RunFacts) -> None:
    # A tiny model chooses one; a larger one after it takes as many as it would have taken before.
    torch.set_num_threads(2)
    run_facts(tmp_path, editor="none", task="classification")
    assert torch.get_num_threads() == 2


@pytest.mark.slow
def test_neither_the_folder_of_the_process_nor_its_hash_seed_shows_in_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["stream=toy", "editor=ft_retrain", "seed=3", "max_edits=5", "eval_every=3", "max_upstream=20"]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "grace_bench", "run", *options, "wandb.mode=disabled", f"out={tmp_path / 'one'}"],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Pacific/Auckland"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    assert main(["run", *options, "wandb.mode=disabled", "out=two"]) == 0
    one, two = (path.parent for out in ("one", "two") for path in (tmp_path / out).rglob("result.json"))
    assert one.relative_to(tmp_path / "one") == two.relative_to(tmp_path / "two")
    assert timeless(one) == timeless(two)


LONG = ("max_edits=30", "eval_every=10", "wandb.mode=disabled")
LONG_STREAMS = {"qa": "atlas-qa", "language_modelling": "atlas-text", "classification": "toy"}


@pytest.mark.slow
@each_editor
def test_over_thirty_edits_only_rounding_tells_batches_and_evaluation_frequencies_apart(
    tmp_path: Path, editor: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Prints a row of the table in docs/reliability.md."""
    cls = EDITORS.get(editor)
    fitting = (name for task, name in LONG_STREAMS.items() if task in cls.supported_tasks)
    # Where the networks of all editors ship that need some.
    stream = "atlas-facts" if cls.needs_meta_training else next(fitting)

    def run(name: str, *options: str) -> Path:
        out = tmp_path / name
        assert main(["run", f"stream={stream}", f"editor={editor}", *LONG, *options, f"out={out}"]) == 0
        (path,) = out.rglob("result.json")
        return path.parent

    whole = run("whole")
    again, expected = timeless(run("again")), timeless(whole)
    assert again == expected
    found = {
        name: difference(whole, run(name, option))
        for name, option in (("batches of five", "batch_size=5"), ("every five edits", "eval_every=5"))
    }
    n_edits = expected["result.json"]["metrics"]["n_edits"]
    with capfd.disabled():
        figures = " | ".join(f"{part.scores:.1e} | {part.losses:.1e}" for part in found.values())
        print(f"\n| {editor} | {stream} | {n_edits:.0f} | all | {figures} |")
    for part in found.values():
        assert part.scores <= SCORE
        assert part.losses <= LOSS
