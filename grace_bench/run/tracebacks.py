"""The tracebacks of edits that failed with a programming error in the editor."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from grace_bench.common.credentials import without_secrets
from grace_bench.common.state import restored
from grace_bench.common.text import visible
from grace_bench.editing.batch import EditOutcome
from grace_bench.errors import RunFailure


@dataclass
class _Written:
    """The content so far: number of tracebacks, their size in bytes, and the reason of the first failure."""

    n_edits: int = 0
    size: int = 0
    first: str | None = None


class Tracebacks:
    """The file `tracebacks.txt` of a run folder, made at the first edit that fails with a programming error.

    Args:
        folder: The run folder; None writes nothing.
        say: Called with one line at the first such edit.
    """

    def __init__(self, *, folder: Path | None = None, say: Callable[[str], None] | None = None) -> None:
        self._path = None if folder is None else folder / "tracebacks.txt"
        self._say = say
        self._written = _Written()

    def add(self, outcome: EditOutcome, *, request_id: str, n_edits: int) -> None:
        """Writes the traceback of an edit that has one.

        Args:
            outcome: The outcome of the edit.
            request_id: The id of its request.
            n_edits: Edits made so far, this one included.
        """
        if outcome.traceback is None:
            return
        written, edit = self._written, f"edit {n_edits} (request '{request_id}')"
        written.n_edits += 1
        if self._path is not None:
            text = without_secrets(f"{edit}:\n{outcome.traceback.rstrip()}\n\n")
            content = text.encode("utf-8", "backslashreplace")
            # A new run replaces an earlier file.
            with self._path.open("ab" if written.size else "wb") as file:
                file.write(content)
            written.size += len(content)
        if written.first is None:
            written.first = outcome.failed
            if self._say is not None:
                self._say(visible(f"{edit} failed with a programming error in the editor: {self._first()}"))

    def check(self, n_edits: int) -> None:
        """Makes sure that not every edit of a run failed with a programming error.

        Args:
            n_edits: The run's edits.

        Raises:
            RunFailure: If every edit did, with the reason of the first and the name of the file.
        """
        if self._written.n_edits == n_edits > 0:
            raise RunFailure(
                visible(f"every edit failed with a programming error in the editor, the first: {self._first()}")
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the content so far as JSON values."""
        return asdict(self._written)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, and drops the tracebacks written after it: they are written again."""
        self._written = restored(_Written, state)
        if self._path is not None and self._path.exists():
            os.truncate(self._path, min(self._written.size, self._path.stat().st_size))

    def _first(self) -> str:
        return f"{self._written.first}{'' if self._path is None else f' (traceback in {self._path})'}"
