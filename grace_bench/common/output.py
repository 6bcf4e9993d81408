"""Standard streams whose reader may disappear while a run continues."""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class BestEffortStream:
    """A text stream that drops what can no longer be written.

    Progress output is only a view of a run: days of work must not end with the terminal they were started in.

    Args:
        stream: The stream; everything but writing is delegated to it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes as much as possible; returns the length of the whole text."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes as much as possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def close_output() -> None:
    """Lets the interpreter exit quietly after the reader of standard output is gone; unwritten output is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
