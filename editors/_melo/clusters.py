"""MELO's vector database: clusters of edited inputs that choose low-rank blocks (Yu et al. 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from grace_bench.editors._grace.codebook import Before, Codebook, Fidelity, Label, Op, Retrieval, Settlement
from grace_bench.editors._grace.key_index import EuclideanIndex
from grace_bench.editors._rows import Rows

NO_BLOCK = -1
_DROPPED = -1
"""The cluster of a point that was dropped."""
_GAP = 1e-5
"""How much smaller and larger than half their distance the balls of two clusters are after a split."""


@dataclass(frozen=True)
class ClustersBefore(Before):
    """The part of the clusters that a batch changed, as it was before: enough to undo the batch.

    Attributes:
        n_points: The number of points.
        centers: The (D,) centers of clusters that moved.
        dropped: The clusters of points that were dropped.
    """

    n_points: int = 0
    centers: dict[int, Tensor] = field(default_factory=dict)
    dropped: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment(Settlement):
    """What an edit did to the clusters; a point that joined one is an `expand`.

    Attributes:
        nearest: In a split, the other cluster.
        n_points: How many points it had.
        n_kept: How many of these are still in it.
    """

    nearest: int | None = None
    n_points: int = 0
    n_kept: int = 0


class Clusters(Codebook):
    """A codebook whose entries are clusters of edited inputs, each of which chooses a block.

    An entry's key is the center of its cluster, the mean of the points in it. A point is the query of an edited input
    with the block that holds its answer. An edit whose query is farther than radius plus `init_radius` from the nearest
    center begins a cluster. Otherwise its point joins the cluster if the label is the same; if not, it begins a cluster
    of its own, the radii of both become half their distance, and the other cluster drops the points that are then
    outside. A cluster without points keeps one at its center that chooses no block.

    In `strict` fidelity an edit is answered by its own block even if its query moves by 1e-5 (see `Codebook`), until a
    later split drops its point. Labels are compared by their ids. A repeated edit replaces its earlier point. Where two
    labels have the same query, the later one wins. A split enlarges no ball, nor begins with one larger than
    `init_radius`. Each row of a batch finds the clusters as the rows before it left them.

    Args:
        init_radius: Radius of a new cluster.
        fidelity: `reference` reproduces the official code.
        device: Where the tensors are.
        precision: The dtype that queries were computed in.
    """

    def __init__(
        self,
        *,
        init_radius: float,
        fidelity: Fidelity,
        device: torch.device | str = "cpu",
        precision: torch.dtype = torch.float32,
    ) -> None:
        # Distances are exact in both fidelities.
        super().__init__(eps_init=init_radius, device=device, precision=precision)
        self.is_reference = fidelity == "reference"
        self._points = EuclideanIndex(device=self._device)
        self._homes = Rows(0, device=self._device, dtype=torch.long)
        self._blocks = Rows(0, device=self._device, dtype=torch.long)
        self._changed = ClustersBefore(0)

    @property
    def n_points(self) -> int:
        """The number of points in clusters."""
        return int((self._homes.tensor != _DROPPED).sum())

    def blocks_of(self, cluster: int) -> list[int]:
        """Returns the blocks of a cluster's points, the oldest first."""
        blocks: list[int] = self._blocks.tensor[self._homes.tensor == cluster].tolist()
        return blocks

    def retrieve(self, queries: Tensor) -> Retrieval:
        if not self.is_reference:
            return super().retrieve(queries)
        distances = self.distances(queries)
        # The first minimum, where the index would take the last.
        entry = distances.argmin(dim=1)
        nearest = distances.gather(1, entry[:, None])[:, 0]
        return Retrieval(entry, nearest, nearest <= self.radii[entry])

    def choose(self, queries: Tensor) -> tuple[Retrieval, Tensor]:
        """Chooses a block for each query: that of the nearest point in the nearest cluster, if it is in its radius.

        Args:
            queries: (B, D).

        Returns:
            The clusters, and the (B,) blocks, `NO_BLOCK` for none.
        """
        found = self.retrieve(queries)
        row, point, distance = self._points.among(queries.float(), self._homes.tensor == found.entry[:, None])
        least = distance.new_full((len(queries),), torch.inf).scatter_reduce(0, row, distance, "amin")
        nearest = distance == least[row]
        # Several points in one place: the official code takes the oldest.
        first, how = (self._n_all, "amin") if self.is_reference else (-1, "amax")
        chosen = point.new_full((len(queries),), first).scatter_reduce(0, row[nearest], point[nearest], how)
        return found, torch.where(found.hit, self._blocks.tensor[chosen], NO_BLOCK)

    def assign(
        self, queries: Tensor, labels: Sequence[Label], label_sums: Sequence[float], block: int
    ) -> list[Assignment]:
        """Puts the edits of a batch into clusters.

        Args:
            queries: (N, D).
            labels: N wanted answers as ids.
            label_sums: N sums of the ids, which the official code compares instead.
            block: The block that is trained on the batch.

        Returns:
            What was done for each edit; `before` of the last one undoes all.
        """
        self._before = self._changed = ClustersBefore(len(self), n_points=self._n_all)
        edits = zip(queries.detach().float(), labels, label_sums, strict=True)
        try:
            if self.is_reference:
                settled = self._assign_as_found(queries, [*edits], block)
            else:
                settled = [self._assign_strict(*edit, block) for edit in edits]
        except Exception:
            self.undo(self._changed)
            raise
        return [replace(one, before=self._changed) for one in settled]

    def unlink(self, query: Tensor) -> None:
        """Lets the points at a (D,) query choose no block; clusters stay as they are."""
        if not self._n_all:
            return
        kept = self._homes.tensor != _DROPPED
        _, point, distance = self._points.among(query.detach().float()[None], kept[None])
        self._blocks.tensor[point[distance <= self._noise(query)]] = NO_BLOCK

    def undo(self, before: Before) -> None:
        super().undo(before)
        assert isinstance(before, ClustersBefore)
        for entry, center in before.centers.items():
            self._index.move(entry, center)
        for point, home in before.dropped.items():
            self._homes.tensor[point] = home
        for rows in (self._points, self._homes, self._blocks):
            rows.truncate(before.n_points)

    def clear(self) -> None:
        super().clear()
        for rows in (self._points, self._homes, self._blocks):
            rows.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns the clusters as `Codebook.state_dict` does, and the points with their clusters and blocks."""
        kept = self._homes.tensor != _DROPPED
        points = {
            "points": self._points.keys,
            "point_clusters": self._homes.tensor,
            "point_blocks": self._blocks.tensor,
        }
        return {**super().state_dict(), **{name: rows[kept] for name, rows in points.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._points.extend(state["points"])
        self._homes.extend(state["point_clusters"])
        self._blocks.extend(state["point_blocks"])

    @property
    def _n_all(self) -> int:
        """The number of points, dropped ones included."""
        return len(self._homes.tensor)

    def _assign_as_found(
        self, queries: Tensor, edits: Sequence[tuple[Tensor, Label, float]], block: int
    ) -> list[Assignment]:
        """Assigns as the official code: every row finds the clusters as they were before the batch."""
        if not len(self):
            return [self._begin("add", *edit, block, self.eps_init, None) for edit in edits]
        found = self.retrieve(queries)
        settled = []
        for edit, nearest, distance in zip(edits, found.entry.tolist(), found.distance.tolist(), strict=True):
            query, _, label_sum = edit
            if distance > float(self.radii[nearest]) + self.eps_init:
                settled.append(self._begin("add", *edit, block, self.eps_init, distance))
            elif label_sum == self.label_means[nearest]:
                self._join(nearest, query, block)
                settled.append(Assignment("expand", nearest, False, distance))
            else:
                begun = self._begin("split", *edit, block, distance / 2 + _GAP, distance)
                settled.append(self._shrink(nearest, distance / 2 - _GAP, begun))
        return settled

    def _assign_strict(self, query: Tensor, label: Label, label_sum: float, block: int) -> Assignment:
        edit, noise = (query, label, label_sum, block), self._noise(query)
        if not len(self):
            return self._begin("add", *edit, self.eps_init, None)
        close, distances = self._index.near(query, noise)
        position = len(distances) - 1 - int(distances.flip(0).argmin())
        nearest, distance = int(close[position]), float(distances[position])
        radius = float(self.radii[nearest])
        same = max(noise, self._same_key(nearest))
        limits = (radius + self.eps_init, same)
        is_close = min(abs(distance - limit) for limit in limits) <= noise or len(close) > 1
        if distance > radius + self.eps_init:
            settled = self._begin("add", *edit, self.eps_init, distance)
        elif label == self.labels[nearest]:
            self._drop(self._members(nearest, around=query, within=same))
            self._join(nearest, query, block, noise=noise)
            settled = Assignment("expand", nearest, False, distance)
        elif distance <= same:
            # No radius separates them.
            self._before.labels.setdefault(nearest, (self.labels[nearest], self.label_means[nearest]))
            self._label(nearest, label, label_sum)
            self._drop(self._members(nearest))
            self._resize(nearest, max(noise, min(radius, self.eps_init)))
            self._add_point(query, nearest, block)
            self._move(nearest, query)
            settled = Assignment("relabel", nearest, False, distance)
        else:
            half = distance / 2 - noise / 3
            begun = self._begin("split", *edit, min(self.eps_init, distance / 2), distance)
            settled = self._shrink(nearest, min(radius, half), begun)
        return replace(settled, is_close=is_close)

    def _begin(
        self,
        op: Op,
        query: Tensor,
        label: Label,
        label_sum: float,
        block: int,
        radius: float,
        distance: float | None,
    ) -> Assignment:
        """Adds a cluster with one point."""
        # A cluster has points where an entry of GRACE has a value.
        entry = self._add(op, query, label, lambda: torch.empty(0), label_sum, radius, distance).entry
        self._add_point(query, entry, block)
        return Assignment(op, entry, True, distance)

    def _join(self, cluster: int, query: Tensor, block: int, *, noise: float = 0.0) -> None:
        """Adds a point to a cluster, whose center and radius follow."""
        if not self.is_reference:
            self._drop(self._members(cluster) & (self._blocks.tensor == NO_BLOCK))
        self._add_point(query, cluster, block)
        members = self._points.keys[self._members(cluster)]
        self._move(cluster, members.mean(dim=0))
        farthest = float(self._distances_to(cluster, members).max())
        self._resize(cluster, max(farthest + noise, self.eps_init))

    def _shrink(self, cluster: int, radius: float, begun: Assignment) -> Assignment:
        """Shrinks a cluster, which drops the points that are outside, beside one that an edit began."""
        self._resize(cluster, radius)
        members = self._members(cluster).nonzero()[:, 0]
        outside = self._distances_to(cluster, self._points.keys[members]) > radius
        self._drop(torch.zeros_like(self._homes.tensor, dtype=torch.bool).index_fill(0, members[outside], True))
        if bool(outside.all()):
            self._add_point(self.keys[cluster], cluster, NO_BLOCK)
        return replace(begun, nearest=cluster, n_points=len(members), n_kept=len(members) - int(outside.sum()))

    def _members(self, cluster: int, *, around: Tensor | None = None, within: float = 0.0) -> Tensor:
        """(P,) bool, the points of a cluster, all or those within a distance of a query."""
        members = self._homes.tensor == cluster
        if around is not None:
            _, point, distance = self._points.among(around[None], members[None])
            members = members.index_fill(0, point[distance > within], False)
        return members

    def _distances_to(self, cluster: int, points: Tensor) -> Tensor:
        """(n,) distances of (n, D) points to a center."""
        row = torch.arange(len(points), device=points.device)[:, None]
        everyone = torch.arange(len(self), device=points.device) == cluster
        return self._index.among(points, everyone.expand(len(row), -1))[2]

    def _add_point(self, query: Tensor, cluster: int, block: int) -> None:
        self._points.extend(query[None])
        self._homes.extend(torch.tensor([cluster]))
        self._blocks.extend(torch.tensor([block]))

    def _drop(self, points: Tensor) -> None:
        """Drops the points of a (P,) bool from their clusters."""
        for point in points.nonzero()[:, 0].tolist():
            if point < self._changed.n_points:
                self._changed.dropped.setdefault(point, int(self._homes.tensor[point]))
            self._homes.tensor[point] = _DROPPED

    def _move(self, cluster: int, center: Tensor) -> None:
        if cluster < self._changed.n_entries:
            self._changed.centers.setdefault(cluster, self.keys[cluster].clone())
        self._index.move(cluster, center)
