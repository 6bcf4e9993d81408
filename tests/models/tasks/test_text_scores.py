"""Scores of single answers, and what a task makes of many."""

import math
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grace_bench.models.tasks.base import ItemScore, Task
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.tasks.text_scores import exact_match, normalize_answer, reference_f1, token_f1

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
    others = {"exact_match": float(score == 1.0), "token_accuracy": token_accuracy, "reference_f1": score / 2}
    return ItemScore(score=score, others=others)


def text_of(perplexity: float, n_tokens: int) -> ItemScore:
    return ItemScore(score=perplexity, n_tokens=n_tokens)


@pytest.fixture
def language_modelling() -> Task:
    return get_task("language_modelling")


def test_every_score_is_averaged_under_its_own_name() -> None:
    means = get_task("qa").aggregate([answered(1.0), answered(0.5), answered(0.0, token_accuracy=0.25)])
    assert means == pytest.approx({"": 0.5, "exact_match": 1 / 3, "token_accuracy": 0.75, "reference_f1": 0.25})


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
