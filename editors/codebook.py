"""The codebook: keys, values, deferral radii and labels, in front of one layer (Hartvigsen et al. 2023, section 3)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.editors._key_index import CosineIndex, EuclideanIndex, Rows, newest_of_least
from grace_bench.options import check_positive

Label = tuple[int, ...]
Op = Literal["add", "expand", "split", "hit", "relabel"]
Distance = Literal["euclidean", "cosine"]
Fidelity = Literal["strict", "reference"]

# Rounding in another batch may move a query by 1e-5, and so the difference of two distances by twice that; the rest is
# for the rounding of the distances themselves.
_JITTER = 3e-5
_RADIUS_MARGIN = 1e-4
_SAME_KEY = 1e-4
# torch.cdist's own threshold: with more rows than this it multiplies matrices.
_MAX_EXACT_ROWS = 25


@dataclass(frozen=True)
class Settlement:
    """What an edit did to the codebook.

    Attributes:
        op: `add`, `expand`, `split`, `hit` or `relabel`.
        entry: The entry that holds the edit.
        is_new: Whether that entry was made by it.
        distance: Distance to the nearest entry beforehand, None if there was none.
        is_close: Whether rounding in another batch could have decided otherwise.
    """

    op: Op
    entry: int
    is_new: bool
    distance: float | None
    is_close: bool = False


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


class Codebook:
    """Keys, values, radii and labels, growing in amortised constant time.

    `settle` decides what an edit does to keys, radii and labels; it never looks at values. `retrieve` finds the entries
    that answer queries; it never changes anything.

    In `strict` fidelity an edited input is answered by its own entry also when its query moves by 1e-5, as float32
    activations do in another batch. With euclidean distance this holds for `eps_init` above 2e-5, unless two entries of
    the codebook lie within 1e-4 of each other. Cosine distance has no such bound in absolute terms, because it grows as
    queries get shorter: there the promise is about moves of 1e-5 times the query's norm, for queries within a distance
    of 0.5 of an entry.

    Args:
        eps_init: Radius of a new entry.
        distance: `euclidean`, or `cosine` (1 - cosine similarity; 1 to everything for a query of zeros, or nearly so
            for one shorter than 1e-12).
        fidelity: `reference` does what the official code does, its flaws included. `strict` keeps every radius
            non-negative, every edited query inside its own ball, and compares labels rather than their means.
        device: Where the tensors are.
        precision: The dtype that queries were computed in. In bfloat16 and float16 the moves of 1e-5 become moves of a
            third of the dtype's epsilon times the query's norm, and every margin of `strict` grows with them.

    Raises:
        UserError: If `eps_init` is not a positive, finite number.
    """

    def __init__(
        self,
        *,
        eps_init: float,
        distance: Distance = "euclidean",
        fidelity: Fidelity = "strict",
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        check_positive("editor.eps_init", eps_init)
        self.eps_init = eps_init
        self.distance = distance
        self.fidelity = fidelity
        self.precision = precision
        self.labels: list[Label] = []
        self.label_means: list[float] = []
        self._device = torch.device(device)
        index = CosineIndex if distance == "cosine" else EuclideanIndex
        self._index = index(device=self._device)
        self._values = Rows(0, 0, device=self._device)
        self._radii = Rows(0, device=self._device)
        self._label_ids = Rows(0, device=self._device, dtype=torch.long)
        self._id_of_label: dict[Label, int] = {}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> Tensor:
        """(N, D_in) float32, not to be written to."""
        return self._index.keys

    @property
    def values(self) -> Tensor:
        """(N, D_out) float32."""
        return self._values.tensor

    @property
    def radii(self) -> Tensor:
        """(N,) float32 deferral radii, in the units of the distance."""
        return self._radii.tensor

    def distances(self, queries: Tensor) -> Tensor:
        """Returns the (B, N) float32 distances of (B, D_in) queries, of any float dtype, to every key."""
        queries = queries.detach().float()
        if self.fidelity == "strict":
            return self._index.distances(queries)
        if self.distance == "cosine":
            similarity = functional.normalize(queries, dim=-1) @ functional.normalize(self.keys, dim=-1).T
            return (1 - similarity).clamp(min=0)
        # The official code leaves it to cdist, which above 25 rows multiplies matrices: off by up to 0.5 near zero. For
        # 25 queries it would do so too, and then a query's answer would depend on the batch it came in.
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
            entry, nearest = self._index.nearest(queries.detach().float())
        else:
            distances = self.distances(queries)
            entry = distances.argmin(dim=1)
            nearest = distances.gather(1, entry[:, None])[:, 0]
        return Retrieval(entry, nearest, nearest <= self.radii[entry])

    def contested(self, queries: Tensor) -> Tensor:
        """Returns a (B,) bool: which queries lie in the balls of two entries with different labels."""
        least = torch.full((len(queries),), torch.iinfo(torch.long).max, device=queries.device)
        greatest = torch.full_like(least, -1)
        for some, entries, inside in self._inside(queries.detach().float()):
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
        """Decides which entry holds an edit, and makes or changes it (section 3.2, Algorithm 1).

        Args:
            query: (D_in,) the edited input at the query position.
            label: The wanted answer as ids.
            make_value: Gives the (D_out,) starting value if a new entry is made.
            label_mean: Mean over the padded labels, which the official code compares instead of the ids.

        Returns:
            What was done, and the entry that holds the edit.
        """
        query = query.detach().float()
        if not len(self):
            return self._add("add", query, label, make_value, label_mean, self.eps_init, None)
        noise = self._noise(query)
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
        # What strict radii add to a distance is the whole noise, so that an edited input is no close decision again.
        limits = [radius, radius + self.eps_init]
        if self.fidelity == "strict" and label != self.labels[nearest]:
            limits.append(max(noise, self._same_key(nearest)))
        is_close = min(abs(distance - limit) for limit in limits) <= 2 / 3 * noise
        is_close |= int((distances <= distance + noise).sum()) > 1
        if distance > self.eps_init + radius:
            settled = self._add("add", query, label, make_value, label_mean, self.eps_init, distance)
        elif self.fidelity == "reference":
            settled = self._settle_reference(query, label, make_value, label_mean, nearest, distance)
        else:
            near = dict(zip(close.tolist(), distances.tolist(), strict=True))
            settled = self._settle_strict(query, label, make_value, label_mean, nearest, near, noise)
        return replace(settled, is_close=is_close)

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
            self.radii[nearest] = distance / 2 - 1e-5
            return added
        if distance > float(self.radii[nearest]):
            self.radii[nearest] = distance
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
        # So near to being nearest that the query's numerical noise could pick them instead.
        rivals = [entry for entry in near if entry != nearest]
        if label == self.labels[nearest] and not rivals:
            if covering > radius:
                self.radii[nearest] = covering
                return Settlement("expand", nearest, False, distance)
            return Settlement("hit", nearest, False, distance)
        # No radius can tell two inputs apart that are this close, so the later label stands. Between rivals an entry of
        # its own can, as long as the query is not within its own noise of the nearest.
        if distance <= (noise if rivals else max(noise, self._same_key(nearest))):
            self.labels[nearest], self.label_means[nearest] = label, label_mean
            self._label_ids.tensor[nearest] = self._id(label)
            self.radii[nearest] = max(radius, covering)
            return Settlement("relabel", nearest, False, distance)
        others = [entry for entry in (nearest, *rivals) if label != self.labels[entry]]
        for entry in others:
            limit = near[entry] / 2 - noise / 3
            self.radii[entry] = max(0.0, min(float(self.radii[entry]), limit))
        op: Op = "split" if others else "add"
        return self._add(op, query, label, make_value, label_mean, min(self.eps_init, distance / 2), distance)

    def _noise(self, query: Tensor) -> float:
        """The distance by which rounding may move a query in another batch, with some room."""
        if torch.finfo(self.precision).bits >= 32:
            return _JITTER
        size = float(query.norm()) if self.distance == "euclidean" else 1.0
        return max(_JITTER, torch.finfo(self.precision).eps * size)

    def _same_key(self, entry: int) -> float:
        """The distance within which a query counts as the key itself: 1e-4 of the key's norm."""
        norm = float(self.keys[entry].norm()) if self.distance == "euclidean" else 1.0
        return _SAME_KEY * max(1.0, norm)

    def _id(self, label: Label) -> int:
        """One number for each label there ever was."""
        return self._id_of_label.setdefault(label, len(self._id_of_label))

    def _inside(self, queries: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields some queries, some entries, and the bool matrix of which queries lie in which balls."""
        if not len(self):
            return
        if self.fidelity == "strict":
            yield from self._index.inside(queries, self.radii)
        else:
            yield slice(0, len(queries)), slice(0, len(self)), self.distances(queries) <= self.radii

    def _meeting(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yields some entries, some as old or older, and the bool matrix of whose balls meet."""
        if self.fidelity == "strict":
            yield from self._index.meeting(self.radii)
            return
        for i in range(len(self)):
            some = slice(i, i + 1)
            yield some, slice(0, len(self)), self.distances(self.keys[some]) <= self.radii + self.radii[i]

    def _add(
        self,
        op: Op,
        query: Tensor,
        label: Label,
        make_value: Callable[[], Tensor],
        label_mean: float,
        radius: float,
        distance: float | None,
    ) -> Settlement:
        value = make_value().detach().float()
        entry = len(self)
        self._index.extend(query[None])
        self._values.extend(value[None])
        self._radii.extend(torch.tensor([radius]))
        self._label_ids.extend(torch.tensor([self._id(label)]))
        self.labels.append(label)
        self.label_means.append(label_mean)
        return Settlement(op, entry, True, distance)

    def clear(self) -> None:
        """Removes every entry."""
        self.labels, self.label_means, self._id_of_label = [], [], {}
        for rows in (self._index, self._values, self._radii, self._label_ids):
            rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns keys, values, radii, labels and label means."""
        return {
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "radii": self.radii.clone(),
            "labels": [list(label) for label in self.labels],
            "label_means": list(self.label_means),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `state_dict`."""
        sizes = {name: len(state[name]) for name in ("keys", "values", "radii", "labels", "label_means")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"entries differ: {sizes}")
        self.clear()
        self._index.extend(state["keys"])
        self._values.extend(state["values"])
        self._radii.extend(state["radii"])
        self.labels = [tuple(label) for label in state["labels"]]
        self.label_means = [float(mean) for mean in state["label_means"]]
        self._label_ids.extend(torch.tensor([self._id(label) for label in self.labels], dtype=torch.long))
