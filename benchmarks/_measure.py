"""Helpers of the benchmarks: sides timed in turns after a warm-up, and the state of the machine."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch


def interleave(
    sides: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Times the sides in turn, round after round, so that other load on the machine affects all of them alike.

    Args:
        sides: The calls to time, by name.
        repeats: The largest number of rounds.
        warmup: The number of untimed rounds before the timed ones.
        seconds: No further round starts after this many seconds, once three rounds are done.

    Returns:
        The seconds of each call, by side.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(warmup):
        for call in sides.values():
            call()
    start = time.perf_counter()
    for round_ in range(repeats):
        if round_ >= 3 and time.perf_counter() - start > seconds:
            break
        for name, call in sides.items():
            before = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - before)
    return taken


def peak(clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the floating-point operations per second of a clock that a product of two large matrices reaches."""
    left, right = torch.randn(2, 2048, 2048).unbind()
    seconds = []
    for _ in range(8):
        before = clock()
        left @ right
        seconds.append(clock() - before)
    return float(2 * 2048**3 / median(seconds))


def spread(seconds: list[float], *, unit: float = 1.0) -> str:
    """Returns the median, with minimum and maximum in brackets, in multiples of `unit` seconds."""
    least, middle, greatest = (f"{which(seconds) / unit:.4g}" for which in (min, median, max))
    return f"{middle} ({least}-{greatest})"


def machine() -> str:
    """Returns one line with processor, threads, load average, PyTorch version and date."""
    load = " ".join(f"{average:.2f}" for average in os.getloadavg())
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    today = time.strftime("%Y-%m-%d")
    return f"{_processor()}, {threads}, load {load}, torch {torch.__version__}, {today}"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
