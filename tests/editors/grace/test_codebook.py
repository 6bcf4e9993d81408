"""What a codebook promises, for any sequence of keys and labels, against plain numpy in double precision."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from grace_bench.editors._grace import key_index as _key_index
from grace_bench.editors._grace.codebook import Codebook, Distance, Fidelity, Overlap, Settlement
from grace_bench.errors import UserError
from helpers import each_value_once

WIDTH = 4
Edit = tuple[list[float], int]

# Few coordinates and few labels, so that inputs repeat, lie on lines between others, and contradict each other; and
# arbitrary ones, down to differences that float32 hardly resolves.
_coordinate = st.one_of(
    st.sampled_from([0.0, 0.003, 0.004, 0.006, 0.5, 0.50001, 1.0, 1.0003]),
    # No layer gives a direction by coordinates this small, and cosine distance cannot tell them from zero.
    st.floats(-4, 4, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-6 else 0.0),
)
_edits = st.lists(
    st.tuples(st.lists(_coordinate, min_size=WIDTH, max_size=WIDTH), st.integers(0, 2)), min_size=1, max_size=24
)
_queries = st.lists(st.lists(_coordinate, min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=8)
_eps = st.sampled_from([0.002, 0.05, 0.5, 3.0])
_thorough = settings(max_examples=settings.default.max_examples * 3 // 2)


def settle(codebook: Codebook, key: list[float], label: int) -> Settlement:
    return codebook.settle(
        torch.tensor(key), (label,), lambda: torch.full((2,), float(len(codebook))), label_mean=float(label)
    )


def filled(
    edits: list[Edit],
    eps_init: float,
    distance: Distance = "euclidean",
    fidelity: Fidelity = "strict",
    overlap: Overlap = "allow",
) -> Codebook:
    codebook = Codebook(eps_init=eps_init, distance=distance, fidelity=fidelity, overlap=overlap)
    for key, label in edits:
        settle(codebook, key, label)
    return codebook


def true_distances(codebook: Codebook, query: Tensor) -> np.ndarray:
    keys, point = codebook.keys.double().numpy(), query.double().numpy()
    if codebook.distance == "euclidean":
        return np.sqrt(((keys - point) ** 2).sum(axis=1))
    norms = np.linalg.norm(keys, axis=1) * np.linalg.norm(point)
    return 1 - np.divide(keys @ point, norms, out=np.zeros(len(keys)), where=norms > 0)


@pytest.mark.parametrize("fidelity", ["strict", "reference"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(
    edits=_edits,
    queries=st.lists(st.lists(_coordinate, min_size=WIDTH, max_size=WIDTH), min_size=1, max_size=8),
    eps=_eps,
)
@_thorough
def test_lookup_gives_the_nearest_entry_and_hits_within_its_radius(
    fidelity: Fidelity, distance: Distance, edits: list[Edit], queries: list[list[float]], eps: float
) -> None:
    codebook = filled(edits, eps, distance, fidelity)
    points = torch.tensor([*queries, *(key for key, _ in edits)])
    found = codebook.retrieve(points)
    for row, point in enumerate(points):
        expected = true_distances(codebook, point)
        entry = int(found.entry[row])
        assert expected[entry] <= expected.min() + 2e-6
        assert math.isclose(float(found.distance[row]), expected[entry], abs_tol=2e-6)
        radius = float(codebook.radii[entry])
        if abs(expected[entry] - radius) > 4e-6:
            assert bool(found.hit[row]) == (expected[entry] <= radius)


@given(edits=_edits, eps=_eps)
@_thorough
def test_a_query_is_looked_up_alike_alone_and_in_a_batch(edits: list[Edit], eps: float) -> None:
    for fidelity in ("strict", "reference"):
        codebook = filled(edits, eps, "euclidean", fidelity)  # type: ignore[arg-type]
        points = torch.tensor([key for key, _ in edits] * 3)
        together = codebook.retrieve(points)
        for row, point in enumerate(points):
            alone = codebook.retrieve(point[None])
            assert alone.entry[0] == together.entry[row]
            assert alone.hit[0] == together.hit[row]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(edits=_edits, eps=_eps)
@_thorough
def test_strict_radii_are_never_negative_and_no_split_makes_one_grow(
    distance: Distance, edits: list[Edit], eps: float
) -> None:
    codebook = Codebook(eps_init=eps, distance=distance)
    for key, label in edits:
        before = codebook.radii.clone()
        settled = settle(codebook, key, label)
        assert (codebook.radii >= 0).all()
        if settled.op == "split":
            assert (codebook.radii[: len(before)] <= before).all()
            assert codebook.radii[-1] <= eps


def three_within(codebook: Codebook, query: Tensor) -> bool:
    """Whether two entries lie so close to the query that no radius tells the three apart."""
    return len(codebook) > 1 and sorted(true_distances(codebook, query))[1] < 1e-4


@given(edits=_edits, eps=_eps, seed=st.integers(0, 2**31))
@_thorough
def test_an_edited_input_hits_its_own_entry_also_when_its_query_moves(edits: list[Edit], eps: float, seed: int) -> None:
    codebook = Codebook(eps_init=eps)
    generator = torch.Generator().manual_seed(seed)
    for key, label in edits:
        query = torch.tensor(key)
        assume(not three_within(codebook, query))
        settled = settle(codebook, key, label)
        direction = torch.randn(16, WIDTH, generator=generator)
        moved = query + 1e-5 * direction / direction.norm(dim=1, keepdim=True)
        found = codebook.retrieve(torch.cat([query[None], moved]))
        assert found.hit.all()
        assert (found.entry == settled.entry).all()
        assert codebook.labels[settled.entry] == (label,)


@given(edits=_edits, eps=st.sampled_from([0.5, 1.0, 3.0]), seed=st.integers(0, 2**31))
@_thorough
def test_in_bfloat16_it_does_so_for_moves_that_rounding_to_eight_bits_makes(
    edits: list[Edit], eps: float, seed: int
) -> None:
    codebook = Codebook(eps_init=eps, precision=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for key, label in edits:
        query = torch.tensor(key)
        noise = 2**-7 * float(query.norm())
        assume(noise < eps / 2)
        assume(len(codebook) < 2 or sorted(true_distances(codebook, query))[1] > 4 * noise)
        settled = settle(codebook, key, label)
        direction = torch.randn(16, WIDTH, generator=generator)
        moved = query + noise / 3 * direction / direction.norm(dim=1, keepdim=True)
        found = codebook.retrieve(torch.cat([query[None], moved]))
        assert found.hit.all()
        assert (found.entry == settled.entry).all()


@given(edits=_edits, eps=st.sampled_from([0.05, 0.3]), seed=st.integers(0, 2**31))
@_thorough
def test_with_cosine_distance_it_does_so_relative_to_its_norm(edits: list[Edit], eps: float, seed: int) -> None:
    codebook = Codebook(eps_init=eps, distance="cosine")
    generator = torch.Generator().manual_seed(seed)
    for key, label in edits:
        query = torch.tensor(key)
        assume(query.norm() > 1e-3)
        assume(not len(codebook) or true_distances(codebook, query).min() < 0.5 or len(codebook) < 2)
        assume(not three_within(codebook, query))
        settled = settle(codebook, key, label)
        direction = torch.randn(16, WIDTH, generator=generator)
        moved = query + 1e-5 * query.norm() * direction / direction.norm(dim=1, keepdim=True)
        found = codebook.retrieve(torch.cat([query[None], moved]))
        assert found.hit.all()
        assert (found.entry == settled.entry).all()


@given(edits=_edits, eps=_eps)
@_thorough
def test_strict_decisions_follow_the_published_rules(edits: list[Edit], eps: float) -> None:
    codebook = Codebook(eps_init=eps)
    for key, label in edits:
        query = torch.tensor(key)
        old_labels, old_radii = list(codebook.labels), codebook.radii.double().numpy().copy()
        distances = np.sort(true_distances(codebook, query)) if old_labels else np.array([np.inf])
        nearest = int(true_distances(codebook, query).argmin()) if old_labels else -1
        clear = len(distances) < 2 or distances[1] > distances[0] + 1e-4
        norm = float(codebook.keys[nearest].norm()) if old_labels else 0.0
        settled = settle(codebook, key, label)
        if not old_labels or distances[0] > eps + old_radii[nearest] + 1e-5:
            assert settled.op == "add"
            assert float(codebook.radii[-1]) == pytest.approx(eps)
        elif clear and distances[0] < eps + old_radii[nearest] - 1e-5:
            if old_labels[nearest] == (label,):
                assert settled.op in ("expand", "hit")
                assert codebook.radii[nearest] >= distances[0]
                assert len(codebook) == len(old_labels)
            elif distances[0] < 0.99e-4 * max(1.0, norm):
                assert settled.op == "relabel"
                assert codebook.labels[nearest] == (label,)
            elif distances[0] > 1.01e-4 * max(1.0, norm):
                assert settled.op == "split"
                limit = max(0.0, min(old_radii[nearest], distances[0] / 2 - 1e-5))
                assert float(codebook.radii[nearest]) == pytest.approx(limit, abs=2e-6)
                assert float(codebook.radii[-1]) == pytest.approx(min(eps, distances[0] / 2), abs=2e-6)


@pytest.mark.parametrize("fidelity", ["strict", "reference"])
@given(edits=_edits, eps=_eps, seed=st.integers(0, 2**16))
@_thorough
def test_a_decision_that_is_not_close_is_the_same_for_a_query_that_moved(
    fidelity: Fidelity, edits: list[Edit], eps: float, seed: int
) -> None:
    moves = torch.randn(len(edits), WIDTH, generator=torch.Generator().manual_seed(seed))
    for number, (key, label) in enumerate(edits):
        codebook, other = (filled(edits[:number], eps, fidelity=fidelity) for _ in range(2))
        moved = torch.tensor(key) + 5e-6 * moves[number] / moves[number].norm()
        first, second = settle(codebook, key, label), settle(other, moved.tolist(), label)
        if not first.is_close:
            assert (first.op, first.entry) == (second.op, second.entry)


def test_decisions_on_the_edge_are_close_and_others_are_not() -> None:
    def is_close(x: float, label: int) -> bool:
        codebook = filled([([0, 0, 0, 0], 0), ([10, 0, 0, 0], 1)], 1.0)
        return settle(codebook, [x, 0, 0, 0], label).is_close

    assert [is_close(x, 0) for x in (1.0, 2.0, 5.0)] == [True, True, True]
    assert [is_close(x, 0) for x in (0.0, 0.5, 1.5, 4.9)] == [False, False, False, False]
    assert is_close(1e-4, 1)
    assert not is_close(1e-4, 0)
    codebook = filled([([0, 0, 0, 0], 0), ([1.5, 0, 0, 0], 0)], 1.0)
    assert not settle(codebook, [1.5, 0, 0, 0], 0).is_close, "an edited input lies well inside its own ball"


def test_strict_expands_to_just_beyond_the_distance() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([1.5, 0, 0, 0], 0)], 1.0)
    assert codebook.radii.tolist() == pytest.approx([1.5 * (1 + 1e-4)])


@pytest.mark.parametrize("distance", [0.004985, 0.00498, 0.02])
def test_an_input_at_the_edge_of_a_small_ball_stays_inside_when_it_moves(distance: float) -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([0.01, 0, 0, 0], 1)], 0.5)
    codebook.radii[1] = 0.0
    settled = settle(codebook, [0, distance, 0, 0], 0)
    assert settled.entry == 0
    found = codebook.retrieve(torch.tensor([[0, distance + 1e-5, 0, 0]]))
    assert found.hit.all()
    assert found.entry.tolist() == [0]


def test_strict_compares_ids_where_reference_compares_means() -> None:
    for fidelity, op in (("strict", "split"), ("reference", "hit")):
        codebook = Codebook(eps_init=1.0, fidelity=fidelity)  # type: ignore[arg-type]
        codebook.settle(torch.zeros(3), (5, 7), lambda: torch.zeros(2), label_mean=6.0)
        settled = codebook.settle(torch.tensor([0.5, 0, 0]), (4, 8), lambda: torch.zeros(2), label_mean=6.0)
        assert settled.op == op


def test_a_contradiction_of_the_same_input_relabels_in_strict_and_splits_in_reference() -> None:
    edits: list[Edit] = [([1.0, 2, 0, 0], 0), ([1.0, 2, 0, 0], 1)]
    strict = filled(edits, 1.0)
    assert strict.labels == [(1,)]
    reference = filled(edits, 1.0, "euclidean", "reference")
    assert reference.labels == [(0,), (1,)]
    assert reference.radii.tolist() == pytest.approx([-1e-5, 0.0], abs=1e-9)


def test_a_query_half_way_between_two_entries_gets_its_own() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([1, 0, 0, 0], 1)], 0.4)
    for label in (0, 1, 2):
        trial = Codebook(eps_init=0.4)
        trial.load_state_dict(codebook.state_dict())
        trial.radii.fill_(0.4)
        settled = settle(trial, [0.5, 0, 0, 0], label)
        assert (settled.op, settled.entry, settled.is_new) == ("split", 2, True)
        assert float(trial.radii[2]) == pytest.approx(0.25)


def test_repeats_above_25_entries_are_exact_in_strict() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(200, 64, generator=generator) * 30
    codebook = Codebook(eps_init=1e-3)
    for number, key in enumerate(keys):
        codebook.settle(key, (number,), lambda: torch.zeros(2), label_mean=0.0)
    found = codebook.retrieve(keys)
    assert found.entry.tolist() == list(range(200))
    assert found.distance.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_queries_of_any_precision_find_the_entry_they_made(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(40, 8, generator=generator).to(dtype)
    codebook = Codebook(eps_init=0.1)
    for number, query in enumerate(queries):
        codebook.settle(query, (number,), lambda: torch.zeros(2), label_mean=0.0)
    assert codebook.keys.dtype == codebook.radii.dtype == torch.float32
    found = codebook.retrieve(queries)
    assert found.entry.tolist() == list(range(40))
    assert found.hit.all()


@given(edits=_edits, eps=_eps)
@_thorough
def test_growth_keeps_what_was_there(edits: list[Edit], eps: float) -> None:
    codebook = Codebook(eps_init=eps)
    kept: list[tuple[Tensor, Tensor]] = []
    for key, label in edits * 3:
        if settle(codebook, key, label).is_new:
            kept.append((torch.tensor(key), torch.full((2,), float(len(codebook) - 1))))
        assert len(codebook.keys) == len(codebook.values) == len(codebook.radii) == len(codebook) == len(kept)
        for (key_tensor, value), row, stored in zip(kept, codebook.keys, codebook.values, strict=True):
            assert torch.equal(key_tensor, row)
            assert torch.equal(value, stored)


def test_a_thousand_entries_are_moved_in_memory_seldom() -> None:
    codebook = Codebook(eps_init=1e-3)
    addresses = set()
    for number in range(1000):
        codebook.settle(torch.tensor([float(number)]), (0,), lambda: torch.zeros(2), label_mean=0.0)
        addresses.add(codebook.keys.data_ptr())
    assert len(addresses) <= 8


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(edits=_edits, more=_edits, eps=_eps)
@_thorough
def test_a_loaded_state_goes_on_as_the_original(
    distance: Distance, edits: list[Edit], more: list[Edit], eps: float
) -> None:
    original = filled(edits, eps, distance)
    loaded = Codebook(eps_init=eps, distance=distance)
    loaded.load_state_dict(original.state_dict())
    frozen = original.state_dict()
    for key, label in more:
        assert settle(original, key, label) == settle(loaded, key, label)
    for name, value in original.state_dict().items():
        other = loaded.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
    assert len(frozen["keys"]) == len(frozen["labels"])


def test_clearing_leaves_an_empty_codebook_that_can_grow_again() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([9, 0, 0, 0], 1)], 1.0)
    codebook.clear()
    assert len(codebook) == len(codebook.keys) == len(codebook.radii) == 0
    assert codebook.overlap() == 0.0
    assert not codebook.contested(torch.zeros(3, WIDTH)).any()
    with pytest.raises(IndexError):
        codebook.retrieve(torch.zeros(3, WIDTH))
    assert codebook.settle(torch.ones(7), (0,), lambda: torch.zeros(3), label_mean=0.0).op == "add"
    assert codebook.keys.shape == (1, 7)


@pytest.mark.parametrize("fidelity", ["strict", "reference"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(edits=_edits, eps=_eps)
@_thorough
def test_overlap_and_contested_are_what_a_plain_loop_finds(
    fidelity: Fidelity, distance: Distance, edits: list[Edit], eps: float
) -> None:
    codebook = filled(edits, eps, distance, fidelity)
    radii, labels = codebook.radii.double().numpy(), codebook.labels
    sizes = lengths(codebook, radii)
    pairs = meeting = 0
    for i in range(len(codebook)):
        gaps = true_distances(codebook, codebook.keys[i])
        for j in range(i):
            if labels[i] != labels[j]:
                reach = sizes[i] + sizes[j]
                if distance == "cosine":
                    reach = 1 - math.cos(min(reach, math.pi))
                assume(abs(gaps[j] - reach) > 4e-6)
                pairs += 1
                meeting += gaps[j] <= reach and min(radii[i], radii[j]) >= 0
    assert codebook.overlap() == (meeting / pairs if pairs else 0.0)
    points = torch.tensor([key for key, _ in edits])
    for point, contested in zip(points, codebook.contested(points), strict=True):
        gaps = true_distances(codebook, point)
        assume((np.abs(gaps - radii) > 4e-6).all())
        inside = {labels[i] for i in range(len(codebook)) if gaps[i] <= radii[i]}
        assert bool(contested) == (len(inside) > 1)


@pytest.mark.parametrize("eps_init", [0, -1.0, math.nan, math.inf, "wide", None])
def test_a_radius_that_is_no_positive_number_is_refused(eps_init: float) -> None:
    with pytest.raises(UserError, match=r"editor\.eps_init="):
        Codebook(eps_init=eps_init)


@pytest.mark.parametrize("make", [lambda: torch.zeros(3), lambda: torch.zeros(3, requires_grad=True)])
def test_a_starting_value_is_asked_for_only_if_there_is_a_new_entry(make: Callable[[], Tensor]) -> None:
    codebook = Codebook(eps_init=1.0)
    codebook.settle(torch.zeros(2), (0,), make, label_mean=0.0)
    assert not codebook.values.requires_grad

    def refuse() -> Tensor:
        raise AssertionError("no entry was made")

    assert codebook.settle(torch.tensor([0.5, 0.0]), (0,), refuse, label_mean=0.0).op == "hit"


PLAIN = 2**60
BOUNDED = -1


@contextmanager
def lookups(plain: int, pairs: int = 2**17, rows: int = 256, gathered: int = 2**20) -> Iterator[None]:
    """Makes every lookup plain, or bounded in blocks of a size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_key_index, "_PLAIN", plain)
        patch.setattr(_key_index, "_PAIRS", pairs)
        patch.setattr(_key_index, "_ROWS", rows)
        patch.setattr(_key_index, "_GATHERED", gathered)
        yield


