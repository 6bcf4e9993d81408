"""The cost of a run: time and memory."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from grace_bench.common.state import copied, restored
from grace_bench.results.schema import Cost


@dataclass
class CostMeter:
    """Adds up the cost of a run, over all of its processes.

    Attributes:
        edit_times: Seconds of each edit.
        eval_seconds: Seconds spent scoring candidates and evaluation streams.
        peak_rss_mb: Peak memory of the process.
        peak_gpu_mb: Peak memory of torch on the GPU; None without one.
    """

    edit_times: list[float] = field(default_factory=list)
    eval_seconds: float = 0.0
    peak_rss_mb: float = 0.0
    peak_gpu_mb: float | None = None

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Counts the time inside the context as scoring."""
        started = time.perf_counter()
        yield
        self.eval_seconds += time.perf_counter() - started

    def cost(self, *, extra_parameters: int) -> Cost:
        """Returns the cost so far.

        Args:
            extra_parameters: Number of parameters that the editor adds to the model.
        """
        quantiles = np.quantile(self.edit_times, [0.5, 0.95]).tolist() if self.edit_times else [None, None]
        self._measure_memory()
        return Cost(
            seconds_per_edit_p50=quantiles[0],
            seconds_per_edit_p95=quantiles[1],
            edit_seconds=sum(self.edit_times),
            eval_seconds=self.eval_seconds,
            peak_rss_mb=self.peak_rss_mb,
            peak_gpu_mb=self.peak_gpu_mb,
            extra_parameters=extra_parameters,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the figures so far, this process's peak memory included."""
        self._measure_memory()
        state: dict[str, Any] = copied(vars(self))
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        vars(self).update(vars(restored(CostMeter, copied(state))))

    def _measure_memory(self) -> None:
        self.peak_rss_mb = max(self.peak_rss_mb, peak_rss() / 2**20)
        if torch.cuda.is_available():
            self.peak_gpu_mb = max(self.peak_gpu_mb or 0.0, torch.cuda.max_memory_allocated() / 2**20)


def peak_rss() -> int:
    """Returns the peak memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return peak * (1024 if sys.platform != "darwin" else 1)
