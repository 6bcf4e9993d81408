"""Which of many keys lie near a query: exactly, in bounded memory, for little more than one matrix product."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from typing import Self

import torch
from torch import Tensor

from grace_bench.editors._rows import Rows

# Measured on one core: below this many multiplications, computing all distances is faster than bounding them first.
_PLAIN = 2**20
# Limits on what is in memory at once: query-key pairs, queries, and numbers gathered for exact distances.
_PAIRS = 2**17
_ROWS = 256
_GATHERED = 2**20

_UNIT = 2.0**-24
"""Unit roundoff of float32."""
_TINY = 2.0**-55
"""More than underflow can add to a float32 distance."""
_HUGE = 1e18
"""Norms above this, or that are not numbers, may overflow when squared in float32."""
_SHORTEST = 1e-12
"""Shorter vectors have no direction; `torch.nn.functional.normalize` divides them by this."""


class KeyIndex(ABC):
    """Keys with exact lookups.

    The distance of a query and a key is what float32 arithmetic gives for the pair, independent of the rest of the
    batch; `distances` computes it for all pairs. The other lookups first bound it by a float32 product, and compute it
    only for pairs that the bounds do not decide, so their answers equal those of `distances` to the last bit. The
    bounds hold for any order of summation: a dot product of width D is off by at most D u / (1 - D u) times the product
    of the norms, u the unit roundoff (Higham 2002, Accuracy and Stability of Numerical Algorithms, 3.1).

    Args:
        device: Where the keys are.
    """

    def __init__(self, *, device: torch.device) -> None:
        self._keys = Rows(0, 0, device=device)
        self._sizes = Rows(0, device=device, dtype=torch.float64)

    @property
    def keys(self) -> Tensor:
        """(N, D) float32, read-only."""
        return self._keys.tensor

    def extend(self, keys: Tensor) -> None:
        """Adds (n, D) keys, the newest last."""
        if not len(keys):
            return
        self._keys.extend(keys)
        for some in keys.split(max(1, _GATHERED // max(1, keys.shape[1]))):
            self._sizes.extend(_norms(some.to(self.keys), self._origin()))

    def first(self, n: int) -> Self:
        """Returns the index of the first n keys, without a copy."""
        index = copy(self)
        index._keys, index._sizes = Rows.of(self.keys[:n]), Rows.of(self._sizes.tensor[:n])
        return index

    def truncate(self, n: int) -> None:
        """Removes all but the first `n` keys."""
        self._keys.truncate(n)
        self._sizes.truncate(n)

    def clear(self) -> None:
        """Removes every key."""
        self.truncate(0)

    def distances(self, queries: Tensor) -> Tensor:
        """Returns the (B, N) distances of (B, D) queries."""
        return self._exact(self.keys, self._sizes.tensor, queries).T

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (B,) entries nearest to (B, D) queries, the newest in a tie, and their distances."""
        if self._is_plain(queries):
            distances = self.distances(queries)
            entry = newest_of_least(distances)
            return entry, distances.gather(1, entry[:, None])[:, 0]
        parts = []
        for chunk in queries.split(_ROWS):
            row, entry, distance = self._near(chunk, 0.0)
            # All of these lie at the minimum distance of their query.
            newest = entry.new_full((len(chunk),), -1).scatter_reduce_(0, row, entry, "amax")
            parts.append((newest, distance.new_empty(len(chunk)).scatter_(0, row, distance)))
        return torch.cat([entry for entry, _ in parts]), torch.cat([distance for _, distance in parts])

    def near(self, query: Tensor, slack: float) -> tuple[Tensor, Tensor]:
        """Returns the (M,) entries, oldest first, that are at most `slack` farther from a (D,) query than the nearest.

        The second tensor has their (M,) distances.
        """
        if not self._is_plain(query[None]):
            return self._near(query[None], slack)[1:]
        distances = self.distances(query[None])[0]
        close = distances <= distances.min() + slack
        # The nearest always counts, even if its distance is NaN.
        close[newest_of_least(distances[None])] = True
        entry = torch.nonzero(close)[:, 0]
        return entry, distances[entry]

    def within(self, query: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the (M,) entries, oldest first, whose (N,) reach covers a (D,) query, and their (M,) distances."""
        found = [torch.nonzero(inside[0])[:, 0] + some.start for _, some, inside in self.inside(query[None], reach)]
        entry = torch.cat(found)
        return entry, self._pairs(query[None], torch.zeros_like(entry), entry)

    def inside(self, queries: Tensor, radii: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields, block by block: some of (B, D) queries, entries, and which queries lie in balls of (N,) radii."""
        for some in _slices(len(queries), _ROWS):
            for entries, inside in self._reached(queries[some], radii):
                yield some, entries, inside

    def meeting(self, radii: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields, block by block: entries, entries no newer than those, and whose balls of (N,) radii meet."""
        for some in _slices(len(radii), _ROWS):
            for entries, meets in self._reached(self.keys[some], radii[: some.stop], radii[some, None]):
                yield some, entries, meets

    def lengths(self, distances: Tensor) -> Tensor:
        """Returns distances as lengths, which obey the triangle inequality."""
        return distances

    def distances_of(self, lengths: Tensor) -> Tensor:
        """Returns the distances of lengths; 0 for negative ones."""
        return lengths.clamp(min=0)

    def reach(self, radii: Tensor, own_radii: Tensor) -> Tensor:
        """Returns the largest distances at which balls of two radii meet."""
        return radii + own_radii

    def _is_plain(self, queries: Tensor) -> bool:
        """Whether all distances are computed: because that is faster, or because the bounds would not hold."""
        if self.keys.numel() * len(queries) <= _PLAIN or not _products_are_float32():
            return True
        sizes = (self._sizes.tensor, _norms(queries), _norms(self.keys[:1]))
        return not all(bool((some <= _HUGE).all()) for some in sizes)

    def _reached(
        self, queries: Tensor, radii: Tensor, own_radii: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields, block by block: some of the first entries, and which balls contain a query or meet its ball."""
        if self._is_plain(queries):
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
        """The pairs within `slack` of the best of their query: row, entry, distance, ordered by entry in each row."""
        ceiling = queries.new_full((len(queries),), torch.inf, dtype=torch.float64)
        found = []
        for block, low, high in self._bounded(queries, len(self.keys)):
            ceiling = torch.minimum(ceiling, high.amin(dim=1))
            # The slack is added in float32 below, where it may round up.
            row, column = torch.nonzero(low <= ((ceiling + slack) * (1 + 4 * _UNIT))[:, None], as_tuple=True)
            found.append((row, column + block.start, low[row, column]))
        row, entry, low = (torch.cat(parts) for parts in zip(*found, strict=True))
        candidates = low <= ((ceiling + slack) * (1 + 4 * _UNIT))[row]
        row, entry = row[candidates], entry[candidates]
        distance = self._pairs(queries, row, entry)
        least = distance.new_full((len(queries),), torch.inf).scatter_reduce(0, row, distance, "amin")
        kept = distance <= (least + slack)[row]
        return row[kept], entry[kept], distance[kept]

    def _bounded(self, queries: Tensor, n: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields blocks of the first n entries with the (B, n) bounds of their distances from below and above."""
        bounds = self._bounds(queries)
        for block in _slices(n, max(1, _PAIRS // len(queries))):
            yield block, *bounds(block)

    def _pairs(self, queries: Tensor, row: Tensor, entry: Tensor) -> Tensor:
        """The (P,) distances of P pairs of a query and a key."""
        keys, sizes = self.keys, self._sizes.tensor
        n = max(1, _GATHERED // queries.shape[1])
        parts = [
            self._exact(keys[some][:, None], sizes[some][:, None], queries[rows][:, None])[:, 0, 0]
            for rows, some in zip(row.split(n), entry.split(n), strict=True)
        ]
        return torch.cat(parts)

    def _products(self, vectors: Tensor, block: slice) -> Tensor:
        """The (B, n) float32 products of (B, D) vectors and some keys."""
        # Autocast would compute this in half precision, for which the bounds do not hold.
        with torch.autocast(vectors.device.type, enabled=False):
            return vectors.float() @ self.keys[block].T

    def _origin(self) -> Tensor | None:
        """The (1, D) point from which the sizes of keys are measured; None for the origin."""
        return None

    @abstractmethod
    def _exact(self, keys: Tensor, sizes: Tensor, queries: Tensor) -> Tensor:
        """The (..., n, B) distances of (..., n, D) keys with (..., n) sizes and (..., B, D) queries."""

    @abstractmethod
    def _bounds(self, queries: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """Returns the (B, n) bounds of the distances of (B, D) queries to a block of entries."""


class EuclideanIndex(KeyIndex):
    """Keys under euclidean distance.

    With c the first key, |q - k|^2 = (q - c).(q + c) - 2 (q - c).k + |k - c|^2. Its rounding error grows with |q - c|
    |k| rather than |q| |k|: activations have a large common part, in which their differences would drown.
    """

    def _origin(self) -> Tensor | None:
        return self.keys[:1]

    def _exact(self, keys: Tensor, sizes: Tensor, queries: Tensor) -> Tensor:
        return _cdist(keys, queries)

    def _bounds(self, queries: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        error, centre = _error(queries.shape[1]), self.keys[:1].double()
        moved = queries.double() - centre
        shift = (moved * (queries.double() + centre)).sum(dim=1, keepdim=True)
        errors = 2 * error * _norms(moved)[:, None]
        farthest = _norms(centre)

        def bounds(block: slice) -> tuple[Tensor, Tensor]:
            sizes = self._sizes.tensor[block]
            squares = self._products(-2 * moved, block) + (shift + sizes.square())
            slack = errors * (sizes + farthest)
            low = (squares - slack).clamp_(min=0).sqrt_().mul_(1 - error).sub_(_TINY)
            return low, squares.add_(slack).clamp_(min=0).sqrt_().mul_(1 + error).add_(_TINY)

        return bounds


class CosineIndex(KeyIndex):
    """Keys under cosine distance: half the squared distance of unit vectors; exact near 0, unlike their product.

    A vector too short for a direction is at distance 1 from everything. Lengths are angles.
    """

    def lengths(self, distances: Tensor) -> Tensor:
        return 2 * (distances / 2).clamp(0, 1).sqrt().asin()

    def distances_of(self, lengths: Tensor) -> Tensor:
        return 2 * (lengths.clamp(0, math.pi) / 2).sin().square()

    def reach(self, radii: Tensor, own_radii: Tensor) -> Tensor:
        # In double precision, because float32 cannot distinguish angles between nearly opposite keys.
        return self.distances_of(self.lengths(radii.double()) + self.lengths(own_radii.double()))

    def _exact(self, keys: Tensor, sizes: Tensor, queries: Tensor) -> Tensor:
        norms, lengths = sizes.float(), _norms(queries).float()
        units = keys / norms.clamp(min=_SHORTEST)[..., None]
        squares = _cdist(units, queries / lengths.clamp(min=_SHORTEST)[..., None]).square()
        return (squares + _missing(norms)[..., :, None] + _missing(lengths)[..., None, :]) / 2

    def _bounds(self, queries: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        error = _error(queries.shape[1])
        units = queries / _norms(queries).clamp(min=_SHORTEST)[:, None]

        def bounds(block: slice) -> tuple[Tensor, Tensor]:
            distances = 1 - self._products(units, block) / self._sizes.tensor[block].clamp(min=_SHORTEST)
            return (distances - error).mul_(1 - error), (distances + error).mul_(1 + error)

        return bounds


def newest_of_least(distances: Tensor) -> Tensor:
    """Returns the (B,) columns with the minimum of (B, N) distances, the last one in a tie."""
    return distances.shape[1] - 1 - distances.flip(1).argmin(dim=1)


def _cdist(keys: Tensor, queries: Tensor) -> Tensor:
    # The other mode multiplies matrices, which is off by up to 0.5 near zero and depends on what else is in the batch.
    return torch.cdist(keys, queries, p=2, compute_mode="donot_use_mm_for_euclid_dist")


def _norms(points: Tensor, origin: Tensor | None = None) -> Tensor:
    """The (..., n) float64 distances of (..., n, D) points from a (1, D) origin."""
    # In cdist, unlike in a sum over a dimension, a row's result is known not to depend on the other rows.
    zero = points.new_zeros(1, points.shape[-1]) if origin is None else origin
    return _cdist(points.double(), zero.double())[..., 0]


def _missing(norms: Tensor) -> Tensor:
    """How far normalised vectors fall short of a squared length of 1: 0 unless the vectors are too short."""
    return 1 - (norms / _SHORTEST).clamp(max=1).square()


def _error(width: int) -> float:
    """An upper bound of the relative error of a float32 sum of `width` products and a few more roundings."""
    return 1.01 * (width + 32) * _UNIT


def _products_are_float32() -> bool:
    """Whether matrices are multiplied in full float32 precision."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Set for a single backend only, in which case PyTorch refuses to give one answer for all.
        return False


def _slices(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
