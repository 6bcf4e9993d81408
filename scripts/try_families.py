"""Tries the harness on a tiny random model of every class of the installed transformers, and writes what happened.

    python scripts/try_families.py [NAME ...] [--out FILE] [--table]

A NAME such as `causal-llama`, or a part of one, restricts the classes. `--out` appends a JSON line a class; classes that
the file already has are not tried again. `--table` prints the table of docs/models.md from that file. Needs a checkout,
since the tiny models are those of the tests.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]


def main() -> int:
    """Tries the classes and prints a line for each; exit code 1 if one crashed, or two ways of computing differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names, such as llama or seq2seq-")
    parser.add_argument("--out", type=Path, help="a file of JSON lines")
    parser.add_argument("--seconds", type=int, default=60, help="the longest that one check may take")
    asked = parser.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    families = load_families()
    known = read(asked.out) if asked.out else {}
    n_faults = 0
    for family in families.families():
        if family.name in known or (asked.names and not any(name in family.name for name in asked.names)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="family-") as folder:
            report = families.check_family(family, Path(folder), seconds=asked.seconds)
        n_faults += bool(report.faults)
        row = {**vars(report), "seconds": round(time.perf_counter() - start, 1)}
        if asked.out:
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        said = report.not_made and f"cannot be made: {report.not_made}"
        print(f"{family.name} ({row['seconds']} s): {said or '; '.join(report.faults) or 'ok'}", flush=True)
    return int(n_faults > 0)


def load_families() -> ModuleType:
    """Imports the tiny models of the tests, which are not part of the package."""
    place = REPOSITORY / "tests" / "models" / "families.py"
    spec = importlib.util.spec_from_file_location("families", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict[str, dict]:
    """Returns the reports of a file by family; none if there is no such file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["family"]: row for row in rows}


if __name__ == "__main__":
    sys.exit(main())
