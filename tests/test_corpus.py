"""Broken input by the hundred: one line that says what is wrong, or a skip that is counted, and nothing is changed."""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import grace_bench.streams
from grace_bench.cli import main
from grace_bench.editors import Grace
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from helpers import module_at

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
SECONDS = 20
"""No case may take longer, on a busy machine."""
LONGEST_LINE = 1000
DRAWN = 1000
IN_CI = 15
AS_PROCESSES = 12
TOLD = ("left out", "dropped", "retried, after it failed", "not compared")
"""What is said where something is passed over and counted."""
RUN = ("stream=toy", "max_edits=4", "eval_every=2", "max_upstream=20", "wandb.mode=disabled")
STOPPED = (
    *RUN[:1],
    "max_edits=12",
    "eval_every=5",
    *RUN[3:],
    "checkpoint_every=2",
    "editor=grace",
    "editor.n_iter=200",
)


# Tests are imported one by one, so that a module beside them is no package's.
corpus = module_at(Path(__file__).with_name("corpus.py"))


class TimedOutError(BaseException):
    """Not an Exception, so that nothing on its way takes it for a mistake."""


@dataclass(frozen=True)
class Ending:
    """How a command ended; `error` is the traceback of what it let through."""

    code: int | None
    out: str
    err: str
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a case: `message`, `skip` or `valid`, or what is wrong with it."""

    case: Any
    what: str
    why: str = ""

    @property
    def is_right(self) -> bool:
        return self.what in ("message", "skip", "valid")


def in_process(command: Sequence[str]) -> Ending:
    def stop(*_: object) -> None:
        raise TimedOutError

    out, err, error, code = io.StringIO(), io.StringIO(), "", None
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
    except BaseException:
        error = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return Ending(code, out.getvalue(), err.getvalue(), error)


def as_process(command: Sequence[str]) -> Ending:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "grace_bench", *command], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return Ending(None, "", "", "TimedOutError")
    error = done.stderr if "Traceback" in done.stderr else ""
    return Ending(done.returncode, done.stdout, done.stderr, error)


def snapshot(folder: Path) -> dict[str, Any]:
    """Everything in a folder: what it is, and the digest of what can be read."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        has_content = stat.S_ISREG(mode) and os.access(path, os.R_OK)
        found[str(path)] = (mode, hashlib.sha256(path.read_bytes()).hexdigest() if has_content else None)
    return found


def judge(case: Any, folder: Path, carry_out: Any = in_process) -> Verdict:
    ask = case.arrange(folder)
    before = snapshot(ask.given)
    ending = carry_out(ask.command)
    after = snapshot(ask.given)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    if ending.error:
        return Verdict(case, "hang" if "TimedOutError" in ending.error else "traceback", ending.error)
    if changed and (ending.code != 0 or not ask.goes_on):
        return Verdict(case, "changed files", f"{changed} {ending.err}")
    if ending.code == 0:
        if any(said in ending.out for said in TOLD):
            return Verdict(case, "skip", ending.out)
        return Verdict(case, "valid" if case.may_be_valid else "accepted though broken", ending.out)
    line = ending.err.removesuffix("\n")
    if ending.code not in (1, 2) or not line.startswith("grace-bench: ") or "\n" in line:
        return Verdict(case, f"code {ending.code} without one line", ending.err)
    if not all(name in line for name in ask.names):
        return Verdict(case, "a line that does not name it", f"{line} {ask.names}")
    return Verdict(case, "message" if len(line) <= LONGEST_LINE else "a line too long", line)


def judged(cases: Sequence[Any], tmp_path: Path, carry_out: Any = in_process) -> list[Verdict]:
    verdicts = []
    for number, case in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        verdicts.append(judge(case, folder, carry_out))
        shutil.rmtree(folder)
    return verdicts


def drawn(cases: Sequence[Any], n: int) -> list[Any]:
    """Returns some of the cases, always the same, in their order."""
    numbers = random.Random(0).sample(range(len(cases)), n)
    return [cases[number] for number in sorted(numbers)]


def assert_right(verdicts: Sequence[Verdict]) -> None:
    wrong = [f"{verdict.case.name}: {verdict.what}: {verdict.why}" for verdict in verdicts if not verdict.is_right]
    assert not wrong, "\n\n".join(wrong)


