"""Whether two editors differ by more than the choice of edits explains."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance

import numpy as np

from grace_bench.common.scores import OUTLIER, ScoreInfo, score_info
from grace_bench.errors import UserError
from grace_bench.results.comparability import refuse_mixtures
from grace_bench.results.reading import read_predictions, read_result
from grace_bench.results.rescored import all_rescored
from grace_bench.results.schema import RunResult

SIGNIFICANCE_LEVEL = 0.05

_Item = tuple[str, str]
"""Request id and probe."""
_Scores = Mapping[str, Mapping[_Item, tuple[float, int]]]
"""Scores at the end of a run with their numbers of tokens, by stream and item."""

_MAX_DRAWS = 2_000_000
"""Number of request indices drawn at once, to bound memory."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of two editors on the same items.

    Attributes:
        first, second: The names of the editors.
        metric: The compared score.
        difference: Mean score of the first minus that of the second over the paired items, with equal weight for each
            seed; of the log perplexity if the main score is perplexity.
        low, high: The 95 % interval of the difference.
        p_value: Two-sided, of no difference.
        n_items: Pairs of scores, over all seeds.
        n_seeds: Seeds that both editors were run with.
        n_unpaired: Items of those seeds that only one of the two has a score for.
        n_nan: Pairs left out because a score is not finite.
    """

    first: str
    second: str
    metric: str
    difference: float
    low: float
    high: float
    p_value: float
    n_items: int
    n_seeds: int
    n_unpaired: int = 0
    n_nan: int = 0

    @property
    def is_significant(self) -> bool:
        """Whether the p-value is below 0.05."""
        return self.p_value < SIGNIFICANCE_LEVEL


def compare(
    first: Sequence[Path],
    second: Sequence[Path],
    *,
    names: tuple[str, str],
    streams: Sequence[str],
    metric: str,
    score: str | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares two editors by a paired bootstrap over requests.

    Pairing. Runs are paired by seed, and within a seed the scores of the last evaluation by request and probe. An item
    that only one of the two has is left out and counted: two editors that edited different candidates are compared on
    the requests both edited, because only one of them has a score for the rest. The difference may therefore deviate
    from the difference of the two means, each of which is over the editor's own edits.

    Requests are drawn with replacement, each with its probes and with its scores under every seed: the same request
    under two seeds is not two independent observations (cluster bootstrap, Davison & Hinkley 1997, section 3.8). The
    statistic of a resample is a ratio, because the seeds of a stream need not share their requests: summed differences
    over summed weights, an item weighing 1 / (items of its seed).

    Seeds are too few to resample. If the seeds' mean differences vary by more than their choice of requests explains,
    as when an editor collapses in one order of three, each resample also deviates by a draw from Student's t with seeds
    - 1 degrees of freedom, times the standard error that follows from this variance. With one seed nothing is known
    about others: the p-value then covers other requests only.

    The p-value is the share of resamples that deviate from the observed difference by at least its size (Efron &
    Tibshirani 1993, chapter 16), with one added to both counts (Davison & Hinkley 1997, chapter 4). The interval is
    symmetric and computed from the same deviations, so the two agree. If few requests differ, the bootstrap is
    optimistic, so the p-value is at least 2 ** (1 - n) for n requests that differ, the minimum of a sign test.

    Args:
        first: The run folders of an editor, one per seed.
        second: The run folders of the other editor.
        names: The names of the two in the result.
        streams: The evaluation streams whose items are compared; several streams are averaged, and each is resampled.
        metric: The score's name in the result.
        score: The score of the panel by which items are compared; None for the runs' main score. Items of a score that
            is weighted by tokens have that weight.
        n_resamples: Number of resamples; the smallest p-value is about its reciprocal.
        seed: Seeds the resampling.

    Raises:
        UserError: If the runs cannot be compared: measured differently, no seed or no item in common, or predictions
            missing or broken.
    """
    runs = [_runs_by_seed(folders, score) for folders in (first, second)]
    results = [result for side in runs for result, _ in side.values()]
    refuse_mixtures(results)
    if len({result.stream.name for result in results}) != 1:
        raise UserError(f"{names[0]} and {names[1]} were not run on one stream")
    by = score_info(score or results[0].protocol.main_score)
    seeds = sorted(runs[0].keys() & runs[1].keys())
    if not seeds:
        raise UserError(f"{names[0]} and {names[1]} have no seed in common")
    pairs: dict[int, list[_Pairs]] = {}
    for number in seeds:
        one, two = (_final_scores(side[number][1], score) for side in runs)
        of_roles = [_pair(one.get(role, {}), two.get(role, {}), by) for role in streams]
        if all(part.differences for part in of_roles):
            pairs[number] = of_roles
    if not pairs:
        raise UserError(f"{names[0]} and {names[1]} have no scores of the same requests in {' and '.join(streams)}")
    samples = [_Sample.over_seeds(parts) for parts in zip(*pairs.values(), strict=True)]
    used = [part for of_roles in pairs.values() for part in of_roles]
    rng = np.random.default_rng(seed)
    difference = float(np.mean([sample.sums.sum() for sample in samples]))
    deviations = np.mean([sample.resampled(n_resamples, rng) for sample in samples], axis=0) - difference
    if len(pairs) > 1:
        # Given the sign of the difference, so that the order of the two editors affects signs only.
        towards = math.copysign(1.0, difference)
        deviations += towards * _seed_error(list(pairs.values())) * rng.standard_t(len(pairs) - 1, size=n_resamples)
    distances = np.abs(deviations)
    # Equal up to rounding counts as equal: with scores of 0 and 1 many resamples deviate by exactly the difference.
    n_as_far = int(np.count_nonzero(distances >= abs(difference) * (1 - 1e-9)))
    n_differing = sum(int(np.count_nonzero(sample.sums)) for sample in samples)
    width = float(np.quantile(distances, 1 - SIGNIFICANCE_LEVEL))
    return Comparison(
        first=names[0],
        second=names[1],
        metric=metric,
        difference=difference,
        low=difference - width,
        high=difference + width,
        p_value=min(1.0, max((n_as_far + 1) / (n_resamples + 1), 2.0 ** (1 - n_differing))),
        n_items=sum(len(part.differences) for part in used),
        n_seeds=len(pairs),
        n_unpaired=sum(part.n_unpaired for part in used),
        n_nan=sum(part.n_nan for part in used),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values corrected for their number (Holm 1979), in the same order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


@dataclass(frozen=True)
class _Pairs:
    """The items of one stream that are in both runs.

    Attributes:
        differences: Score of the first minus that of the second.
        weights: The weight of each item in the mean.
        n_unpaired: Items of only one run.
        n_nan: Shared items without two finite scores.
    """

    differences: Mapping[_Item, float]
    weights: Mapping[_Item, float]
    n_unpaired: int
    n_nan: int

    @property
    def weight(self) -> float:
        """The sum of the weights."""
        return sum(self.weights.values())

    def mean(self) -> float:
        """Returns the weighted mean difference."""
        return sum(self.weights[item] * difference for item, difference in self.differences.items()) / self.weight

    def variance(self) -> float:
        """Returns the sampling variance of the mean, counting the items of a request as one draw; 0 for one request."""
        mean, weight, deviations = self.mean(), self.weight, defaultdict[str, float](float)
        for item, difference in self.differences.items():
            deviations[item[0]] += self.weights[item] * (difference - mean) / weight
        n_requests = len(deviations)
        return sum(d * d for d in deviations.values()) * n_requests / (n_requests - 1) if n_requests > 1 else 0.0


@dataclass(frozen=True)
class _Sample:
    """The requests of one stream.

    Attributes:
        sums: Each request's share of the mean difference, shape (requests,).
        weights: Each request's share of the weight, shape (requests,), 1 in total.
    """

    sums: np.ndarray
    weights: np.ndarray

    @classmethod
    def over_seeds(cls, pairs: Sequence[_Pairs]) -> "_Sample":
        sums: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for part in pairs:
            share = 1 / (part.weight * len(pairs))
            for item, difference in sorted(part.differences.items()):
                weight = share * part.weights[item]
                sums[item[0]] += weight * difference
                weights[item[0]] += weight
        requests = sorted(sums)
        return cls(np.array([sums[name] for name in requests]), np.array([weights[name] for name in requests]))

    def resampled(self, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the mean difference in each resample, shape (n_resamples,)."""
        n_requests = len(self.sums)
        means = []
        for start in range(0, n_resamples, step := max(1, _MAX_DRAWS // n_requests)):
            drawn = rng.integers(n_requests, size=(min(step, n_resamples - start), n_requests))
            means.append(self.sums[drawn].sum(axis=1) / self.weights[drawn].sum(axis=1))
        return np.concatenate(means)


def _seed_error(pairs: Sequence[Sequence[_Pairs]]) -> float:
    """Returns the standard error of the mean over seeds, without the part that the choice of requests explains.

    The variance between seeds is the sample variance of their mean differences minus the mean sampling variance of
    these, but at least 0.
    """
    means = [sum(part.mean() for part in of_roles) / len(of_roles) for of_roles in pairs]
    sampling = [sum(part.variance() for part in of_roles) / len(of_roles) ** 2 for of_roles in pairs]
    return math.sqrt(max(0.0, variance(means) - fmean(sampling)) / len(pairs))


def _runs_by_seed(folders: Sequence[Path], score: str | None) -> dict[int, tuple[RunResult, Path]]:
    runs: dict[int, tuple[RunResult, Path]] = {}
    found, _ = all_rescored([(read_result(folder / "result.json"), folder) for folder in folders], score)
    for result, folder in found:
        if result.seed in runs:
            raise UserError(f"{runs[result.seed][1]} and {folder} are both of seed {result.seed}")
        runs[result.seed] = (result, folder)
    return runs


def _final_scores(folder: Path, score: str | None) -> _Scores:
    path = folder / "predictions.parquet"
    column, more = "score", []
    if score is not None:
        info = score_info(score)
        column, more = info.column, ["n_tokens"] if info.pooling == "tokens" else []
    last = max((row["n_edits"] for row in read_predictions(path, columns=["n_edits"])), default=0)
    scores: dict[str, dict[_Item, tuple[float, int]]] = defaultdict(dict)
    columns = ["stream", "request_id", "probe", column, *more]
    for row in read_predictions(path, columns=columns, filters=[("n_edits", "=", last)]):
        item = (row["request_id"], row["probe"])
        if item in scores[row["stream"]]:
            raise UserError(f"{path}: two scores of request '{item[0]}' in '{row['stream']}' at the end")
        value = math.nan if row[column] is None else row[column]
        scores[row["stream"]][item] = (value, row.get("n_tokens") or 1)
    return scores


def _pair(first: Mapping[_Item, tuple[float, int]], second: Mapping[_Item, tuple[float, int]], by: ScoreInfo) -> _Pairs:
    shared = sorted(first.keys() & second.keys())
    one, two = (np.array([scores[item][0] for item in shared], dtype=float) for scores in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        if by.pooling == "outliers":
            one, two = (np.where(np.isnan(values), math.nan, values > OUTLIER) for values in (one, two))
        elif by.is_perplexity:
            one, two = np.log(one), np.log(two)
        differences = one - two
    finite = np.isfinite(differences)
    kept = [item for item, is_finite in zip(shared, finite, strict=True) if is_finite]
    return _Pairs(
        differences=dict(zip(kept, differences[finite].tolist(), strict=True)),
        weights={item: float(first[item][1]) if by.pooling == "tokens" else 1.0 for item in kept},
        n_unpaired=len(first.keys() ^ second.keys()),
        n_nan=int(np.count_nonzero(~finite)),
    )
