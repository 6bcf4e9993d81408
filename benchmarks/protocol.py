"""The cost of a whole benchmark: `grace-bench run` from start to end, with the exact and the plain engine.

    OMP_NUM_THREADS=1 python benchmarks/protocol.py
    OMP_NUM_THREADS=1 python benchmarks/protocol.py --protocol wise --out FOLDER
    OMP_NUM_THREADS=1 python benchmarks/protocol.py --protocol alphaedit --edits 200 --editors grace memit

- `errors`: atlas-qa, where only errors are edited, evaluated every 50 edits; GRACE also after every edit;
- `wise`: atlas-facts, where every request is edited, one at a time, and evaluated at the end;
- `alphaedit`: atlas-facts, where every request is edited, 50 at once, and evaluated at the end.

The commands run one after another, each in its own process, without W&B, with the settings tuned for the stream. What
is measured is the time by the clock and the processor time of the process and its children. Printed with it are the
candidates on which the engines decided differently, and the largest difference between their metrics. With `--out`,
finished runs are kept there, and the same command resumes: only what is missing runs.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from _measure import machine, spread
from rich.console import Console
from rich.table import Table

DECISIONS = ("id", "was_error", "edited", "op", "key", "n_keys", "after_text")
ENGINES = ("exact", "plain")
PROTOCOLS: dict[str, dict[str, Any]] = {
    "errors": {"stream": "atlas-qa", "eval_every": 50},
    "wise": {"stream": "atlas-facts", "edit": "all"},
    "alphaedit": {"stream": "atlas-facts", "edit": "all", "edits_at_once": 50},
}
EDITORS = {
    "errors": ("grace", "ft"),
    "wise": ("none", "grace", "ft", "memit", "alphaedit", "ultraedit", "retrieve", "melo"),
    "alphaedit": ("none", "grace", "ft", "memit", "alphaedit", "ultraedit", "retrieve", "melo"),
}


def run(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the command, unless `out` has what an earlier one measured.

    Returns:
        The seconds by the clock, those of the processor, the load average before, and the run folder.
    """
    known = out / "measured.json"
    if known.exists():
        return dict(json.loads(known.read_text(encoding="utf-8")))
    # A resumed run would not show what a whole one takes.
    shutil.rmtree(out, ignore_errors=True)
    arguments = [f"{name}={value}" for name, value in settings.items()]
    load, before, started = os.getloadavg()[0], processor(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "grace_bench", "run", *arguments, f"out={out}", "wandb.mode=disabled"],
        env={**os.environ, "WANDB_MODE": "disabled"},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    measured = {
        "seconds": time.perf_counter() - started,
        "processor": processor() - before,
        "load": load,
        "folder": str(next(out.glob("*/*/*/*/result.json")).parent),
    }
    known.write_text(json.dumps(measured), encoding="utf-8")
    return measured


def processor() -> float:
    """Returns the seconds that the processor has spent on children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def lines(path: Path) -> list[dict[str, Any]]:
    """Returns the records of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def decisions(folder: Path) -> list[tuple[Any, ...]]:
    """Returns the decisions of a run for each candidate; there are none if nothing was edited."""
    path = folder / "edits.jsonl"
    return [tuple(record.get(name) for name in DECISIONS) for record in lines(path)] if path.exists() else []


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
    parser.add_argument("--protocol", default="errors", choices=list(PROTOCOLS))
    parser.add_argument("--editors", nargs="+", help="by default those that EDITORS names for the protocol")
    parser.add_argument("--edits", type=int, default=50, help="edits in a run (50)")
    parser.add_argument("--repeats", type=int, default=1, help="runs per command (1)")
    parser.add_argument("--out", type=Path, help="keeps finished runs in this folder, and goes on from them")
    options = parser.parse_args()
    base = {**PROTOCOLS[options.protocol], "max_edits": options.edits}
    base.setdefault("eval_every", options.edits)
    editors = options.editors or EDITORS[options.protocol]
    cases: dict[str, dict[str, Any]] = {}
    for editor in editors:
        for engine in ENGINES:
            cases[f"{editor}, {engine}"] = {**base, "editor": editor, "engine": engine}
    if options.protocol == "errors" and "grace" in editors:
        cases["grace, exact, every edit"] = {**base, "editor": "grace", "engine": "exact", "eval_every": 1}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in cases}
    print(f"before: {machine()}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        kept = options.out or Path(temporary)
        for round_ in range(options.repeats):
            for name, settings in cases.items():
                folder = f"{options.protocol}-{options.edits}-{round_}-{name.replace(', ', '-').replace(' ', '-')}"
                measured[name].append(run(kept / folder, settings))
                latest = measured[name][-1]
                print(
                    f"{name}: {latest['seconds']:.1f} s, processor {latest['processor']:.1f} s, "
                    f"load {latest['load']:.1f}",
                    flush=True,
                )
        print(f"after: {machine()}")
        table = Table(title=f"Seconds of grace-bench run, {options.protocol}, {options.edits} edits: median (min-max)")
        for heading in ("editor", "engine", "eval_every", "seconds", "processor", "processor / exact", "load"):
            table.add_column(heading, justify="left" if heading in {"editor", "engine"} else "right")
        for name, settings in cases.items():
            taken, reference = (
                [one["processor"] for one in measured[case]] for case in (name, f"{settings['editor']}, exact")
            )
            table.add_row(
                *(str(settings[key]) for key in ("editor", "engine", "eval_every")),
                spread([one["seconds"] for one in measured[name]]),
                spread(taken),
                f"{median(taken) / median(reference):.2f}",
                spread([one["load"] for one in measured[name]]),
            )
        Console(width=120).print(table)
        for editor in editors:
            folders = [Path(measured[f"{editor}, {engine}"][-1]["folder"]) for engine in ENGINES]
            print(f"{editor}: {compare(folders)}")


if __name__ == "__main__":
    main()