# What rounding makes hard: much in common, ties and near-ties, numbers whose squares overflow or vanish.
_clouds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda points, other: points,
    "common": lambda points, other: 0.01 * points + 1000,
    "repeated": lambda points, other: points[: len(points) // 6 + 1].repeat(6, 1)[: len(points)],
    "near-ties": lambda points, other: points[: len(points) // 6 + 1].repeat(6, 1)[: len(points)] + 1e-6 * other,
    "grid": lambda points, other: points.round().clamp(-1, 1),
    "zeros": lambda points, other: points * (other > 1),
    "sizes": lambda points, other: points * 10 ** (3 * other[:, :1]),
    "large": lambda points, other: 1e9 * points,
    "overflowing": lambda points, other: 1e19 * points,
    "vanishing": lambda points, other: 1e-22 * points,
    "one not a number": lambda points, other: torch.where(torch.arange(len(points))[:, None] == 1, math.nan, points),
}
_cloud = st.sampled_from(list(_clouds))


def cloud(kind: str, n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return _clouds[kind](torch.randn(n, width, generator=generator), torch.randn(n, width, generator=generator))


def of_keys(keys: Tensor, radius: float, distance: Distance = "euclidean") -> Codebook:
    """A codebook of given keys, whatever they are, with radii up to some size and three labels."""
    codebook = Codebook(eps_init=radius, distance=distance)
    n = len(keys)
    codebook.load_state_dict(
        {
            "keys": keys,
            "values": torch.zeros(n, 1),
            "radii": radius * torch.rand(n, generator=torch.Generator().manual_seed(n)),
            "labels": [[number % 3] for number in range(n)],
            "label_means": [0.0] * n,
        }
    )
    return codebook


def same(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.isnan(), two.isnan()) and torch.equal(one.nan_to_num(nan=0), two.nan_to_num(nan=0))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(
    kind=_cloud,
    n=st.integers(1, 60),
    width=st.sampled_from([1, 2, 5, 16, 130]),
    seed=st.integers(0, 2**31),
    pairs=st.sampled_from([7, 100, 2**17]),
    rows=st.sampled_from([5, 256]),
    gathered=st.sampled_from([50, 2**20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from([0.01, 0.5, 2.0]),
)
@_thorough
def test_bounding_distances_in_blocks_changes_no_answer(
    distance: Distance,
    kind: str,
    n: int,
    width: int,
    seed: int,
    pairs: int,
    rows: int,
    gathered: int,
    dtype: torch.dtype,
    spread: float,
) -> None:
    keys = cloud(kind, n, width, seed)
    typical = float(keys.nan_to_num(0).norm(dim=1).clamp(1e-24, 1e17).median()) if distance == "euclidean" else 0.5
    codebook = of_keys(keys, spread * typical, distance)
    queries = torch.cat([keys[:20], cloud(kind, 10, width, seed + 1), torch.zeros(1, width)]).to(dtype)
    with lookups(PLAIN):
        plain = codebook.retrieve(queries), codebook.contested(queries), codebook.overlap()
    with lookups(BOUNDED, pairs, rows, gathered):
        bounded = codebook.retrieve(queries), codebook.contested(queries), codebook.overlap()
    assert torch.equal(plain[0].entry, bounded[0].entry)
    assert same(plain[0].distance, bounded[0].distance)
    assert torch.equal(plain[0].hit, bounded[0].hit)
    assert torch.equal(plain[1], bounded[1])
    assert plain[2] == bounded[2]


@given(kind=_cloud, n=st.integers(1, 60), width=st.sampled_from([1, 5, 130]), seed=st.integers(0, 2**31))
@_thorough
def test_bounded_lookups_give_the_distances_of_cdist_and_the_newest_of_equals(
    kind: str, n: int, width: int, seed: int
) -> None:
    keys = cloud(kind, n, width, seed)
    queries = torch.cat([keys, cloud(kind, 10, width, seed + 1)])
    distances = torch.cdist(keys, queries, compute_mode="donot_use_mm_for_euclid_dist").T.numpy()
    with lookups(BOUNDED, pairs=50):
        found = of_keys(keys, 1.0).retrieve(queries)
    for row, computed in enumerate(distances):
        least = np.isnan(computed) if np.isnan(computed).any() else computed == computed.min()
        assert int(found.entry[row]) == np.flatnonzero(least)[-1]
        assert same(found.distance[row], torch.tensor(computed)[found.entry[row]])


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(
    kind=st.sampled_from(["plain", "common", "repeated", "near-ties", "grid", "sizes", "large"]),
    n=st.integers(1, 60),
    width=st.sampled_from([2, 16, 130]),
    seed=st.integers(0, 2**31),
)
@_thorough
def test_bounded_lookups_find_the_nearest_key_in_double_precision(
    distance: Distance, kind: str, n: int, width: int, seed: int
) -> None:
    codebook = of_keys(cloud(kind, n, width, seed), 1.0, distance)
    queries = torch.cat([codebook.keys, cloud(kind, 10, width, seed + 1)])
    with lookups(BOUNDED, pairs=50):
        found = codebook.retrieve(queries)
    # No float32 distance of this width is off by more, relative to itself or, for cosine distance, to a unit vector.
    relative, absolute = 2e-5, (2e-6 if distance == "cosine" else 0.0)
    for row, query in enumerate(queries):
        expected = true_distances(codebook, query)
        chosen = expected[int(found.entry[row])]
        assert chosen <= expected.min() * (1 + 2 * relative) + 2 * absolute
        assert math.isclose(float(found.distance[row]), chosen, rel_tol=relative, abs_tol=absolute)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@given(
    kind=_cloud,
    n=st.integers(1, 40),
    width=st.sampled_from([1, 2, 16]),
    seed=st.integers(0, 2**31),
    eps=st.sampled_from([1e-3, 0.3, 2.0]),
    precision=st.sampled_from([torch.float32, torch.bfloat16]),
)
@_thorough
def test_bounding_distances_changes_no_decision(
    distance: Distance, kind: str, n: int, width: int, seed: int, eps: float, precision: torch.dtype
) -> None:
    codebooks = [Codebook(eps_init=eps, distance=distance, precision=precision) for _ in range(2)]
    for number, key in enumerate(cloud(kind, n, width, seed)):
        settled = []
        for codebook, how in zip(codebooks, (PLAIN, BOUNDED), strict=True):
            with lookups(how, pairs=9):
                settled.append(settle(codebook, key.tolist(), number * 7 % 3))
        # As text, because a distance that is no number is not equal to itself.
        assert str(settled[0]) == str(settled[1])
    assert codebooks[0].labels == codebooks[1].labels
    assert same(codebooks[0].radii, codebooks[1].radii)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_few_distances_are_computed_where_keys_are_many(distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = cloud("plain", 20_000, 64, 0) + 10
    codebook = of_keys(keys, 1e-3, distance)
    queries = keys[::1000] + 1e-3
    computed = []
    exact = codebook._index._exact

    def counted(*pairs: Tensor) -> Tensor:
        computed.append(exact(*pairs))
        return computed[-1]

    monkeypatch.setattr(codebook._index, "_exact", counted)
    assert codebook.retrieve(queries).entry.tolist() == list(range(0, 20_000, 1000))
    codebook.contested(queries)
    codebook.settle(queries[0], (9,), lambda: torch.zeros(1), label_mean=9.0)
    assert sum(distances.numel() for distances in computed) < 20 * len(queries)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("setting", ["autocast", "medium"])
def test_products_of_low_precision_lead_no_lookup_astray(distance: Distance, setting: str) -> None:
    codebook = of_keys(cloud("plain", 3000, 64, 0), 0.1, distance)
    queries = cloud("plain", 200, 64, 1)
    expected = codebook.retrieve(queries)
    usual = torch.get_float32_matmul_precision()
    try:
        if setting == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            found = codebook.retrieve(queries)
    finally:
        torch.set_float32_matmul_precision(usual)
    assert torch.equal(found.entry, expected.entry)
    assert torch.equal(found.distance, expected.distance)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_distance_does_not_depend_on_what_else_is_looked_up(distance: Distance) -> None:
    keys = cloud("plain", 3000, 40, 0)
    codebook = of_keys(keys, 0.1, distance)
    queries = cloud("plain", 70, 40, 1)
    together = codebook.retrieve(queries)
    for row in range(70):
        alone = codebook.retrieve(queries[row : row + 1])
        assert alone.entry[0] == together.entry[row]
        assert alone.distance[0] == together.distance[row]


def test_contested_and_overlap_follow_labels_that_were_taken_over() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([1, 0, 0, 0], 0)], 0.4)
    codebook.radii.fill_(0.8)
    between = torch.tensor([[0.5, 0, 0, 0]])
    assert (codebook.contested(between).tolist(), codebook.overlap()) == ([False], 0.0)
    assert settle(codebook, [1, 0, 0, 0], 5).op == "relabel"
    assert (codebook.contested(between).tolist(), codebook.overlap()) == ([True], 1.0)
    assert settle(codebook, [0, 0, 0, 0], 5).op == "relabel"
    assert (codebook.contested(between).tolist(), codebook.overlap()) == ([False], 0.0)


# Of the inputs that the edits below are like, whose directions differ a thousandfold in variance.
_upstream = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1, 0.1, 0.003])


def measuring(distance: Distance, eps: float, overlap: Overlap = "allow", **options: torch.dtype) -> Codebook:
    """An empty codebook, whitened if its distance wants that."""
    codebook = Codebook(eps_init=eps, distance=distance, overlap=overlap, **options)  # type: ignore[arg-type]
    if codebook.needs_whitening:
        codebook.whiten(_upstream)
    return codebook


def lengths(codebook: Codebook, distances: np.ndarray) -> np.ndarray:
    """Distances as numbers that add up along a way: angles for cosine distance."""
    return np.arccos(np.clip(1 - distances, -1, 1)) if codebook.distance == "cosine" else distances


each_distance = pytest.mark.parametrize("distance", ["euclidean", "cosine", "mahalanobis"])


@each_distance
@given(edits=_edits, queries=_queries, eps=_eps)
@_thorough
def test_shrinking_keeps_balls_of_different_labels_apart(
    distance: Distance, edits: list[Edit], queries: list[list[float]], eps: float
) -> None:
    codebook = measuring(distance, eps, "shrink")
    keys: list[Tensor] = []
    for key, label in edits:
        if distance == "cosine":
            assume(not any(key) or np.linalg.norm(key) > 1e-3)
        settle(codebook, key, label)
        keys += [codebook.keys[-1].clone()] * (len(codebook) - len(keys))
        assert (codebook.radii >= 0).all()
        assert codebook.overlap() == 0.0
        radii = lengths(codebook, codebook.radii.double().numpy())
        for entry, centre in enumerate(keys):
            points = codebook.keys.double().numpy()
            gaps = np.linalg.norm(points - centre.double().numpy(), axis=1)
            if distance == "cosine":
                gaps = lengths(codebook, true_distances(codebook, centre))
            others = np.array([other != codebook.labels[entry] for other in codebook.labels])
            assert (gaps[others] >= (radii + radii[entry])[others] - 1e-6).all()
    points = torch.tensor([*queries, *(key for key, _ in edits)])
    if distance != "cosine" or bool((points.norm(dim=1) > 0).all()):
        assert not codebook.contested(points).any()


def test_shrinking_keeps_balls_about_opposite_keys_apart_although_float32_hardly_tells_their_angles_apart() -> None:
    codebook = filled([([1, 0, 0, 0], 0), ([-1, 0, 0, 0], 1)], 3.0, "cosine", overlap="shrink")
    for how in (PLAIN, BOUNDED):
        with lookups(how):
            assert codebook.overlap() == 0.0
    codebook.radii.fill_(1.0)
    assert codebook.overlap() == 1.0


@each_distance
@given(edits=_edits, eps=st.sampled_from([0.05, 0.5, 3.0]), seed=st.integers(0, 2**31))
@_thorough
def test_with_shrinking_too_an_edited_input_hits_an_entry_of_its_label_also_when_its_query_moves(
    distance: Distance, edits: list[Edit], eps: float, seed: int
) -> None:
    codebook = measuring(distance, eps, "shrink")
    generator = torch.Generator().manual_seed(seed)
    makers: dict[int, Tensor] = {}
    gain = 1.0 if codebook.whitening is None else codebook.whitening.gain
    for key, label in edits:
        query = torch.tensor(key)
        if distance == "cosine":
            assume(query.norm() > 1e-3)
            assume(not len(codebook) or codebook.distances(query[None]).min() < 0.5 or len(codebook) < 2)
        assume(len(codebook) < 2 or float(codebook.distances(query[None])[0].sort().values[1]) > 1e-4 * gain)
        settled = settle(codebook, key, label)
        if settled.is_new or settled.op == "relabel":
            makers.pop(settled.entry, None)
        if settled.is_new:
            makers[settled.entry] = query
        direction = torch.randn(16, WIDTH, generator=generator)
        moved = query + 1e-5 * direction / direction.norm(dim=1, keepdim=True) * (
            query.norm() if distance == "cosine" else 1
        )
        found = codebook.retrieve(torch.cat([query[None], moved]))
        assert found.hit.all()
        assert (found.entry == settled.entry).all()
        assert codebook.labels[settled.entry] == (label,)
    # An input that made an entry stays its key, so that it is answered by it unless its label is contradicted.
    for entry, query in makers.items():
        found = codebook.retrieve(query[None])
        assert (found.entry.item(), found.hit.item()) == (entry, True)


@given(edits=_edits, eps=_eps, seed=st.integers(0, 2**16))
@_thorough
def test_with_shrinking_too_a_decision_that_is_not_close_is_the_same_for_a_query_that_moved(
    edits: list[Edit], eps: float, seed: int
) -> None:
    moves = torch.randn(len(edits), WIDTH, generator=torch.Generator().manual_seed(seed))
    for number, (key, label) in enumerate(edits):
        codebook, other = (measuring("euclidean", eps, "shrink") for _ in range(2))
        for earlier in edits[:number]:
            settle(codebook, *earlier)
            settle(other, *earlier)
        moved = torch.tensor(key) + 5e-6 * moves[number] / moves[number].norm()
        first, second = settle(codebook, key, label), settle(other, moved.tolist(), label)
        if not first.is_close:
            # A repeated input may grow its entry by the last bit, or hit it.
            same = [settled.op.replace("expand", "hit") for settled in (first, second)]
            assert (same[0], first.entry) == (same[1], second.entry)


@each_distance
@given(edits=_edits, eps=_eps)
@_thorough
def test_shrinking_changes_nothing_while_there_is_one_label(distance: Distance, edits: list[Edit], eps: float) -> None:
    allow, shrink = measuring(distance, eps), measuring(distance, eps, "shrink")
    for key, _ in edits:
        assert settle(allow, key, 0) == settle(shrink, key, 0)
    assert torch.equal(allow.radii, shrink.radii)


def test_a_ball_ends_where_another_label_begins() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([3.2, 0, 0, 0], 1), ([1.9, 0, 0, 0], 1)], 1.0, overlap="shrink")
    assert codebook.radii.tolist() == pytest.approx([1.0, 1.3], abs=1e-3)
    # The nearest entry could grow to this input only into the other's ball.
    settled = settle(codebook, [0, 1.95, 0, 0], 0)
    assert (settled.op, settled.entry) == ("add", 2)
    assert codebook.radii.tolist() == pytest.approx([1.0, 1.3, 1.0], abs=1e-3)
    settled = settle(codebook, [1.2, -1.5, 0, 0], 2)
    gaps = [math.hypot(1.2, 1.5) - 0.9605, math.hypot(2.0, 1.5) - 1.3]
    assert (settled.op, settled.entry) == ("split", 3)
    assert codebook.radii.tolist() == pytest.approx([0.9605, 1.3, 1.0, min(0.9605, *gaps)], abs=1e-3)


