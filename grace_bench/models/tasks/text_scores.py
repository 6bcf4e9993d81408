"""Scores of single answers, as pure functions."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-cases and removes punctuation, articles and extra white space (SQuAD, Rajpurkar et al. 2016).

    A text that would become empty is only stripped and lower-cased, so that two such answers can still differ.

    >>> normalize_answer("The  Euro!")
    'euro'
    >>> normalize_answer("A")
    'a'
    """
    lowered = text.lower()
    bare = " ".join(_ARTICLES.sub(" ", lowered.translate(_PUNCTUATION)).split())
    return bare or lowered.strip()


def exact_match(answer: str, accepted: Iterable[str]) -> float:
    """Returns 1.0 if the normalised answer is one of the accepted ones, else 0.0.

    >>> exact_match("the euro", ["Euro", "EUR"])
    1.0
    """
    given = normalize_answer(answer)
    return float(any(given == normalize_answer(text) for text in accepted))


def token_f1(answer: str, accepted: Iterable[str]) -> float:
    """Returns the best F1 between the bags of words of the answer and of an accepted one (SQuAD).

    Of two empty texts it is 1, so that an exact match is always a full score.

    >>> token_f1("Euro of Spain", ["euro"])
    0.5
    """
    return max(_bag_f1(normalize_answer(answer).split(), normalize_answer(text).split()) for text in accepted)


def _bag_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    if not given and not wanted:
        return 1.0
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def reference_f1(given: Iterable[int], wanted: Iterable[int]) -> float:
    """Returns the F1 of the official GRACE code: shared distinct token ids over both lengths, end token included.

    Repeated tokens count in the lengths and not in the overlap.

    >>> round(reference_f1([7, 7, 1], [7, 1]), 3)
    0.8
    """
    given, wanted = list(given), list(wanted)
    common = len(set(given) & set(wanted))
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
