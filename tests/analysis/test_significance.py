"""Comparisons of two editors: calibrated where nothing differs, sure where much does, open about what is left out."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_bench.analysis import significance
from grace_bench.analysis.significance import Comparison, holm
from grace_bench.errors import UserError
from grace_bench.results.schema import PREDICTIONS, SCHEMA_VERSION

Scores = Mapping[str, Sequence[float | None] | Mapping[str, float | None]]
"""Scores by stream: by position, or by request id, a probe after a slash."""


def write_run(
    folder: Path,
    final: Scores,
    *,
    seed: int = 0,
    editor: str = "grace",
    reverse: bool = False,
    n_edits: int = 10,
    stream: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Path:
    """Writes what a comparison reads of a run; an evaluation before the last scores everything 0.125."""
    rows = []
    for role, scores in final.items():
        by_name = scores if isinstance(scores, Mapping) else {f"r{index}": x for index, x in enumerate(scores)}
        for name, score in by_name.items():
            request_id, _, probe = name.partition("/")
            for clock, value in ((0, 0.125), (n_edits, score)):
                rows.append(
                    {"n_edits": clock, "stream": role, "request_id": request_id, "probe": probe, "score": value}
                )
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows[::-1] if reverse else rows, schema=PREDICTIONS)
    pq.write_table(table, folder / "predictions.parquet")
    identity = {"name": "atlas-qa", "task": "qa", "fingerprint": "s0", "n_candidates": 9}
    weights = {"name": "t5", "path": "t5", "fingerprint": "m0", "layer": "l", "dtype": "float32", "n_parameters": 1}
    measured = {"split": "edits", "main_score": "f1", "higher_is_better": True, "max_edits": n_edits, "eval_every": 5}
    decoded = {"max_upstream": None, "max_new_tokens": 8, "query": "prefix", "prefix_length": 8}
    result = {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"{editor}-s{seed}",
        "stream": {**identity, "source": "x", "revision": "1", "license": "x", **(stream or {})},
        "model": {**weights, **(model or {})},
        "editor": {"name": editor},
        "protocol": {**measured, **decoded, **(protocol or {})},
        "seed": seed,
        "before": {},
        "metrics": {},
        "cost": {
            "seconds_per_edit_p50": None,
            "seconds_per_edit_p95": None,
            "edit_seconds": 0.0,
            "eval_seconds": 0.0,
            "peak_rss_mb": 1.0,
            "peak_gpu_mb": None,
            "extra_parameters": 0,
        },
        "environment": {},
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder


AVG: dict[str, Any] = {"streams": ("upstream", "edited"), "metric": "Avg"}


def compare(first: Sequence[Path], second: Sequence[Path], **options: Any) -> Comparison:
    """The comparison in ERR unless another score is asked for."""
    return significance.compare(first, second, **{"streams": ("edited",), "metric": "ERR", **options})


def versus(folder: Path, first: Sequence[Scores], second: Sequence[Scores], **options: Any) -> Comparison:
    """Compares two editors whose runs have seeds 0, 1, …"""
    sides = [
        [write_run(folder / f"{editor}-s{seed}", scores, seed=seed, editor=editor) for seed, scores in enumerate(runs)]
        for editor, runs in (("a", first), ("b", second))
    ]
    return compare(*sides, names=("a", "b"), **options)


def edited(scores: Any) -> Scores:
    return {"edited": scores.tolist() if isinstance(scores, np.ndarray) else scores}


# --- what the numbers mean -------------------------------------------------------------------------------------------


def test_the_difference_is_that_of_the_means_of_the_last_evaluation(tmp_path: Path) -> None:
    found = versus(tmp_path / "x", [edited([1, 1, 0, 1])], [edited([0, 1, 0, 0])])
    assert found.difference == pytest.approx(0.5)
    assert (found.first, found.second, found.metric, found.n_items, found.n_seeds) == ("a", "b", "ERR", 4, 1)
    assert (found.n_unpaired, found.n_nan) == (0, 0)
    assert found.low < found.difference < found.high


def test_seeds_weigh_alike_however_many_items_they_have(tmp_path: Path) -> None:
    found = versus(tmp_path / "x", [edited([1] * 30), edited([0] * 3)], [edited([0] * 30), edited([0] * 3)])
    assert found.difference == pytest.approx(0.5)
    assert (found.n_items, found.n_seeds) == (33, 2)


def test_avg_is_the_mean_of_upstream_and_edited(tmp_path: Path) -> None:
    first = {"upstream": [1, 0, 1, 1], "edited": [1, 1]}
    second = {"upstream": [0, 0, 1, 1], "edited": [0, 0]}
    found = versus(tmp_path / "x", [first], [second], **AVG)
    assert found.difference == pytest.approx((0.25 + 1) / 2)
    assert (found.metric, found.n_items) == ("Avg", 6)
    upstream = versus(tmp_path / "x", [first], [second], metric="TRR", streams=("upstream",))
    assert (upstream.difference, upstream.n_items) == (pytest.approx(0.25), 4)


def test_perplexities_are_compared_by_their_logarithms(tmp_path: Path) -> None:
    protocol = {"main_score": "perplexity", "higher_is_better": False}
    ratio = np.exp(np.random.default_rng(0).normal(0.5, 0.1, size=40))
    one = write_run(tmp_path / "a", edited(ratio * 1000), editor="a", protocol=protocol)
    two = write_run(tmp_path / "b", edited(np.full(40, 1000.0)), editor="b", protocol=protocol)
    found = compare([one], [two], names=("a", "b"))
    assert found.difference == pytest.approx(np.log(ratio).mean())
    assert found.is_significant


def test_scores_that_are_no_number_are_left_out_and_counted(tmp_path: Path) -> None:
    found = versus(tmp_path / "x", [edited([1, math.nan, None, 1, 1])], [edited([0, 0, 0, math.inf, 1])])
    assert (found.n_items, found.n_nan, found.difference) == (2, 3, pytest.approx(0.5))


def test_only_requests_that_both_edited_are_compared(tmp_path: Path) -> None:
    first = edited({"x": 1.0, "y": 1.0, "mine": 0.0})
    second = edited({"y": 0.0, "x": 1.0, "yours": 1.0, "also": 1.0})
    found = versus(tmp_path / "x", [first], [second])
    assert (found.difference, found.n_items, found.n_unpaired) == (pytest.approx(0.5), 2, 3)


def test_probes_are_paired_by_name_and_drawn_with_their_request(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shift = dict(zip(map(str, range(60)), rng.normal(size=60), strict=True))
    one = {f"{name}/{probe}": value for name, value in shift.items() for probe in range(4)}
    zero = dict.fromkeys(one, 0.0)
    probed = versus(tmp_path / "x", [{"holdout": one}], [{"holdout": zero}], streams=("holdout",), metric="Holdout")
    single = versus(tmp_path / "x", [edited(shift)], [edited(dict.fromkeys(shift, 0.0))])
    assert probed.n_items == 4 * single.n_items
    # Four probes that answer as one are one observation.
    assert probed.high - probed.low == pytest.approx(single.high - single.low)


def test_the_same_requests_under_more_seeds_are_no_more_observations(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=80)
    one = versus(tmp_path / "x", [edited(values)], [edited(values * 0)])
    three = versus(tmp_path / "x", [edited(values)] * 3, [edited(values * 0)] * 3)
    assert (three.n_items, three.n_seeds) == (240, 3)
    assert three.high - three.low == pytest.approx(one.high - one.low)
    assert three.p_value == one.p_value


def test_the_interval_is_that_of_the_normal_distribution_where_there_are_many_requests(tmp_path: Path) -> None:
    values = np.random.default_rng(3).normal(0.1, 1.0, size=1000)
    found = versus(tmp_path / "x", [edited(values)], [edited(values * 0)])
    half = 1.96 * values.std(ddof=1) / math.sqrt(1000)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(found.difference)


# --- the test --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "n_experiments", "least", "most"),
    # 99.8 % of such numbers of experiments lie between least and most.
    [
        pytest.param("one seed", 200, 2, 21, marks=pytest.mark.slow),
        ("three seeds", 80, 0, 11),
        pytest.param("Avg", 80, 0, 11, marks=pytest.mark.slow),
    ],
)
def test_where_nothing_differs_about_one_in_twenty_is_significant(
    kind: str, n_experiments: int, least: int, most: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)

    def runs() -> list[Scores]:
        made: list[Scores] = []
        for seed in range(3 if kind == "three seeds" else 1):
            requests = map(str, range(60 * seed, 60 * seed + 60))
            upstream = {"upstream": rng.random(60).tolist()} if kind == "Avg" else {}
            made.append({"edited": dict(zip(requests, rng.integers(2, size=60).tolist(), strict=True)), **upstream})
        return made

    options = AVG if kind == "Avg" else {}
    found = [versus(tmp_path / "x", runs(), runs(), **options, n_resamples=999) for _ in range(n_experiments)]
    assert least <= sum(comparison.is_significant for comparison in found) <= most
    assert np.mean([comparison.p_value < 0.5 for comparison in found]) == pytest.approx(0.5, abs=0.17)


@pytest.mark.slow
def test_an_editor_that_only_varies_with_the_seed_is_rarely_called_different(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)

    def runs() -> list[Scores]:
        return [edited(rng.normal(rng.normal(), 0.3, size=60)) for _ in range(3)]

    found = [versus(tmp_path / "x", runs(), runs(), n_resamples=999) for _ in range(80)]
    assert np.mean([comparison.is_significant for comparison in found]) < 0.12


def test_a_difference_that_is_there_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    better, worse = ([edited((rng.random(200) < rate) * 1.0) for _ in range(3)] for rate in (0.9, 0.6))
    found = versus(tmp_path / "x", better, worse)
    assert found.low < 0.3 < found.high
    assert found.p_value < 0.001
    assert found.is_significant


def test_equal_scores_make_no_difference(tmp_path: Path) -> None:
    scores = [edited(np.random.default_rng(seed).random(30)) for seed in range(3)]
    found = versus(tmp_path / "x", scores, scores)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert not found.is_significant


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_the_order_of_the_two_only_turns_signs(n_seeds: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    first, second = ([edited(rng.normal(rng.normal(), 1, size=50)) for _ in range(n_seeds)] for _ in range(2))
    found, turned = versus(tmp_path / "x", first, second), versus(tmp_path / "x", second, first)
    assert turned.difference == pytest.approx(-found.difference)
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))
    assert turned.p_value == found.p_value


def test_neither_the_order_of_rows_nor_that_of_folders_matters(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    folders: dict[bool, list[list[Path]]] = {False: [], True: []}
    for editor in "ab":
        scores = [edited(rng.random(50)) for _ in range(3)]
        for reverse, sides in folders.items():
            made = [
                write_run(tmp_path / f"{editor}{seed}{reverse}", of_seed, seed=seed, editor=editor, reverse=reverse)
                for seed, of_seed in enumerate(scores)
            ]
            sides.append(made[::-1] if reverse else made)
    one, two = (compare(*sides, names=("a", "b")) for sides in folders.values())
    assert one == two


def test_the_seed_fixes_the_result_and_another_seed_moves_it_little(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    first, second = ([edited(rng.random(80))] for _ in range(2))
    one, again, other = (versus(tmp_path / "x", first, second, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert one.p_value != other.p_value
    assert one.p_value == pytest.approx(other.p_value, abs=0.05)


@pytest.mark.parametrize(("n", "least"), [(1, 1.0), (2, 0.5), (4, 0.125), (6, 0.03125)])
def test_few_requests_prove_little_even_if_all_differ_alike(n: int, least: float, tmp_path: Path) -> None:
    found = versus(tmp_path / "x", [edited([1] * n)], [edited([0] * n)])
    assert found.p_value == least
    among_others = versus(tmp_path / "x", [edited([1] * n + [0] * 100)], [edited([0] * (n + 100))])
    assert among_others.p_value >= least


# --- what cannot be compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"protocol": {"eval_every": 7}}, "protocol.eval_every"),
        ({"stream": {"fingerprint": "s9"}}, "stream.fingerprint"),
        ({"model": {"fingerprint": "m9"}}, "model.fingerprint"),
    ],
)
def test_what_was_measured_differently_is_refused(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", edited([1, 0]), editor="a")
    two = write_run(tmp_path / "b", edited([1, 0]), editor="b", **change)
    with pytest.raises(UserError, match=f"runs a-s0 and b-s0 cannot stand in one table: {field} is "):
        compare([one], [two], names=("a", "b"))


def test_another_stream_is_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", edited([1, 0]))
    two = write_run(tmp_path / "b", edited([1, 0]), stream={"name": "scotus"})
    with pytest.raises(UserError, match="a and b were not run on one stream"):
        compare([one], [two], names=("a", "b"))


def test_runs_without_a_common_seed_are_no_pair_and_seeds_of_one_alone_are_left_out(tmp_path: Path) -> None:
    zero, one, two = (write_run(tmp_path / str(seed), edited([1, 0, 1]), seed=seed) for seed in range(3))
    with pytest.raises(UserError, match="a and b have no seed in common"):
        compare([zero], [one, two], names=("a", "b"))
    assert compare([zero, one], [one, two], names=("a", "b")).n_seeds == 1


def test_two_runs_of_one_seed_are_refused(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, edited([1, 0])) for name in "ab")
    with pytest.raises(UserError, match=r"a and .*b are both of seed 0"):
        compare([one, two], [one], names=("a", "b"))


@pytest.mark.parametrize("options", [{}, AVG])
def test_runs_without_a_common_request_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no scores of the same requests in .*edited"):
        versus(tmp_path / "x", [edited({"p": 1.0})], [edited({"q": 1.0})], **options)


def test_missing_and_broken_predictions_are_named(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, edited([1, 0])) for name in "ab")
    path = two / "predictions.parquet"
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: no such file"):
        compare([one], [two], names=("a", "b"))
    path.write_text("no parquet")
    with pytest.raises(UserError, match=rf"^{path}: cannot be read as Parquet"):
        compare([one], [two], names=("a", "b"))


def test_two_scores_of_one_item_are_refused(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, edited([1, 0])) for name in "ab")
    path = two / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(UserError, match=r"two scores of request 'r0' in 'edited' at the end"):
        compare([one], [two], names=("a", "b"))


# --- Holm's correction -----------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A hypothesis is rejected where every set of hypotheses with it is, by Bonferroni (Marcus et al. 1976)."""
    indices = range(len(p_values))
    for index, corrected in enumerate(holm(p_values)):
        sets = [s for size in indices for s in combinations(indices, size + 1) if index in s]
        closed = max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in sets)
        assert corrected == pytest.approx(closed)


def test_holm_of_nothing_is_nothing() -> None:
    assert holm([]) == []
