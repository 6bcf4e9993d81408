"""Makes reference runs and compares two sets of them byte by byte; a pure refactoring must leave them equal.

    python scripts/reference_runs.py make FOLDER
    python scripts/reference_runs.py compare BEFORE AFTER

The runs are `none`, `grace` and `ft` on each of the four embedded streams, a run that is interrupted and resumed, a run
with `engine=plain`, and `mend` on atlas-qa. Times, memory and the description of the machine are not compared.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STREAMS = ("atlas-qa", "atlas-drift", "atlas-text", "toy")
EDITORS = ("none", "grace", "ft")
COMMON = ("max_edits=30", "eval_every=10", "max_upstream=100", "checkpoint_every=5", "wandb.mode=disabled")
# The interrupted run is stopped after this many candidates.
STOP_AFTER = 12
# The fields of `result.json` that differ between executions; `files` and `digest` depend on the others.
VARYING = ("cost", "environment", "files", "digest")
VARYING_COST = (
    *("seconds_per_edit_p50", "seconds_per_edit_p95", "edit_seconds", "eval_seconds"),
    *("peak_rss_mb", "peak_gpu_mb"),
)


def make(folder: Path) -> None:
    """Makes the runs in a new folder."""
    folder.mkdir(parents=True)
    stopped = ("stream=atlas-qa", "editor=ft", "out=stopped")
    _grace_bench(folder, "run", "-m", f"stream={','.join(STREAMS)}", f"editor={','.join(EDITORS)}", "out=runs", *COMMON)
    _grace_bench(folder, "run", "stream=atlas-drift", "editor=grace", "engine=plain", "out=plain", *COMMON)
    _grace_bench(folder, "run", "stream=atlas-qa", "editor=mend", "out=mend", *COMMON)
    _interrupt(folder, *stopped)
    _grace_bench(folder, "run", "existing=resume", *stopped, *COMMON)


def compare(before: Path, after: Path) -> list[str]:
    """Returns one line per differing file, with the first difference."""
    runs = {side: _runs(side) for side in (before, after)}
    differences = [f"{run}: only in {before}" for run in runs[before] - runs[after]]
    differences += [f"{run}: only in {after}" for run in runs[after] - runs[before]]
    for run in sorted(runs[before] & runs[after]):
        files = {path.relative_to(side / run) for side in (before, after) for path in (side / run).rglob("*")}
        for name in sorted(files):
            contents = [_content(side / run / name) for side in (before, after)]
            if contents[0] != contents[1]:
                differences.append(f"{run / name}: {_first_difference(*contents)}")
    return differences


def _grace_bench(folder: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "grace_bench", *arguments], cwd=folder, check=True)


def _interrupt(folder: Path, *overrides: str) -> None:
    """Starts a run and interrupts it, as Ctrl-C does, once `STOP_AFTER` candidates are on disk."""
    command = [sys.executable, "-m", "grace_bench", "run", *overrides, *COMMON]
    process = subprocess.Popen(command, cwd=folder)
    while process.poll() is None:
        edits = next((folder / "stopped").rglob("edits.jsonl"), None)
        if edits is not None and edits.read_bytes().count(b"\n") >= STOP_AFTER:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    if process.wait() != 130:
        raise SystemExit(f"{' '.join(command)}: ended before it could be interrupted")


def _runs(folder: Path) -> set[Path]:
    return {path.parent.relative_to(folder) for path in folder.rglob("result.json")}


def _content(path: Path) -> Any:
    """Returns the content of a file to compare: its bytes, or for JSON all fields except times and memory."""
    if not path.is_file():
        return "a folder" if path.is_dir() else "not there"
    if path.name == "result.json":
        record = json.loads(path.read_text(encoding="utf-8"))
        cost = {name: value for name, value in record["cost"].items() if name not in VARYING_COST}
        return {**{name: value for name, value in record.items() if name not in VARYING}, "cost": cost}
    if path.name == "edits.jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    return path.read_bytes()


def _first_difference(one: Any, two: Any) -> str:
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        line = next(i for i in range(len(one)) if one[i] != two[i])
        return f"line {line + 1}: {_first_difference(one[line], two[line])}"
    if isinstance(one, dict) and isinstance(two, dict):
        names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
        return "; ".join(f"{name}: {one.get(name)} → {two.get(name)}" for name in names)
    return f"{len(one)} → {len(two)} bytes" if isinstance(one, bytes) and isinstance(two, bytes) else f"{one} → {two}"


def main(arguments: list[str]) -> int:
    """Runs `make FOLDER` or `compare BEFORE AFTER`; returns 1 if runs differ."""
    if len(arguments) == 2 and arguments[0] == "make":
        make(Path(arguments[1]))
        return 0
    if len(arguments) == 3 and arguments[0] == "compare":
        differences = compare(Path(arguments[1]), Path(arguments[2]))
        print("\n".join(differences) or "equal")
        return 1 if differences else 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
