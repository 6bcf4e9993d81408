"""Tensors that grow."""

from typing import Self

import torch
from torch import Tensor


class Rows:
    """A tensor that grows by rows, each in amortised constant time.

    Args:
        shape: Its shape when empty: (0, 0) for vector rows, (0,) for numbers.
        device: Its device.
        dtype: Its dtype.
    """

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._empty = self._buffer = torch.empty(shape, device=device, dtype=dtype)
        self._n = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Returns a tensor as rows, without a copy."""
        rows = cls(*(0 for _ in tensor.shape), device=tensor.device, dtype=tensor.dtype)
        rows._buffer, rows._n = tensor, len(tensor)
        return rows

    @property
    def tensor(self) -> Tensor:
        """(N, ...) the rows, without a copy."""
        return self._buffer[: self._n]

    def extend(self, rows: Tensor) -> None:
        """Adds (n, ...) rows at the end."""
        n = self._n + len(rows)
        if n > len(self._buffer):
            grown = self._empty.new_empty((max(16, n, 2 * self._n), *rows.shape[1:]))
            if self._n:
                grown[: self._n] = self.tensor
            self._buffer = grown
        self._buffer[self._n : n] = rows
        self._n = n

    def truncate(self, n: int) -> None:
        """Removes all but the first `n` rows."""
        self._n = min(n, self._n)
        if not self._n:
            self.clear()

    def clear(self) -> None:
        """Removes every row."""
        self._buffer, self._n = self._empty, 0
