"""The lifelong normaliser of UltraEdit (Gu et al. 2025): running statistics over every row of a stream."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace_bench.editing.batch import State

_EPS = torch.finfo(torch.float32).eps


class LifelongNormaliser:
    """Mean and sum of squares of D features over all rows so far, in float32.

    The spread of the rows within one update counts N/(N-1) times, as in the authors' code.

    Args:
        width: D.
        device: The device of the rows.
        loses_single_rows: Whether an update with a single row, which has no variance, makes the statistics NaN for
            ever, as in the authors' code; otherwise such a row has no spread within itself.

    Attributes:
        n: The number of rows so far.
        mean: (D,) their mean.
        var: (D,) their sum of squared deviations from it.
    """

    def __init__(self, width: int, device: torch.device, *, loses_single_rows: bool) -> None:
        self.n = 0
        self.mean = torch.zeros(width, device=device)
        self.var = torch.zeros(width, device=device)
        self._variance_of_one = torch.nan if loses_single_rows else 0.0

    def update(self, rows: Tensor) -> None:
        """Adds (N, D) rows, at least one."""
        n = len(rows)
        total = self.n + n
        delta = rows.mean(dim=0) - self.mean
        within = rows.var(dim=0) if n > 1 else torch.full_like(delta, self._variance_of_one)
        self.mean = self.mean + n * delta / total
        self.var = self.var + n * within + self.n * n * delta.square() / total
        self.n = total

    def __call__(self, rows: Tensor) -> Tensor:
        """Returns (N, D) rows in units of the deviations from the mean."""
        std = (self.var / (self.n - 1 + _EPS)).sqrt()
        return (rows - self.mean) / (std + _EPS)

    def state_dict(self) -> State:
        """Returns the statistics."""
        return {"n": self.n, "mean": self.mean, "var": self.var}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from statistics returned by `state_dict`."""
        self.n = int(state["n"])
        self.mean = state["mean"].to(self.mean.device, copy=True)
        self.var = state["var"].to(self.var.device, copy=True)
