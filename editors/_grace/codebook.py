"""The codebook: keys, values, deferral radii and labels, in front of one layer (Hartvigsen et al. 2023, section 3)."""

import math
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.common.options import check_positive
from grace_bench.editors._grace.key_index import CosineIndex, EuclideanIndex, newest_of_least
from grace_bench.editors._grace.whitening import Whitening
from grace_bench.editors._rows import Rows
from grace_bench.errors import UserError

Label = tuple[int, ...]
Op = Literal["add", "expand", "split", "hit", "relabel"]
Distance = Literal["euclidean", "cosine", "mahalanobis"]
Fidelity = Literal["strict", "reference"]
Overlap = Literal["allow", "shrink"]

# Rounding in another batch may move a query by 1e-5, and so the difference of two distances by twice that; the rest
# covers the rounding of the distances themselves.
_JITTER = 3e-5
_RADIUS_MARGIN = 1e-4
_SAME_KEY = 1e-4
# The gap between balls of two labels, as a share of the distance of their keys: radii are added in float32.
_GAP = 1e-6
# torch.cdist's own threshold: with more rows than this it multiplies matrices.
_MAX_EXACT_ROWS = 25


@dataclass(frozen=True)
class Before:
    """The part of the codebook that an edit changed, as it was before: enough to undo the edit.

    Attributes:
        n_entries: The number of entries.
        radii: The radii of entries whose radius changed.
        labels: The labels and label means of entries whose label changed.
    """

    n_entries: int
    radii: dict[int, float] = field(default_factory=dict)
    labels: dict[int, tuple[Label, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Settlement:
    """What an edit did to the codebook.

    Attributes:
        op: `add`, `expand`, `split`, `hit` or `relabel`.
        entry: The entry that holds the edit.
        is_new: Whether that entry was made by it.
        distance: Distance to the nearest entry beforehand, None if there was none.
        is_close: Whether rounding in another batch could have decided otherwise.
        before: The argument of `Codebook.undo`.
    """

    op: Op
    entry: int
    is_new: bool
    distance: float | None
    is_close: bool = False
    before: Before = field(default_factory=lambda: Before(0))


@dataclass(frozen=True)
class Retrieval:
    """Which entry answers each of B queries.

    Attributes:
        entry: (B,) long, the nearest entry.
        distance: (B,) its distance.
        hit: (B,) bool, whether the query lies within its radius.
    """

    entry: Tensor
    distance: Tensor
    hit: Tensor


@dataclass(frozen=True)
class _Others:
    """Entries of other labels whose balls reach or nearly reach a ball about a centre, in lengths (see `_length`).

    Attributes:
        entry: (M,) long.
        distance: (M,) float64, from the centre.
        radius: (M,) float64.
        gap: (M,) float64, the least gap between the balls.
    """

    entry: Tensor
    distance: Tensor
    radius: Tensor
    gap: Tensor

    @property
    def room(self) -> float:
        """The largest radius at which a ball about the centre meets none of them; negative inside one."""
        return float((self.distance - self.radius - self.gap).min()) if len(self.entry) else math.inf

    @property
    def most_room(self) -> float:
        """The same once their balls have shrunk to their keys."""
        return float((self.distance - self.gap).min()) if len(self.entry) else math.inf


class Codebook:
    """Keys, values, radii and labels, growing in amortised constant time.

    `settle` decides what an edit does to keys, radii and labels; it never reads values. `retrieve` finds the entries
    that answer queries; it changes nothing.

    In `strict` fidelity an edited input is answered by its own entry even if its query moves by 1e-5, as float32
    activations do in another batch. With euclidean distance this holds for `eps_init` above 2e-5, unless two entries of
    the codebook lie within 1e-4 of each other. Cosine distance has no such bound in absolute terms, because it grows as
    queries get shorter: there the guarantee covers moves of 1e-5 times the query's norm, for queries within a distance
    of 0.5 of an entry. Mahalanobis distance counts a move up to `Whitening.gain` times, and every margin with it.

    With `overlap="shrink"` no two balls of different labels ever intersect: the distance of their keys exceeds the sum
    of their radii (for cosine distance: of the angles), so no query lies in both. A new or growing ball ends where
    another begins; where an entry cannot grow to an edited input, the input gets an entry of its own. Balls of other
    labels shrink in a split, as without this option; one that contains the edited input itself shrinks to half its
    distance from it.

    Args:
        eps_init: Radius of a new entry.
        distance: `euclidean`; `cosine` (1 - cosine similarity; 1 to everything for a query of zeros, or nearly so
            for one shorter than 1e-12); or `mahalanobis`, for which `whiten` must come first.
        fidelity: `reference` reproduces the official code, its flaws included. `strict` keeps every radius
            non-negative, every edited query inside its own ball, and compares labels rather than their means.
        overlap: Whether balls of different labels may overlap: `allow`, as in the paper, or `shrink`.
        device: Where the tensors are.
        precision: The dtype that queries were computed in. In bfloat16 and float16 the moves of 1e-5 become moves of a
            third of the dtype's epsilon times the query's norm, and every margin of `strict` grows with them.

    Raises:
        UserError: If `eps_init` is not a positive, finite number, or an option does not exist in the official code
            and `fidelity` is `reference`.
    """

    def __init__(
        self,
        *,
        eps_init: float,
        distance: Distance = "euclidean",
        fidelity: Fidelity = "strict",
        overlap: Overlap = "allow",
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        check_positive("editor.eps_init", eps_init)
        if fidelity == "reference":
            for option, value, known in (("distance", distance, "mahalanobis"), ("overlap", overlap, "shrink")):
                if value == known:
                    raise UserError(f"editor.{option}={value} needs editor.fidelity=strict: the official code has none")
        self.eps_init = eps_init
        self.distance = distance
        self.fidelity = fidelity
        self.overlap_policy = overlap
        self.precision = precision
        self.whitening: Whitening | None = None
        """Maps keys and queries before their distance is computed; None unless `whiten` was called."""
        self.labels: list[Label] = []
        self.label_means: list[float] = []
        self._device = torch.device(device)
        index = CosineIndex if distance == "cosine" else EuclideanIndex
        self._index = index(device=self._device)
        self._values = Rows(0, 0, device=self._device)
        self._radii = Rows(0, device=self._device)
        self._label_ids = Rows(0, device=self._device, dtype=torch.long)
        self._id_of_label: dict[Label, int] = {}
        self._before = Before(0)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> Tensor:
        """(N, D_in) float32, read-only; whitened for Mahalanobis distance."""
        return self._index.keys

    @property
    def values(self) -> Tensor:
        """(N, D_out) float32."""
        return self._values.tensor

    @property
    def radii(self) -> Tensor:
        """(N,) float32 deferral radii, in the units of the distance."""
        return self._radii.tensor

    @property
    def needs_whitening(self) -> bool:
        """Whether `whiten` must be called before the first entry is added."""
        return self.distance == "mahalanobis" and self.whitening is None

    def whiten(self, activations: Tensor) -> None:
        """Estimates Mahalanobis distance from (n, D_in) activations at queries.

        Raises:
            UserError: If the codebook already has entries, which were measured by another distance, or the activations
                determine no distance.
        """
        if len(self):
            raise UserError("a codebook is whitened before its first entry")
        self.whitening = Whitening.from_activations(activations.to(self._device))

    def distances(self, queries: Tensor) -> Tensor:
        """Returns the (B, N) float32 distances of (B, D_in) queries, of any float dtype, to every key."""
        queries = self._mapped(queries)
        if self.fidelity == "strict":
            return self._index.distances(queries)
        if self.distance == "cosine":
            similarity = functional.normalize(queries, dim=-1) @ functional.normalize(self.keys, dim=-1).T
            return (1 - similarity).clamp(min=0)
        # The official code uses cdist, which multiplies matrices above 25 rows and is then off by up to 0.5 near zero.
        # More than 25 queries would trigger this too, and a query's answer would depend on its batch.
        mode = "use_mm_for_euclid_dist" if len(self) > _MAX_EXACT_ROWS else "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.keys, queries, p=2, compute_mode=mode).T

    def retrieve(self, queries: Tensor) -> Retrieval:
        """Finds the nearest entry of each query.

        Args:
            queries: (B, D_in).

        Raises:
            IndexError: If the codebook is empty.
        """
        if not len(self):
            raise IndexError("the codebook is empty")
        if self.fidelity == "strict":
            entry, nearest = self._index.nearest(self._mapped(queries))
        else:
            distances = self.distances(queries)
            entry = distances.argmin(dim=1)
            nearest = distances.gather(1, entry[:, None])[:, 0]
        return Retrieval(entry, nearest, nearest <= self.radii[entry])

    def contested(self, queries: Tensor) -> Tensor:
        """Returns a (B,) bool: which queries lie in the balls of two entries with different labels."""
        least = torch.full((len(queries),), torch.iinfo(torch.long).max, device=queries.device)
        greatest = torch.full_like(least, -1)
        for some, entries, inside in self._inside(self._mapped(queries)):
            row, column = torch.nonzero(inside, as_tuple=True)
            label_ids = self._label_ids.tensor[entries][column]
            least[some] = least[some].scatter_reduce(0, row, label_ids, "amin")
            greatest[some] = greatest[some].scatter_reduce(0, row, label_ids, "amax")
        return least < greatest

    def overlap(self) -> float:
        """Returns the share of pairs of entries with different labels whose balls intersect; 0 without such pairs."""
        label_ids = self._label_ids.tensor
        alike = torch.unique(label_ids, return_counts=True)[1]
        pairs = (len(self) ** 2 - int(alike.square().sum())) // 2
        intersecting = 0
        numbers = torch.arange(len(self), device=self._device)
        for some, entries, meets in self._meeting():
            older = numbers[entries] < numbers[some, None]
            intersecting += int((meets & older & (label_ids[entries] != label_ids[some, None])).sum())
        return intersecting / pairs if pairs else 0.0

    def settle(self, query: Tensor, label: Label, make_value: Callable[[], Tensor], label_mean: float) -> Settlement:
        """Decides which entry holds an edit, and creates or changes that entry (section 3.2, Algorithm 1).

        Args:
            query: (D_in,) the edited input at the query position.
            label: The wanted answer as ids.
            make_value: Returns the (D_out,) starting value; called only if an entry is created.
            label_mean: Mean over the padded labels, which the official code compares instead of the ids.

        Returns:
            The operation, and the entry that holds the edit.
        """
        self._before = Before(len(self))
        try:
            settled = self._settle(query, label, make_value, label_mean)
        except Exception:
            self.undo(self._before)
            raise
        return replace(settled, before=self._before)

    def undo(self, before: Before) -> None:
        """Undoes the newest edit: restores keys, radii and labels, but not a value that was trained on it.

        Args:
            before: Of the newest edit that has not been undone.
        """
        self._restore(before)
        del self.labels[before.n_entries :], self.label_means[before.n_entries :]
        for rows in (self._index, self._values, self._radii, self._label_ids):
            rows.truncate(before.n_entries)

    def _settle(self, query: Tensor, label: Label, make_value: Callable[[], Tensor], label_mean: float) -> Settlement:
        noise = self._noise(query.detach().float())
        query = self._mapped(query)
        if not len(self):
            return self._add("add", query, label, make_value, label_mean, self.eps_init, None)
        if self.fidelity == "strict":
            close, distances = self._index.near(query, noise)
            position = int(newest_of_least(distances[None]))
        else:
            distances = self.distances(query[None])[0]
            close = torch.arange(len(self))
            position = int(distances.argmin())
        nearest = int(close[position])
        distance = float(distances[position])
        radius = float(self.radii[nearest])
        # Strict radii add the whole noise to a distance, so that the edited input itself is never a close decision
        # later.
        limits = [radius, radius + self.eps_init]
        if self.fidelity == "strict" and label != self.labels[nearest]:
            limits.append(max(noise, self._same_key(nearest)))
        is_close = min(abs(distance - limit) for limit in limits) <= 2 / 3 * noise
        is_close |= int((distances <= distance + noise).sum()) > 1
        if distance > self.eps_init + radius:
            settled = self._add("add", query, label, make_value, label_mean, self.eps_init, distance, noise)
        elif self.fidelity == "reference":
            settled = self._settle_reference(query, label, make_value, label_mean, nearest, distance)
        else:
            near = dict(zip(close.tolist(), distances.tolist(), strict=True))
            settled = self._settle_strict(query, label, make_value, label_mean, nearest, near, noise)
        return replace(settled, is_close=is_close or settled.is_close)

    def _settle_reference(
        self,
        query: Tensor,
        label: Label,
        make_value: Callable[[], Tensor],
        label_mean: float,
        nearest: int,
        distance: float,
    ) -> Settlement:
        if label_mean != self.label_means[nearest]:
            added = self._add("split", query, label, make_value, label_mean, distance / 2, distance)
            self._resize(nearest, distance / 2 - 1e-5)
            return added
        if distance > float(self.radii[nearest]):
            self._resize(nearest, distance)
            return Settlement("expand", nearest, False, distance)
        return Settlement("hit", nearest, False, distance)

    def _settle_strict(
        self,
        query: Tensor,
        label: Label,
        make_value: Callable[[], Tensor],
        label_mean: float,
        nearest: int,
        near: dict[int, float],
        noise: float,
    ) -> Settlement:
        distance, radius = near[nearest], float(self.radii[nearest])
        covering = max(distance * (1 + _RADIUS_MARGIN), distance + noise)
        # Entries so close to the nearest that the query's numerical noise could select them instead.
        rivals = [entry for entry in near if entry != nearest]
        is_close = False
        if label == self.labels[nearest] and not rivals:
            if covering > radius:
                grown, is_close = self._grow(nearest, label, distance, covering, covering, noise)
                if grown:
                    return Settlement("expand", nearest, False, distance, is_close)
                settled = self._add("add", query, label, make_value, label_mean, self.eps_init, distance, noise)
                return replace(settled, is_close=is_close or settled.is_close)
            return Settlement("hit", nearest, False, distance)
        # No radius separates two inputs this close, so the later label wins. Between rivals an entry of its own can, as
        # long as the query is farther from the nearest than its own noise.
        if distance <= (noise if rivals else max(noise, self._same_key(nearest))):
            grown, is_close = self._grow(nearest, label, distance, covering, max(radius, covering), noise)
            if grown:
                self._before.labels[nearest] = (self.labels[nearest], self.label_means[nearest])
                self._label(nearest, label, label_mean)
                return Settlement("relabel", nearest, False, distance, is_close)
        others = [entry for entry in (nearest, *rivals) if label != self.labels[entry]]
        for entry in others:
            self._resize(entry, max(0.0, min(float(self.radii[entry]), self._half(near[entry], noise))))
        op: Op = "split" if others else "add"
        radius = min(self.eps_init, distance / 2)
        settled = self._add(op, query, label, make_value, label_mean, radius, distance, noise)
        return replace(settled, is_close=is_close or settled.is_close)

    def _grow(
        self, entry: int, label: Label, distance: float, covering: float, radius: float, noise: float
    ) -> tuple[bool, bool]:
        """Enlarges an entry's radius and sets its label, unless balls of other labels leave no room.

        Args:
            entry: The entry.
            label: Its label from now on.
            distance: Of the edited input.
            covering: The radius that covers it.
            radius: The wanted radius, at least `covering`.
            noise: Of the query.

        Returns:
            Whether it grew, and whether rounding could have changed that.
        """
        if self.overlap_policy == "allow":
            self._resize(entry, radius)
            return True, False
        others = self._others(self.keys[entry], label, radius, noise, but=entry)
        # An entry that changes its label may overlap entries of its old label, which now must shrink.
        changes = label != self.labels[entry]
        room, needed = others.most_room if changes else others.room, self._length(covering)
        is_same = distance <= noise
        is_close = abs(room - needed) <= 2 / 3 * noise or (room < needed and abs(distance - noise) <= 2 / 3 * noise)
        if room < needed and not is_same:
            return False, is_close
        others = self._push_back(others, needed, noise)
        self._resize(entry, min(radius, self._distance(others.room)))
        return True, is_close

    def _others(self, centre: Tensor, label: Label, radius: float, noise: float, *, but: int | None = None) -> _Others:
        """Finds the entries of other labels whose balls come near a ball of this radius about a (D,) centre."""
        reach = self._index.lengths(self.radii.double()) + (self._length(radius) + noise)
        entry, distance = self._index.within(centre, self._index.distances_of(reach).float())
        other = self._label_ids.tensor[entry] != self._id(label)
        if but is not None:
            other &= entry != but
        entry, length = entry[other], self._index.lengths(distance[other].double())
        return _Others(entry, length, self._index.lengths(self.radii[entry].double()), noise / 3 + _GAP * length)

    def _push_back(self, others: _Others, needed: float, noise: float) -> _Others:
        """Shrinks the balls that are in the way: to half their distance, or further if `needed` requires it."""
        crowding = others.distance - others.radius - others.gap < needed
        most = torch.minimum(others.distance / 2 - noise / 3, others.distance - others.gap - needed).clamp(min=0)
        radius = torch.where(crowding, torch.minimum(others.radius, most), others.radius)
        pushed = zip(
            others.entry[crowding].tolist(), self._index.distances_of(radius[crowding]).float().tolist(), strict=True
        )
        for entry, smaller in pushed:
            self._resize(entry, smaller)
        return replace(others, radius=radius)

    def _resize(self, entry: int, radius: float) -> None:
        self._before.radii.setdefault(entry, float(self.radii[entry]))
        self.radii[entry] = radius

    def _restore(self, before: Before) -> None:
        for entry, radius in before.radii.items():
            self.radii[entry] = radius
        for entry, (label, label_mean) in before.labels.items():
            self._label(entry, label, label_mean)

    def _label(self, entry: int, label: Label, label_mean: float) -> None:
        self.labels[entry], self.label_means[entry] = label, label_mean
        self._label_ids.tensor[entry] = self._id(label)

    def _half(self, distance: float, noise: float) -> float:
        """The radius that a split leaves to an entry at a distance."""
        if self.overlap_policy == "allow":
            return distance / 2 - noise / 3
        return self._distance(self._length(distance) / 2 - noise / 3)

    def _length(self, distance: float) -> float:
        """A distance as a length, which obeys the triangle inequality: for cosine distance the angle."""
        return float(self._index.lengths(torch.tensor(distance, dtype=torch.float64)))

    def _distance(self, length: float) -> float:
        """The distance that corresponds to a length; 0 for a negative length."""
        return float(self._index.distances_of(torch.tensor(length, dtype=torch.float64)))

    def _mapped(self, queries: Tensor) -> Tensor:
        """Queries in the space of the keys: float32, and whitened if the distance is."""
        queries = queries.detach()
        return queries.float() if self.whitening is None else self.whitening(queries)

    def _noise(self, query: Tensor) -> float:
        """The distance, with a margin, by which rounding in another batch may move a query at the layer's input."""
        noise = _JITTER
        if torch.finfo(self.precision).bits < 32:
            size = 1.0 if self.distance == "cosine" else float(query.norm())
            noise = max(_JITTER, torch.finfo(self.precision).eps * size)
        return noise if self.whitening is None else noise * self.whitening.gain

    def _same_key(self, entry: int) -> float:
        """The distance within which a query counts as the key itself: 1e-4 of the key's norm."""
        norm = 1.0 if self.distance == "cosine" else float(self.keys[entry].norm())
        return _SAME_KEY * max(1.0, norm)

    def _id(self, label: Label) -> int:
        """Returns a number for a label, the same whenever the label occurs."""
        return self._id_of_label.setdefault(label, len(self._id_of_label))

    def _inside(self, queries: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields, block by block: queries, entries, and the bool matrix of which queries lie in which balls."""
        if not len(self):
            return
        if self.fidelity == "strict":
            yield from self._index.inside(queries, self.radii)
        else:
            yield slice(0, len(queries)), slice(0, len(self)), self.distances(queries) <= self.radii

    def _meeting(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields, block by block: entries, entries no newer than those, and the bool matrix of whose balls meet."""
        if self.fidelity == "strict":
            yield from self._index.meeting(self.radii)
            return
        for i in range(len(self)):
            some = slice(i, i + 1)
            reach = self._index.reach(self.radii, self.radii[some])
            # A split of the official code can leave a negative radius: a ball that contains nothing.
            reach[(self.radii < 0) | (self.radii[i] < 0)] = -1
            yield some, slice(0, len(self)), self.distances(self.keys[some]) <= reach

    def _add(
        self,
        op: Op,
        query: Tensor,
        label: Label,
        make_value: Callable[[], Tensor],
        label_mean: float,
        radius: float,
        distance: float | None,
        noise: float = _JITTER,
    ) -> Settlement:
        is_close = False
        if self.overlap_policy == "shrink" and len(self):
            others = self._others(query, label, radius, noise)
            needed = 2 / 3 * noise
            slack = others.distance - others.radius - others.gap - needed
            is_close = bool((slack.abs() <= 2 / 3 * noise).any())
            op = "split" if bool((slack < 0).any()) else op
            radius = min(radius, self._distance(self._push_back(others, needed, noise).room))
        value = make_value().detach().float()
        entry = len(self)
        self._index.extend(query[None])
        self._values.extend(value[None])
        self._radii.extend(torch.tensor([radius]))
        self._label_ids.extend(torch.tensor([self._id(label)]))
        self.labels.append(label)
        self.label_means.append(label_mean)
        return Settlement(op, entry, True, distance, is_close)

    def entry_at(self, query: Tensor) -> int | None:
        """Returns the entry whose key is a (D_in,) query, as exactly as passes of the model repeat it; None without."""
        found = self.retrieve(query[None])
        is_key = float(found.distance[0]) <= self._noise(query.detach().float())
        return int(found.entry[0]) if is_key else None

    def remove(self, entry: int) -> None:
        """Removes an entry; the others stay as they are, and those after it move up."""
        if len(self) == 1:
            self.clear()
            return
        state = self.state_dict()
        kept = [other for other in range(len(self)) if other != entry]
        rows = {name: state[name][kept] for name in ("keys", "values", "radii")}
        lists = {name: [state[name][other] for other in kept] for name in ("labels", "label_means")}
        self.load_state_dict({**state, **rows, **lists})

    def clear(self) -> None:
        """Removes every entry; the distance stays the same."""
        self.labels, self.label_means, self._id_of_label = [], [], {}
        for rows in (self._index, self._values, self._radii, self._label_ids):
            rows.clear()

    def as_it_was(self, before: Before, values: Tensor) -> "Codebook":
        """Returns a read-only view of the codebook before some edits; keys never change.

        Args:
            before: `before` of these edits merged, the oldest for each entry.
            values: (n, D_out) the values then.
        """
        past, n = copy(self), before.n_entries
        past.labels, past.label_means = self.labels[:n], self.label_means[:n]
        past._index, past._values = self._index.first(n), Rows.of(values)
        past._radii, past._label_ids = (Rows.of(rows.tensor[:n].clone()) for rows in (self._radii, self._label_ids))
        past._restore(before)
        return past

    def state_dict(self) -> dict[str, Any]:
        """Returns keys, values, radii, labels and label means, and the whitening of queries."""
        whitening = self.whitening
        return {
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "radii": self.radii.clone(),
            "labels": [list(label) for label in self.labels],
            "label_means": list(self.label_means),
            **({} if whitening is None else {"whitening": whitening.matrix, "whitening_mean": whitening.mean}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        sizes = {name: len(state[name]) for name in ("keys", "values", "radii", "labels", "label_means")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"entries differ: {sizes}")
        self.clear()
        if self.distance == "mahalanobis" and "whitening" in state:
            self.whitening = Whitening(state["whitening_mean"].to(self._device), state["whitening"].to(self._device))
        self._index.extend(state["keys"])
        self._values.extend(state["values"])
        self._radii.extend(state["radii"])
        self.labels = [tuple(label) for label in state["labels"]]
        self.label_means = [float(mean) for mean in state["label_means"]]
        self._label_ids.extend(torch.tensor([self._id(label) for label in self.labels], dtype=torch.long))
