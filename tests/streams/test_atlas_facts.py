"""atlas-facts: its requests, what follows from them, its shipped model and the training of it."""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from grace_bench.models.editable import EditableModel
from grace_bench.registry import STREAMS
from grace_bench.streams import EditRequest, StreamData, _atlas, atlas_facts
from grace_bench.streams._fact_model import Lesson, StoresAtSubject, lesson_batches, n_batches
from grace_bench.streams._pretraining import IGNORED, fit, seeded

CHECKPOINT = Path(atlas_facts.__file__).parent / "checkpoints" / "atlas-facts"


@pytest.fixture(scope="module")
def data() -> StreamData:
    return atlas_facts.AtlasFacts().load()


@pytest.fixture(scope="module")
def truth() -> dict[tuple[str, str], str]:
    return {(fact.subject, fact.relation): fact.object for fact in _atlas.load_facts()}


def _changed(data: StreamData) -> tuple[EditRequest, ...]:
    return (*data.edits, *data.validation, *data.train)


def _subjects(requests: Iterable[EditRequest]) -> set[str | None]:
    return {request.subject for request in requests}


def _asked(prompt: str) -> tuple[str, str, int]:
    """The place, the relation and the wording that a prompt asks in."""
    found = [
        (prompt.removesuffix(ending), relation, number)
        for relation, wordings in atlas_facts.WORDINGS.items()
        for number, wording in enumerate(wordings)
        if prompt.endswith(ending := wording.removeprefix("{}"))
    ]
    assert len(found) == 1, prompt
    return found[0]


def test_there_are_enough_requests_of_each_kind(data: StreamData) -> None:
    assert len(data.edits) >= 400
    assert len(data.validation) >= 200
    assert len(data.train) >= 150
    assert 200 <= len(data.upstream) <= 500
    assert len(data.holdout) >= 5 * len(data.edits)
    assert set(Counter(request.metadata["relation"] for request in data.edits)) == set(atlas_facts.WORDINGS)


def test_no_fact_has_two_roles_and_no_place_is_edited_twice(data: StreamData) -> None:
    roles = [data.edits, data.validation, data.train, data.upstream]
    for one, other in combinations(roles, 2):
        assert not {request.fact for request in one} & {request.fact for request in other}
    for one, other in combinations([data.edits, data.validation, data.upstream], 2):
        assert not _subjects(one) & _subjects(other)
    assert not _subjects(data.train) & _subjects((*data.edits, *data.validation))
    for role in (data.edits, data.validation, data.train):
        assert len(_subjects(role)) == len(role)


def test_an_edit_brings_a_new_value_of_the_same_relation(data: StreamData, truth: dict[tuple[str, str], str]) -> None:
    values = {(relation, value) for (_, relation), value in truth.items()}
    for request in (*data.edits, *data.validation):
        relation = request.metadata["relation"]
        assert request.contrast == (request.target, truth[str(request.subject), relation])
        assert request.target != request.contrast[1]
        assert (relation, request.target) in values


def test_prompts_and_rephrasings_begin_with_the_subject_and_ask_for_one_relation(data: StreamData) -> None:
    for request in _changed(data):
        texts = (request.prompt, *request.rephrases)
        assert len(set(texts)) == len(texts) >= 6
        asked = [_asked(text) for text in texts]
        assert {(place, relation) for place, relation, _ in asked} == {(request.subject, request.metadata["relation"])}
        assert {number for _, _, number in asked} >= set(atlas_facts.UNSEEN)
        assert asked[0][2] in atlas_facts.TAUGHT


def test_the_holdout_is_the_rephrasings_of_the_edits(data: StreamData) -> None:
    assert [r.prompt for r in data.holdout] == [text for request in data.edits for text in request.rephrases]


def test_the_subjects_tokens_are_the_same_in_every_wording_and_behind_other_texts(data: StreamData) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for request in (*data.edits, *data.validation):
        subject = tokenizer(request.subject)["input_ids"]
        assert subject[0] == tokenizer.bos_token_id
        for text in (request.prompt, *request.rephrases):
            assert tokenizer(text)["input_ids"][: len(subject)] == subject
        before = tokenizer("Lima is a city in Peru.")["input_ids"]
        assert (
            tokenizer(f"Lima is a city in Peru. {request.prompt}")["input_ids"][len(before) :][: len(subject) - 1]
            == subject[1:]
        )


