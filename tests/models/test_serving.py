"""A model that serves another task for a while, and what it is asked by mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    T5Config,
    T5EncoderModel,
)

from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS

MakeModel = Callable[..., EditableModel]

PROMPTS = ["what is the capital of Kazakhstan", "the river in Italy is"]
TASKS = ("classification", "qa", "completion", "language_modelling")
CAUSAL = {"completion", "language_modelling"}
each_task = pytest.mark.parametrize("task", TASKS)


def refusal(attempt: Callable[[], Any]) -> str:
    """The one line with which an attempt is refused."""
    with pytest.raises(UserError) as caught:
        attempt()
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


# Serving another task.


@pytest.mark.parametrize("wanted", TASKS)
@each_task
def test_a_model_serves_the_tasks_of_its_head_and_refuses_the_others_in_one_line(
    task: str, wanted: str, make_model: MakeModel
) -> None:
    model = make_model(task)
    own_task, own_engine = model.task, model.engine
    other = get_task(wanted)
    if task == wanted or {task, wanted} <= CAUSAL:
        with model.serving(other, engine="plain") as serving:
            assert serving is model
            assert model.task is other
            assert model.engine.name == "plain"
            model.encode_batch(PROMPTS, [1, 2] if wanted == "classification" else ["Astana", "Tiber"])
    else:
        with pytest.raises(UserError) as caught, model.serving(other, engine="plain"):
            pass
        assert str(caught.value).startswith(f"model tiny, made for {task}, cannot serve {wanted}: needs ")
        assert len(str(caught.value).splitlines()) == 1
    assert model.task is own_task
    assert model.engine is own_engine


def test_the_models_own_task_and_engine_come_back_after_an_error(make_model: MakeModel) -> None:
    model = make_model("completion")
    own_task, own_engine = model.task, model.engine
    with model.serving(get_task("completion"), engine="exact", memory_mb=1):
        assert model.engine is not own_engine
        assert model.engine.most_kept_bytes == 2**20
    with pytest.raises(ZeroDivisionError), model.serving(get_task("completion"), engine="exact"):
        raise ZeroDivisionError
    assert model.task is own_task
    assert model.engine is own_engine
    refusal(lambda: model.serving(get_task("qa"), engine="exact").__enter__())
    told = refusal(lambda: model.serving(get_task("completion"), engine="exakt").__enter__())  # type: ignore[arg-type]
    assert "did you mean 'exact'?" in told
    assert model.task is own_task
    assert model.engine is own_engine


def small(kind: str) -> tuple[nn.Module, str]:
    sizes: dict[str, Any] = {"vocab_size": 40}
    if kind == "gpt2 classifier":
        return GPT2ForSequenceClassification(
            GPT2Config(n_layer=1, n_embd=16, n_head=2, n_positions=16, pad_token_id=0, **sizes)
        ), "transformer.h.0.mlp.c_fc"
    if kind == "masked bert":
        config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **sizes)
        return BertForMaskedLM(config), "bert.encoder.layer.0.output.dense"
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **sizes)
    return T5EncoderModel(config), "encoder.block.0.layer.1.DenseReluDense.wo"


@pytest.mark.parametrize(
    ("kind", "serves"),
    [("gpt2 classifier", {"classification"}), ("masked bert", set()), ("t5 encoder", {"classification"})],
)
def test_what_a_module_is_decides_what_it_serves(kind: str, serves: set[str], word_tokenizer: Any) -> None:
    module, layer = small(kind)
    model = EditableModel(module, layer=layer, task="classification", tokenizer=word_tokenizer)
    assert {task for task in TASKS if get_task(task).misfit(model) is None} == serves


@each_task
def test_without_a_tokenizer_no_task_is_served(task: str, make_model: MakeModel) -> None:
    given = make_model(task)
    model = EditableModel(given.module, layer=given.layer_name, task=given.task)
    assert "needs a tokenizer" in refusal(lambda: model.serving(get_task(task), engine="exact").__enter__())


# What is asked by mistake.


@pytest.mark.parametrize("method", ["answer", "ask", "queries", "encode_batch"])
@each_task
def test_a_single_text_is_not_read_letter_by_letter(task: str, method: str, make_model: MakeModel) -> None:
    ask = getattr(make_model(task), method)
    told = refusal(lambda: ask(PROMPTS[0]))
    assert told == f"prompts should be a list of texts, not a single text: write [{PROMPTS[0]!r}]"
    assert refusal(lambda: ask([PROMPTS[0], 3])) == "prompts should be a list of texts, but holds a value of type int"


@each_task
def test_a_single_target_is_not_read_letter_by_letter(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    assert refusal(lambda: model.encode_batch(PROMPTS, "ab")) == (
        "targets='ab' should be a list of 2, one for each prompt"
    )
    assert "one for each prompt" in refusal(lambda: model.encode_batch(PROMPTS, [1]))


@pytest.mark.parametrize("method", ["score", "score_batch", "score_batches"])
def test_a_single_request_is_refused_where_a_list_is_scored(
    method: str, make_model: MakeModel, make_requests: Callable[[str], list[EditRequest]]
) -> None:
    model, (request, *_) = make_model("completion"), make_requests("completion")
    for given in (request, request.prompt, [request.prompt]):
        assert refusal(lambda given=given: getattr(model, method)(given)).startswith("requests should be a list of ")  # type: ignore[misc]


@each_task
def test_asked_nothing_a_model_answers_nothing(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    assert model.answer([]) == []
    assert model.ask([]) == []
    assert model.score([]) == []
    assert model.score_batch([]) == []
    assert list(model.score_batches([])) == []
    model.check_targets([])
    for method in (model.queries, model.encode_batch):
        assert refusal(lambda method=method: method([])) == "prompts=[] should hold at least one text"  # type: ignore[misc]


# Labels.


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("Euro", "label 'Euro' should be a whole number (0 to 3)"),
        ("", "label '' should be a whole number (0 to 3)"),
        (1.5, "label 1.5 should be a whole number (0 to 3)"),
        (4, "label 4 is none of the model's 4 (0 to 3)"),
        (-1, "label -1 is none of the model's 4 (0 to 3)"),
        (-100, "label -100 is none of the model's 4 (0 to 3)"),
        ("7", "label 7 is none of the model's 4 (0 to 3)"),
    ],
)
@pytest.mark.parametrize("editor", ["grace", "ft"])
def test_a_label_that_is_none_of_the_models_is_refused_in_one_line(
    label: Any, says: str, editor: str, make_model: MakeModel
) -> None:
    model = make_model("classification")
    assert refusal(lambda: model.encode_batch(PROMPTS, [0, label])) == says
    before = model.answer(PROMPTS)
    with EDITORS.get(editor)(model=model) as strategy:
        assert refusal(lambda: strategy.edit_text(PROMPTS[0], label)) == says
        assert strategy.n_edits == 0
        assert model.answer(PROMPTS) == before
    if isinstance(label, int | str):
        request = EditRequest(id="r3", prompt=PROMPTS[0], target=label)
        assert refusal(lambda: model.check_targets([request])) == f"request 'r3': field 'target': {says}"


def test_labels_are_taken_as_whole_numbers_of_any_kind(make_model: MakeModel) -> None:
    batch = make_model("classification").encode_batch(PROMPTS, [torch.tensor(3), "2"])  # type: ignore[list-item]
    assert batch.labels is not None
    assert batch.labels.tolist() == [3, 2]
    assert batch.target_ids == ((3,), (2,))


class Scale(nn.Module):
    """Scores three classes from one number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3)
        self.n_passes = 0

    def forward(self, number: Tensor) -> Tensor:
        self.n_passes += 1
        return self.layer(number)


def test_the_labels_of_any_module_are_counted_once_and_past_its_editors() -> None:
    module = Scale()
    model = EditableModel(
        module,
        layer="layer",
        task="classification",
        encode=lambda texts: {"number": torch.tensor([[float(text)] for text in texts])},
    )
    calls: list[Any] = []

    def note(call: Any) -> Tensor:
        calls.append(call)
        return call.output

    model.intercept(note)
    for _ in range(3):
        assert refusal(lambda: model.encode_batch(["0.5"], [3])) == "label 3 is none of the model's 3 (0 to 2)"
        model.encode_batch(["0.5", "1"], [2, 0])
        assert model.count_labels("0.5") == 3
    assert module.n_passes == 1
    assert not calls
    model.release()


def test_a_module_that_scores_tokens_is_told_that_it_is_no_classifier(make_model: MakeModel) -> None:
    given = make_model("completion")
    model = EditableModel(given.module, layer=given.layer_name, task="classification", tokenizer=given.tokenizer)
    assert refusal(lambda: model.encode_batch(PROMPTS, [0, 1])) == (
        "model GPT2LMHeadModel is no classifier: its logits have 3 dimensions"
    )
