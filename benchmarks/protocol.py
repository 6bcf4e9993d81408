"""The cost of a whole benchmark: `grace-bench run` from start to end, with the exact and the plain engine.

    OMP_NUM_THREADS=2 python benchmarks/protocol.py

GRACE and fine-tuning make 500 edits of atlas-qa and are evaluated every 50 edits; then GRACE is evaluated after every
edit. The commands run one after another, each in its own process, without W&B. Prints the seconds and their ratios, the
number of candidates on which the engines decided differently, and the largest difference between their metrics.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measure import machine, spread
from rich.console import Console
from rich.table import Table

DECISIONS = ("id", "was_error", "edited", "op", "key", "n_keys", "after_text")
GRACE_BENCH = shutil.which("grace-bench", path=str(Path(sys.executable).parent)) or "grace-bench"


def run(out: Path, settings: Mapping[str, Any]) -> tuple[float, Path]:
    """Runs the command.

    Returns:
        The seconds it took, and the run folder.
    """
    arguments = [f"{name}={value}" for name, value in settings.items()]
    environment = {**os.environ, "WANDB_MODE": "disabled"}
    before = time.perf_counter()
    subprocess.run(
        [GRACE_BENCH, "run", *arguments, f"out={out}", "wandb.mode=disabled"],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    seconds = time.perf_counter() - before
    return seconds, next(out.glob("*/*/*/*/result.json")).parent


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decisions(folder: Path) -> list[tuple[Any, ...]]:
    """Returns the decisions of a run for each candidate."""
    return [tuple(record.get(name) for name in DECISIONS) for record in lines(folder / "edits.jsonl")]


def apart(first: Path, second: Path) -> float:
    """Returns the largest difference between the metrics of two runs."""
    differences = [
        abs(a[name] - b[name])
        for a, b in zip(*(lines(folder / "metrics.jsonl") for folder in (first, second)), strict=True)
        for name in a.keys() & b.keys()
        if isinstance(a[name], int | float) and isinstance(b[name], int | float)
    ]
    return max(differences)


def compare(folders: Sequence[Path]) -> str:
    """Returns a line that says how far two runs agree."""
    pairs = list(zip(*map(decisions, folders), strict=True))
    differing = sum(a != b for a, b in pairs)
    return f"{len(pairs)} candidates, {differing} decided differently; metrics apart by at most {apart(*folders):.1e}"


def main() -> None:
    """Runs the commands and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--editors", nargs="+", default=["grace", "ft"])
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=1, help="runs per command (1)")
    options = parser.parse_args()
    base = {"stream": "atlas-qa", "max_edits": options.edits}
    cases: dict[str, dict[str, Any]] = {}
    for editor in options.editors:
        for engine in ("exact", "plain"):
            cases[f"{editor}, {engine}"] = {**base, "editor": editor, "engine": engine, "eval_every": 50}
    cases["grace, exact, every edit"] = {**base, "editor": "grace", "engine": "exact", "eval_every": 1}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    folders: dict[str, Path] = {}
    print(f"before: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as kept:
        for round_ in range(options.repeats):
            for number, (name, settings) in enumerate(cases.items()):
                taken, folders[name] = run(Path(kept, f"{round_}-{number}"), settings)
                seconds[name].append(taken)
                print(f"{name}: {taken:.1f} s", flush=True)
        print(f"after: {machine()}")
        table = Table(title=f"Seconds of grace-bench run, atlas-qa, {options.edits} edits: median (min-max)")
        for heading in ("editor", "engine", "eval_every", "seconds", "ratio to exact, every 50"):
            table.add_column(heading, justify="left" if heading in {"editor", "engine"} else "right")
        for name, settings in cases.items():
            reference = seconds[f"{settings['editor']}, exact"]
            ratio = sorted(seconds[name])[len(seconds[name]) // 2] / sorted(reference)[len(reference) // 2]
            shown = [str(settings[key]) for key in ("editor", "engine", "eval_every")]
            table.add_row(*shown, spread(seconds[name]), f"{ratio:.2f}")
        Console(width=110).print(table)
        for editor in options.editors:
            print(f"{editor}: {compare([folders[f'{editor}, {engine}'] for engine in ('exact', 'plain')])}")


if __name__ == "__main__":
    main()
