"""Broken input by the hundred: a line that says what is wrong, or a skip that is counted, and nothing is changed."""

import contextlib
import hashlib
import io
import os
import random
import shutil
import signal
import stat
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import pytest

from grace_bench.cli import main

SECONDS = 20
"""No case may take longer."""
LONGEST_LINE = 1000
COUNTED = ("left out", "dropped", "retried", "set aside", "not compared", "could not", "without")


class TimedOutError(BaseException):
    """Not an Exception, so that nothing on its way takes it for a mistake."""


@dataclass(frozen=True)
class Ending:
    code: int | None
    out: str
    err: str
    error: str
    seconds: float


def carry_out(command: tuple[str, ...]) -> Ending:
    def stop(*_: object) -> None:
        raise TimedOutError

    out, err, error, code = io.StringIO(), io.StringIO(), "", None
    before = signal.signal(signal.SIGALRM, stop)
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
    except BaseException:
        error = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return Ending(code, out.getvalue(), err.getvalue(), error, time.perf_counter() - started)


def snapshot(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        regular = stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IRUSR
        found[str(path)] = (status.st_mode, hashlib.sha256(path.read_bytes()).digest() if regular else None)
    return found


def judge(case: corpus.Case, folder: Path) -> tuple[str, str]:
    """Carries a case out; returns how it ended, and what is wrong with that."""
    ask = case.arrange(folder)
    before = snapshot(ask.given)
    ending = carry_out(ask.command)
    after = snapshot(ask.given)
    said = [line for line in ending.err.splitlines() if line.startswith("grace-bench: ")]
    if "TimedOutError" in ending.error:
        return "hang", ending.error
    if ending.error:
        return "traceback", ending.error
    if ending.code in (1, 2):
        if before != after:
            return "changed", "\n".join(sorted(set(map(str, before.items())) ^ set(map(str, after.items()))))
        if len(said) != 1 or not ending.err.endswith(said[0] + "\n"):
            return "not one line", ending.err
        if not all(name in said[0] for name in ask.names):
            return "does not name it", f"{said[0]}\n{ask.names}"
        if len(said[0]) > LONGEST_LINE:
            return "too long", said[0][:LONGEST_LINE]
        return "message", said[0]
    if before != after and not ask.goes_on:
        return "changed", "\n".join(sorted(set(map(str, before.items())) ^ set(map(str, after.items()))))
    if any(word in ending.out + ending.err for word in COUNTED):
        return "skip", ending.out
    return ("valid" if case.may_be_valid else "accepted"), ending.out


if __name__ == "__main__":
    import tempfile

    data = Path(os.environ["DATA"])
    import grace_bench.streams

    bases = corpus.Bases(Path("/tmp/w/corpus-base/runs"), next(Path("/tmp/w/corpus-base/stopped").glob("*/*/*/*")), {p.name: p for p in (Path(next(iter(grace_bench.streams.__path__))) / "checkpoints").iterdir()}, data)
    cases = corpus.corpus(bases)
    chosen = [c for c in cases if len(sys.argv) < 2 or sys.argv[1] in c.name]
    print(len(cases), len(chosen))
    counts: Counter[Any] = Counter()
    for case in chosen:
        with tempfile.TemporaryDirectory(dir="/tmp/w", prefix="corpus-case") as folder:
            how, why = judge(case, Path(folder))
        counts[how] += 1
        good = how in ("message", "skip", "valid")
        print("ok " if good else "BAD", how, "|", case.name, "|", why if not good else why[-300:].replace("\n", " "), flush=True)
    print(counts)
