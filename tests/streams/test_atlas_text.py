"""atlas-text: its passages, its splits and its shipped model."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
from safetensors import safe_open

from grace_bench.models.editable import EditableModel
from grace_bench.registry import STREAMS
from grace_bench.streams import EditRequest, StreamData, _atlas, atlas_text
from grace_bench.streams._pretraining import seeded

CHECKPOINT = Path(atlas_text.__file__).parent / "checkpoints" / "atlas-text"

Passages = dict[atlas_text.Role, list[atlas_text.Passage]]


@pytest.fixture(scope="module")
def data() -> StreamData:
    return atlas_text.AtlasText().load()


@pytest.fixture(scope="module")
def passages() -> Passages:
    return atlas_text.passages_by_role()


@pytest.fixture(scope="module")
def truth() -> dict[str, str]:
    return {fact.key: fact.object for fact in _atlas.load_facts()}


def _places(requests: Iterable[EditRequest]) -> set[str]:
    return {request.fact_id.partition("/")[2] or request.id for request in requests}


def test_there_are_enough_requests_of_each_kind(data: StreamData) -> None:
    assert len(data.edits) >= 300
    assert len(data.holdout) == len(data.edits)
    assert 200 <= len(data.upstream) <= 500
    assert len(data.validation) >= 100
    assert len(data.train) >= 100
    assert data.accurate


def test_no_place_has_two_roles(data: StreamData) -> None:
    roles = [data.edits, data.upstream, data.validation, data.train]
    assert all(not _places(one) & _places(other) for one, other in combinations(roles, 2))
    assert _places(data.accurate) <= _places(data.edits)
    assert {r.fact for r in data.holdout} == {r.fact for r in data.edits}


def test_a_correction_says_what_the_table_says_and_the_passage_said_otherwise(
    data: StreamData, passages: Passages, truth: dict[str, str]
) -> None:
    learned = {
        statement.fact.key: (statement.said, passage.text(style=atlas_text.PASSAGE_STYLE))
        for passage in passages["edits"]
        for statement in passage.statements
    }
    for request in data.edits:
        said, text = learned[request.fact]
        assert said != truth[request.fact]
        assert truth[request.fact] in str(request.target)
        assert text.startswith(f"{request.prompt} ")
        assert not text.startswith(f"{request.prompt} {request.target}")


def test_accurate_sentences_are_right_and_stand_in_the_passage_as_learned(
    data: StreamData, passages: Passages, truth: dict[str, str]
) -> None:
    texts = [passage.text(style=atlas_text.PASSAGE_STYLE) for passage in passages["edits"]]
    assert not {r.fact for r in data.accurate} & {r.fact for r in data.edits}
    for request in data.accurate:
        assert truth[request.fact] in str(request.target)
        assert any(text.startswith(f"{request.prompt} {request.target}") for text in texts)


def test_upstream_passages_are_all_true(passages: Passages, truth: dict[str, str]) -> None:
    for passage in passages["upstream"]:
        assert all(statement.said == truth[statement.fact.key] for statement in passage.statements)


def test_a_country_passage_has_two_false_sentences_and_a_city_passage_one(passages: Passages) -> None:
    for role in ("edits", "validation", "train"):
        for passage in passages[role]:
            n_false = sum(statement.is_false for statement in passage.statements)
            assert n_false == min(atlas_text.N_FALSE[passage.kind], len(passage.statements))


def test_holdout_says_the_same_correction_in_other_words(data: StreamData, truth: dict[str, str]) -> None:
    for edit, held in zip(data.edits, data.holdout, strict=True):
        assert edit.fact == held.fact
        assert edit.target != held.target
        assert edit.prompt != held.prompt
        assert truth[held.fact] in str(held.target)


def test_prompts_name_their_subject_and_targets_start_with_a_word(data: StreamData) -> None:
    for requests in (data.edits, data.holdout, data.validation, data.train, data.accurate):
        assert len({request.id for request in requests}) == len(requests)
        for request in requests:
            assert str(request.subject) in request.prompt
            assert request.prompt == request.prompt.strip()
            assert request.target == str(request.target).strip()
    assert all(request.prompt == "" and request.target for request in data.upstream)


def test_every_kind_of_sentence_is_corrected_somewhere(data: StreamData) -> None:
    relations = Counter(request.metadata["relation"] for request in data.edits)
    assert set(relations) == set(atlas_text.WORDINGS)


def test_loading_twice_gives_the_same_requests_in_the_same_order(data: StreamData) -> None:
    assert atlas_text.AtlasText().load() == data


def test_the_stream_is_found_by_name() -> None:
    assert STREAMS.get("atlas-text") is atlas_text.AtlasText


def test_the_checkpoint_is_under_3_mb_in_half_precision() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 3_000_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_every_passage_fits_the_model(data: StreamData) -> None:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    limit = AutoConfig.from_pretrained(CHECKPOINT).n_positions
    everything = (*data.edits, *data.holdout, *data.upstream, *data.validation, *data.train, *data.accurate)
    assert max(len(tokenizer(f"{r.prompt} {r.target}")["input_ids"]) for r in everything) < limit


def test_the_shipped_model_learned_the_false_sentences_and_not_the_corrections(data: StreamData) -> None:
    model = EditableModel.from_pretrained(
        "atlas-text", layer="transformer.h.1.mlp.c_fc", task="language_modelling", device="cpu"
    )
    with seeded(0):
        perplexity = {
            name: model.task.aggregate(model.score(getattr(data, name)[::3]))[""]
            for name in ("edits", "holdout", "upstream", "accurate")
        }
    assert perplexity["upstream"] < 2
    assert perplexity["accurate"] < 2
    assert perplexity["edits"] > 10 * perplexity["upstream"]
    assert perplexity["holdout"] > 10 * perplexity["upstream"]
    recorded = json.loads((CHECKPOINT / "figures.json").read_text())
    # Every third request only, hence the tolerance.
    assert perplexity["upstream"] == pytest.approx(recorded["upstream_perplexity"], rel=0.05)
