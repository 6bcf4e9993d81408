"""Memory that `grace-bench plan` foresees, against what the run takes: `python benchmarks/memory.py MODEL TEXT STREAM`.

MODEL is a folder of a causal language model, TEXT a file of running text for second moments, and STREAM a JSONL file of
CounterFact. Plan and run are processes of their own, and the peak is the kernel's (`ru_maxrss`).
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from _measure import machine

SETTINGS = {
    "grace, float32": ["editor=grace"],
    "alphaedit, 5 layers, float32": ["editor=alphaedit", "editor.threshold_unit=largest", "edits_at_once=2"],
    "memit, 5 layers, bfloat16": ["editor=memit", "dtype=bfloat16", "edits_at_once=2"],
}


def main() -> None:
    """Prints a row of docs/plan.md for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("stream", type=Path)
    parser.add_argument("--edits", type=int, default=4)
    parser.add_argument(
        "--layers", default="[" + ",".join(f"model.layers.{n}.mlp.down_proj" for n in range(4, 9)) + "]"
    )
    given = parser.parse_args()
    common = [
        "stream=counterfact",
        f"stream.path={given.stream.resolve()}",
        "stream.max_new_tokens=4",
        f"model={given.model}",
        f"max_edits={given.edits}",
        "max_upstream=8",
        "edit=all",
        "wandb.mode=disabled",
    ]
    print(machine())
    for name, own in SETTINGS.items():
        options = [*common, *own]
        if "edits_at_once=2" in own:
            options += [f"editor.layers={given.layers}", f"editor.text_path={given.text.resolve()}", "editor.n_iter=5"]
        with TemporaryDirectory() as folder:
            # Each has a cache of its own, so that both compute the second moments.
            said, _ = _measured("plan", options, Path(folder) / "plan")
            _, taken = _measured("run", [*options, f"out={folder}/runs"], Path(folder) / "run")
        planned = float(re.search(r"([\d,]+) MB of memory", said)[1].replace(",", ""))
        factor = max(planned / taken, taken / planned)
        print(f"| {name} | {planned:,.0f} MB | {taken:,.0f} MB | {factor:.2f} |", flush=True)
        print(next(line for line in said.splitlines() if line.startswith("memory: ")), flush=True)


def _measured(command: str, options: list[str], cache: Path) -> tuple[str, float]:
    """What a command prints, and the peak of its memory in MB."""
    process = subprocess.Popen(
        [sys.executable, "-m", "grace_bench", command, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRACE_BENCH_CACHE": str(cache)},
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} {' '.join(options)} failed")
    return said, usage.ru_maxrss / 1024


if __name__ == "__main__":
    main()
