"""Ending a run on a signal where nothing of it is lost."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """While the context lasts, the first SIGINT or SIGTERM only asks for the end; the second ends everything at once.

    Before the first checkpoint there is nothing to wait for, so the first signal does. Outside the main thread, where
    Python lets nobody handle signals, nothing changes.

    Attributes:
        is_asked: Whether a signal came.
        can_wait: Whether the work at hand is finished first.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self.can_wait = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_asked or not self.can_wait:
            raise KeyboardInterrupt
        self.is_asked = True
        # What the signal interrupted may have been printing, which cannot be begun again.
        os.write(2, b"grace-bench: stopping as soon as the edit or evaluation at hand is done; again stops at once\n")
