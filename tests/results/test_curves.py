"""Curves over seeds, when forgetting begins, and what became of each edit."""

import math
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS
from grace_bench.results.curves import (
    KeptEdit,
    age_width,
    edits_forgotten_after,
    kept_edits,
    mean_curve,
    score_by_age,
    series_of,
    thinned,
    upstream_forgotten_after,
    worst_forgotten,
)
from grace_bench.results.reading import read_edits, read_evaluations
from grace_bench.results.schema import Evaluation


def evaluations(**figures: list[float | None]) -> list[Evaluation]:
    """Evaluations after 0, 10, 20, … edits."""
    rows = zip(*figures.values(), strict=True)
    return [Evaluation(n_edits=10 * i, metrics=dict(zip(figures, row, strict=True))) for i, row in enumerate(rows)]


def edit(name: str, *, after: float | None, end: float, age: int = 0) -> KeptEdit:
    return KeptEdit(
        id=name,
        n_edits=1,
        age=age,
        prompt="",
        target="",
        before_text="",
        after_text="",
        end_text="",
        score_after=after,
        score_end=end,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    settings = RunSettings(schedule=Schedule(max_edits=6, eval_every=3), seed=1)
    # A point is one position: there is nothing before it to replace.
    grace = partial(EDITORS.get("grace"), replacement="replace_last")
    run_benchmark("toy", editor=grace, settings=settings, folder=folder)
    return folder


def test_a_curve_has_the_mean_and_the_extremes_of_its_seeds() -> None:
    points = mean_curve([[(0, 1.0), (10, 0.8)], [(0, 1.0), (10, 0.4)], []])
    assert [(p.x, p.mean, p.low, p.high, p.n) for p in points] == [
        (0, 1.0, 1.0, 1.0, 2),
        (10, pytest.approx(0.6), 0.4, 0.8, 2),
    ]


def test_seeds_that_end_apart_are_averaged_where_all_were_evaluated_and_at_their_ends() -> None:
    points = mean_curve([[(0, 1.0), (10, 0.9), (20, 0.7), (28, 0.5)], [(0, 1.0), (10, 0.7), (14, 0.3)]])
    assert [(p.x, p.mean, p.n) for p in points] == [(0, 1.0, 2), (10, pytest.approx(0.8), 2), (21, 0.4, 2)]


def test_no_runs_make_no_curve() -> None:
    assert mean_curve([[]]) == []


@given(st.integers(2, 60), st.integers(2, 30))
def test_a_thinned_curve_keeps_its_ends_and_its_order(n: int, most: int) -> None:
    points = mean_curve([[(i, float(i)) for i in range(n)]])
    kept = thinned(points, most)
    places = [point.x for point in kept]
    assert len(kept) == min(n, most)
    assert places == sorted(set(places))
    assert (places[0], places[-1]) == (0, n - 1)


def test_what_is_not_a_number_is_no_point_of_a_curve() -> None:
    assert series_of(evaluations(TRR=[1.0, None, math.nan, 0.5]), "TRR") == [(0, 1.0), (30, 0.5)]


def test_upstream_is_forgotten_where_it_falls_behind_its_start_by_more_than_five_points() -> None:
    assert (
        upstream_forgotten_after(series_of(evaluations(TRR=[0.9, 0.85, 0.84, 0.9]), "TRR"), higher_is_better=True) == 20
    )
    assert upstream_forgotten_after(series_of(evaluations(TRR=[0.9, 0.95, 0.86]), "TRR"), higher_is_better=True) is None
    assert upstream_forgotten_after(series_of(evaluations(TRR=[None, None]), "TRR"), higher_is_better=True) is None


def test_edits_are_forgotten_where_err_falls_behind_what_was_learned() -> None:
    # The second evaluation's fall is edits that never worked.
    learned, kept = [(10, 1.0), (20, 0.5), (30, 0.6)], [(10, 1.0), (20, 0.5), (30, 0.5)]
    assert edits_forgotten_after(learned, kept, higher_is_better=True) == 30
    assert edits_forgotten_after(learned, kept[:2], higher_is_better=True) is None
    assert edits_forgotten_after([], kept, higher_is_better=True) is None


def test_a_perplexity_is_forgotten_by_its_relative_growth() -> None:
    assert upstream_forgotten_after(series_of(evaluations(TRR=[20.0, 21.0, 21.1]), "TRR"), higher_is_better=False) == 20
    assert edits_forgotten_after([(10, 2.0)], [(10, 1.0)], higher_is_better=False) is None


def test_the_worst_forgotten_edit_comes_first_and_of_equal_ones_the_youngest() -> None:
    edits = [
        edit("kept", after=1.0, end=0.95),
        edit("half", after=1.0, end=0.5),
        edit("old", after=1.0, end=0.0, age=9),
        edit("young", after=1.0, end=0.0, age=3),
        edit("never right", after=0.0, end=0.0),
        edit("unknown", after=None, end=0.0),
        edit("not a number", after=1.0, end=math.nan),
    ]
    assert [e.id for e in worst_forgotten(edits, higher_is_better=True)] == ["young", "old", "half"]


def test_the_worst_forgotten_perplexity_grew_by_the_greatest_factor() -> None:
    edits = [edit("a", after=100.0, end=200.0), edit("b", after=2.0, end=30.0), edit("better", after=9.0, end=3.0)]
    assert [e.id for e in worst_forgotten(edits, higher_is_better=False)] == ["b", "a"]


def test_the_ages_and_scores_of_a_run_are_those_in_its_files(run: Path) -> None:
    edits = kept_edits(run, 6)
    records = [record for record in read_edits(run / "edits.jsonl").values() if record.edited]
    assert [(e.id, e.age) for e in edits] == [(record.id, 6 - record.n_edits) for record in records]
    at_end = read_evaluations(run / "metrics.jsonl")[-1].metrics
    assert pd.Series([e.score_end for e in edits]).mean() == pytest.approx(at_end["ERR"])
    assert pd.Series([e.score_after for e in edits]).mean() == pytest.approx(at_end["ES"])
    assert all(e.end_text for e in edits)


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), max_size=20), min_size=1, max_size=3))
def test_scores_by_age_are_those_of_pandas(runs: list[list[tuple[int, float]]]) -> None:
    edits = [[edit("e", after=1.0, end=score, age=age) for age, score in run] for run in runs]
    found = score_by_age(edits, width=5)
    frame = pd.DataFrame(
        [(seed, age // 5, score) for seed, run in enumerate(runs) for age, score in run],
        columns=["seed", "bin", "score"],
    )
    of_seeds = frame.groupby(["bin", "seed"]).score.mean().groupby("bin")
    assert sorted(found) == sorted(of_seeds.groups)
    for number, (point, n_edits) in found.items():
        assert point.x == 5 * number + 2
        assert point.mean == pytest.approx(of_seeds.mean()[number])
        assert (point.low, point.high) == pytest.approx((of_seeds.min()[number], of_seeds.max()[number]))
        assert n_edits == (frame.bin == number).sum()


@given(st.integers(0, 10**6))
def test_ages_fall_into_at_most_ten_bins_and_never_fewer_than_four_of_many(max_age: int) -> None:
    n_bins = max_age // age_width(max_age) + 1
    assert min(4, max_age + 1) <= n_bins <= 10


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"n_edits": 3', "metrics.jsonl:2: Invalid JSON"),
        ('{"TRR": 1.0}', "metrics.jsonl:2: field 'n_edits': Field required"),
        ('{"n_edits": 3, "TRR": "high"}', "metrics.jsonl:2: field 'TRR': Input should be a valid number"),
    ],
)
def test_a_broken_evaluation_is_told_with_file_line_and_field(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"n_edits": 0, "TRR": 1.0}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_evaluations(path)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
