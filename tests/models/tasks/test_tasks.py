"""Tasks on tiny models: what free generation scores, what is compared, what is cut, what goes into one batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import IGNORED
from grace_bench.models.tokens import TextFormat

MakeModel = Callable[..., EditableModel]

PROMPT = "what is the capital of Kazakhstan"


# Free and forced answers.


def constructed(model: EditableModel, wrong_at: int, target: str) -> None:
    """Makes a causal model give each target token after the one before it, but for one, from which it goes astray."""
    tokenizer, module = model.tokenizer, model.module
    batch = model.encode_batch([PROMPT], [target])
    ids = batch.inputs["input_ids"][0].tolist()
    start = int(batch.query[0])
    following = dict(zip(ids[start:], ids[start + 1 :], strict=False))
    astray = tokenizer.convert_tokens_to_ids("▁Peru")
    following[ids[start + wrong_at]] = astray
    following[astray] = astray

    def forward(input_ids: Tensor, **_: Any) -> Any:
        chosen = torch.tensor([[following.get(int(i), astray) for i in row] for row in input_ids])
        return type("Output", (), {"logits": functional.one_hot(chosen, len(tokenizer)).float()})()

    module.forward = forward  # type: ignore[method-assign]

    def generate(input_ids: Tensor, max_new_tokens: int, eos_token_id: list[int], **_: Any) -> Tensor:
        for _ in range(max_new_tokens):
            new = forward(input_ids).logits[:, -1:].argmax(dim=-1)
            input_ids = torch.cat([input_ids, new], dim=1)
            if int(new) in eos_token_id:
                break
        return input_ids

    module.generate = generate  # type: ignore[assignment]


def test_the_main_score_follows_the_free_answer_where_the_forced_one_is_nearly_right(make_model: MakeModel) -> None:
    model = make_model("completion", max_new_tokens=8)
    target = "Astana Rome Lima Tenge Euro"
    constructed(model, wrong_at=1, target=target)
    (item,) = model.score([EditRequest(id="1", prompt=PROMPT, target=target)])
    assert item.text == "Astana Peru Peru Peru Peru Peru Peru Peru", "to the limit, not to the target's length"
    assert item.others["token_accuracy"] == pytest.approx(4 / 5)
    assert item.score == pytest.approx(2 / (8 + 5)), "one shared word of eight and five"
    assert item.others["exact_match"] == 0.0
    assert item.correct is False


def test_a_free_answer_does_not_depend_on_the_target_it_is_compared_with(make_model: MakeModel) -> None:
    for task in ("completion", "qa"):
        model = make_model(task, max_new_tokens=6)
        targets = ["Rome", "Rome Lima Tenge", "Paris of France in the capital of Peru"]
        texts = {model.score([EditRequest(id=target, prompt=PROMPT, target=target)])[0].text for target in targets}
        assert len(texts) == 1, task


# The comparison of two answers.


@pytest.mark.parametrize("task", ["completion", "qa"])
def test_a_contrast_says_which_answer_is_likelier_a_token(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    answers = ["Rome", "Rome Lima Tenge", "Paris in the river"]

    def loss(prompt: str, answer: str) -> float:
        batch = model.encode_batch([prompt], [answer])
        assert batch.labels is not None
        with torch.no_grad():
            log_probs = model.logits(batch)[0].log_softmax(dim=-1)
        scored = [
            float(log_probs[t, label])
            for t, label in enumerate(batch.labels[0].tolist())
            if label not in (IGNORED, model.tokenizer.eos_token_id)
        ]
        assert len(scored) == len(answer.split())
        return -sum(scored) / len(scored)

    prompts = [PROMPT, "the river in Italy is"]
    requests, expected = [], []
    for prompt in prompts:
        for one in answers:
            for other in answers:
                metadata = {"contrast": [one, other]}
                requests.append(EditRequest(id=str(len(requests)), prompt=prompt, target="Sol", metadata=metadata))
                expected.append(float(loss(prompt, one) < loss(prompt, other) - 1e-6))
    assert {0.0, 1.0} == set(expected)
    bare = EditRequest(id="bare", prompt=PROMPT, target="Sol")
    items = model.score([bare, *requests])
    assert "contrast" not in items[0].others
    assert [item.others["contrast"] for item in items[1:]] == expected
    assert model.task.aggregate(items)["contrast"] == pytest.approx(sum(expected) / len(expected))
    assert "contrast" not in model.task.aggregate(items[:1])


# Limits.


@pytest.mark.parametrize("task", ["completion", "qa"])
def test_inputs_and_answers_are_cut_where_the_stream_says(task: str, make_model: MakeModel) -> None:
    free = make_model(task)
    cut = make_model(task, max_input_tokens=4, max_target_tokens=3)
    target = "Paris in the river of France"
    long, short = free.encode_batch([PROMPT], [target]), cut.encode_batch([PROMPT], [target])
    end = free.tokenizer.eos_token_id
    assert long.target_ids[0][-1] == end
    assert len(long.target_ids[0]) == 7
    assert short.target_ids[0] == (*long.target_ids[0][:2], end)
    n_given = int(short.inputs["attention_mask"].sum()) - (len(short.target_ids[0]) if task == "completion" else 0)
    assert n_given == 4
    asked = cut.encode_batch([PROMPT])
    assert int(asked.inputs["attention_mask"].sum()) == 4
    assert asked.query.tolist() == short.query.tolist(), "asked and taught at one position"


def test_running_text_is_cut_as_a_target(make_model: MakeModel) -> None:
    model = make_model("language_modelling", max_target_tokens=5)
    assert model.encode_batch([""], ["the river of Italy is the Tiber in Rome"]).inputs["input_ids"].shape[1] == 5


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [("Astana Rome", True), ("Paris", True), ("Sol Euro", True), ("Astana", False), ("Astana Rome Lima Tenge", False)],
)
def test_an_answer_is_right_if_it_is_all_that_was_taught(answer: str, is_right: bool, make_model: MakeModel) -> None:
    model = make_model("completion", max_target_tokens=3, max_new_tokens=8)
    target = "Astana Rome Lima Tenge"
    taught = model.encode_batch([PROMPT], [target]).target_ids[0]
    assert model.tokenizer.decode(taught, skip_special_tokens=True) == "Astana Rome"
    ids = [model.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in answer.split()]

    def generate(input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, torch.tensor([[*ids, model.tokenizer.eos_token_id]])], dim=1)

    model.module.generate = generate  # type: ignore[assignment]
    request = EditRequest(id="1", prompt=PROMPT, target=target, answers=("Paris", "Sol Euro Lima Peru"))
    (item,) = model.score([request])
    assert (item.text, item.correct) == (answer, is_right)


@pytest.mark.parametrize("option", ["max_input_tokens", "max_target_tokens", "batch_tokens"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_a_limit_that_is_no_number_of_tokens_is_refused_by_name(option: str, value: Any, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=f"{option}={value}"):
        make_model("completion", **{option: value})


# Batches.


@pytest.mark.parametrize("task", ["classification", "qa", "completion", "language_modelling"])
def test_a_forward_pass_of_scoring_holds_no_more_tokens_than_allowed(task: str, make_model: MakeModel) -> None:
    limit = 40
    words = [
        "the",
        "river",
        "of",
        "Italy",
        "is",
        "in",
        "France",
        "and",
        "the",
        "capital",
        "of",
        "Peru",
        "is",
        "Lima",
        "in",
        "the",
    ]
    requests = [
        EditRequest(
            id=str(n),
            prompt=" ".join(words[: 1 + n]),
            target=n % 4 if task == "classification" else "Rome Lima"[: 4 + 5 * (n % 2)],
            metadata={} if task == "classification" else {"contrast": ["Rome", "Lima of Peru in Italy"]},
        )
        for n in (11, 3, 14, 5, 0, 8, 1, 2, 13, 4)
    ]
    whole, split = make_model(task), make_model(task, batch_tokens=limit)
    sizes: list[tuple[int, int]] = []

    def watch(call: LayerCall) -> Tensor:
        sizes.append((call.input.shape[0], call.input.shape[0] * (call.state.step + call.input.shape[1])))
        return call.output

    split.intercept(watch)
    scores = split.score(requests)
    assert all(tokens <= limit for rows, tokens in sizes if rows > 1), "one row alone may be longer"
    assert any(rows > 1 for rows, _ in sizes)
    expected = whole.score(requests)
    assert [item.text for item in scores] == [item.text for item in expected]
    assert [item.score for item in scores] == pytest.approx([item.score for item in expected], rel=1e-4)


@pytest.mark.parametrize(
    ("task", "is_held"), [("classification", True), ("language_modelling", True), ("completion", False)]
)
def test_on_a_cpu_a_batch_that_generates_nothing_holds_at_most_1024_tokens(
    make_model: MakeModel, task: str, is_held: bool
) -> None:
    model = make_model(task, batch_size=1000)
    n = 1024 // model.size("Rome", ("Italy",))
    requests = [EditRequest(id=str(number), prompt="Rome", target="Italy") for number in range(n + 1)]
    sizes = [len(batch) for batch in model.score_batches(requests)]
    assert sizes == ([n, 1] if is_held else [n + 1])


def test_a_text_longer_than_a_pass_may_be_goes_alone(make_model: MakeModel) -> None:
    task = make_model("completion", batch_tokens=10, batch_size=3).task
    assert [sorted(batch) for batch in task.batches([12, 2, 2, 30, 2, 2, 5])] == [[1, 2, 4], [5, 6], [0], [3]]


# Precision.


@pytest.mark.parametrize("task", ["completion", "qa", "language_modelling"])
@pytest.mark.parametrize("name", ["grace", "ft", "defer", "memory", "lora"])
def test_an_edit_in_bfloat16_moves_the_answer_and_is_taken_back(
    name: str, task: str, make_model: MakeModel, make_editor: Callable[..., EditorStrategy], make_requests: Any
) -> None:
    model, (request, *_) = make_model(task, dtype=torch.bfloat16), make_requests(task)
    batch = model.encode_batch([request.prompt], [request.target])

    def loss() -> float:
        with torch.no_grad():
            return float(model.task.loss(model.logits(batch), batch))

    before = loss()
    assert (model.dtype, model.layer_dtype) == (torch.bfloat16, torch.bfloat16)
    with make_editor(name, model) as editor:
        editor.edit_text(request.prompt, request.target)
        assert loss() < before
        assert model.score([request])[0].score >= 0
    assert loss() == before


# Targets that no free answer can equal.


def _give(row: list[int], **_: Any) -> Tensor:
    return torch.tensor([row])


def test_a_target_is_accepted_as_the_tokenizer_gives_it_back(make_model: MakeModel) -> None:
    for task in ("completion", "qa"):
        model = make_model(task, max_new_tokens=4)
        target = "Nur-Sultan Astana"
        ids = model.encode_batch([PROMPT], [target]).target_ids[0]
        assert model.tokenizer.unk_token_id in ids
        given = [0] if task == "qa" else model.encode_batch([PROMPT]).inputs["input_ids"][0].tolist()
        model.module.generate = partial(_give, [*given, *ids])  # type: ignore[assignment]
        request = EditRequest(id="1", prompt=PROMPT, target=target)
        (item,) = model.score([request])
        assert (item.text, item.correct, item.score) == ("Astana", True, 1.0)
        found = model.task.answerability(model, [request, EditRequest(id="2", prompt=PROMPT, target="Rome")])
        assert (found.unanswerable, found.n_given_back) == ({}, 1)
        assert found.lines() == ["1 of 2 targets is accepted as the tokenizer gives it back"]


@pytest.mark.parametrize("task", ["completion", "qa"])
def test_targets_that_no_free_answer_can_equal_are_counted_by_reason(task: str, make_model: MakeModel) -> None:
    model = make_model(task, max_new_tokens=2)
    targets = ["Rome", "Rome of", "Rome of Peru", "the Sol of Peru in Italy", "東京", "Москва", "Lima of Peru"]
    requests = [EditRequest(id=text, prompt=PROMPT, target=text) for text in targets]
    # One answer that can be given is enough.
    requests[-1] = requests[-1].model_copy(update={"answers": ("Lima",)})
    found = model.task.answerability(model, requests)
    assert found.unanswerable == {
        "longer than max_new_tokens=2": 2,
        "characters that the tokenizer cannot give back": 2,
    }
    assert found.lines() == [
        "4 of 7 targets cannot be answered freely: characters that the tokenizer cannot give back (2), "
        "longer than max_new_tokens=2 (2)"
    ]
    assert model.task.longest_target(model, requests) == 7


def test_punctuation_that_is_left_of_a_text_is_no_answer(make_model: MakeModel) -> None:
    model = make_model("completion", max_new_tokens=8)
    requests = [EditRequest(id=text, prompt=PROMPT, target=text) for text in ("Москва ?", "Rome Москва ?", "?")]
    found = model.task.answerability(model, requests)
    assert found.unanswerable == {"characters that the tokenizer cannot give back": 1}
    assert found.n_given_back == 1


def test_a_target_that_is_answerable_only_by_its_name_of_a_special_token_is_text(make_model: MakeModel) -> None:
    request = EditRequest(id="1", prompt=PROMPT, target="</s> Rome")
    model = make_model("completion", max_new_tokens=8)
    assert model.task.answerability(model, [request]).unanswerable == {}
    parsing = make_model("completion", max_new_tokens=8, format=TextFormat(special_tokens="parse"))
    assert parsing.task.answerability(parsing, [request]).unanswerable == {"the text of a special token": 1}


@pytest.mark.parametrize("task", ["classification", "language_modelling"])
def test_only_questions_are_put_into_a_chat(task: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=f"chat=true is for qa and completion, not for {task}"):
        make_model(task, format=TextFormat(chat=True))
