"""Scores of single answers, and what a task makes of many."""

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_bench.data.stream import Normalise
from grace_bench.models.tasks.base import ItemScore, Task
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.tasks.text_scores import (
    exact_match,
    normalize_answer,
    normalize_strictly,
    reference_f1,
    token_f1,
)

words = st.sampled_from(
    ["the", "The", "a", "an", "euro", "Euro!", "of", "Spain", "U.S.", "O'Neil", "é", "--", "theatre"]
)
answers = st.one_of(st.lists(words, max_size=6).map("  ".join), st.text(max_size=12))


def squad_words(text: str) -> list[str]:
    """The words SQuAD compares, written word by word rather than by substitution over the whole text."""
    kept = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    found = []
    for word in kept.split():
        parts = re.split(r"(\W+)", word)
        found += "".join(" " if part in ("a", "an", "the") else part for part in parts).split()
    return found


def squad_f1(given: Sequence[str], wanted: Sequence[str]) -> float:
    left = list(wanted)
    common = 0
    for word in given:
        if word in left:
            left.remove(word)
            common += 1
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Euro!", "euro"),
        ("an apple, a day", "apple day"),
        ("U.S. dollar", "us dollar"),
        ("theatre", "theatre"),
        ("\tthe\nEuro ", "euro"),
        ("A", "a"),
        ("The", "the"),
        ("?", "?"),
        ("", ""),
        ("  ", ""),
    ],
)
def test_normalisation_is_squads_except_that_no_answer_vanishes(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@given(answers)
def test_normalisation_agrees_with_a_second_implementation(text: str) -> None:
    expected = squad_words(text)
    if expected:
        assert normalize_answer(text).split() == expected
    else:
        assert normalize_answer(text) == text.lower().strip()


@given(answers, answers)
def test_token_f1_agrees_with_a_second_implementation(answer: str, wanted: str) -> None:
    given_words, wanted_words = squad_words(answer), squad_words(wanted)
    if given_words and wanted_words:
        assert token_f1(answer, [wanted]) == pytest.approx(squad_f1(given_words, wanted_words))


@given(answers, answers)
def test_token_f1_is_symmetric_and_between_zero_and_one(one: str, other: str) -> None:
    assert token_f1(one, [other]) == token_f1(other, [one])
    assert 0.0 <= token_f1(one, [other]) <= 1.0


@given(answers, st.lists(answers, min_size=1, max_size=3))
def test_an_exact_match_has_a_full_f1_and_more_accepted_answers_never_lower_either(
    answer: str, accepted: list[str]
) -> None:
    if exact_match(answer, accepted) == 1.0:
        assert token_f1(answer, accepted) == 1.0
    for score in (exact_match, token_f1):
        assert score(answer, accepted) == max(score(answer, [text]) for text in accepted)
    assert exact_match(answer, [*accepted, answer]) == token_f1(answer, [*accepted, answer]) == 1.0


# --- strict ----------------------------------------------------------------------------------------------------------

marks = st.sampled_from([*"-−–+$%#°.,()[]'\"“”「」。·!?*/ 0157eE", "C", "é", "1,000", "1.0", "½", "٣", "北", " "])
odd_answers = st.one_of(answers, st.lists(marks, max_size=8).map("".join))
NORMALISATIONS: tuple[Normalise, ...] = ("squad", "strict")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("10", "1.0"),
        ("5", "-5"),
        ("5", "−5"),
        ("5", "$5"),
        ("$5", "€5"),
        ("5", "5%"),
        ("5", "5°"),
        ("<5", ">5"),
        ("5", "5+"),
        ("5", ".5"),
        ("314", "3.14"),
        ("1,00", "100"),
        ("1.2.3", "12.3"),
        ("1e3", "13"),
        ("C", "C++"),
        ("C", "C#"),
        ("A", "A*"),
        ("O+", "O-"),
        ("O", "O-"),
        ("NET", ".NET"),
        ("print", "print()"),
        ("US", "U.S."),
        ("x=1", "x1"),
        ("a/b", "ab"),
        ("the Euro", "Euro"),
        ("Łódź", "Lodz"),
        ("?", "!"),
    ],
)
def test_strictly_different_answers_are_told_apart(one: str, other: str) -> None:
    assert exact_match(one, [other], normalise="strict") == exact_match(other, [one], normalise="strict") == 0.0
    assert token_f1(one, [other], normalise="strict") < 1.0


