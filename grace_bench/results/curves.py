"""The fate of edits as more edits follow: curves over seeds, the onset of forgetting, scores by age, single edits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from grace_bench.common.scores import score_info
from grace_bench.results.reading import read_edits, read_predictions
from grace_bench.results.schema import Evaluation

FORGETTING_THRESHOLD = 0.05
"""A loss counts as forgetting if it exceeds this: points of accuracy or F1, or relative growth of perplexity."""

Series = Sequence[tuple[int, float]]
"""One run's metric over time: the number of edits, and the value then."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The runs of one editor at one position of an axis.

    Attributes:
        x: The position.
        mean, low, high: Mean, minimum and maximum of the runs' values.
        n: The number of runs.
    """

    x: float
    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, x: float, figures: Sequence[float]) -> "Point":
        """Summarises the values of one or more runs."""
        return cls(x=x, mean=fmean(figures), low=min(figures), high=max(figures), n=len(figures))


@dataclass(frozen=True, kw_only=True)
class KeptEdit:
    """One edit at the end of its run.

    Attributes:
        id: The request's id.
        n_edits: The number of edits after it was made, itself included.
        age: The number of edits made after it.
        prompt, target: The input and the wanted answer, where they were recorded.
        before_text, after_text, end_text: The answer before the edit, right after it, and at the end.
        score_after, score_end: The main score right after the edit and at the end.
    """

    id: str
    n_edits: int
    age: int
    prompt: str | None
    target: str | None
    before_text: str
    after_text: str | None
    end_text: str | None
    score_after: float | None
    score_end: float


def decline(reference: float, figure: float, *, higher_is_better: bool) -> float:
    """Returns how much worse a figure is than a reference; negative if it is better.

    The difference for scores between 0 and 1; for perplexities, which have no upper end, the relative growth.

    >>> decline(0.75, 0.5, higher_is_better=True)
    0.25
    >>> decline(10.0, 15.0, higher_is_better=False)
    0.5
    """
    return reference - figure if higher_is_better else figure / reference - 1.0


def _is_forgotten(reference: float, figure: float, higher_is_better: bool) -> bool:
    # A fall by exactly the threshold does not count, despite rounding of binary fractions.
    return decline(reference, figure, higher_is_better=higher_is_better) > FORGETTING_THRESHOLD + 1e-9


def series_of(evaluations: Sequence[Evaluation], metric: str) -> Series:
    """Returns the finite values of a metric, by number of edits."""
    found = {line.n_edits: line.metrics.get(metric) for line in evaluations}
    return [(n, value) for n, value in sorted(found.items()) if value is not None and math.isfinite(value)]


def mean_curve(runs: Sequence[Series]) -> list[Point]:
    """Averages the curves of runs that differ in the seed.

    Runs are averaged at the numbers of edits at which all of them were evaluated, so that every point is a mean over
    the same seeds. If runs end after different numbers of edits, the last point is the mean of their last evaluations,
    at the mean of their ends, as in the leaderboard.

    Args:
        runs: A series for each run; empty ones are left out.
    """
    curves = [dict(series) for series in runs if series]
    if not curves:
        return []
    ends = [max(curve) for curve in curves]
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    points = [Point.of(n, [curve[n] for curve in curves]) for n in shared]
    if len(set(ends)) > 1:
        points.append(Point.of(fmean(ends), [curve[end] for curve, end in zip(curves, ends, strict=True)]))
    return points


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Returns at most `most` of the points, evenly spread, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def upstream_forgotten_after(retention: Series, *, higher_is_better: bool) -> int | None:
    """Returns the number of edits at the first evaluation that is worse than before the first edit.

    Args:
        retention: The main score on upstream data (TRR) over a run.
        higher_is_better: The direction of the main score.

    Returns:
        None if no evaluation is worse by more than the threshold.
    """
    return next((n for n, figure in retention if _is_forgotten(retention[0][1], figure, higher_is_better)), None)


def edits_forgotten_after(learned: Series, kept: Series, *, higher_is_better: bool) -> int | None:
    """Returns the number of edits at the first evaluation at which edits score worse than right after they were made.

    `learned` is the mean score of the same edits, each right after it was made (except that `kept` omits superseded
    ones): the gap between the two was learned and lost. A fall of `kept` alone may come from edits that never worked.

    Args:
        learned: The main score of each edit right after it was made (ES) over a run.
        kept: The main score on the requests edited so far (ERR).
        higher_is_better: The direction of the main score.

    Returns:
        None if no evaluation is worse by more than the threshold.
    """
    reference = dict(learned)
    return next(
        (n for n, figure in kept if n in reference and _is_forgotten(reference[n], figure, higher_is_better)), None
    )


def kept_edits(folder: Path, n_edits: int, *, score: str | None = None) -> list[KeptEdit]:
    """Reads the edits of a run with their state at its end, in order, without the superseded ones.

    Args:
        folder: The run folder.
        n_edits: The edits that the run made.
        score: The score of the panel by which they are read; None for the main score.

    Raises:
        UserError: If `edits.jsonl` or `predictions.parquet` is missing or broken.
    """
    records = read_edits(folder / "edits.jsonl")
    column = "score" if score is None else score_info(score).column
    at_end = read_predictions(
        folder / "predictions.parquet",
        columns=["request_id", column, "text"],
        filters=[("stream", "=", "edited"), ("n_edits", "=", n_edits)],
    )
    edits = []
    for row in at_end:
        record = records.get(row["request_id"])
        if record is None or not record.edited or row[column] is None:
            continue
        edits.append(
            KeptEdit(
                id=record.id,
                n_edits=record.n_edits,
                age=n_edits - record.n_edits,
                prompt=record.prompt,
                target=record.target,
                before_text=record.before_text,
                after_text=record.after_text,
                end_text=row["text"],
                score_after=record.score_after if score is None else record.scores_after.get(column),
                score_end=row[column],
            )
        )
    return sorted(edits, key=lambda edit: edit.n_edits)


def worst_forgotten(edits: Sequence[KeptEdit], *, higher_is_better: bool) -> list[KeptEdit]:
    """Returns the edits whose score at the end is worse than right after the edit, by more than the threshold.

    The greatest loss comes first; of equal losses, the one after the fewest edits.
    """

    def forgotten(edit: KeptEdit) -> bool:
        return edit.score_after is not None and _is_forgotten(edit.score_after, edit.score_end, higher_is_better)

    def rank(edit: KeptEdit) -> tuple[float, int]:
        assert edit.score_after is not None
        return -decline(edit.score_after, edit.score_end, higher_is_better=higher_is_better), edit.age

    return sorted(filter(forgotten, edits), key=rank)


def age_width(max_age: int, *, most: int = 10) -> int:
    """Returns the smallest of 1, 2, 5, 10, 20, 50, … that divides ages from 0 to `max_age` into at most `most` bins.

    >>> [age_width(n) for n in (0, 9, 10, 49, 99, 100, 999)]
    [1, 1, 2, 5, 10, 20, 100]
    """
    scale = 1
    while True:
        for width in (scale, 2 * scale, 5 * scale):
            if max_age // width < most:
                return width
        scale *= 10


def score_by_age(runs: Sequence[Sequence[KeptEdit]], *, width: int) -> Mapping[int, tuple[Point, int]]:
    """Averages the scores at the end by the age of the edit.

    Args:
        runs: The edits of each run.
        width: The number of ages in a bin.

    Returns:
        For each bin, whose ages begin at its index times `width`: the runs' means at the middle of the bin, and the
        number of edits in it.
    """
    by_bin: dict[int, dict[int, list[float]]] = {}
    for run, edits in enumerate(runs):
        for edit in edits:
            if math.isfinite(edit.score_end):
                by_bin.setdefault(edit.age // width, {}).setdefault(run, []).append(edit.score_end)
    return {
        number: (
            Point.of(number * width + (width - 1) / 2, [fmean(scores) for scores in scores_of.values()]),
            sum(len(scores) for scores in scores_of.values()),
        )
        for number, scores_of in sorted(by_bin.items())
    }
