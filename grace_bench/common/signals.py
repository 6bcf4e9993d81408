"""Stopping a run on a signal without losing its work."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any, Self

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    # The terminal was closed.
    _SIGNALS.append(signal.SIGHUP)


class Interruption:
    """A context in which the first SIGINT, SIGTERM or SIGHUP requests a stop, and the second interrupts at once.

    SIGHUP stays ignored where it was, as under `nohup`. Outside the main thread, where Python allows no signal
    handlers, nothing changes.

    Args:
        work: What the first signal lets finish, for the line on standard error.

    Attributes:
        is_requested: Whether a signal has arrived.
        can_defer: Whether the first signal lets the current work finish; set it once there is work to save.
    """

    def __init__(self, work: str = "the current edit or evaluation") -> None:
        self._stopping = f"grace-bench: stopping after {work}; a second signal stops at once\n".encode()
        self.is_requested = False
        self.can_defer = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            handled = [number for number in _SIGNALS if not _is_ignored_hangup(number)]
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested or not self.can_defer:
            raise KeyboardInterrupt
        self.is_requested = True
        # The signal may have interrupted a print, which is not reentrant.
        with suppress(OSError):  # The terminal may be closed.
            os.write(2, self._stopping)


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
