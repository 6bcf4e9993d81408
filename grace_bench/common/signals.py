"""Ending a run on a signal where nothing of it is lost."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    # The terminal is gone.
    _SIGNALS.append(signal.SIGHUP)


_STOPPING = b"grace-bench: stopping as soon as the edit or evaluation at hand is done; again stops at once\n"


class Interruption:
    """While the context lasts, the first signal that ends programs only asks for the end; the second ends them at once.

    These are SIGINT, SIGTERM and SIGHUP, the last unless it is ignored, as under `nohup`.

    Before the first checkpoint there is nothing to wait for, so the first signal does. Outside the main thread, where
    Python lets nobody handle signals, nothing changes.

    Attributes:
        is_requested: Whether a signal came.
        can_wait: Whether the work at hand is finished first.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self.can_wait = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if not _is_ignored_hangup(number)]
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested or not self.can_wait:
            raise KeyboardInterrupt
        self.is_requested = True
        # What the signal interrupted may have been printing, which cannot be begun again.
        with suppress(OSError):  # A terminal that is gone takes no text.
            os.write(2, _STOPPING)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
