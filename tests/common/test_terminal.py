"""Bars of long steps: each step is drawn once, whatever steps follow it."""

import io

import pytest
from rich.console import Console

from grace_bench.common.terminal import progress_bars

STEPS = ("reading", "key covariance", "answers of the unedited model")


def screen(text: str) -> list[str]:
    """The lines that a terminal shows after it was written to: rich moves up and clears whole lines only."""
    lines, row = [""], 0
    for part in text.replace("\x1b[2K", "\x00C").replace("\x1b[1A", "\x00U").replace("\r", "").split("\x00"):
        if part.startswith("U"):
            row -= 1
        elif part.startswith("C"):
            lines[row] = ""
        for number, line in enumerate(part.removeprefix("U").removeprefix("C").split("\n")):
            row += number > 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] += line
    return lines


@pytest.mark.parametrize("is_terminal", [True, False])
def test_each_step_has_one_bar_that_stays(is_terminal: bool) -> None:
    file = io.StringIO()
    with progress_bars(Console(file=file, width=100, force_terminal=is_terminal)) as progress:
        for step in STEPS:
            for done in (1, 2, 3):
                progress(step, done, 3)
            # A reader that does not know how long its file is reports the end once more.
            progress(step, 3, 3)
    shown = [line for line in screen(file.getvalue()) if "%" in line]
    assert [next(step for step in STEPS if step in line) for line in shown] == list(STEPS)
    assert all("100%" in line for line in shown)


def test_a_step_that_is_carried_out_again_has_a_bar_again() -> None:
    file = io.StringIO()
    with progress_bars(Console(file=file, width=100, force_terminal=False)) as progress:
        for done in (1, 2, 1, 2):
            progress("training", done, 2)
    assert file.getvalue().count("training") == 2


def test_steps_side_by_side_have_a_bar_each() -> None:
    file = io.StringIO()
    with progress_bars(Console(file=file, width=100, force_terminal=False)) as progress:
        for step, done in (("one", 1), ("two", 1), ("one", 2), ("two", 2)):
            progress(step, done, 2)
    assert [line.split()[0] for line in file.getvalue().splitlines() if "100%" in line] == ["one", "two"]