def test_balls_of_other_labels_that_hold_the_edited_input_give_way() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([5, 0, 0, 0], 1)], 1.0, overlap="shrink")
    codebook.radii[0], codebook.radii[1] = 4.5, 0.4
    # Its nearest has its label; the other's ball reaches beyond it.
    settled = settle(codebook, [4.0, 0, 0, 0], 1)
    assert (settled.op, settled.entry) == ("split", 2)
    assert codebook.radii.tolist() == pytest.approx([2.0, 0.4, 1.0], abs=1e-3)


def test_an_entry_that_takes_another_label_loses_what_lies_in_balls_of_its_old_one() -> None:
    codebook = filled([([0, 0, 0, 0], 0), ([1.5, 0, 0, 0], 0), ([0, 2.6, 0, 0], 0)], 1.0, overlap="shrink")
    assert settle(codebook, [0, 0, 0, 0], 1).op == "relabel"
    assert codebook.labels == [(1,), (0,)]
    assert codebook.radii.tolist() == pytest.approx([1.5 * (1 + 1e-4), 1.0], abs=1e-3)
    assert settle(codebook, [0, 2.6, 0, 0], 1).op == "relabel"
    assert settle(codebook, [0, 0, 0, 0], 0).op == "relabel"
    assert codebook.overlap() == 0.0