def table(verdicts: Sequence[Verdict]) -> str:
    """How every group ended, as Markdown."""
    rows = [
        "| broken | ways | cases | message | counted skip | still valid |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for group in dict.fromkeys(verdict.case.group for verdict in verdicts):
        some = [verdict for verdict in verdicts if verdict.case.group == group]
        counts = Counter(verdict.what for verdict in some)
        ways = len({(verdict.case.kind, verdict.case.damage) for verdict in some})
        cells = (ways, len(some), counts["message"], counts["skip"], counts["valid"])
        rows.append(f"| {group} | {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def make_stopped(out: Path) -> Path:
    """Interrupts a run as it writes its checkpoint at four edits, and returns its folder."""
    is_over = False

    def interrupt(event: str, arguments: tuple[Any, ...]) -> None:
        # A hook stays for the life of the process.
        if not is_over and event == "os.rename" and str(arguments[1]).endswith("checkpoint/000004"):
            os.kill(os.getpid(), signal.SIGINT)

    sys.addaudithook(interrupt)
    assert main(["run", *STOPPED, f"out={out}"]) == 130
    is_over = True
    return next(out.rglob("config.yaml")).parent


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What is valid; making it also imports all that the cases need, which takes longer than any of them."""
    folder = tmp_path_factory.mktemp("bases")
    assert main(["run", "-m", *RUN, "editor=grace,ft", "seed=0,1", f"out={folder / 'runs'}"]) == 0
    (folder / "runs" / "command.json").write_text(json.dumps(RUN))
    checkpoints = Path(next(iter(grace_bench.streams.__path__))) / "checkpoints"
    return corpus.Bases(
        runs=folder / "runs",
        stopped=make_stopped(folder / "stopped"),
        models={path.name: path for path in checkpoints.iterdir()},
        data=SHARED if SHARED.is_dir() else None,
    )


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_names_in_the_corpus_are_unique_and_a_case_is_made_the_same_way_twice(bases: Any, tmp_path: Path) -> None:
    cases = corpus.corpus(bases)
    names = [case.name for case in cases]
    assert not [name for name, count in Counter(names).items() if count > 1]
    assert names == [case.name for case in corpus.corpus(bases)]
    assert len(cases) >= 500


def test_some_broken_inputs_end_in_a_line_or_a_counted_skip_and_change_nothing(bases: Any, tmp_path: Path) -> None:
    cases = corpus.corpus(bases)
    assert_right(judged(drawn(cases, IN_CI), tmp_path))


def test_a_broken_editor_is_refused_in_one_line_that_names_its_folder(bases: Any, tmp_path: Path) -> None:
    saved = next(path for path in bases.runs.rglob("editor") if "grace" in path.parts)
    model = EditableModel.from_pretrained("toy", task="classification")
    assert Grace.from_pretrained(saved, model=model).n_edits == 4
    damages = list(corpus.editor_damages(saved))
    for file, damage, spoil in damages:
        folder = tmp_path / "editor"
        shutil.copytree(saved, folder)
        spoil(folder / file, random.Random(damage))
        before = snapshot(folder)
        with pytest.raises(UserError) as caught:
            Grace.from_pretrained(folder, model=model)
        assert str(folder) in str(caught.value), damage
        assert "\n" not in str(caught.value), damage
        assert snapshot(folder) == before
        shutil.rmtree(folder)


@pytest.mark.slow
def test_a_thousand_broken_inputs_end_in_a_line_or_a_counted_skip_and_change_nothing(
    bases: Any, tmp_path: Path
) -> None:
    verdicts = judged(drawn(corpus.corpus(bases), DRAWN), tmp_path)
    print(f"\n{table(verdicts)}")
    assert_right(verdicts)
    assert sum(verdict.what != "valid" for verdict in verdicts) >= 500


@pytest.mark.slow
def test_in_a_process_of_its_own_a_command_ends_the_same_way(bases: Any, tmp_path: Path) -> None:
    # No process is given a NUL character.
    cases = [case for case in corpus.corpus(bases) if r"\x00" not in case.damage]
    assert_right(judged(drawn(cases, AS_PROCESSES), tmp_path, as_process))
