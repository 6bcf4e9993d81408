"""How far the scores of the panel lie apart on the same runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from grace_bench.common.scores import score_info
from grace_bench.results.metric_info import MetricInfo, Metrics
from grace_bench.results.rescored import recorded_scores, rescored
from grace_bench.results.schema import RunResult


@dataclass(frozen=True)
class Scorings:
    """One metric of several editors, by every score that one of their runs recorded.

    Attributes:
        metric: The metric.
        scores: The names of the scores, in the order of the panel.
        values: For each editor its means over runs, in the order of the scores; None where it has none.
        apart: For each editor the greatest of its scores between 0 and 1 minus the least; None with fewer than two.
    """

    metric: MetricInfo
    scores: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    apart: tuple[float | None, ...]


def scorings(rows: Sequence[Sequence[RunResult]], metrics: Metrics) -> list[Scorings]:
    """Returns every metric on the scale of the main score that runs recorded by more than one score.

    Args:
        rows: The runs of each editor, as they were recorded.
        metrics: The descriptions of all registered metrics.
    """
    recorded = [[(result, recorded_scores(result, metrics)) for result in row] for row in rows]
    by_score = {
        score: [
            [rescored(result, score, metrics=metrics) for result, names in row if score in names] for row in recorded
        ]
        for score in dict.fromkeys(name for row in recorded for _, names in row for name in names)
    }
    found = []
    for info in (info for info in metrics if info.is_main_score and not info.averages):
        columns = {score: [_mean(results, info) for results in read] for score, read in by_score.items()}
        known = {score: values for score, values in columns.items() if any(value is not None for value in values)}
        if len(known) > 1:
            values = tuple(zip(*known.values(), strict=True))
            shares = [i for i, score in enumerate(known) if score_info(score).is_share]
            apart = tuple(_apart([line[i] for i in shares]) for line in values)
            found.append(Scorings(info, tuple(known), values, apart))
    return found


def _mean(results: Sequence[RunResult], info: MetricInfo) -> float | None:
    values = [value for result in results if (value := result.metrics.get(info.name)) is not None]
    return fmean(values) if values else None


def _apart(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) - min(known) if len(known) > 1 else None
