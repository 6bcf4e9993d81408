"""The same runs by another score of the panel."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TypeVar

from grace_bench.common.scores import PANEL, score_info
from grace_bench.common.text import visible
from grace_bench.errors import UserError
from grace_bench.results.metric_info import MetricInfo, Metrics, metric_infos
from grace_bench.results.schema import Evaluation, Protocol, RunResult

T = TypeVar("T")


def rescored(result: RunResult, score: str | None, *, metrics: Metrics | None = None) -> RunResult:
    """Returns the result as if a score of the panel had been the run's main score; None leaves it as it is.

    Every metric on the scale of the main score takes the value that the run recorded for this score (`ERR/contains`).
    What the run did is not changed: which requests were errors was decided by its own protocol.

    Args:
        result: A finished run.
        score: The score's name.
        metrics: The descriptions of all registered metrics, if they are at hand.

    Raises:
        UserError: If there is no such score, or the run did not record it.
    """
    if score is None:
        return result
    info, protocol = score_info(score), result.protocol
    infos = metrics or metric_infos()
    values = _rescored(result.metrics, protocol, score, infos)
    if all(values.get(one.name) is None for one in infos if one.is_main_score):
        known = ", ".join(recorded_scores(result, infos))
        raise UserError(f"run {visible(result.run_id)} has no score {score} (it has {known})")
    by_score = {"main_score": score, "locality_score": None, "higher_is_better": info.higher_is_better}
    return result.model_copy(
        update={
            "protocol": protocol.model_copy(update=by_score),
            "metrics": values,
            "before": _rescored(result.before, protocol, score, infos),
        }
    )


def all_rescored(
    runs: Sequence[tuple[RunResult, T]], score: str | None
) -> tuple[list[tuple[RunResult, T]], tuple[str, ...]]:
    """Returns the runs that recorded a score by that score, and a line for each of the others.

    Args:
        runs: Results, each with anything that belongs to it.
        score: As in `rescored`.

    Raises:
        UserError: If there is no such score, or no run recorded it.
    """
    if score is None:
        return [*runs], ()
    score_info(score)
    found, lacking, metrics = [], [], metric_infos()
    for result, more in runs:
        try:
            found.append((rescored(result, score, metrics=metrics), more))
        except UserError as error:
            lacking.append(str(error))
    if lacking and not found:
        raise UserError(lacking[0])
    return found, tuple(lacking)


def rescored_evaluations(
    evaluations: Sequence[Evaluation], protocol: Protocol, score: str | None
) -> Sequence[Evaluation]:
    """Returns evaluations by another score.

    Args:
        evaluations: Evaluations of one run.
        protocol: The run's own protocol.
        score: As in `rescored`.
    """
    if score is None:
        return evaluations
    infos = metric_infos()
    return [replace(line, metrics=_rescored(line.metrics, protocol, score, infos)) for line in evaluations]


def recorded_scores(result: RunResult, metrics: Metrics) -> list[str]:
    """Returns the scores of the panel by which a run can be ranked, in the order of the panel.

    Args:
        result: A finished run.
        metrics: The descriptions of all registered metrics.
    """
    infos = [info for info in metrics if info.is_main_score]
    values, protocol = result.metrics, result.protocol
    return [
        score.name for score in PANEL if any(_value(values, protocol, info, score.name) is not None for info in infos)
    ]


def main_score_of(protocol: Protocol, stream: str | None) -> str:
    """Returns the main score of an evaluation stream under a protocol."""
    return (protocol.locality_score if stream == "locality" else None) or protocol.main_score


def _rescored(
    metrics: Mapping[str, float | None], protocol: Protocol, score: str, infos: Metrics
) -> dict[str, float | None]:
    found = dict(metrics)
    for info in infos:
        value = _value(metrics, protocol, info, score)
        if info.is_main_score and (value is not None or info.name in found):
            found[info.name] = value
        for stream in info.part_columns if info.is_main_score else ():
            name = f"{info.name}/{stream}"
            if name in metrics and score != main_score_of(protocol, stream):
                found[name] = metrics.get(f"{name}/{score}")
    for info in infos:
        if info.averages and score_info(score).higher_is_better:
            parts = [found.get(name) for name in info.averages]
            known = [value for value in parts if value is not None and math.isfinite(value)]
            found[info.name] = fmean(known) if len(known) == len(parts) else None
    return found


def _value(metrics: Mapping[str, float | None], protocol: Protocol, info: MetricInfo, score: str) -> float | None:
    if info.averages:
        return None
    is_main = score == main_score_of(protocol, info.stream)
    return metrics.get(info.name) if is_main else metrics.get(f"{info.name}/{score}")
