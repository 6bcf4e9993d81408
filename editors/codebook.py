"""The codebook: keys, values, deferral radii and labels, in front of one layer (Hartvigsen et al. 2023, section 3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

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
    """

    op: Op
    entry: int
    is_new: bool
    distance: float | None


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
        self._keys = torch.empty(0, 0, device=self._device)
        self._values = torch.empty(0, 0, device=self._device)
        self._radii = torch.empty(0, device=self._device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def keys(self) -> Tensor:
        """(N, D_in) float32."""
        return self._keys[: len(self)]

    @property
    def values(self) -> Tensor:
        """(N, D_out) float32."""
        return self._values[: len(self)]

    @property
    def radii(self) -> Tensor:
        """(N,) float32 deferral radii, in the units of the distance."""
        return self._radii[: len(self)]

    def distances(self, queries: Tensor) -> Tensor:
        """Returns the (B, N) float32 distances of (B, D_in) queries, of any float dtype, to every key."""
        queries = queries.float()
        if self.distance == "cosine":
            similarity = functional.normalize(queries, dim=-1) @ functional.normalize(self.keys, dim=-1).T
            return (1 - similarity).clamp(min=0)
        # Multiplying matrices is off by up to 0.5 near zero. The official code does it above 25 entries; cdist left to
        # itself would also do it for 25 queries, and then a query's answer would depend on the batch it came in.
        official = self.fidelity == "reference" and len(self) > _MAX_EXACT_ROWS
        mode = "use_mm_for_euclid_dist" if official else "donot_use_mm_for_euclid_dist"
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
        distances = self.distances(queries)
        entry = self._nearest(distances)
        nearest = distances.gather(1, entry[:, None])[:, 0]
        return Retrieval(entry, nearest, nearest <= self.radii[entry])

    def contested(self, queries: Tensor) -> Tensor:
        """Returns a (B,) bool: which queries lie in the balls of two entries with different labels."""
        if not len(self):
            return torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
        inside = self.distances(queries) <= self.radii
        label_ids = self._label_ids().expand_as(inside)
        highest = torch.where(inside, label_ids, -1).amax(dim=1)
        lowest = torch.where(inside, label_ids, len(self)).amin(dim=1)
        return inside.any(dim=1) & (highest != lowest)

    def overlap(self) -> float:
        """Returns the share of pairs of entries with different labels whose balls intersect; 0 without such pairs."""
        pairs = intersecting = 0
        label_ids = self._label_ids()
        for i in range(1, len(self)):
            different = label_ids[:i] != label_ids[i]
            reach = self.radii[:i] + self.radii[i]
            pairs += int(different.sum())
            intersecting += int((different & (self.distances(self.keys[i : i + 1])[0, :i] <= reach)).sum())
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
        distances = self.distances(query[None])
        nearest = int(self._nearest(distances)[0])
        distance = float(distances[0, nearest])
        radius = float(self.radii[nearest])
        if distance > self.eps_init + radius:
            return self._add("add", query, label, make_value, label_mean, self.eps_init, distance)
        if self.fidelity == "reference":
            return self._settle_reference(query, label, make_value, label_mean, nearest, distance)
        noise = self._noise(query)
        return self._settle_strict(query, label, make_value, label_mean, nearest, distances[0], noise)

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
            self._radii[nearest] = distance / 2 - 1e-5
            return added
        if distance > float(self.radii[nearest]):
            self._radii[nearest] = distance
            return Settlement("expand", nearest, False, distance)
        return Settlement("hit", nearest, False, distance)

    def _settle_strict(
        self,
        query: Tensor,
        label: Label,
        make_value: Callable[[], Tensor],
        label_mean: float,
        nearest: int,
        distances: Tensor,
        noise: float,
    ) -> Settlement:
        distance, radius = float(distances[nearest]), float(self.radii[nearest])
        covering = max(distance * (1 + _RADIUS_MARGIN), distance + noise)
        rivals = self._rivals(distances, nearest, noise)
        if label == self.labels[nearest] and not rivals:
            if covering > radius:
                self._radii[nearest] = covering
                return Settlement("expand", nearest, False, distance)
            return Settlement("hit", nearest, False, distance)
        # No radius can tell two inputs apart that are this close, so the later label stands. Between rivals an entry of
        # its own can, as long as the query is not within its own noise of the nearest.
        if distance <= (noise if rivals else max(noise, self._same_key(nearest))):
            self.labels[nearest], self.label_means[nearest] = label, label_mean
            self._radii[nearest] = max(radius, covering)
            return Settlement("relabel", nearest, False, distance)
        others = [entry for entry in (nearest, *rivals) if label != self.labels[entry]]
        for entry in others:
            limit = float(distances[entry]) / 2 - noise / 3
            self._radii[entry] = max(0.0, min(float(self.radii[entry]), limit))
        op: Op = "split" if others else "add"
        return self._add(op, query, label, make_value, label_mean, min(self.eps_init, distance / 2), distance)

    def _noise(self, query: Tensor) -> float:
        """The distance by which rounding may move a query in another batch, with some room."""
        if torch.finfo(self.precision).bits >= 32:
            return _JITTER
        size = float(query.norm()) if self.distance == "euclidean" else 1.0
        return max(_JITTER, torch.finfo(self.precision).eps * size)

    def _rivals(self, distances: Tensor, nearest: int, noise: float) -> list[int]:
        """Entries so near to being nearest that the query's numerical noise could pick them instead."""
        close = torch.nonzero(distances <= distances[nearest] + noise)[:, 0].tolist()
        return [entry for entry in close if entry != nearest]

    def _same_key(self, entry: int) -> float:
        """The distance within which a query counts as the key itself: 1e-4 of the key's norm."""
        norm = float(self.keys[entry].norm()) if self.distance == "euclidean" else 1.0
        return _SAME_KEY * max(1.0, norm)

    def _label_ids(self) -> Tensor:
        """(N,) one number a distinct label."""
        ids = {label: i for i, label in enumerate(dict.fromkeys(self.labels))}
        return torch.tensor([ids[label] for label in self.labels], dtype=torch.long, device=self._device)

    def _nearest(self, distances: Tensor) -> Tensor:
        if self.fidelity == "reference":
            return distances.argmin(dim=1)
        # Of two entries at one distance the newest wins.
        return distances.shape[1] - 1 - distances.flip(1).argmin(dim=1)

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
        n = len(self)
        if n == len(self._radii):
            capacity = max(16, 2 * n)
            self._keys = self._grown(self._keys, (capacity, len(query)))
            self._values = self._grown(self._values, (capacity, len(value)))
            self._radii = self._grown(self._radii, (capacity,))
        self._keys[n], self._values[n], self._radii[n] = query, value, radius
        self.labels.append(label)
        self.label_means.append(label_mean)
        return Settlement(op, n, True, distance)

    def _grown(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        grown = torch.empty(shape, device=self._device)
        if len(self):
            grown[: len(self)] = tensor
        return grown

    def clear(self) -> None:
        """Removes every entry."""
        self.labels, self.label_means = [], []
        self._keys, self._values = self._keys.new_empty(0, 0), self._values.new_empty(0, 0)
        self._radii = self._radii.new_empty(0)

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
        self._keys, self._values, self._radii = (
            state[name].to(self._device).clone() for name in ("keys", "values", "radii")
        )
        self.labels = [tuple(label) for label in state["labels"]]
        self.label_means = [float(mean) for mean in state["label_means"]]
        sizes = {name: len(state[name]) for name in ("keys", "values", "radii", "labels", "label_means")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"entries differ: {sizes}")