@each_value_once("distance, overlap", ["euclidean", "cosine", "mahalanobis"], ["allow", "shrink"])
@given(
    kind=_cloud,
    n=st.integers(1, 40),
    width=st.sampled_from([2, 16]),
    seed=st.integers(0, 2**31),
    eps=st.sampled_from([1e-3, 0.3, 2.0]),
)
def test_bounding_distances_changes_no_decision_of_a_policy_or_a_distance(
    distance: Distance, overlap: Overlap, kind: str, n: int, width: int, seed: int, eps: float
) -> None:
    assume(kind != "one not a number")
    codebooks = [Codebook(eps_init=eps, distance=distance, overlap=overlap) for _ in range(2)]
    for codebook in codebooks if distance == "mahalanobis" else ():
        codebook.whiten(cloud("plain", 20, width, 5))
    for number, key in enumerate(cloud(kind, n, width, seed)):
        settled = []
        for codebook, how in zip(codebooks, (PLAIN, BOUNDED), strict=True):
            with lookups(how, pairs=9):
                settled.append(settle(codebook, key.tolist(), number * 7 % 3))
        assert settled[0] == settled[1]
    assert codebooks[0].labels == codebooks[1].labels
    assert torch.equal(codebooks[0].radii, codebooks[1].radii)


@each_distance
def test_shrinking_among_many_keys_computes_few_distances(distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = cloud("plain", 20_000, 64, 0) + 10
    codebook = Codebook(eps_init=1e-3, distance=distance, overlap="shrink")
    if distance == "mahalanobis":
        codebook.whiten(keys[:500])
        keys = codebook.whitening(keys)  # type: ignore[misc]
    codebook.load_state_dict(of_keys(keys, 1e-3, "euclidean").state_dict())
    computed = []
    exact = codebook._index._exact
    monkeypatch.setattr(codebook._index, "_exact", lambda *pairs: computed.append(exact(*pairs)) or computed[-1])
    for label in (9, 9, 8):
        settle(codebook, [10.0] * 64, label)
    assert sum(distances.numel() for distances in computed) < 2000


@given(edits=_edits, eps=_eps)
@_thorough
def test_mahalanobis_decides_as_euclidean_does_on_whitened_inputs(edits: list[Edit], eps: float) -> None:
    mahalanobis, euclidean = measuring("mahalanobis", eps), Codebook(eps_init=eps)
    assert mahalanobis.whitening is not None
    for key, label in edits:
        whitened = mahalanobis.whitening(torch.tensor(key))
        one, two = settle(mahalanobis, key, label), settle(euclidean, whitened.tolist(), label)
        # The margins for rounding are wider where rounding counts more.
        assume(one.op == two.op or not one.is_close)
        assume(one.distance is None or one.distance > 1e-3 or one.distance == 0.0)
        assert (one.op, one.entry) == (two.op, two.entry)


@pytest.mark.parametrize("overlap", ["allow", "shrink"])
@given(edits=_edits, more=_edits, eps=_eps)
@_thorough
def test_a_loaded_state_measures_and_decides_as_the_original(
    overlap: Overlap, edits: list[Edit], more: list[Edit], eps: float
) -> None:
    original = measuring("mahalanobis", eps, overlap)
    for key, label in edits:
        settle(original, key, label)
    loaded = Codebook(eps_init=eps, distance="mahalanobis", overlap=overlap)
    loaded.load_state_dict(original.state_dict())
    for key, label in more:
        assert settle(original, key, label) == settle(loaded, key, label)
    assert torch.equal(original.keys, loaded.keys)
    assert torch.equal(original.radii, loaded.radii)


def test_a_codebook_keeps_its_distance_when_it_is_cleared_and_changes_it_only_while_it_is_empty() -> None:
    codebook = measuring("mahalanobis", 1.0)
    settle(codebook, [1.0, 2, 3, 4], 0)
    before = codebook.distances(torch.ones(1, WIDTH))
    with pytest.raises(UserError, match="before its first entry"):
        codebook.whiten(_upstream)
    codebook.clear()
    assert not codebook.needs_whitening
    settle(codebook, [1.0, 2, 3, 4], 0)
    assert torch.equal(codebook.distances(torch.ones(1, WIDTH)), before)


@pytest.mark.parametrize("option", [{"distance": "mahalanobis"}, {"overlap": "shrink"}])
def test_what_the_official_code_does_not_have_is_refused_in_reference(option: dict[str, str]) -> None:
    with pytest.raises(UserError, match=f"editor.{next(iter(option))}=.* needs editor.fidelity=strict"):
        Codebook(eps_init=1.0, fidelity="reference", **option)  # type: ignore[arg-type]
