"""What the terminal and a log hear of a run: a bar that ends full, or one readable line an evaluation."""

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.data.stream import EditStream, StreamData
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loggers.progress import ProgressLogger


def grace(**parts: Any) -> EditorStrategy:
    editor: EditorStrategy = EDITORS.get("grace")(replacement="replace_last", eps_init=0.3, n_iter=30, **parts)
    return editor


class Evaluations(RunLogger):
    """Notes candidates and edits at every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.n_candidates = 0
        self.seen: list[tuple[int, int]] = []

    def after_candidate(self, strategy: EditorStrategy, metric_values: Any) -> None:
        self.n_candidates += 1

    def after_eval(self, strategy: EditorStrategy, metric_values: Any) -> None:
        self.seen.append((self.n_candidates, strategy.n_edits))


def short(*, turned: int = 6, known: int = 0) -> EditStream:
    """The toy stream cut to a few points that turned, and after them a few the model already answers."""
    whole = STREAMS.get("toy")().load()

    class Short(STREAMS.get("toy")):  # type: ignore[misc]
        def load(self) -> StreamData:
            return StreamData(edits=(*whole.edits[:turned], *whole.upstream[:known]), upstream=whole.upstream[:10])

    stream: EditStream = Short()
    return stream


def run(console: Console, stream: EditStream, editor: Any = "none", **schedule: Any) -> Evaluations:
    evaluations = Evaluations()
    run_benchmark(
        stream,
        model="toy",
        editor=editor,
        settings=RunSettings(schedule=Schedule(**{"eval_every": 2, **schedule})),
        loggers=[ProgressLogger(console), evaluations],
    )
    return evaluations


SCHEDULES = pytest.mark.parametrize(
    "schedule",
    [{"max_edits": 3}, {"max_edits": 6}, {"max_edits": 50}, {}, {"eval_every": 1}, {"eval_every": 50}],
    ids=str,
)


@SCHEDULES
@pytest.mark.parametrize("editor", ["none", grace], ids=["none", "grace"])
def test_a_log_gets_one_plain_line_an_evaluation(schedule: dict[str, int], editor: Any) -> None:
    file = io.StringIO()
    evaluations = run(Console(file=file, width=40), short(), editor, **schedule)
    text = file.getvalue()
    assert text.endswith("\n")
    assert not set("\x1b\r\b") & set(text)
    lines = text.splitlines()
    assert len(lines) == len(evaluations.seen)
    total = schedule.get("max_edits", 6)
    for line, (n_candidates, n_edits) in zip(lines, evaluations.seen, strict=True):
        found = re.fullmatch(r"\w+ on toy: (\d+)/(\d+), (\d+) edits, (.*)", line)
        assert found is not None, line
        done = n_edits if "max_edits" in schedule else n_candidates
        assert [int(number) for number in found.groups()[:3]] == [done, total, n_edits]
        over = n_candidates == 6 or n_edits == schedule.get("max_edits")
        assert ("left" in line) == (n_candidates > 0 and not over), "no time is left after the last candidate"
        assert re.search(r"TRR [01]\.\d{3}", line)
        assert ("ERR" in line) == (n_edits > 0)
        assert ("keys" in line) == (editor is grace)


@pytest.mark.parametrize("known", [0, 3])
@pytest.mark.parametrize("schedule", [{"max_edits": 50}, {}], ids=str)
def test_no_time_is_left_when_the_stream_has_ended(schedule: dict[str, int], known: int) -> None:
    file = io.StringIO()
    run(Console(file=file), short(turned=3, known=known), **schedule)
    last = file.getvalue().splitlines()[-1]
    assert "3 edits" in last
    assert "left" not in last


STREAMS_OF_ALL_KINDS: dict[str, Callable[[], EditStream]] = {
    "all edited": lambda: short(turned=4),
    "some edited": lambda: short(turned=3, known=3),
    "none edited": lambda: short(turned=0, known=3),
}


@pytest.mark.parametrize("stream", STREAMS_OF_ALL_KINDS)
@pytest.mark.parametrize("schedule", [{"max_edits": 2}, {"max_edits": 50}, {}], ids=str)
def test_the_bar_of_a_finished_run_ends_full(stream: str, schedule: dict[str, int]) -> None:
    file = io.StringIO()
    # Without colours, what is still to be done is left blank rather than drawn in another one.
    console = Console(file=file, force_terminal=True, color_system=None, width=120, legacy_windows=False)
    run(console, STREAMS_OF_ALL_KINDS[stream](), **schedule)
    frames = [frame for frame in re.split(r"[\r\n]+", file.getvalue()) if " on toy" in frame]
    assert "scoring the unedited model" in frames[0]
    last = frames[-1]
    done = re.search(r"(\d+)/(\d+)", last)
    assert done is not None, last
    assert done[1] == done[2], last
    assert "━" * 40 in last


def test_a_run_that_fails_leaves_the_bar_where_it_was() -> None:
    class Breaking(EDITORS.get("none")):  # type: ignore[misc]
        def edit(self, batch: Any) -> Any:
            if self.n_edits == 2:
                raise MemoryError
            return super().edit(batch)

    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=None, width=120, legacy_windows=False)
    with pytest.raises(MemoryError):
        run(console, short(), Breaking)
    frames = [frame for frame in re.split(r"[\r\n]+", file.getvalue()) if " on toy" in frame]
    assert "2/6" in frames[-1]
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l"), "the cursor is shown again"


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_what_it_tells(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "grace_bench", "run", "stream=toy", "editor=none", "max_edits=3", "eval_every=1"]
    done = subprocess.run([*command, "wandb.mode=disabled", f"out={tmp_path}"], stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.returncode == 0
    assert b"none on toy: TRR" in done.stdout
    assert len(list(tmp_path.rglob("result.json"))) == 1


def test_a_reader_that_has_read_enough_is_no_failure() -> None:
    listing = subprocess.Popen([sys.executable, "-m", "grace_bench", "list"], stdout=subprocess.PIPE)
    assert listing.stdout is not None
    listing.stdout.close()
    assert listing.wait(timeout=60) == 0
