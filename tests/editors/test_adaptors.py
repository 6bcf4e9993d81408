"""Defer, Memory and LoRA: what they answer against plain loops over rows and positions."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_bench.data.requests import EditRequest
from grace_bench.editors.defer import Defer
from grace_bench.editors.lora import Lora
from grace_bench.editors.memory import Memory
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

each_task = pytest.mark.parametrize("task", ["classification", "qa", "completion", "language_modelling"])
each_replacement = pytest.mark.parametrize("replacement", ["replace_all", "replace_last", "replace_prompt"])


def edited(editor: Any, requests: list[EditRequest]) -> Any:
    for request in requests:
        editor.edit_text(request.prompt, request.target)
    return editor


def layer_answers(model: EditableModel, requests: list[EditRequest]) -> tuple[LayerCall, Tensor]:
    """What enters and leaves the layer itself, and what the editor makes of it, for one padded batch."""
    seen: list[Tensor] = []
    handle = model.layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests])
    try:
        with torch.no_grad():
            call = model.layer_call(batch)
            seen.clear()
            model.logits(batch)
    finally:
        handle.remove()
    return call, seen[0].reshape(call.output.shape)


def is_written(position: int, query: int, replacement: str) -> bool:
    return {"replace_all": True, "replace_last": position == query, "replace_prompt": position < query}[replacement]


def linear(weight: Tensor, bias: Tensor, vector: Tensor) -> list[float]:
    return [
        sum(float(w) * float(x) for w, x in zip(row, vector, strict=True)) + float(b)
        for row, b in zip(weight, bias, strict=True)
    ]


@each_replacement
@each_task
def test_defer_gives_the_prediction_where_the_gate_is_above_the_threshold(
    task: str, replacement: Any, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)
    editor = edited(Defer(model=model, n_iter=3, replacement=replacement), requests[:1])
    assert editor.adaptor is not None
    tensors = editor.adaptor.state_dict()
    call, answer = layer_answers(model, requests)
    gates = [
        1 / (1 + math.exp(-linear(tensors["gate.weight"], tensors["gate.bias"], query)[0])) for query in call.query
    ]
    # Between the gates of two rows, so that both branches are taken.
    editor.threshold = (sorted(gates)[0] + sorted(gates)[-1]) / 2
    call, answer = layer_answers(model, requests)
    deferred = [gate > editor.threshold for gate in gates]
    assert {True, False} == set(deferred)
    for row, (query, is_deferred) in enumerate(zip(call.query, deferred, strict=True)):
        predicted = torch.tensor(linear(tensors["predictor.weight"], tensors["predictor.bias"], query))
        for position in range(answer.shape[1]):
            written = is_deferred and is_written(position, int(call.position[row]), replacement)
            expected = predicted if written else call.output[row, position]
            torch.testing.assert_close(answer[row, position], expected, rtol=1e-4, atol=1e-4)


@each_replacement
@each_task
def test_memory_gives_the_values_of_its_slots_under_attention(
    task: str, replacement: Any, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)
    editor = edited(Memory(model=model, n_iter=3, n_slots=5, replacement=replacement), requests[:1])
    assert editor.adaptor is not None
    tensors = editor.adaptor.state_dict()
    call, answer = layer_answers(model, requests)
    for row, query in enumerate(call.query):
        scores = [math.exp(score) for score in linear(tensors["attention.weight"], tensors["attention.bias"], query)]
        weights = [score / sum(scores) for score in scores]
        recalled = sum(w * tensors["slot_values.weight"][:, slot] for slot, w in enumerate(weights))
        for position in range(answer.shape[1]):
            written = is_written(position, int(call.position[row]), replacement)
            expected = recalled if written else call.output[row, position]
            torch.testing.assert_close(answer[row, position], expected, rtol=1e-4, atol=1e-4)


def test_the_unedited_output_is_mixed_into_the_memorys_until_its_first_edit_is_made(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model("qa"), make_requests("qa")
    shares: list[float] = []
    editor = Memory(model=model, n_iter=4, lr=1e-9)

    def watch(module: Any, inputs: Any, output: Tensor) -> None:
        if editor.step is not None and editor.adaptor is not None:
            recalled = editor.adaptor.get_submodule("slot_values")(
                torch.softmax(editor.adaptor.get_submodule("attention")(inputs[0][:, -1]), dim=-1)
            )
            own = torch.nn.functional.linear(inputs[0], module.weight)[0, 0]
            shares.append(float(((output[0, 0] - own) / (recalled[0] - own)).detach().mean()))

    handle = model.layer.register_forward_hook(watch)
    edited(editor, requests[:2])
    handle.remove()
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0], abs=1e-3)


def test_defer_trains_gate_and_prediction_together_and_the_gate_opens_for_every_edit(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model("completion"), make_requests("completion")[:3]
    editor = Defer(model=model)
    for request in requests:
        editor.edit_text(request.prompt, request.target)
        query = model.layer_call(model.encode_batch([request.prompt], [request.target])).query
        assert editor.adaptor is not None
        assert float(torch.sigmoid(editor.adaptor.get_submodule("gate")(query))) > editor.threshold


@each_task
def test_lora_answers_as_a_model_that_peft_itself_wraps(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model, requests = make_model(task), make_requests(task)
    editor = edited(Lora(model=model, n_iter=5, lr=1e-2, r=3, alpha=12.0), requests[:2])
    assert editor.adaptor is not None
    wrapped = make_model(task)
    config = LoraConfig(
        r=3,
        lora_alpha=12,
        target_modules=[model.layer_name],
        fan_in_fan_out=task in ("completion", "language_modelling"),
    )
    module: Any = inject_adapter_in_model(config, wrapped.module)
    state = editor.adaptor.state_dict()
    adapter = module.get_submodule(model.layer_name)
    adapter.lora_A["default"].weight.data = state["A.weight"]
    adapter.lora_B["default"].weight.data = state["B.weight"]
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(batch), wrapped.logits(batch), rtol=1e-4, atol=1e-4)
        unedited = make_model(task).logits(batch)
        assert not torch.allclose(unedited, wrapped.logits(batch), atol=1e-2)


def test_lora_leaves_the_models_modules_as_they_are(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model = make_model("qa")
    before = {name: type(module) for name, module in model.module.named_modules()}
    edited(Lora(model=model), make_requests("qa")[:1])
    assert {name: type(module) for name, module in model.module.named_modules()} == before


def test_lora_refuses_a_layer_that_is_no_linear_map(make_model: MakeModel) -> None:
    given = make_model("qa")
    model = EditableModel(given.module, layer="encoder.block.0", task="qa", tokenizer=given.tokenizer)
    with pytest.raises(UserError, match=r"layer=encoder\.block\.0 is a T5Block, which LoRA cannot adapt"):
        Lora(model=model)


@pytest.mark.parametrize("cls", [Defer, Memory, Lora])
def test_the_same_seed_gives_the_same_adaptor_and_leaves_the_global_generator_alone(
    cls: Any, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    states = []
    for seed, state in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        editor = edited(cls(model=make_model("qa"), n_iter=2, seed=seed), make_requests("qa")[:1])
        assert torch.equal(torch.get_rng_state(), before)
        states.append(editor.state_dict())
    tensors = [name for name, value in states[0].items() if isinstance(value, Tensor)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in tensors)
    assert not all(torch.equal(states[0][name], states[2][name]) for name in tensors)


@pytest.mark.parametrize(
    ("cls", "option", "value", "says"),
    [
        (Defer, "threshold", 1.0, "should be below 1"),
        (Defer, "threshold", 0, "should be a positive number"),
        (Defer, "replacement", "replace_most", "is not known"),
        (Memory, "n_slots", 0, "should be a whole number, at least 1"),
        (Memory, "lr", -1.0, "should be a positive number"),
        (Lora, "r", 0, "should be a whole number, at least 1"),
        (Lora, "alpha", 0.0, "should be a positive number"),
        (Lora, "n_iter", 0, "should be a whole number, at least 1"),
    ],
)
def test_an_option_out_of_range_is_named(cls: Any, option: str, value: Any, says: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"editor\.{option}={value} .*{says}"):
        cls(model=make_model("qa"), **{option: value})
