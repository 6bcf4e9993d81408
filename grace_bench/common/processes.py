"""Several runs side by side, each in its own process."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    function: Callable[[T], R], items: Iterable[T], *, jobs: int | None = None, fork: bool = False
) -> list[R]:
    """Applies a function to every item in parallel processes; returns the results in the order of the items.

    Args:
        function: A module-level function, or a partial of one.
        items: Its arguments.
        jobs: How many processes run at once; None for one per usable core.
        fork: On Linux, the processes are copies of this one, and need not import again what it has imported. Only for
            a process that has not computed on several threads or a GPU: a copy can use neither.

    Raises:
        Exception: The first exception that the function raises. Unfinished work is then abandoned, as on an interrupt.
    """
    context = multiprocessing.get_context("fork" if fork and sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(jobs or n_cores(), mp_context=context, initializer=_prepare) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # The pool would wait for items that have started.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def n_cores() -> int:
    """Returns how many cores this process may use, or how many there are on systems that cannot tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    """Lets the parent decide when this process ends.

    An interrupt from the keyboard reaches every process, and the parent handles it. A copy has the parent's handlers,
    and Ray leaves one behind that ends Ray's processes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
