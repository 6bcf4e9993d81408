"""Scores of tokens and of their likelihoods, as pure functions; `text_scores` has those of texts."""

import math
from collections import Counter
from collections.abc import Sequence

from grace_bench.common.scores import OUTLIER

FLUENCY_TOKENS = 100
"""Number of tokens of a continuation whose fluency is measured."""
_FLUENCY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""The weights of bigrams and trigrams (Meng et al. 2022, appendix on evaluation)."""
_LARGEST_EXPONENT = 700.0


def token_accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Returns the share of target tokens that are predicted, each after the gold tokens before it.

    >>> token_accuracy([5, 7, 2], [5, 8, 2])
    0.6666666666666666

    Args:
        predicted: The most likely token at each of the T positions.
        target: The T tokens of the target, without the end token. Of no tokens the score is NaN.
    """
    return _share_equal(predicted, target)


def token_agreement(predicted: Sequence[int], unedited: Sequence[int]) -> float:
    """Returns the share of positions of a reference answer at which edited and unedited model predict the same token.

    This is the locality of Wang et al. 2024 (WISE, equation 9).

    >>> token_agreement([5, 7, 2, 9], [5, 7, 4, 9])
    0.75

    Args:
        predicted: The edited model's most likely token at each of the T positions, after the reference tokens before.
        unedited: The unedited model's.
    """
    return _share_equal(predicted, unedited)


def contrast(first: float, second: float) -> float:
    """Returns 1.0 if the first answer is likelier than the second, else 0.0 (Meng et al. 2022, efficacy score).

    >>> contrast(1.2, 3.4), contrast(2.0, 2.0)
    (1.0, 0.0)

    Args:
        first: The mean negative log-likelihood of the first answer's tokens.
        second: The second answer's.
    """
    return float(first < second)


def perplexity(total: float, n_tokens: int) -> float:
    """Returns the exponential of the mean negative log-likelihood of a text's tokens; NaN without tokens.

    Above e ** 700 it would not fit a float, and is cut there.

    >>> round(perplexity(2 * math.log(8), 2), 9)
    8.0

    Args:
        total: The sum of the tokens' negative log-likelihoods.
        n_tokens: The number of tokens.
    """
    return math.exp(min(total / n_tokens, _LARGEST_EXPONENT)) if n_tokens else math.nan


def perplexity_weighted(perplexities: Sequence[float], n_tokens: Sequence[int]) -> float:
    """Returns the perplexity of the tokens of all texts together; NaN without tokens.

    >>> round(perplexity_weighted([2.0, 8.0], [2, 1]), 6)
    3.174802

    Args:
        perplexities: The perplexity of each text.
        n_tokens: Its number of tokens.
    """
    total = sum(n_tokens)
    nll = sum(math.log(value) * n for value, n in zip(perplexities, n_tokens, strict=True))
    return math.exp(nll / total) if total else math.nan


def perplexity_outliers(perplexities: Sequence[float]) -> float:
    """Returns the share of texts with a perplexity above 1,000; NaN without texts.

    >>> perplexity_outliers([3.0, 1000.0, 25000.0, 12.0])
    0.25
    """
    return sum(value > OUTLIER for value in perplexities) / len(perplexities) if perplexities else math.nan


def fluency(tokens: Sequence[int]) -> float:
    """Returns the weighted entropy of the bigrams and trigrams of generated tokens, in bits; low for repetition.

    It is the mean of 2/3 of the entropy of bigrams and 4/3 of that of trigrams (Zhang et al. 2018; Meng et al. 2022,
    who count words of sampled texts). A model that says nothing is as little fluent as one that repeats itself.

    >>> fluency([4, 4, 4, 4, 4, 4]), round(fluency([1, 2, 3, 4, 5]), 6), fluency([])
    (0.0, 1.723308, 0.0)
    """
    weighted = [weight * _entropy(tokens, n) for n, weight in _FLUENCY_WEIGHTS.items()]
    return sum(weighted) / len(weighted)


def _entropy(tokens: Sequence[int], n: int) -> float:
    """The entropy in bits of the distribution of the n-grams of tokens."""
    counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)).values()
    total = sum(counts)
    return -sum(count / total * math.log2(count / total) for count in counts) + 0.0


def _share_equal(given: Sequence[int], wanted: Sequence[int]) -> float:
    if len(given) != len(wanted):
        raise ValueError(f"{len(given)} tokens cannot be compared with {len(wanted)}")
    return sum(one == other for one, other in zip(given, wanted, strict=True)) / len(wanted) if wanted else math.nan
