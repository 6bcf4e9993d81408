"""Several runs side by side, each in a process of its own."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(function: Callable[[T], R], items: Iterable[T], *, jobs: int | None = None) -> list[R]:
    """Returns what a function makes of every item, in their order.

    Args:
        function: A function of a module, or a partial of one.
        items: Its arguments.
        jobs: How many go on at once; None for the cores that this process may use.

    Raises:
        Exception: What the function raises first. Work in progress is then given up, as it is on an interrupt.
    """
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs or n_cores(), mp_context=spawned, initializer=_prepare) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            # The pool would wait for what has begun.
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def n_cores() -> int:
    """Returns how many cores this process may use; not every system tells of fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare() -> None:
    """Leaves an interrupt from the keyboard, which reaches every process, to the one that waits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
