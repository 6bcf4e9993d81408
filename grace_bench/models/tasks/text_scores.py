"""Scores of single answers, as pure functions.

Answers are compared after normalisation: `squad`, which drops case, articles and ASCII punctuation and with them what
tells "C++" from "C" or "-5" from "5", or `strict`, which drops only case and outer punctuation and compares numbers as
numbers.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from grace_bench.data.stream import Normalise

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MEANINGFUL = frozenset("#%&*/@\\§¶†‡‰‱′٪؉؊")
"""Characters that Unicode files under punctuation, but that are symbols at the edge of an answer: A*, C#, 5%, @home."""
_MINUS = "\u2010\u2012\u2013\u2212-"
"""Hyphens, the en dash and the minus sign; any of them is written before a negative number."""
_POINTS = ".\u066b"
_SIGN = f"[+{_MINUS}]"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN}?)(?:(?P<before>[^\w\s.,+{_MINUS}]) ?)?(?P<inner_sign>{_SIGN}?)"
    rf"(?:(?P<whole>\d{{1,3}}(?:[,\u066c]\d{{3}})+|\d+)(?:[{_POINTS}](?P<part>\d*))?|[{_POINTS}](?P<fraction>\d+))"
    rf"(?:e(?P<exponent>{_SIGN}?\d{{1,9}}))?(?: ?(?P<after>[^\w\s.,{_MINUS}]))?"
)
"""A number, casefolded, with at most one symbol on either side."""
_UNSPACED = re.compile(
    "["
    "\u0e00-\u0fff"  # Thai, Lao, Tibetan
    "\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Burmese
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai
    "\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u303c"  # radicals, marks and numerals of Han
    "\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "]"
)
"""The blocks of scripts that are written without spaces between words; their digits and punctuation are no words."""


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


