"""The first thing a new user runs: every editor on an embedded stream."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from grace_bench.analysis.leaderboard import Leaderboard, print_leaderboard
from grace_bench.common.processes import side_by_side
from grace_bench.common.terminal import say
from grace_bench.errors import UserError
from grace_bench.launch.jobs import compose, execute, folder_of
from grace_bench.registry import EDITORS, STREAMS

_STREAMS = ("atlas-qa", "atlas-text")
_FOR_COMPARISON = ("grace", "none")


def demo(out: Path, *, n_edits: int) -> None:
    """Runs every registered editor on atlas-qa, or on atlas-text if it works there only, and prints the leaderboards.

    As many runs go on side by side as there are cores; tiny models use one each.

    Args:
        out: Where run folders are made; finished runs there are reused.
        n_edits: Edits an editor makes.

    Raises:
        UserError: If there is a file where the folder is to be, before a process is started for each run to find out.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: Not a directory")
    folders = side_by_side(partial(_run, out=str(out), n_edits=n_edits), _pairs())
    print_leaderboard(Leaderboard.read(folders))
    say(f"\nRun folders: {out}\nThe same again: grace-bench leaderboard {out}")


def _pairs() -> Iterator[tuple[str, str]]:
    """Each editor with the first stream it works on, and on every such stream some editors to compare with."""
    tasks = {name: STREAMS.get(name).task for name in _STREAMS}
    pairs: dict[tuple[str, str], None] = {}
    for editor in EDITORS.entries():
        supported = EDITORS.get(editor).supported_tasks
        stream = next((name for name in _STREAMS if tasks[name] in supported), None)
        if stream is not None:
            pairs[stream, editor] = None
            pairs |= {(stream, other): None for other in _FOR_COMPARISON}
    yield from pairs


def _run(pair: tuple[str, str], *, out: str, n_edits: int) -> Path:
    """Returns the run's folder."""
    stream, editor = pair
    config = compose([f"stream={stream}", f"editor={editor}", f"max_edits={n_edits}"])
    # Not an override: a path may hold what the override grammar gives a meaning.
    config.out = out
    # A demo that was interrupted goes on where it was.
    config.existing = "resume"
    # Several runs cannot each move a bar in one terminal.
    execute(config, say=lambda line: None, console=Console(stderr=True, force_terminal=False))
    return folder_of(config)
