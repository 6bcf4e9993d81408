"""Model classes of transformers: batches and engines change no answer, or one line says what is not supported."""

from pathlib import Path

import pytest

from helpers import module_at

# Tests are imported one by one, so that a module beside them is no package's.
families = module_at(Path(__file__).with_name("families.py"))
FAMILIES = {family.name: family for family in families.families()}
SAMPLE = (
    "causal-gpt2",
    "causal-lfm2",
    "seq2seq-bart",
    "classification-mpnet",
    "classification-deberta-v2",
)
"""Attention, convolutions and mixtures of them; recurrences take ten times as long."""


@pytest.mark.parametrize("name", SAMPLE)
def test_families_of_every_kind_answer_alike_in_any_batch_and_with_any_engine(name: str, tmp_path: Path) -> None:
    report = families.check_family(FAMILIES[name], tmp_path)

    assert report.not_made is None
    assert report.faults == []
    assert report.outcomes["batches"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*FAMILIES} - {*SAMPLE}))
def test_every_family_answers_alike_in_any_batch_and_with_any_engine(name: str, tmp_path: Path) -> None:
    report = families.check_family(FAMILIES[name], tmp_path)

    if report.not_made is not None:
        pytest.skip(f"no tiny model: {report.not_made}")
    assert report.faults == []
    for said in report.outcomes.values():
        assert "\n" not in said