@pytest.mark.parametrize(
    "same",
    [
        ("1", "1.0", "1.00", "+1", "01", "１", "1.", "(1)", "1e0", "0.1e1", "10E-1", "١"),
        ("1000", "1,000", "1,000.0", "1e3", "1E+03", "١٬٠٠٠"),
        ("-5", "−5", "–5", "-5.0", "(-5)", "-5."),
        ("0.5", ".5", "0.50", "5e-1", "٠٫٥"),
        ("0", "-0", "0.00", "0e7"),
        ("5%", "5 %", "5.0%", "５％", "5%."),
        ("$1,000", "$1000", "$ 1000.00"),
        ("Astana", "astana", " ASTANA ", "Astana.", '"Astana"', "(Astana)", "“Astana”.", "- Astana", "«Astana»!"),
        ("C++", "c++", "C++.", '"C++"'),
        ("Straße", "STRASSE"),
        ("ﬁn", "fin"),
        ("New  York", "new york"),
        ("北京", "「北京」。"),
    ],
)
def test_strictly_equal_answers_are_spelled_in_many_ways(same: Sequence[str]) -> None:
    for one in same:
        assert exact_match(one, [same[0]], normalise="strict") == 1.0, one
        assert token_f1(one, [same[0]], normalise="strict") == 1.0, one


decimals = st.builds(
    lambda digits, exponent: Decimal(digits).scaleb(exponent), st.integers(-9999, 9999), st.integers(-9, 9)
)


@given(decimals, decimals)
def test_numbers_are_strictly_equal_where_their_values_are(one: Decimal, other: Decimal) -> None:
    for text in (str(one), f"{one:f}", f"{one:,f}", f"{one:e}"):
        assert exact_match(text, [str(one)], normalise="strict") == 1.0
        assert exact_match(text, [str(other)], normalise="strict") == float(one == other)


@given(odd_answers)
def test_strict_normalisation_adds_nothing_to_a_text_and_leaves_none_empty(text: str) -> None:
    normal = normalize_strictly(text)
    assert bool(normal) == bool(unicodedata.normalize("NFKC", text).strip())
    assert normalize_strictly(f" {text}\n") == normal
    assert normalize_strictly(f"«{text}»") == normal or not any(c.isalnum() for c in text)


@given(odd_answers, odd_answers, st.sampled_from(NORMALISATIONS))
def test_an_exact_match_is_symmetric_and_has_a_full_f1_however_answers_are_normalised(
    one: str, other: str, normalise: Normalise
) -> None:
    match = exact_match(one, [other], normalise=normalise)
    assert match == exact_match(other, [one], normalise=normalise)
    assert exact_match(one, [one], normalise=normalise) == 1.0
    f1 = token_f1(one, [other], normalise=normalise)
    assert f1 == token_f1(other, [one], normalise=normalise)
    assert 0.0 <= f1 <= 1.0
    if match:
        assert f1 == 1.0


def test_a_long_run_of_brackets_or_digits_is_normalised_at_once() -> None:
    n = 200_000
    for text in ("(" * n, ")" * n, "[x" * n, "7" * n, "1," * n, "." * n):
        normalize_strictly(text)


# --- text without spaces ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "wanted", "f1"),
    [
        ("北京市", "北京", 0.8),
        ("北京。", "北京", 1.0),
        ("北京、上海", "上海", 2 / 3),
        ("東京タワー", "東京", 4 / 7),
        ("とうきょう", "きょうと", 8 / 9),
        ("กรุง", "กรุงเทพ", 2 / 3),
        ("ភ្នំពេញ", "ភ្នំ", 2 / 3),
        # Other scripts and numbers in it stay words.
        ("2019年5月", "2020年5月", 0.75),
        ("iPhone手机", "iPhone", 0.5),
        # Korean has spaces.
        ("서울 시", "서울시", 0.0),
    ],
)
@pytest.mark.parametrize("normalise", NORMALISATIONS)
def test_f1_counts_characters_where_words_are_not_set_apart(
    answer: str, wanted: str, f1: float, normalise: Normalise
) -> None:
    assert token_f1(answer, [wanted], normalise=normalise) == pytest.approx(f1)


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0xDFF), max_size=12), answers)
def test_f1_counts_words_in_every_other_text_as_before(answer: str, wanted: str) -> None:
    given_words, wanted_words = normalize_answer(answer).split(), normalize_answer(wanted).split()
    if given_words and wanted_words and wanted.isascii():
        assert token_f1(answer, [wanted]) == pytest.approx(squad_f1(given_words, wanted_words))


def test_an_empty_answer_is_right_only_where_nothing_was_wanted() -> None:
    assert token_f1("", [""]) == exact_match("", [""]) == 1.0
    assert token_f1("", ["euro"]) == token_f1("euro", [""]) == exact_match("", ["euro"]) == 0.0


@pytest.mark.parametrize(
    ("given", "wanted", "f1"),
    [
        # 3 shared of 3 and 3.
        ([5, 6, 1], [5, 6, 1], 1.0),
        # Only the end token is shared: precision 1/3, recall 1/2.
        ([8, 9, 1], [5, 1], 0.4),
        # Repeats count in the length and not in the overlap: precision 2/4, recall 2/3.
        ([7, 7, 7, 1], [7, 6, 1], 4 / 7),
        # So that even an answer that is exactly right falls short: precision and recall 2/3.
        ([7, 7, 1], [7, 7, 1], 2 / 3),
        # Order does not count.
        ([6, 5], [5, 6], 1.0),
        ([5], [6], 0.0),
        ([], [6], 0.0),
        ([5], [], 0.0),
    ],
)
def test_reference_f1_counts_distinct_shared_tokens_over_both_lengths(
    given: list[int], wanted: list[int], f1: float
) -> None:
    assert reference_f1(given, wanted) == pytest.approx(f1)


