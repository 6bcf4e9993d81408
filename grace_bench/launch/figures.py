"""The kinds of figures, as `grace-bench figure` names them: those of all runs, and what editors declare."""

import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from grace_bench.editing.commands import FigureKind
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS

_OF_RUNS = {
    "curves": FigureKind(
        draw="grace_bench.analysis.figures.of_runs:draw_curves",
        takes="runs",
        shows="scores over the edits, a line an editor",
    ),
    "editors": FigureKind(
        draw="grace_bench.analysis.figures.dots:draw_editors",
        takes="runs",
        shows="scores at the end of the runs, a row an editor, a panel for each protocol",
    ),
    "scores": FigureKind(
        draw="grace_bench.analysis.figures.dots:draw_scores",
        takes="runs",
        shows="the same edits by every score, a row an editor",
    ),
}
_TAKES = {"runs": "RUNS ...", "options": "[option=value ...]"}
_COLUMN = 30
_WIDTH = 119


def figure_kinds() -> Iterator[tuple[str, FigureKind]]:
    """Yields the kinds of figures by name: those of all runs, those of the package's editors and of installed packages.

    An installed package that cannot be imported has none.
    """
    yield from _OF_RUNS.items()
    for name in EDITORS.entries():
        try:
            yield from EDITORS.attribute(name, "figures").items()
        except UserError:
            continue


def figure_help() -> str:
    """Returns the lines of the command's help that describe the kinds."""
    lines = []
    for name, kind in figure_kinds():
        head = f"  {name} {_TAKES[kind['takes']]}"
        text = textwrap.wrap(kind["shows"], _WIDTH - _COLUMN)
        if len(head) < _COLUMN:
            head = f"{head:{_COLUMN}}{text.pop(0)}"
        lines += [head, *(f"{'':{_COLUMN}}{line}" for line in text)]
    return "\n".join(lines)


def draw(kind: str, given: Sequence[str], out: Path, *, say: Callable[[str], None], score: str | None = None) -> None:
    """Draws the figures of one kind, and says where they are.

    Args:
        kind: One of `figure_kinds`.
        given: Run folders or settings of a run, whichever the kind takes.
        out: Receives the figures.
        say: Takes lines for the user.
        score: The score of the panel by which runs are drawn; None for their main scores.

    Raises:
        UserError: If there is no such kind, nothing to draw, or what is given cannot be.
    """
    found = next((declared for name, declared in figure_kinds() if name == kind), None)
    if found is None:
        names = ", ".join(repr(name) for name, _ in figure_kinds())
        raise UserError(
            f"argument kind: invalid choice: {kind!r} (choose from {names}) (grace-bench figure --help says more)"
        )
    if found["takes"] == "runs":
        if not given:
            raise UserError(f"figure {kind} needs run folders, or folders that hold some")
        function, more = named_function(found["draw"]), {} if score is None else {"score": score}
        if more and "score" not in inspect.signature(function).parameters:
            raise UserError(f"--score={score}: figure {kind} shows no scores")
        files = function([Path(path) for path in given], out, **more)
    elif score is not None:
        raise UserError(f"--score={score}: figure {kind} shows no runs")
    else:
        from grace_bench.launch.memory_trial import open_trial

        files = named_function(found["draw"])(given, out, open_trial)
    for file in files:
        say(str(file))


def named_function(name: str) -> Any:
    """Imports what `module:function` names."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
