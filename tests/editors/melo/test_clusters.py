"""MELO's clusters: against the same rules written out over lists, and what `strict` promises."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_bench.editors._melo.clusters import NO_BLOCK, Clusters

RADIUS = 1.0
Batch = list[tuple[list[float], tuple[int, ...]]]


def random_batches(seed: int, *, n_batches: int = 12, n_rows: int = 3, apart: float = 0.0) -> list[Batch]:
    """Points in the plane, some of them repeated or this far apart, with few labels of which two have the same sum."""
    rng = random.Random(seed)
    labels = [(1, 2), (3,), (7,)]
    places: list[list[float]] = []
    batches = []
    for _ in range(n_batches):
        batch: Batch = []
        for _ in range(rng.randint(1, n_rows)):
            again = places and rng.random() < 0.25
            place = [rng.uniform(0, 6), rng.uniform(0, 6)]
            if again:
                place = [axis + rng.uniform(-apart, apart) for axis in rng.choice(places)]
            places.append(place)
            batch.append((place, rng.choice(labels)))
        batches.append(batch)
    return batches


def assign(clusters: Clusters, batch: Batch, block: int) -> Any:
    queries = torch.tensor([place for place, _ in batch])
    labels = [label for _, label in batch]
    return clusters.assign(queries, labels, [float(sum(label)) for label in labels], block)


class Listed:
    """The official rules over lists: clusters are dictionaries, points are pairs of a place and a block."""

    def __init__(self) -> None:
        self.clusters: list[dict[str, Any]] = []

    def nearest(self, place: list[float]) -> tuple[int, float]:
        return min(((i, math.dist(one["center"], place)) for i, one in enumerate(self.clusters)), key=lambda x: x[1])

    def assign(self, batch: Batch, block: int) -> None:
        found = [self.nearest(place) if self.clusters else (0, math.inf) for place, _ in batch]
        for (place, label), (index, distance) in zip(batch, found, strict=True):
            new = {"center": place, "radius": RADIUS, "sum": sum(label), "points": [(place, block)]}
            if distance == math.inf or distance > self.clusters[index]["radius"] + RADIUS:
                self.clusters.append(new)
                continue
            one = self.clusters[index]
            if one["sum"] == sum(label):
                one["points"].append((place, block))
                places = [point for point, _ in one["points"]]
                one["center"] = [sum(axis) / len(places) for axis in zip(*places, strict=True)]
                one["radius"] = max(RADIUS, *(math.dist(point, one["center"]) for point in places))
                continue
            self.clusters.append(new)
            one["radius"], new["radius"] = distance / 2 - 1e-5, distance / 2 + 1e-5
            one["points"] = [x for x in one["points"] if math.dist(x[0], one["center"]) <= one["radius"]]
            one["points"] = one["points"] or [(one["center"], NO_BLOCK)]

    def choose(self, place: list[float]) -> int:
        index, distance = self.nearest(place)
        if distance > self.clusters[index]["radius"]:
            return NO_BLOCK
        block: int = min(self.clusters[index]["points"], key=lambda point: math.dist(point[0], place))[1]
        return block


@pytest.mark.parametrize("seed", range(8))
def test_reference_does_what_the_rules_say(seed: int) -> None:
    clusters, listed = Clusters(init_radius=RADIUS, fidelity="reference"), Listed()
    # Of centers in one place the last bit would decide which is nearest.
    for block, batch in enumerate(random_batches(seed, apart=0.05)):
        assign(clusters, batch, block)
        listed.assign(batch, block)
        assert len(clusters) == len(listed.clusters)
        assert clusters.radii.tolist() == pytest.approx([one["radius"] for one in listed.clusters], abs=1e-5)
        assert clusters.keys.flatten().tolist() == pytest.approx(
            [axis for one in listed.clusters for axis in one["center"]], abs=1e-5
        )
        blocks = [[block for _, block in one["points"]] for one in listed.clusters]
        assert [clusters.blocks_of(i) for i in range(len(clusters))] == blocks
    rng = random.Random(seed)
    places = [[rng.uniform(0, 6), rng.uniform(0, 6)] for _ in range(50)]
    assert clusters.choose(torch.tensor(places))[1].tolist() == [listed.choose(place) for place in places]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("fidelity", ["strict", "reference"])
@pytest.mark.parametrize("seed", range(4))
def test_every_batch_can_be_undone_and_a_saved_state_continues_alike(seed: int, fidelity: Any) -> None:
    clusters, resumed = (Clusters(init_radius=RADIUS, fidelity=fidelity) for _ in range(2))
    states, changes = [clusters.state_dict()], []
    batches = random_batches(seed)
    for block, batch in enumerate(batches):
        changes.append(assign(clusters, batch, block)[-1].before)
        states.append(clusters.state_dict())
    resumed.load_state_dict(states[6])
    for block in range(6, len(batches)):
        assign(resumed, batches[block], block)
    assert same(resumed.state_dict(), states[-1])
    probes = torch.rand(40, 2, generator=torch.Generator().manual_seed(seed)) * 6
    assert torch.equal(resumed.choose(probes)[1], clusters.choose(probes)[1])
    for before, state in zip(reversed(changes), reversed(states[:-1]), strict=True):
        clusters.undo(before)
        assert same(clusters.state_dict(), state)


@pytest.mark.parametrize("seed", range(8))
def test_strict_answers_an_edit_by_its_own_block_until_a_split_drops_it(seed: int) -> None:
    clusters = Clusters(init_radius=RADIUS, fidelity="strict")
    for block, batch in enumerate(random_batches(seed, n_batches=25, n_rows=1)):
        assign(clusters, batch, block)
        moves = 1e-5 * torch.randn(20, 2, generator=torch.Generator().manual_seed(block)).div(2)
        found, chosen = clusters.choose(torch.tensor([batch[0][0]]) + moves.clamp(-7e-6, 7e-6))
        nearest = clusters.labels[int(found.entry[0])] == batch[0][1]
        # Another center may be nearer than that of the cluster it joined, which is MELO's rule.
        assert chosen.tolist() == [block] * 20 or not nearest
        assert bool((clusters.radii > 0).all())


def test_strict_lets_the_later_label_win_where_the_query_is_the_same() -> None:
    clusters = Clusters(init_radius=RADIUS, fidelity="strict")
    place = [1.0, 1.0]
    (first,), (second,) = (assign(clusters, [(place, label)], block) for block, label in enumerate([(1,), (2,)]))
    assert (first.op, second.op, len(clusters)) == ("add", "relabel", 1)
    assert clusters.choose(torch.tensor([place]))[1].tolist() == [1]


def test_strict_answers_a_repeated_edit_by_its_newest_block() -> None:
    clusters = Clusters(init_radius=RADIUS, fidelity="strict")
    for block in range(3):
        (settled,) = assign(clusters, [([1.0, 1.0 + 1e-6 * block], (1,))], block)
    assert settled.op == "expand"
    assert clusters.blocks_of(0) == [2]
    reference = Clusters(init_radius=RADIUS, fidelity="reference")
    for block in range(3):
        assign(reference, [([1.0, 1.0], (1,))], block)
    assert reference.choose(torch.tensor([[1.0, 1.0]]))[1].tolist() == [0]


def test_labels_of_equal_sums_are_one_label_in_reference_alone() -> None:
    batches: list[Batch] = [[([1.0, 1.0], (1, 2))], [([1.5, 1.0], (3,))]]
    ops = {}
    for fidelity in ("strict", "reference"):
        clusters = Clusters(init_radius=RADIUS, fidelity=fidelity)  # type: ignore[arg-type]
        ops[fidelity] = [assign(clusters, batch, block)[0].op for block, batch in enumerate(batches)]
    assert ops == {"strict": ["add", "split"], "reference": ["add", "expand"]}


def test_a_split_of_strict_enlarges_no_ball() -> None:
    clusters = Clusters(init_radius=RADIUS, fidelity="strict")
    assign(clusters, [([0.0, 0.0], (1,))], 0)
    assign(clusters, [([1.2, 0.0], (2,))], 1)
    assign(clusters, [([0.0, 1.9], (3,))], 2)
    assert clusters.radii.max() <= RADIUS
    assert clusters.radii[0] < 0.6


def test_centers_that_move_keep_the_lookups_of_many_exact() -> None:
    """Beyond a million multiplications the index bounds distances before it computes them."""
    generator = torch.Generator().manual_seed(0)
    clusters = Clusters(init_radius=0.5, fidelity="strict")
    places = torch.randn(400, 64, generator=generator)
    assert len(places) * 64 * 64 > 2**20
    for block, place in enumerate(places):
        clusters.assign(place[None], [(block,)], [0.0], block)
    for block in range(30):
        near = places[block] + 0.2 * torch.randn(64, generator=generator) / 8
        clusters.assign(near[None], [(block,)], [0.0], 400 + block)
    assert clusters.n_points == 430
    queries = torch.randn(64, 64, generator=generator)
    expected = (queries.double()[:, None] - clusters.keys.double()).norm(dim=2).argmin(dim=1)
    assert torch.equal(clusters.retrieve(queries).entry, expected)
