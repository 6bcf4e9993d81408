"""Ten thousand edits in one process: what becomes of memory, open files and the cost of an edit."""

import gc
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
from avalanche.core import BasePlugin

from grace_bench.editors._grace.codebook import Codebook
from grace_bench.registry import EDITORS
from grace_bench.run.resumable import ResumableRun
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule
from grace_bench.streams.jsonl import Jsonl

MOST_HELD = 6
"""What memory may grow by, of what a checkpoint takes on disk: objects are larger than the JSON they are written as."""
LEVEL = 1.5
"""What an edit of the last thousand may cost of one of the second."""
OPTIONS: dict[str, dict[str, Any]] = {
    # Radii so small that every edit makes an entry: a codebook cannot grow faster.
    "grace": {"n_iter": 5, "eps_init": 1e-4, "replacement": "replace_last"},
    # Steps so small that no edit does away with the errors to come.
    "ft": {"n_iter": 5, "lr": 1e-9},
}


@dataclass(frozen=True)
class Sample:
    """A run after so many edits; times are the processor's, in seconds since it began."""

    n_edits: int
    rss: int
    n_files: int
    seconds: float
    lookups: float
    saving: float


class Watch(BasePlugin[Any]):
    """Takes a sample after every so many edits, lookups and checkpoints timed apart."""

    def __init__(self, *, every: int, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.every = every
        self.samples: list[Sample] = []
        self.on_disk = 0
        self._process = psutil.Process()
        self._spent = {"lookups": 0.0, "saving": 0.0}
        self._depth = 0
        for cls, name, kind in (
            (Codebook, "retrieve", "lookups"),
            (Codebook, "contested", "lookups"),
            (Codebook, "settle", "lookups"),
            (ResumableRun, "save", "saving"),
        ):
            monkeypatch.setattr(cls, name, self._timing(getattr(cls, name), kind))

    def _timing(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._spent[kind] += time.process_time() - started
                if kind == "saving":
                    newest = max(args[0]._checkpoints._folder.glob("0*"))
                    self.on_disk = sum(path.stat().st_size for path in newest.iterdir())

        return timed

    def after_candidate(self, strategy: Any, **_: Any) -> None:
        n_edits = strategy.record.n_edits
        if n_edits % self.every == 0 and (not self.samples or self.samples[-1].n_edits < n_edits):
            gc.collect()
            rss, n_files = self._process.memory_info().rss, self._process.num_fds()
            self.samples.append(Sample(n_edits, rss, n_files, time.process_time(), **self._spent))

    def rest(self, one: Sample, two: Sample) -> float:
        """Milliseconds an edit between two samples, lookups and checkpoints left out."""
        spent = two.seconds - one.seconds - (two.lookups - one.lookups) - (two.saving - one.saving)
        return 1000 * spent / (two.n_edits - one.n_edits)

    def rest_of(self, thousand: int) -> float:
        """The median over a thousand edits, of which evaluations are in one part each."""
        within = [sample for sample in self.samples if 1000 * (thousand - 1) <= sample.n_edits <= 1000 * thousand]
        return median(self.rest(one, two) for one, two in pairwise(within))

    def table(self) -> str:
        """Memory, files and milliseconds an edit by thousands of edits."""
        lines = ["| edits | memory, MB | files | ms an edit | lookups | checkpoints | the rest |", f"|{' ---: |' * 7}"]
        some = [sample for sample in self.samples if sample.n_edits % 1000 == 0]
        for one, two in pairwise(some):
            n = (two.n_edits - one.n_edits) / 1000
            parts = [(getattr(two, name) - getattr(one, name)) / n for name in ("seconds", "lookups", "saving")]
            cells = [f"{two.n_edits:,}", f"{two.rss / 2**20:.0f}", str(two.n_files), *(f"{p:.2f}" for p in parts)]
            lines.append(f"| {' | '.join(cells)} | {self.rest(one, two):.2f} |")
        return "\n".join(lines)


def write_points(path: Path, n: int) -> None:
    """Writes n different points, each with the class that the model does not give it."""
    generator = random.Random(0)
    points: dict[str, float] = {}
    while len(points) < n:
        x, y = (round(generator.uniform(-3, 3), 4) for _ in range(2))
        height = y - math.sin(2 * x)
        # Near the border of the classes the model itself errs.
        if abs(height) > 0.3:
            points[f"({x:.4f}, {y:.4f})"] = height
    with path.open("w", encoding="utf-8") as file:
        for number, (prompt, height) in enumerate(points.items()):
            file.write(json.dumps({"id": str(number), "prompt": prompt, "target": int(height <= 0)}) + "\n")


def watched(editor: str, n_edits: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *, every: int) -> Watch:
    write_points(folder / "points.jsonl", n_edits + n_edits // 10)
    watch = Watch(every=every, monkeypatch=monkeypatch)
    result = run_benchmark(
        Jsonl(path=str(folder / "points.jsonl"), task="classification"),
        model="toy",
        editor=lambda **parts: EDITORS.get(editor)(**OPTIONS[editor], **parts),
        settings=RunSettings(schedule=Schedule(max_edits=n_edits, eval_every=n_edits // 10)),
        folder=folder / "run",
        plugins=[watch],
    )
    assert result.metrics["n_edits"] == n_edits
    return watch


def assert_memory_and_files_stay(watch: Watch, *, warm: int, most: float = MOST_HELD) -> None:
    settled = [sample for sample in watch.samples if sample.n_edits >= warm]
    assert len(settled) > 2
    assert len({sample.n_files for sample in settled}) == 1
    first, last = settled[0], settled[-1]
    grown, held = (last.rss - first.rss) / (last.n_edits - first.n_edits), watch.on_disk / last.n_edits
    print(f"memory grows by {grown:.0f} bytes an edit; a checkpoint takes {held:.0f} on disk")
    assert grown <= most * held


def test_over_some_hundred_edits_memory_grows_by_what_is_kept_and_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = watched("grace", 240, tmp_path, monkeypatch, every=40)
    # Over so few edits it shows by how much an allocator asks at once.
    assert_memory_and_files_stay(watch, warm=120, most=4 * MOST_HELD)


@pytest.mark.slow
@pytest.mark.parametrize(("editor", "n_edits"), [("grace", 10_000), ("ft", 4_000)])
def test_over_ten_thousand_edits_memory_grows_by_what_is_kept_files_are_closed_and_an_edit_costs_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, editor: str, n_edits: int
) -> None:
    watch = watched(editor, n_edits, tmp_path, monkeypatch, every=100)
    print(f"\n{editor}\n{watch.table()}")
    assert_memory_and_files_stay(watch, warm=1000)
    early, late = watch.rest_of(2), watch.rest_of(n_edits // 1000)
    print(f"the rest, medians: {early:.2f} ms in the second thousand, {late:.2f} in the last")
    assert late <= LEVEL * early
