"""Distances at which rounding may have decided differently on the machine of a recording."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from grace_bench.editors._grace.record import RecordedStep

MAX_EXACT_ROWS = 25
"""With more entries than this, the official code computes distances by a matrix product."""


class Rounding:
    """Intercepts the editor's distances and decides where rounding may."""

    def __init__(self, codebook: Any) -> None:
        self._codebook = codebook
        self._computed = codebook.distances
        self._recorded: Callable[[Tensor], tuple[int, float] | None] | None = None
        self._forced: tuple[int, bool] | None = None
        codebook.distances = self._distances

    @contextmanager
    def forced(self, entry: int, hit: bool) -> Iterator[None]:
        """Lets one entry, or none, answer every query."""
        outer, self._forced = self._forced, (entry, hit)
        try:
            yield
        finally:
            self._forced = outer

    @contextmanager
    def as_recorded(
        self, previous: list[float], step: RecordedStep, label_mean: float
    ) -> Iterator[dict[int, tuple[int, float] | None]]:
        """Gives one edit its recorded distances, as far as rounding can explain them.

        Args:
            previous: The recorded radii before the edit.
            step: The record of the edit.
            label_mean: The mean of its labels.

        Yields:
            The entry assumed nearest and its distance, by the number of entries at the time (before the edit, and while
            its value is trained); None where rounding decides nothing.
        """
        n_before = len(self._codebook)
        believed: dict[int, tuple[int, float] | None] = {}

        def recorded(query: Tensor) -> tuple[int, float] | None:
            n = len(self._codebook)
            if n not in believed:
                settled = believed.get(n_before)
                belief = (
                    self._settled(query, previous, step, label_mean)
                    if n == n_before
                    else self._trained(query, step, settled and settled[1])
                )
                believed[n] = None if belief is None or self._is_computed(query, *belief) else belief
            return believed[n]

        self._recorded = recorded
        try:
            yield believed
        finally:
            self._recorded = None

    def possible(self, query: Tensor) -> list[tuple[int, bool]]:
        """Returns the entries that may answer a (1, D) query, and with false the one that may not."""
        low, high = self._bounds(query)
        radii = self._codebook.radii
        near = _near(low, high)
        hits = [(entry, True) for entry in near if low[entry] <= radii[entry]]
        misses = [(entry, False) for entry in near if high[entry] > radii[entry]]
        return hits + misses[:1]

    def _distances(self, queries: Tensor) -> Tensor:
        if self._forced is not None:
            entry, hit = self._forced
            distances = torch.full((len(queries), len(self._codebook)), math.inf)
            distances[:, entry] = -math.inf if hit else math.inf
            return distances
        computed: Tensor = self._computed(queries)
        if self._recorded is None:
            return computed
        believed = self._recorded(queries)
        if believed is None:
            return computed
        entry, distance = believed
        nearest = torch.tensor(distance)
        distances = computed.clamp(min=float(torch.nextafter(nearest, torch.tensor(math.inf))))
        distances[:, entry] = nearest
        return distances

    def _settled(
        self, query: Tensor, previous: list[float], step: RecordedStep, label_mean: float
    ) -> tuple[int, float] | None:
        low, high = self._bounds(query)
        near = _near(low, high)
        grew = step.n_keys > len(self._codebook)
        # A split derives its radii from the distance, so after a distance of zero they are noise.
        if not self._is_open(near, low, high) and not (grew and low[near[0]] == 0):
            return None
        fitting = [entry for entry in near if (self._codebook.label_means[entry] != label_mean) == grew] or near

        def evidence(entry: int) -> tuple[bool, bool, bool, int]:
            after = step.epsilons[entry : entry + 1]
            halved = grew and bool(after) and abs(step.epsilons[-1] - after[0] - 1e-5) < 2e-6
            return halved, previous[entry : entry + 1] != after, entry == step.chosen_key, -entry

        entry = max(fitting, key=evidence)
        moved = evidence(entry)[1]
        radius = float(self._codebook.radii[entry])
        if grew:
            distance = 2 * step.epsilons[-1] if step.epsilons else 0.0
        elif moved and entry < min(len(previous), len(step.epsilons)):
            distance = radius + step.epsilons[entry] - previous[entry]
        else:
            distance = min(radius, float(self._computed(query)[0, entry]))
        return entry, _clip(distance, low[entry], high[entry])

    def _trained(self, query: Tensor, step: RecordedStep, settled: float | None) -> tuple[int, float] | None:
        low, high = self._bounds(query)
        near = _near(low, high)
        entry = step.chosen_key
        if entry not in near or not self._is_open(near, low, high):
            return None
        radius = self._codebook.radii[entry]
        distance = float(self._computed(query)[0, entry]) if settled is None else settled
        # A value that no query reaches keeps its loss.
        if step.loss_first != step.loss_last:
            distance = min(distance, float(radius))
        else:
            distance = max(distance, float(torch.nextafter(radius, torch.tensor(math.inf))))
        return entry, _clip(distance, low[entry], high[entry])

    def _is_computed(self, query: Tensor, entry: int, distance: float) -> bool:
        """Whether the computed distances decide the same and are exact, so that nothing has to be assumed."""
        if len(self._codebook) > MAX_EXACT_ROWS:
            return False
        computed = self._computed(query)[0]
        radius = float(self._codebook.radii[entry])
        return int(computed.argmin()) == entry and (float(computed[entry]) <= radius) == (distance <= radius)

    def _is_open(self, near: list[int], low: Tensor, high: Tensor) -> bool:
        """Whether rounding decides which entry is nearest, or whether it reaches the query."""
        radii = self._codebook.radii
        return len(near) > 1 or bool(low[near[0]] <= radii[near[0]] <= high[near[0]])

    def _bounds(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The (N,) least and greatest distances that the official code may compute on another machine."""
        keys, query = self._codebook.keys.double(), query[0].double()
        squares = (keys - query).square().sum(dim=1)
        unit = torch.finfo(torch.float32).eps
        if len(keys) > MAX_EXACT_ROWS:
            # A few units in the last place of the terms that cancel; measured: up to 2 for 32 to 512 dimensions.
            error = 8 * unit * (keys.square().sum(dim=1) + query.square().sum())
            return (squares - error).clamp(min=0).sqrt(), (squares + error).sqrt()
        # Processors differ in the last bits of a layer's input, so a repeated prompt has a distance of zero on one and
        # of a few units in the last place on another.
        error = 4 * unit * (keys.norm(dim=1) + query.norm())
        return (squares.sqrt() - error).clamp(min=0), squares.sqrt() + error


def _near(low: Tensor, high: Tensor) -> list[int]:
    """The entries that may be nearest."""
    return [int(entry) for entry in torch.nonzero(low <= high.min())[:, 0]]


def _clip(distance: float, low: Tensor, high: Tensor) -> float:
    return min(max(distance, float(low)), float(high))