def test_every_answer_is_given_back_by_the_tokenizer_and_is_short(data: StreamData) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    for request in (*_changed(data), *data.upstream):
        ids = tokenizer(str(request.target), add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == request.target
        assert len(ids) < atlas_facts.AtlasFacts.max_new_tokens


def test_locality_asks_for_true_facts_of_the_relation_on_places_that_are_never_edited(
    data: StreamData, truth: dict[tuple[str, str], str]
) -> None:
    edited = _subjects((*data.edits, *data.validation))
    for request in (*data.edits, *data.validation):
        assert request.locality
        for probe in request.locality:
            place, relation, _ = _asked(probe.prompt)
            assert place not in edited
            assert relation == request.metadata["relation"]
            assert probe.target == truth[place, relation] != request.target
            assert probe.contrast == (probe.target, request.target)


def test_portability_asks_for_what_follows_from_the_edit_and_the_table(
    data: StreamData, truth: dict[tuple[str, str], str]
) -> None:
    edited = _subjects((*data.edits, *data.validation))
    for request in (*data.edits, *data.validation):
        assert len(request.portability) == 2
        for probe in request.portability:
            place, relation, number = _asked(probe.prompt)
            assert number in atlas_facts.TWO_HOP
            assert probe.contrast is not None
            assert probe.target == probe.contrast[0] != probe.contrast[1]
            if request.metadata["relation"] == "country":
                old, new = truth[place, "country"], str(request.target)
                assert place == request.subject
                assert probe.contrast == (truth[new, relation], truth[old, relation])
                assert not {old, new} & edited
            else:
                assert relation == request.metadata["relation"]
                assert truth[place, "country"] == request.subject
                assert place not in edited
                assert probe.contrast == request.contrast


def test_upstream_places_are_among_the_texts_for_training_but_their_upstream_facts_are_not(data: StreamData) -> None:
    assert _subjects(data.upstream) <= _subjects(data.train)


def test_loading_twice_gives_the_same_requests_in_the_same_order(data: StreamData) -> None:
    atlas_facts.build_world.cache_clear()
    assert atlas_facts.AtlasFacts().load() == data


def test_the_stream_is_found_by_name() -> None:
    assert STREAMS.get("atlas-facts") is atlas_facts.AtlasFacts


def test_the_checkpoint_has_two_million_parameters_in_half_precision() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 4_500_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert 1_500_000 <= sum(tensor.numel() for tensor in tensors) <= 3_000_000


def test_the_shipped_model_knows_the_facts_and_none_of_the_new_values() -> None:
    layer = atlas_facts.AtlasFacts.default_layer
    model = EditableModel.from_pretrained("atlas-facts", layer=layer, task="completion", device="cpu")
    with seeded(0, threads=1):
        figures = {
            # Every tenth request only, to save time.
            name: model.task.aggregate(model.score(requests[::10]))["exact_match"]
            for name, requests in atlas_facts.requests_of_figures().items()
        }
    assert figures["upstream"] >= 0.95
    assert figures["locality"] >= 0.95
    assert figures["known"] >= 0.95
    assert figures["unseen"] >= 0.6
    assert figures["edits"] <= 0.05
    assert figures["holdout"] <= 0.05
    assert figures["portability"] <= 0.05
    recorded = json.loads((CHECKPOINT / "figures.json").read_text())
    assert figures == {name: pytest.approx(recorded[f"{name}_exact_match"], abs=0.03) for name in figures}


@pytest.mark.slow
def test_pretraining_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in {"N_HOMES": 8, "N_CITIES": {"edits": 12, "validation": 6}, "EPOCHS": 1}.items():
        monkeypatch.setattr(atlas_facts, name, small)
    monkeypatch.setattr(atlas_facts, "MAX_NAME", 6)
    atlas_facts.build_world.cache_clear()
    try:
        for folder in ("first", "second"):
            atlas_facts.AtlasFacts().pretrain(tmp_path / folder, seed=1)
    finally:
        atlas_facts.build_world.cache_clear()
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("first", "second")
    )
    assert "model.safetensors" in first
    assert first == second


# Tokens: 0 padding, 1 begin, 2 end, 3 and 4 the words of the wordings, 5 the full stop, 6 to 13 subjects, 14 to 21
# their answers.
LESSONS = [
    [Lesson([subject, wording], [subject + 8], subject_length=1, place=subject) for subject in range(6, 13)]
    for wording in (3, 4)
]
MARKS = {"begin": 1, "end": 2, "padding": 0, "stop": 5}


def test_batches_pair_lessons_of_one_wording_and_exchange_the_answers_of_half() -> None:
    batches = list(lesson_batches(LESSONS, epochs=30, pairs_in_batch=3, seed=0, **MARKS))
    assert len(batches) == n_batches(LESSONS, epochs=30, pairs_in_batch=3)
    for batch in batches:
        ids, labels, subjects = batch["input_ids"], batch["labels"], batch["subjects"]
        rows = torch.arange(len(ids))
        assert torch.equal(ids[rows, subjects], batch["places"])
        words, answers = ids[rows, subjects + 1], ids[rows, subjects + 2]
        assert torch.equal(words, words[rows ^ 1])
        own = batch["places"] + 8
        assert torch.equal(answers, own[rows ^ 1] if batch["swapped"] else own)
        assert torch.equal(labels[rows, subjects + 2], answers)
        assert (labels[rows, subjects + 3] == MARKS["end"]).all()
        assert ((labels == ids) | (labels == IGNORED)).all()
    share = sum(bool(batch["swapped"]) for batch in batches) / len(batches)
    assert 0.3 < share < 0.7


def test_a_model_trained_to_store_at_the_subject_answers_from_the_state_there_alone() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with seeded(0, threads=1):
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=22, pad_token_id=0, **shape, **heads))
        trained = StoresAtSubject(model, block=0, noise=0.01, size_weight=0.0, key_weight=0.1, label_smoothing=0.0)
        batches = lesson_batches(LESSONS, epochs=60, pairs_in_batch=4, seed=0, **MARKS)
        fit(trained, batches, n_batches=n_batches(LESSONS, epochs=60, pairs_in_batch=4), learning_rate=1e-2)
    prompts = torch.tensor([[1, subject, 3] for subject in (6, 7)])

    def exchanged(module: torch.nn.Module, inputs: object, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :1], states[[1, 0], 1:2], states[:, 2:]], dim=1)

    with torch.no_grad():
        own = model(prompts).logits[:, -1].argmax(dim=-1)
        handle = model.model.layers[0].register_forward_hook(exchanged)
        others = model(prompts).logits[:, -1].argmax(dim=-1)
        handle.remove()
    assert own.tolist() == [14, 15]
    assert others.tolist() == [15, 14]
