"""Which of many keys lie near a query: exactly, in bounded memory, for little more than one matrix product."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from typing import Self

import torch
from torch import Tensor

# Measured on one core: below this many multiplications the plain distances are faster than bounding them first.
_PLAIN = 2**20
# What is held at once: pairs of a query and a key, queries, and numbers gathered for exact distances.
_PAIRS = 2**17
_ROWS = 256
_GATHERED = 2**20

_UNIT = 2.0**-24
"""Unit roundoff of float32."""
_TINY = 2.0**-120
"""More than a product of three numbers can lose to underflow."""
_HUGE = 1e18
"""Norms above this, or that are no numbers, may overflow when squared."""
_SHORTEST = 1e-12
"""Shorter vectors have no direction; `torch.nn.functional.normalize` divides them by this."""


class Rows:
    """A tensor that grows by rows, each in amortised constant time.

    Args:
        shape: Its shape while it is empty: (0, 0) for rows that are vectors, (0,) for numbers.
        device: Where it is.
        dtype: Of its numbers.
    """

    def __init__(self, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self._empty = self._buffer = torch.empty(shape, device=device, dtype=dtype)
        self._n = 0

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """Returns rows that are there already, without a copy."""
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

    def first(self, n: int) -> "Rows":
        """Returns the first n rows, without a copy."""
        return Rows.of(self.tensor[:n])


class KeyIndex(ABC):
    """Keys, and exact lookups among them.

    A distance has one value for a query and a key, whatever else is looked up with them: `distances` computes it the
    plain way, for all pairs. The other lookups bound it first by a matrix product and the norms of the keys, which are
    kept, and compute it only where the bounds leave open what they are asked. The bounds hold for any order of
    summation (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1: a dot product of width D is off
    by at most D u / (1 - D u) times the product of the norms, u the unit roundoff), so that the answers are those of
    the plain way to the last bit.

    Args:
        device: Where the keys are.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._keys = Rows(0, 0, device=device)
        self._norms = Rows(0, device=device)
        self._bounded_norms = True

    @property
    def keys(self) -> Tensor:
        """(N, D) float32, not to be written to: their norms are kept."""
        return self._keys.tensor

    def extend(self, keys: Tensor) -> None:
        """Adds (n, D) keys, the newest last."""
        self._keys.extend(keys)
        for block in _slices(len(keys), max(1, _GATHERED // max(1, keys.shape[1]))):
            norms = self._measure(self.keys[len(self._norms.tensor) :][: block.stop - block.start])
            self._bounded_norms &= bool((norms <= _HUGE).all())

    def first(self, n: int) -> Self:
        """Returns the index of the first n keys, without a copy."""
        index = copy(self)
        for name, rows in vars(self).items():
            if isinstance(rows, Rows):
                setattr(index, name, rows.first(n))
        return index

    def truncate(self, n: int) -> None:
        """Removes all but the first `n` keys."""
        self._keys.truncate(n)
        self._norms.truncate(n)
        self._bounded_norms = bool((self._norms.tensor <= _HUGE).all())

    def clear(self) -> None:
        """Removes every key."""
        self._keys.clear()
        self._norms.clear()
        self._bounded_norms = True

    def distances(self, queries: Tensor) -> Tensor:
        """Returns the (B, N) distances of (B, D) queries."""
        return self._exact(self.keys, self._norms.tensor, queries).T

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (B,) entries nearest to (B, D) queries, the newest of equals, and their distances."""
        if self._plain(queries):
            distances = self.distances(queries)
            entry = newest_of_least(distances)
            return entry, distances.gather(1, entry[:, None])[:, 0]
        parts = []
        for chunk in queries.split(_ROWS):
            row, entry, distance = self._near(chunk, 0.0)
            newest = entry.new_full((len(chunk),), -1).scatter_reduce_(0, row, entry, "amax")
            # All that is left lies at its query's smallest distance.
            parts.append((newest, distance.new_empty(len(chunk)).scatter_(0, row, distance)))
        return torch.cat([entry for entry, _ in parts]), torch.cat([distance for _, distance in parts])

    def near(self, query: Tensor, slack: float) -> tuple[Tensor, Tensor]:
        """Returns the (M,) entries, oldest first, that are at most `slack` farther from a (D,) query than the nearest.

        The second tensor has their (M,) distances.
        """
        if self._plain(query[None]):
            distances = self.distances(query[None])[0]
            close = distances <= distances.min() + slack
            # This one is, unless the least distance is no number.
            close[newest_of_least(distances[None])] = True
            entry = torch.nonzero(close)[:, 0]
            return entry, distances[entry]
        return self._near(query[None], slack)[1:]

    def within(self, query: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (M,) entries, oldest first, whose (N,) reach takes in a (D,) query, and their (M,) distances."""
        found = [
            torch.nonzero(inside[0])[:, 0] + entries.start for _, entries, inside in self.inside(query[None], reach)
        ]
        entry = torch.cat(found)
        return entry, self._pairs(query[None], torch.zeros_like(entry), entry)

    def inside(self, queries: Tensor, radii: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields some of (B, D) queries, some entries, and the bool matrix of which lie in balls of (N,) radii."""
        for some in _slices(len(queries), _ROWS):
            for entries, inside in self._reached(queries[some], radii):
                yield some, entries, inside

    def meeting(self, radii: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields some entries, some as old or older, and the bool matrix of whose balls of (N,) radii meet."""
        for some in _slices(len(radii), _ROWS):
            for entries, meets in self._reached(self.keys[some], radii[: some.stop], radii[some, None]):
                yield some, entries, meets

    def lengths(self, distances: Tensor) -> Tensor:
        """Returns distances as what obeys the triangle inequality."""
        return distances

    def distances_of(self, lengths: Tensor) -> Tensor:
        """Returns the distances that lengths are of; 0 for negative ones."""
        return lengths.clamp(min=0)

    def reach(self, radii: Tensor, own_radii: Tensor) -> Tensor:
        """Returns the greatest distances at which balls of two radii meet."""
        return radii + own_radii

    def _plain(self, queries: Tensor) -> bool:
        """Whether to take the plain way: because it is faster, or because the bounds would not hold."""
        if self.keys.numel() * len(queries) <= _PLAIN or not _products_are_float32():
            return True
        return not (self._bounded_norms and bool((_norms(queries) <= _HUGE).all()))

    def _reached(
        self, queries: Tensor, radii: Tensor, own_radii: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields some of the first entries, and whose balls hold a query or, if it has a radius, meet its own."""
        if self._plain(queries):
            reach = radii if own_radii is None else self.reach(radii, own_radii)
            yield slice(0, len(radii)), self.distances(queries)[:, : len(radii)] <= reach
            return
        for block, low, high in self._bounded(queries, len(radii)):
            reach = radii[block] if own_radii is None else self.reach(radii[block], own_radii)
            reach = reach.expand_as(low)
            reached = high <= reach
            row, column = torch.nonzero((low <= reach) & ~reached, as_tuple=True)
            reached[row, column] = self._pairs(queries, row, column + block.start) <= reach[row, column]
            yield block, reached

    def _near(self, queries: Tensor, slack: float) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs at most `slack` worse than the best of their query: row, entry, distance, by entry in each row."""
        ceiling = queries.new_full((len(queries),), torch.inf)
        found = []
        for block, low, high in self._bounded(queries, len(self.keys)):
            ceiling = torch.minimum(ceiling, high.amin(dim=1))
            row, column = torch.nonzero(low <= (ceiling + slack)[:, None], as_tuple=True)
            distance = self._pairs(queries, row, column + block.start)
            ceiling = ceiling.scatter_reduce(0, row, distance, "amin")
            kept = distance <= (ceiling + slack)[row]
            found.append((row[kept], column[kept] + block.start, distance[kept]))
        row, entry, distance = (torch.cat(parts) for parts in zip(*found, strict=True))
        # By now the ceiling is the least distance itself: no upper bound is below it, and its key was not left out.
        kept = distance <= (ceiling + slack)[row]
        return row[kept], entry[kept], distance[kept]

    def _bounded(self, queries: Tensor, n: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields blocks of the first n entries with the (B, n) bounds of their distances from below and above."""
        # A product in half precision, which autocast would make of it, is not what the bounds are for.
        with torch.autocast(queries.device.type, enabled=False):
            bounds = self._bounds(queries)
        for block in _slices(n, max(1, _PAIRS // len(queries))):
            with torch.autocast(queries.device.type, enabled=False):
                low, high = bounds(block)
            yield block, low, high

    def _pairs(self, queries: Tensor, row: Tensor, entry: Tensor) -> Tensor:
        """The (P,) distances of P pairs of a query and a key."""
        keys, norms = self.keys, self._norms.tensor
        n = max(1, _GATHERED // queries.shape[1])
        parts = [
            self._exact(keys[some][:, None], norms[some][:, None], queries[rows][:, None])[:, 0, 0]
            for rows, some in zip(row.split(n), entry.split(n), strict=True)
        ]
        return torch.cat(parts)

    def _measure(self, keys: Tensor) -> Tensor:
        """Keeps what the bounds need of (n, D) new keys, and returns their (n,) norms."""
        norms = _norms(keys)
        self._norms.extend(norms)
        return norms

    @abstractmethod
    def _exact(self, keys: Tensor, norms: Tensor, queries: Tensor) -> Tensor:
        """The (..., n, B) distances of (..., n, D) keys with (..., n) norms and (..., B, D) queries."""

    @abstractmethod
    def _bounds(self, queries: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """Gives the (B, n) bounds of the distances of (B, D) queries to a block of entries."""


class EuclideanIndex(KeyIndex):
    """Keys under euclidean distance.

    With c the first key, |q - k|^2 = |q|^2 - |c|^2 - 2 (q - c).k + |k - c|^2. What rounding can do to it grows with
    |q - c| |k| rather than |q| |k|: activations have much in common, which would drown what tells them apart.
    """

    def __init__(self, *, device: torch.device) -> None:
        super().__init__(device=device)
        self._spreads = Rows(0, device=device)

    def truncate(self, n: int) -> None:
        super().truncate(n)
        self._spreads.truncate(n)

    def clear(self) -> None:
        super().clear()
        self._spreads.clear()

    def _measure(self, keys: Tensor) -> Tensor:
        self._spreads.extend(_norms(keys, self.keys[:1]).square())
        return super()._measure(keys)

    def _exact(self, keys: Tensor, norms: Tensor, queries: Tensor) -> Tensor:
        return _cdist(keys, queries)

    def _bounds(self, queries: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        width = queries.shape[1]
        error = _error(width)
        centre = self.keys[:1].double()
        shift = (queries.double().square().sum(dim=1) - centre.square().sum())[:, None].float()
        moved = (queries.double() - centre).float()
        sizes = 2 * error * _norms(moved)[:, None]
        doubled = -2 * moved
        least = 8 * _UNIT * shift.abs() + width * _TINY

        def bounds(block: slice) -> tuple[Tensor, Tensor]:
            spreads = self._spreads.tensor[block]
            squares = (doubled @ self.keys[block].T).add_(spreads).add_(shift)
            errors = (sizes * self._norms.tensor[block]).add_(8 * _UNIT * spreads).add_(least)
            low = (squares - errors).clamp_(min=0).sqrt_().mul_(1 - error)
            return low, squares.add_(errors).clamp_(min=0).sqrt_().mul_(1 + error)

        return bounds


class CosineIndex(KeyIndex):
    """Keys under cosine distance: half the squared distance of unit vectors, exact near 0 as their product is not.

    What is too short for a direction is at distance 1 from everything. Lengths are angles.
    """

    def lengths(self, distances: Tensor) -> Tensor:
        return 2 * (distances / 2).clamp(0, 1).sqrt().asin()

    def distances_of(self, lengths: Tensor) -> Tensor:
        return 2 * (lengths.clamp(0, math.pi) / 2).sin().square()

    def reach(self, radii: Tensor, own_radii: Tensor) -> Tensor:
        # Left in double precision: near opposite keys, float32 tells no two angles apart.
        return self.distances_of(self.lengths(radii.double()) + self.lengths(own_radii.double()))

    def _exact(self, keys: Tensor, norms: Tensor, queries: Tensor) -> Tensor:
        sizes = _norms(queries)
        units = keys / norms.clamp(min=_SHORTEST)[..., None]
        squares = _cdist(units, queries / sizes.clamp(min=_SHORTEST)[..., None]).square()
        return (squares + _missing(norms)[..., :, None] + _missing(sizes)[..., None, :]) / 2

    def _bounds(self, queries: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        error = _error(queries.shape[1])
        units = queries / _norms(queries).clamp(min=_SHORTEST)[:, None]

        def bounds(block: slice) -> tuple[Tensor, Tensor]:
            similarity = (units @ self.keys[block].T).div_(self._norms.tensor[block].clamp(min=_SHORTEST))
            low = (1 - error - similarity).clamp_(min=0).mul_(1 - error)
            return low, similarity.neg_().add_(1 + error).clamp_(min=0).mul_(1 + error)

        return bounds


def newest_of_least(distances: Tensor) -> Tensor:
    """Returns the (B,) columns with the least of (B, N) distances, the last where several have it."""
    return distances.shape[1] - 1 - distances.flip(1).argmin(dim=1)


def _cdist(keys: Tensor, queries: Tensor) -> Tensor:
    # The other mode multiplies matrices, which is off by up to 0.5 near zero and depends on what else is in the batch.
    return torch.cdist(keys, queries, p=2, compute_mode="donot_use_mm_for_euclid_dist")


def _norms(points: Tensor, origin: Tensor | None = None) -> Tensor:
    """The (..., n) float32 distances of (..., n, D) points from a (1, D) origin, right to the last bit or nearly so."""
    # Of cdist, unlike a sum over a dimension, it is known that a row's result does not depend on the other rows.
    zero = points.new_zeros(1, points.shape[-1]) if origin is None else origin
    return _cdist(points.double(), zero.double())[..., 0].float()


def _missing(norms: Tensor) -> Tensor:
    """What vectors divided by their norms lack to a squared length of 1: nothing unless they are too short."""
    return 1 - (norms / _SHORTEST).clamp(max=1).square()


def _error(width: int) -> float:
    """A bound of the relative error of a float32 sum of `width` products, and of a few roundings more."""
    return 1.01 * (width + 32) * _UNIT


def _products_are_float32() -> bool:
    """Whether matrices are multiplied in float32, and not in something faster."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # It was set for a single backend, which PyTorch then refuses to sum up.
        return False


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
