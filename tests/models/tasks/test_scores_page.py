"""The tables of docs/scores.md, computed by the functions that they explain."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import pytest

from grace_bench.common.scores import PANEL
from grace_bench.models.tasks.text_scores import agreement, contains, exact_match, token_f1
from grace_bench.models.tasks.token_scores import contrast, perplexity_outliers, perplexity_weighted, token_accuracy

PAGE = Path(__file__).parents[3] / "docs" / "scores.md"
TARGET = "new sol"
# The negative log-likelihoods of the tokens of `new sol` and of `euro coin` in the four models.
LOSSES = [([0.1, 0.1], [2.5, 2.9]), ([0.2, 0.1], [2.4, 2.9]), ([1.9, 0.1], [0.4, 2.8]), ([0.1, 3.5], [2.9, 0.3])]


@pytest.fixture(scope="module")
def page() -> str:
    if not PAGE.is_file():
        pytest.skip("the documentation is not beside the tests")
    return PAGE.read_text(encoding="utf-8")


def rows_after(page: str, header: str) -> list[list[str]]:
    lines = page[page.index(header) :].splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def bare(cell: str) -> str:
    return cell.strip("`")


def share(predicted: Sequence[str]) -> float:
    ids = {word: number for number, word in enumerate(["new", "sol", "euro"])}
    return token_accuracy([ids[word] for word in predicted], [ids[word] for word in TARGET.split()])


def test_the_constructed_edit_has_the_scores_of_the_page(page: str) -> None:
    rows = rows_after(page, "| free answer | predicted after gold tokens |")
    assert len(rows) == len(LOSSES)
    for (answer, predicted, *shown), (new, old) in zip(rows, LOSSES, strict=True):
        text = bare(answer)
        scores = [
            f"{token_f1(text, [TARGET]):.2f}",
            f"{exact_match(text, [TARGET]):.0f}",
            f"{contains(text, [TARGET]):.0f}",
            f"{share([bare(word) for word in predicted.split(', ')]):.2f}",
            f"{contrast(fmean(new), fmean(old)):.0f}",
        ]
        assert shown == scores, text


def test_the_constructed_probe_has_the_scores_of_the_page(page: str) -> None:
    for unedited, edited, *shown in rows_after(page, "| unedited answer | edited answer |"):
        scores = [agreement(bare(edited), bare(unedited)), exact_match(bare(edited), ["peso"])]
        assert shown == [f"{score:.0f}" for score in scores], edited


def test_the_perplexities_of_the_page_are_those_of_three_texts(page: str) -> None:
    values, n_tokens = [10.0, 12.0, 30_000.0], [40, 60, 2]
    assert f"a mean of {fmean(values):,.1f}, are {perplexity_weighted(values, n_tokens):.1f} over" in " ".join(
        page.split()
    )
    assert perplexity_outliers(values) == pytest.approx(1 / 3)


def test_the_page_describes_every_score(page: str) -> None:
    assert [bare(row[0]) for row in rows_after(page, "| score | tasks |")] == _in_the_order_of_the_page()


def _in_the_order_of_the_page() -> list[str]:
    names = [info.name for info in PANEL]
    # The official code's own score comes after those that others use.
    names.remove("reference_f1")
    names.insert(names.index("contrast") + 1, "reference_f1")
    return names
