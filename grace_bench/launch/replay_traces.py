"""Replays recorded traces with the editors that can, and says whether ours does the same."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from grace_bench.editing.commands import OtherRecordError, Replay, Verdict
from grace_bench.errors import UserError
from grace_bench.launch.figures import named_function
from grace_bench.registry import EDITORS


def verify_files(paths: Sequence[Path], say: Callable[[str], None]) -> int:
    """Replays recordings and says one line a file.

    Args:
        paths: The recordings.
        say: Takes each line.

    Returns:
        The exit code: 0 if all agree, 1 if one differs, 2 if one cannot be used.
    """
    exit_code = 0
    replays = _replays()
    for path in paths:
        try:
            verdict = _verify(path, replays)
        except UserError as error:
            say(" ".join(str(error).split()))
            exit_code = 2
            continue
        if verdict.not_replayed is not None:
            say(f"{path}: not replayed: {verdict.not_replayed}")
        elif verdict.difference is not None:
            say(f"{path}: {verdict.difference}")
            exit_code = max(exit_code, 1)
        else:
            say(f"{path}: agrees" + (f" ({'; '.join(verdict.notes)})" if verdict.notes else ""))
    return exit_code


def _replays() -> list[Replay]:
    """What the editors that declare `traces` replay recordings with; an editor that cannot be imported has nothing."""
    found: dict[str, None] = {}
    for name in EDITORS.entries():
        try:
            declared = EDITORS.attribute(name, "traces")
        except UserError:
            continue
        if declared is not None:
            found[declared] = None
    return [named_function(declared) for declared in found]


def _verify(path: Path, replays: Sequence[Replay]) -> Verdict:
    """Asks one editor after the other whether the recording is one of its own."""
    for replay in replays:
        with suppress(OtherRecordError):
            return replay(path)
    raise UserError(f"{path}: is no recording that an editor replays")