ids = st.lists(st.integers(0, 6), max_size=8)


@given(ids, ids)
def test_reference_f1_is_symmetric_and_the_closed_form_of_precision_and_recall(
    one: list[int], other: list[int]
) -> None:
    shared = sum(token in other for token in dict.fromkeys(one))
    expected = 2 * shared / (len(one) + len(other)) if one or other else 0.0
    assert reference_f1(one, other) == pytest.approx(expected)
    assert reference_f1(one, other) == reference_f1(other, one)


# --- aggregation -----------------------------------------------------------------------------------------------------


def answered(score: float, token_accuracy: float = 1.0) -> ItemScore:
    match = float(score == 1.0)
    others = {
        "exact_match": match,
        "contains": match,
        "token_accuracy": token_accuracy,
        "reference_f1": score / 2,
    }
    return ItemScore(score=score, others=others)


def text_of(perplexity: float, n_tokens: int) -> ItemScore:
    return ItemScore(score=perplexity, n_tokens=n_tokens)


@pytest.fixture
def language_modelling() -> Task:
    return get_task("language_modelling")


def test_every_score_is_averaged_under_its_own_name() -> None:
    means = get_task("qa").aggregate([answered(1.0), answered(0.5), answered(0.0, token_accuracy=0.25)])
    assert means == pytest.approx(
        {"": 0.5, "exact_match": 1 / 3, "contains": 1 / 3, "token_accuracy": 0.75, "reference_f1": 0.25}
    )


def test_an_item_that_lacks_one_of_the_other_scores_is_left_out_of_that_mean_alone() -> None:
    means = get_task("qa").aggregate([answered(1.0, token_accuracy=math.nan), answered(0.5, token_accuracy=0.25)])
    assert means[""] == 0.75
    assert means["token_accuracy"] == 0.25


def test_perplexity_is_the_mean_over_texts_and_beside_it_that_of_all_tokens(language_modelling: Task) -> None:
    means = language_modelling.aggregate([text_of(2.0, 30), text_of(16.0, 10)])
    assert means[""] == 9.0
    # Two bits over 40 tokens: (30 x 1 + 10 x 4) / 40 = 1.75.
    assert means["perplexity_weighted"] == pytest.approx(2**1.75)
    assert "n_nan" not in means


@given(st.lists(st.tuples(st.floats(1.0, 1e6), st.integers(1, 500)), min_size=1, max_size=8))
def test_weighted_perplexity_is_that_of_the_texts_put_together(texts: list[tuple[float, int]]) -> None:
    means = get_task("language_modelling").aggregate([text_of(*text) for text in texts])
    token_losses = [math.log(perplexity) for perplexity, n in texts for _ in range(n)]
    assert means["perplexity_weighted"] == pytest.approx(math.exp(math.fsum(token_losses) / len(token_losses)))
    assert means[""] == pytest.approx(math.fsum(perplexity for perplexity, _ in texts) / len(texts))


def test_nan_is_left_out_and_counted(language_modelling: Task) -> None:
    means = language_modelling.aggregate([text_of(3.0, 4), text_of(math.nan, 0), text_of(5.0, 4), text_of(math.nan, 9)])
    assert means[""] == 4.0
    assert means["n_nan"] == 2
    assert means["perplexity_weighted"] == pytest.approx(math.sqrt(15.0))


def test_nothing_but_nan_is_nan_rather_than_zero(language_modelling: Task) -> None:
    for means in (language_modelling.aggregate([text_of(math.nan, 0)]), language_modelling.aggregate([])):
        assert math.isnan(means[""])
        assert math.isnan(means["perplexity_weighted"])
    assert language_modelling.aggregate([text_of(math.nan, 0)])["n_nan"] == 1


def test_texts_of_a_perplexity_above_a_thousand_are_counted_as_a_share(language_modelling: Task) -> None:
    items = [text_of(3.0, 4), text_of(1000.0, 4), text_of(1000.1, 4), text_of(math.inf, 4), text_of(math.nan, 0)]
    assert language_modelling.aggregate(items)["perplexity_outliers"] == 0.5
    assert language_modelling.aggregate(items[:2])["perplexity_outliers"] == 0.0
    assert math.isnan(language_modelling.aggregate(items[4:])["perplexity_outliers"])


def test_a_contrast_is_averaged_over_those_that_carry_one_and_absent_where_none_does() -> None:
    carrying = [ItemScore(score=0.0, others={**answered(0.0).others, "contrast": value}) for value in (1.0, 1.0, 0.0)]
    assert get_task("completion").aggregate([*carrying, answered(1.0)])["contrast"] == pytest.approx(2 / 3)
    assert "contrast" not in get_task("completion").aggregate([answered(1.0)])
