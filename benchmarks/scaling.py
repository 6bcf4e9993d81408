"""The cost of an edit in a long stream: around the 100th and around the 10,000th edit of one run of GRACE.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

The run edits the T5 that ships with atlas-qa on 10,000 different questions, with five steps per edit, so that the
harness takes more of the time than training; it is evaluated only at the start and at the end. The cost of an edit is
the time from one record to the next: scoring before and after, editing, metrics and files. Up to 32 pending edits are
completed together, so the cost is averaged over windows of 160 records. Lookups, the part that may grow, are the time
spent inside the codebook.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _measure import machine, spread
from rich.console import Console
from rich.table import Table

from grace_bench.data.avalanche import BasePlugin
from grace_bench.editors import Grace
from grace_bench.editors._grace.codebook import Codebook
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule
from grace_bench.streams.jsonl import Jsonl

WINDOW = 160
MILLI = 1e-3
COUNTRIES = ("Peru", "Italy", "France", "Kazakhstan", "Japan", "Kenya", "Norway", "Chile")
PLACES = ("river", "lake", "tower", "bridge", "garden", "square", "museum", "station")


class Clock(BasePlugin[Any]):
    """Records when each candidate's record was complete, and the total time spent in the codebook by then."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []
        self.lookups: list[float] = []
        self.spent = 0.0
        self._depth = 0

    def after_candidate(self, strategy: Any, **_: Any) -> None:
        """Records both times."""
        self.times.append(time.perf_counter())
        self.lookups.append(self.spent)

    def timing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a function so that its time counts as lookups."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            before = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.spent += time.perf_counter() - before

        return timed

    def window(self, end: int) -> tuple[float, float]:
        """Returns seconds per edit, and per edit's lookups, averaged over the window that ends at record `end`."""
        first, last = max(0, end - WINDOW), end - 1
        n = last - first
        return (self.times[last] - self.times[first]) / n, (self.lookups[last] - self.lookups[first]) / n


def write_requests(path: Path, n: int) -> None:
    """Writes n distinct questions to a JSONL file."""
    generator = random.Random(0)
    prompts: dict[str, None] = {}
    while len(prompts) < n:
        place, country = generator.choice(PLACES), generator.choice(COUNTRIES)
        prompts[f"What is the name of {place} {generator.randrange(10**6)} in {country}?"] = None
    with path.open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            record = {"id": str(number), "prompt": prompt, "target": generator.choice(COUNTRIES)}
            file.write(json.dumps(record) + "\n")


def main() -> None:
    """Runs the stream and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3, help="windows per row (3)")
    options = parser.parse_args()
    print(f"before: {machine()}")
    clock = Clock()
    for name in ("retrieve", "contested", "settle"):
        setattr(Codebook, name, clock.timing(getattr(Codebook, name)))
    settings = RunSettings(schedule=Schedule(max_edits=options.edits, eval_every=options.edits + 1))
    with TemporaryDirectory() as folder:
        path = Path(folder, "requests.jsonl")
        write_requests(path, options.edits + 64)
        run_benchmark(
            Jsonl(path=str(path), task="qa", max_new_tokens=4),
            model="atlas-qa",
            editor=lambda **parts: Grace(n_iter=5, eps_init=1e-4, **parts),
            settings=settings,
            folder=Path(folder, "run"),
            plugins=[clock],
        )
    print(f"after: {machine()}")
    table = Table(title="Milliseconds per edit, median of windows (min-max)")
    for heading in ("edits", "per edit", "lookups", "other"):
        table.add_column(heading, justify="right")
    ends = [100, 1_000, options.edits // 2, options.edits - (options.repeats - 1) * WINDOW]
    for end in sorted({end for end in ends if end <= options.edits}):
        windows = [clock.window(end + number * WINDOW) for number in range(options.repeats)]
        rest = [whole - lookup for whole, lookup in windows]
        columns = [[whole for whole, _ in windows], [lookup for _, lookup in windows], rest]
        table.add_row(f"{end:,}", *(spread(column, unit=MILLI) for column in columns))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