def normalize_strictly(text: str) -> str:
    """Applies NFKC, and removes case, extra white space and outer punctuation; a number gets its one canonical form.

    Punctuation inside the text stays, and so do symbols anywhere. A sign of currency, a percent sign or another symbol
    at a number belongs to it. A text that would become empty keeps its punctuation.

    >>> [normalize_strictly(text) for text in ("C++.", '"Astana"', "( The  U.S. )", "-5", "$5")]
    ['c++', 'astana', 'the u.s', '-5', '$5']
    >>> normalize_strictly("1,000.0") == normalize_strictly("1e3") != normalize_strictly("1000%")
    True
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    spaced = " ".join(folded.split())
    return _canonical(_without_outer_punctuation(spaced) or spaced)


def exact_match(answer: str, accepted: Iterable[str], *, normalise: Normalise = "squad") -> float:
    """Returns 1.0 if the normalised answer is one of the accepted ones, else 0.0.

    >>> exact_match("the euro", ["Euro", "EUR"])
    1.0
    >>> exact_match("10", ["1.0"]), exact_match("10", ["1.0"], normalise="strict")
    (1.0, 0.0)
    """
    normalised = _NORMALISATIONS[normalise]
    given = normalised(answer)
    return float(any(given == normalised(text) for text in accepted))


def contains(answer: str, accepted: Iterable[str], *, normalise: Normalise = "squad") -> float:
    """Returns 1.0 if the normalised answer contains one of the accepted ones, else 0.0 (Mallen et al. 2023).

    Under `strict` it must contain all words of it in a row, so that "15" does not contain "5".

    >>> contains("It is the euro, since 1999", ["Euro"]), contains("15 towns", ["5"])
    (1.0, 1.0)
    >>> contains("15 towns", ["5"], normalise="strict")
    0.0
    """
    if normalise == "strict":
        given = _words(answer, normalise)
        return float(any(_is_part(_words(text, normalise), given) for text in accepted))
    given_text = normalize_answer(answer)
    wanted = map(normalize_answer, accepted)
    # An empty text is in every other one.
    return float(any(text in given_text if text else not given_text for text in wanted))


def agreement(answer: str, unedited: str, *, normalise: Normalise = "squad") -> float:
    """Returns 1.0 if the normalised answer is the unedited model's, else 0.0.

    >>> agreement("The euro.", "euro"), agreement("franc", "euro")
    (1.0, 0.0)
    """
    return exact_match(answer, [unedited], normalise=normalise)


def token_f1(answer: str, accepted: Iterable[str], *, normalise: Normalise = "squad") -> float:
    """Returns the best F1 between the bags of words of the answer and of an accepted one (SQuAD).

    In scripts written without spaces, every character is a word. Of two empty texts it is 1, so that an exact match is
    always a full score.

    >>> token_f1("Euro of Spain", ["euro"])
    0.5
    >>> token_f1("北京市", ["北京"])
    0.8
    """
    given = _words(answer, normalise)
    return max(_bag_f1(given, _words(text, normalise)) for text in accepted)


def _words(text: str, normalise: Normalise) -> list[str]:
    """The words of a normalised text; characters that stand for words, where words are not set apart by spaces."""
    normalised = _NORMALISATIONS[normalise](text)
    words = normalised.split()
    if _UNSPACED.search(normalised):
        words = [piece for word in words for piece in _pieces(word, keep_punctuation=normalise == "strict")]
    if normalise == "strict":
        words = [_canonical(bare) for word in words if (bare := _without_outer_punctuation(word))]
    return words or normalised.split()


def _pieces(word: str, *, keep_punctuation: bool) -> Iterator[str]:
    """Splits a word into characters of scripts without spaces, each with its marks, and the runs between them."""
    piece, is_character = "", False
    for character in word:
        category = unicodedata.category(character)
        if category[0] == "M" and piece:
            piece += character
            continue
        is_cut = category[0] == "P" and not keep_punctuation
        begins = category[0] in "LMN" and category != "Nd" and _UNSPACED.match(character) is not None
        if piece and (is_cut or begins or is_character):
            yield piece
            piece = ""
        if not is_cut:
            piece, is_character = piece + character, begins
    if piece:
        yield piece


def _is_part(words: Sequence[str], of: Sequence[str]) -> bool:
    """Whether words stand in a row among others; an empty text is part of an empty one alone."""
    if not words:
        return not of
    return any(list(of[i : i + len(words)]) == list(words) for i in range(len(of) - len(words) + 1))


def _canonical(text: str) -> str:
    """The text; if it is one number, its canonical form, with the symbols at it."""
    found = _NUMBER.fullmatch(text)
    if found is None or (found["sign"] and found["inner_sign"]):
        return text
    if any(symbol and not _is_symbol(symbol) for symbol in found.group("before", "after")):
        return text
    part = found["part"] or found["fraction"] or ""
    written = re.sub(r"\D", "", found["whole"] or "") + part
    digits = "".join(str(unicodedata.decimal(digit)) for digit in written).lstrip("0")
    significant = digits.rstrip("0")
    exponent = _whole(found["exponent"] or "0") - len(part) + len(digits) - len(significant)
    is_negative = (found["sign"] or found["inner_sign"] or "+") in _MINUS
    number = f"{significant}e{exponent}" if exponent else significant
    signed = f"-{number}" if is_negative else number
    return f"{found['before'] or ''}{signed if significant else '0'}{found['after'] or ''}"


def _whole(text: str) -> int:
    return -int(text[1:]) if text[0] in _MINUS else int(text)


def _is_symbol(character: str) -> bool:
    return unicodedata.category(character)[0] == "S" or character in _MEANINGFUL


def _without_outer_punctuation(text: str) -> str:
    """The text without the punctuation around it; brackets that belong to a part of it stay, as in `f(x)`."""
    kinds = [unicodedata.category(character) for character in text]
    begin, end, opened, closed = 0, len(text), kinds.count("Ps"), kinds.count("Pe")
    while begin < end:
        first, last = kinds[begin], kinds[end - 1]
        encloses = first == "Ps" and last == "Pe"
        before, after = text[max(begin, end - 2) : end - 1], text[begin + 1 : min(begin + 2, end)]
        if _is_outer(text[end - 1], beside=before) and (last != "Pe" or encloses or not opened):
            end -= 1
            gone = last
        elif _is_outer(text[begin], beside=after, begins=True) and (first != "Ps" or encloses or not closed):
            begin += 1
            gone = first
        else:
            break
        opened, closed = opened - (gone == "Ps"), closed - (gone == "Pe")
    return text[begin:end]


def _is_outer(character: str, *, beside: str, begins: bool = False) -> bool:
    """Whether a character at the edge of a text is white space, or punctuation that is no part of what stands there.

    Args:
        character: The character.
        beside: Its neighbour inside the text; empty if there is none.
        begins: Whether the text begins with it.
    """
    kind = unicodedata.category(character)
    if kind == "Pd":
        # Attached it is a minus, or part of a name such as O-.
        return beside in ("", " ")
    if begins and character in _POINTS:
        # It ends no sentence: .5, .NET.
        return not beside.isalnum()
    return character == " " or (kind in ("Ps", "Pe", "Pi", "Pf", "Po") and character not in _MEANINGFUL)


_NORMALISATIONS = {"squad": normalize_answer, "strict": normalize_strictly}


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
