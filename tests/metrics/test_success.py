"""ES: a running mean over edits and nothing but edits."""

import json
import math
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_bench.metrics.success import EditSuccess, RunningMean
from grace_bench.results.schema import EditRecord

scores = st.lists(st.one_of(st.floats(0, 1e6), st.just(math.nan)), max_size=30)


@given(scores)
def test_a_running_mean_is_the_mean_of_what_is_a_number(values: list[float]) -> None:
    mean = RunningMean()
    for value in values:
        mean.update(value)
    known = [value for value in values if not math.isnan(value)]
    assert mean.n_nan == len(values) - len(known)
    if known:
        assert mean.compute() == pytest.approx(fmean(known))
    else:
        assert math.isnan(mean.compute())


def candidate(index: int, score: float | None) -> Any:
    """What a metric sees of a strategy after a candidate; a score of None is a candidate that was not edited."""
    record = EditRecord(
        index=index,
        id=str(index),
        was_error=score is not None,
        edited=score is not None,
        n_edits=index,
        before_text="",
        score_before=0.0,
        score_after=score,
    )
    return SimpleNamespace(record=record, n_edits=index, scored_after={})


@given(st.lists(st.one_of(st.none(), st.floats(0, 1), st.just(math.nan)), max_size=30))
def test_candidates_that_were_not_edited_do_not_count(after: list[float | None]) -> None:
    metric = EditSuccess()
    told: list[float] = []
    for index, score in enumerate(after):
        values = metric.after_candidate(candidate(index, score))
        assert (values is None) == (score is None)
        for value in values or ():
            assert value.x_plot == index
            if value.name == "ES":
                told.append(value.value)
    numbers = [score for score in after if score is not None and not math.isnan(score)]
    assert metric.result() == (pytest.approx(fmean(numbers)) if numbers else None)
    assert len(told) == sum(score is not None for score in after)
    assert json.loads(json.dumps(metric.state_dict())) == metric.state_dict()


def test_it_says_how_many_are_no_number_once_there_are_any() -> None:
    metric = EditSuccess()
    names = []
    for index, score in enumerate([1.0, math.nan, 0.5]):
        names.append({value.name: value.value for value in metric.after_candidate(candidate(index, score)) or ()})
    assert names == [{"ES": 1.0}, {"ES": 1.0, "ES/n_nan": 1}, {"ES": 0.75, "ES/n_nan": 1}]
