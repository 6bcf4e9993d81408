"""Editors that change what the model reads: it holds wherever prompts become tokens, and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grace_bench.data.requests import DerivedRequest, EditRequest, TaskName
from grace_bench.editing.batch import Answered, EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, PaddingSide
from grace_bench.models.network import Network, Reading
from grace_bench.models.tokens import PromptTokenizer

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
each_task = pytest.mark.parametrize("task", get_args(TaskName))
SIDES: tuple[PaddingSide, ...] = ("right", "left")


class Reminder(EditorStrategy):
    """Puts what was last said about a prompt in front of it."""

    registered_name = "reminder"

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.said: dict[str, str] = {}
        self.intercept_prompts(lambda prompts: [self.said.get(prompt, "") + prompt for prompt in prompts])

    def edit(self, batch: EditBatch) -> EditOutcome:
        self.said |= {
            prompt: f"{prompt} {target} " for prompt, target in zip(batch.prompts, batch.targets, strict=True)
        }
        return EditOutcome()

    def answered_by(self, queries: Tensor) -> Answered:
        return Answered([None] * len(queries))

    def rollback(self) -> None:
        super().rollback()
        self.said = {}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "said": dict(self.said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.said = dict(state["said"])


def same(a: EncodedBatch, b: EncodedBatch) -> bool:
    return (
        a.inputs.keys() == b.inputs.keys()
        and all(torch.equal(a.inputs[name], b.inputs[name]) for name in a.inputs)
        and torch.equal(a.query, b.query)
        and a.target_ids == b.target_ids
        and (a.labels is None or (b.labels is not None and torch.equal(a.labels, b.labels)))
    )


def as_given(scores: Sequence[Any]) -> list[dict[str, Any]]:
    return [score.state_dict() for score in scores]


@each_task
def test_an_edited_model_answers_and_scores_a_prompt_as_the_unedited_one_what_is_read(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, unedited = make_model(task), make_model(task)
    requests = [
        request.model_copy(update={"contrast": None if task == "classification" else ("Paris", "Rome")})
        for request in make_requests(task)
    ]
    with Reminder(model=model) as editor:
        for request in requests[:3]:
            editor.edit_text(request.prompt, request.target)
        prompts, targets = [r.prompt for r in requests], [r.target for r in requests]
        read = [editor.said.get(prompt, "") + prompt for prompt in prompts]
        assert read[:3] != prompts[:3]
        assert read[3:] == prompts[3:]
        for side in SIDES:
            assert same(model.encode_batch(prompts, side=side), unedited.encode_batch(read, side=side))
            assert same(
                model.encode_batch(prompts, targets, side=side), unedited.encode_batch(read, targets, side=side)
            )
        sizes = [model.size(prompt, [target]) for prompt, target in zip(prompts, targets, strict=True)]
        assert sizes == [unedited.size(text, [target]) for text, target in zip(read, targets, strict=True)]
        assert torch.equal(model.queries(prompts), unedited.queries(read))
        asked = [request.model_copy(update={"prompt": text}) for request, text in zip(requests, read, strict=True)]
        assert as_given(model.score(requests)) == as_given(unedited.score(asked))
        probes, same_probes = (
            [DerivedRequest(**dict(r), is_locality=True, gold=("Paris Rome",)) for r in some]
            for some in (requests, asked)
        )
        assert model.task.unedited(model, probes) == unedited.task.unedited(unedited, same_probes)
        if task != "language_modelling":
            assert model.ask(prompts) == unedited.ask(read)


@pytest.mark.parametrize("task", ["completion", "language_modelling"])
def test_running_text_asks_nothing_and_is_read_as_it_is(task: str, make_model: MakeModel) -> None:
    model, texts = make_model(task), ["the capital of France is Paris", "Rome is in Italy"]
    plain = model.encode_batch(["", " "], texts)
    asked: list[str] = []
    handle = model.intercept_prompts(lambda prompts: asked.extend(prompts) or [f"the {p}" for p in prompts])  # type: ignore[func-returns-value]
    assert same(model.encode_batch(["", " "], texts), plain)
    assert not asked
    assert not same(model.encode_batch(["what", ""], texts), plain)
    assert asked == ["what"]
    handle.remove()
    handle.remove()
    assert model.as_read(["what"]) == ["what"]


@each_task
def test_suspending_rolling_back_and_detaching_let_the_prompt_itself_be_read(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model(task), make_requests(task)[0]
    plain = model.encode_batch([request.prompt])
    editor = Reminder(model=model)
    editor.edit_text(request.prompt, request.target)
    edited = model.encode_batch([request.prompt])
    assert not same(edited, plain)
    with editor.suspended():
        assert same(model.encode_batch([request.prompt]), plain)
    assert same(model.encode_batch([request.prompt]), edited)
    # Everything made on the module answers as edited, until the editor is detached.
    other = EditableModel(model.module, layer=model.layer_name, task=model.task, tokenizer=model.tokenizer)
    assert same(other.encode_batch([request.prompt]), edited)
    editor.rollback()
    assert same(model.encode_batch([request.prompt]), plain)
    editor.edit_text(request.prompt, request.target)
    editor.detach()
    assert same(other.encode_batch([request.prompt]), plain)


def test_the_unedited_model_can_be_asked_while_prompts_are_read(make_model: MakeModel) -> None:
    model = make_model("qa")
    (own,) = model.answer(["capital of France"])
    model.intercept_prompts(lambda prompts: [f"{model.answer([prompt])[0]} {prompt}" for prompt in prompts])
    assert model.as_read(["capital of France"]) == [f"{own} capital of France"]
    model.release()
    assert model.as_read(["capital of France"]) == ["capital of France"]


@pytest.mark.parametrize("task", ["qa", "language_modelling"])
def test_only_requests_that_are_read_in_other_words_are_scored_again(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)
    scored: list[str] = []
    with Reminder(model=model) as editor, torch.no_grad():
        own_scores = model.score_batch

        def score_batch(some: Sequence[EditRequest]) -> Any:
            scored.extend(request.id for request in some)
            return own_scores(some)

        model.score_batch = score_batch  # type: ignore[method-assign]
        rescorer = Rescorer(editor)
        rescorer.score(requests)
        for edited in (2, None, 4, 2):
            if edited is not None:
                editor.edit_text(requests[edited].prompt, f"{requests[edited].target} {editor.n_edits}")
            scored.clear()
            with rescorer.evaluation():
                found = rescorer.score(requests)
            assert scored == ([] if edited is None else [requests[edited].id])
            fresh = model.score(requests)
            assert [score.text for score in found] == [score.text for score in fresh]
            assert [score.score for score in found] == pytest.approx([score.score for score in fresh], rel=1e-4)
            resumed = Rescorer(editor)
            resumed.load_state_dict(rescorer.state_dict())
            scored.clear()
            assert as_given(resumed.score(requests)) == as_given(found)
            assert not scored


WORDS = st.lists(st.sampled_from(["the", "capital", "of", "France", "Rome", "is"]), min_size=1, max_size=12)


@given(context=WORDS, prompt=WORDS, max_length=st.integers(3, 20), from_left=st.booleans())
def test_what_comes_before_a_question_is_cut_before_the_question_is(
    context: list[str], prompt: list[str], max_length: int, from_left: bool, word_tokenizer: Any
) -> None:
    tokenizer = word_tokenizer
    side, tokenizer.truncation_side = tokenizer.truncation_side, "left" if from_left else "right"
    tokens, question = PromptTokenizer(tokenizer), " ".join(prompt)
    text = f"{' '.join(context)} {question}"
    (found,) = tokens.closed_ids([text], max_length=max_length, questions=[question])
    (whole,), (own,) = tokens.closed_ids([text]), tokens.closed_ids([question], max_length=max_length)
    tokenizer.truncation_side = side
    assert len(found) == min(max_length, len(whole))
    assert found[-1] == whole[-1]
    if len(prompt) + 1 <= max_length:
        assert found == whole[-len(found) :]
    else:
        assert found == own


class Deputy(Reminder):
    """Lets another network read what was said, and answer in place of the model."""

    registered_name = "deputy"

    def __init__(self, *, network: Network, **given: Any) -> None:
        EditorStrategy.__init__(self, **given)
        self.said: dict[str, str] = {}
        self.network = network
        self.intercept_prompts(
            lambda prompts: [
                Reading(self.said[prompt] + prompt, self.network) if prompt in self.said else prompt
                for prompt in prompts
            ]
        )


@each_task
@pytest.mark.parametrize("engine", ["exact", "plain"])
def test_what_another_network_reads_it_answers_and_the_model_answers_the_rest(
    task: str, engine: Any, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, other, unedited = make_model(task), make_model(task, seed=1), make_model(task)
    requests = make_requests(task)
    with Deputy(model=model, network=other) as editor, model.serving(model.task, engine=engine), torch.no_grad():
        for request in requests[:3]:
            editor.edit_text(request.prompt, request.target)
        read = [
            request.model_copy(update={"prompt": editor.said.get(request.prompt, "") + request.prompt})
            for request in requests
        ]
        prompts, targets = [r.prompt for r in read], [r.target for r in requests]
        for side in SIDES:
            batch = model.encode_batch([r.prompt for r in requests], targets, side=side)
            plain = unedited.encode_batch(prompts, targets, side=side)
            assert same(batch, plain)
            expected = torch.cat([other.logits(plain)[:3], unedited.logits(plain)[3:]])
            assert torch.allclose(model.logits(batch), expected, atol=1e-4)
            # Layers are the model's own, whoever answers.
            assert torch.allclose(model.layer_call(batch).query, unedited.layer_call(plain).query, atol=1e-5)
        found, theirs, ours = model.score(requests), other.score(read[:3]), unedited.score(read[3:])
        assert [score.text for score in found] == [score.text for score in (*theirs, *ours)]
        assert [score.score for score in found] == pytest.approx([s.score for s in (*theirs, *ours)], rel=1e-4)
        if task != "language_modelling":
            asked = [request.prompt for request in requests]
            assert model.ask(asked) == [*other.ask(prompts[:3]), *unedited.ask(prompts[3:])]
        with editor.suspended():
            assert [s.text for s in model.score(requests)] == [s.text for s in unedited.score(requests)]


@pytest.mark.parametrize("task", ["qa", "language_modelling"])
def test_what_another_network_answered_is_not_scored_again_until_it_reads_something_else(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)
    scored: list[str] = []
    with Deputy(model=model, network=make_model(task, seed=1)) as editor, torch.no_grad():
        own_scores = model.score_batch

        def score_batch(some: Sequence[EditRequest]) -> Any:
            scored.extend(request.id for request in some)
            return own_scores(some)

        model.score_batch = score_batch  # type: ignore[method-assign]
        rescorer = Rescorer(editor)
        rescorer.score(requests)
        for edited in (2, None, 4, 2):
            if edited is not None:
                editor.edit_text(requests[edited].prompt, f"{requests[edited].target} {editor.n_edits}")
            scored.clear()
            with rescorer.evaluation():
                found = rescorer.score(requests)
            assert scored == ([] if edited is None else [requests[edited].id])
            assert [score.text for score in found] == [score.text for score in model.score(requests)]
            resumed = Rescorer(editor)
            resumed.load_state_dict(rescorer.state_dict())
            scored.clear()
            assert as_given(resumed.score(requests)) == as_given(found)
            assert not scored
            assert not rescorer.waits_for_values(requests[2])
