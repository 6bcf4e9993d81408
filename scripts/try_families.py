"""Tries the harness on a tiny random model of every class of the installed transformers, and records what happened.

    python scripts/try_families.py [NAME ...] [--out FILE] [--page docs/models.md]

A NAME such as `causal-llama`, or a part of one, restricts the classes. `--out` appends a JSON line for each class, and
skips the classes that the file already has. `--page` writes the table of the page from that file. The tiny models and
the checks are those of `tests/models/families.py`, so a checkout is needed. Exit code 1: a check crashed, or two ways
of computing the same answer disagreed.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = "<!-- The rest is written by scripts/try_families.py. -->"
KINDS = {"causal": "Causal", "seq2seq": "Seq2seq", "classification": "Classification"}


def main() -> int:
    """Tries the classes asked for, and prints a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="names or parts of names, such as llama or seq2seq-")
    parser.add_argument("--out", type=Path, help="a file of JSON lines; classes that it has are skipped")
    parser.add_argument("--page", type=Path, help="the page whose table is written from --out")
    parser.add_argument("--seconds", type=int, default=60, help="maximum time of one check, in seconds of computing")
    asked = parser.parse_args()
    if asked.page and not asked.out:
        parser.error("--page needs --out")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    families = load_families()
    reports = read(asked.out) if asked.out else {}
    for family in families.families():
        if family.name in reports or (asked.names and not any(name in family.name for name in asked.names)):
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="family-") as folder:
            report = vars(families.check_family(family, Path(folder), seconds=asked.seconds))
        reports[family.name] = report
        if asked.out:
            with asked.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(report) + "\n")
        print(f"{family.name} ({time.perf_counter() - start:.1f} s): {told(report)}", flush=True)
    if asked.page:
        text = asked.page.read_text(encoding="utf-8").partition(MARKER)[0]
        versions = f"transformers {transformers.__version__} and torch {torch.__version__.partition('+')[0]}"
        asked.page.write_text(f"{text}{MARKER}\n\n{table(reports.values(), versions)}", encoding="utf-8")
    return int(any(state(report) in ("differs", "crash") for report in reports.values()))


def load_families() -> ModuleType:
    """Returns the module with the tiny models, which is not part of the package."""
    place = REPOSITORY / "tests" / "models" / "families.py"
    spec = importlib.util.spec_from_file_location("families", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families"] = module
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the reports in a file of JSON lines by the name of the family; none if there is no such file."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["family"]: row for row in rows}


def state(report: Mapping[str, Any]) -> str:
    """Returns `no model`, or the worst outcome of the checks: `crash`, `differs`, `fails`, `refused` or `ok`."""
    if report["not_made"] is not None:
        return "no model"
    states = {said.partition(":")[0].partition(",")[0] for said in report["outcomes"].values()}
    return next(state for state in ("crash", "differs", "fails", "refused", "ok") if state in states)


def told(report: Mapping[str, Any]) -> str:
    """Returns what happened to a family, in one line."""
    if report["not_made"] is not None:
        return f"no tiny model: {report['not_made']}"
    notable = [f"{check}: {said}" for check, said in report["outcomes"].items() if said != "ok"]
    return "; ".join(notable) or "ok"


def table(reports: Iterable[Mapping[str, Any]], versions: str) -> str:
    """Returns the tables of the page as Markdown."""
    by_kind: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for report in reports:
        by_kind[report["family"].partition("-")[0]].append(report)
    columns = ("ok", "refused", "fails", "differs", "crash", "no model")
    lines = [
        f"As of {date.today():%-d %B %Y}, with {versions}:",
        "",
        f"| | classes | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 2)}",
    ]
    for kind, title in KINDS.items():
        states = [state(report) for report in by_kind[kind]]
        lines.append(f"| {title} | {len(states)} | {' | '.join(str(states.count(name)) for name in columns)} |")
    for kind, title in KINDS.items():
        works = sorted(_type_of(report) for report in by_kind[kind] if state(report) == "ok")
        if works:
            lines += ["", f"**{title}, ok:** {', '.join(works)}"]
    lines += ["", "The others, with the checks that were not ok:", "", "| class | what happened |", "|---|---|"]
    for what, types in _others(by_kind):
        lines.append(f"| {', '.join(types)} | {what} |")
    return "\n".join(lines) + "\n"


def _others(by_kind: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, list[str]]]:
    """What happened to families that are not ok, and the families that it happened to."""
    groups: dict[str, list[str]] = defaultdict(list)
    for kind in KINDS:
        for report in sorted(by_kind[kind], key=_type_of):
            if state(report) != "ok":
                what = told(report).replace(report["family"], "MODEL").replace("|", "\\|")
                groups[what].append(report["family"])
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def _type_of(report: Mapping[str, Any]) -> str:
    return str(report["family"]).partition("-")[2]


if __name__ == "__main__":
    sys.exit(main())
