"""The panel of scores: what each one is called, which direction is better, and how the scores of items become one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from grace_bench.errors import UserError, did_you_mean

Stop = Literal["newline", "sentence"]
"""Where a free answer ends, besides the end token and `max_new_tokens`."""
STOPS: tuple[Stop, ...] = ("newline", "sentence")
OUTLIER = 1000.0
"""A text of a higher perplexity is an outlier."""


@dataclass(frozen=True, kw_only=True)
class ScoreInfo:
    """One score of the panel; `docs/scores.md` gives the formulas.

    Attributes:
        name: Its name in options, results and columns.
        summary: What it measures, in a few words.
        higher_is_better: Its direction.
        decimals: Digits after the point of a mean.
        item: The score of items that it is made from, as `predictions.parquet` has it.
        pooling: How the scores of items become one: `mean`; `tokens` for the exponential of the mean logarithm weighted
            by tokens; `outliers` for the share of items above `OUTLIER`.
        only_for_locality: Whether it exists only for locality probes.
        is_optional: Whether `scores` must name it, because it costs a long generation an item.
    """

    name: str
    summary: str
    higher_is_better: bool = True
    decimals: int = 3
    item: str = ""
    pooling: Literal["mean", "tokens", "outliers"] = "mean"
    only_for_locality: bool = False
    is_optional: bool = False

    @property
    def column(self) -> str:
        """The column of `predictions.parquet` with the scores of items."""
        return self.item or self.name

    @property
    def is_perplexity(self) -> bool:
        """Whether it is a perplexity, which has no upper end: its logarithms are compared."""
        return self.column == "perplexity" and self.pooling != "outliers"

    @property
    def is_share(self) -> bool:
        """Whether it lies between 0 and 1, and more is better."""
        return self.higher_is_better and self.column != "fluency"

    def part(self, value: float, n_tokens: int) -> tuple[float, float]:
        """Returns what an item adds to the mean over items, and its weight.

        Args:
            value: The item's score in `column`.
            n_tokens: The number of its scored tokens.
        """
        if self.pooling == "tokens":
            return math.log(value), float(n_tokens)
        return (float(value > OUTLIER) if self.pooling == "outliers" else value), 1.0

    def of_mean(self, mean: float) -> float:
        """Returns the score of all items from the weighted mean of their parts."""
        return math.exp(mean) if self.pooling == "tokens" else mean


PANEL: tuple[ScoreInfo, ...] = (
    ScoreInfo(name="accuracy", summary="the predicted label is the target"),
    ScoreInfo(name="f1", summary="token F1 of the free answer, the best of the accepted ones"),
    ScoreInfo(name="exact_match", summary="the free answer is an accepted one"),
    ScoreInfo(name="contains", summary="the free answer contains an accepted one"),
    ScoreInfo(name="token_accuracy", summary="target tokens that are the most likely ones, after the gold prefix"),
    ScoreInfo(name="reference_f1", summary="token F1 as in the official GRACE code"),
    ScoreInfo(name="contrast", summary="the wanted answer is likelier than the other one"),
    ScoreInfo(name="agreement", summary="the free answer is the unedited model's", only_for_locality=True),
    ScoreInfo(
        name="token_agreement",
        summary="most likely tokens along the reference answer that are the unedited model's",
        only_for_locality=True,
    ),
    ScoreInfo(name="gold", summary="the free answer is the gold answer", only_for_locality=True),
    ScoreInfo(name="perplexity", summary="perplexity, the mean over texts", higher_is_better=False, decimals=2),
    ScoreInfo(
        name="perplexity_weighted",
        summary="perplexity of all tokens together",
        higher_is_better=False,
        decimals=2,
        item="perplexity",
        pooling="tokens",
    ),
    ScoreInfo(
        name="perplexity_outliers",
        summary="texts with a perplexity above 1,000",
        higher_is_better=False,
        item="perplexity",
        pooling="outliers",
    ),
    ScoreInfo(name="fluency", summary="entropy of bigrams and trigrams of 100 generated tokens", is_optional=True),
)
"""Every score, in the order in which tables show them."""

_BY_NAME = {info.name: info for info in PANEL}
ITEM_SCORES = tuple(dict.fromkeys(info.column for info in PANEL))
"""The scores that an item can have, in the order of their columns."""


def score_info(name: str) -> ScoreInfo:
    """Returns the description of a score.

    Raises:
        UserError: If there is no such score.
    """
    if name not in _BY_NAME:
        raise UserError(f"there is no score {name!r}{did_you_mean(name, _BY_NAME)} (there are: {', '.join(_BY_NAME)})")
    return _BY_NAME[name]


def check_score(name: str, value: Any) -> None:
    """Makes sure that an option names a score, or none.

    Args:
        name: The option.
        value: Its value; None for no score.

    Raises:
        UserError: If it does not; names the option.
    """
    if value is not None and value not in _BY_NAME:
        hint = did_you_mean(str(value), _BY_NAME)
        raise UserError(f"{name}={value} is no score{hint} (there are: {', '.join(_BY_NAME)})")


def check_scores(name: str, value: Any) -> None:
    """Makes sure that an option is a list of scores, or None.

    Raises:
        UserError: If it is not; names the option.
    """
    if value is None:
        return
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UserError(f"{name}={value} should be a list of scores, as [exact_match,token_accuracy]")
    for score in value:
        check_score(name, "null" if score is None else score)
