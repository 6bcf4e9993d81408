"""Standard streams whose readers go away while a run goes on."""

import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class LastingStream:
    """A text stream that drops what cannot be written any more.

    What a run tells on the way is a view of it: work of days does not end with the terminal that it was begun in.

    Args:
        stream: The stream; all but writing is its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written; returns the length of all of it."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Hands on what can be."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def close_output() -> None:
    """Lets the interpreter end quietly after the reader of standard output has gone; what is left of it is dropped."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
