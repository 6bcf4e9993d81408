"""A module wrapped again and again: what is on it, for how long, and who answers."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.calls import LayerCall, QueryState
from grace_bench.models.editable import EditableModel
from helpers import each_value_once

MakeModel = Callable[..., EditableModel]

PROMPTS = ["what is the capital of Kazakhstan", "the river in Italy is"]
LAYERS = {
    "classification": [f"bert.encoder.layer.{n}.output.dense" for n in (0, 1)],
    "qa": ["encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.1.layer.2.DenseReluDense.wo"],
    "completion": [f"transformer.h.{n}.mlp.c_fc" for n in (0, 1)],
}
each_task = pytest.mark.parametrize("task", LAYERS)


def n_hooks(module: nn.Module) -> int:
    """How many hooks are on a module and its parts."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)


def wrapped(model: EditableModel, layer: str) -> EditableModel:
    return EditableModel(model.module, layer=layer, task=model.task, tokenizer=model.tokenizer)


def unchanged(call: LayerCall) -> Tensor:
    return call.output


@torch.no_grad()
def logits_of(model: EditableModel) -> Tensor:
    return model.logits(model.encode_batch(PROMPTS)).clone()


@each_task
def test_ten_wraps_leave_no_hooks_and_the_modules_own_generate(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    assert n_hooks(model.module) == 0
    expected, text = logits_of(model), model.answer(PROMPTS)
    counts = set()
    for number in range(10):
        again = wrapped(model, LAYERS[task][number % 2])
        assert torch.equal(logits_of(again), expected)
        assert again.answer(PROMPTS) == text
        again.layer_call(again.encode_batch(PROMPTS))
        assert n_hooks(model.module) == 0
        assert "generate" not in vars(model.module)
        interceptor = again.intercept(unchanged)
        counts.add((number % 2, n_hooks(model.module)))
        assert ("generate" in vars(model.module)) == (task != "classification")
        interceptor.remove()
        interceptor.remove()
    assert len(counts) == 2, "each time as many as the first time"
    assert n_hooks(model.module) == 0
    assert "generate" not in vars(model.module)


@each_task
def test_release_removes_every_interceptor(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    before = logits_of(model)
    for _ in range(3):
        model.intercept(lambda call: torch.zeros_like(call.output))
    assert not torch.equal(logits_of(model), before)
    model.release()
    assert torch.equal(logits_of(model), before)
    assert n_hooks(model.module) == 0
    assert "generate" not in vars(model.module)


@pytest.mark.parametrize("order", permutations(range(3)))
def test_generate_is_restored_in_whatever_order_wrappers_let_go(order: Any, make_model: MakeModel) -> None:
    model = make_model("completion")

    def own(*_: Any, **__: Any) -> str:
        return "own"

    model.module.generate = own  # type: ignore[assignment]
    interceptors = [wrapped(model, LAYERS["completion"][n % 2]).intercept(unchanged) for n in range(3)]
    assert model.module.generate("prompt") == "own"  # type: ignore[operator]
    for index in order:
        assert model.module.generate is not own
        interceptors[index].remove()
    assert model.module.generate is own
    assert n_hooks(model.module) == 0


@each_task
def test_wrappers_of_two_layers_work_at_the_same_time(task: str, make_model: MakeModel) -> None:
    first = make_model(task)
    models = [wrapped(first, layer) for layer in LAYERS[task]]
    seen: dict[int, list[tuple[QueryState, list[int], int]]] = {0: [], 1: []}

    def watch(number: int) -> Callable[[LayerCall], Tensor]:
        def note(call: LayerCall) -> Tensor:
            seen[number].append((call.state, call.position.tolist(), call.state.step))
            return call.output

        return note

    alone: dict[int, list[Any]] = {}
    for number, model in enumerate(models):
        # The first pass of a kind is made several times, to see whether it may be pruned.
        model.answer(PROMPTS)
        interceptor = model.intercept(watch(number))
        model.answer(PROMPTS)
        interceptor.remove()
        alone[number], seen[number] = seen[number], []
    interceptors = [model.intercept(watch(number)) for number, model in enumerate(models)]
    for number, model in enumerate(models):
        seen[number] = []
        model.answer(PROMPTS)
        assert [call[1:] for call in seen[number]] == [call[1:] for call in alone[number]]
        assert all(state is model.last_state for state, *_ in seen[number]), "one question is one sequence"
    for interceptor in interceptors:
        interceptor.remove()
    assert n_hooks(first.module) == 0


@each_value_once("task, editor", LAYERS, ["grace", "ft", "lora"])
def test_editing_at_one_layer_after_another_gives_what_a_fresh_module_gives(
    task: str,
    editor: str,
    make_model: MakeModel,
    make_editor: Callable[..., EditorStrategy],
    make_requests: Callable[[str], list[EditRequest]],
) -> None:
    (request, *_) = make_requests(task)

    def edited(model: EditableModel) -> Tensor:
        with make_editor(editor, model, **({"replacement": "replace_last"} if editor == "grace" else {})) as strategy:
            strategy.edit_text(request.prompt, request.target)
            return logits_of(model)

    reused, before = make_model(task), logits_of(make_model(task))
    for layer in LAYERS[task]:
        assert torch.equal(edited(wrapped(reused, layer)), edited(wrapped(make_model(task), layer)))
        assert torch.equal(logits_of(reused), before)
    assert n_hooks(reused.module) == 0


def test_removed_in_the_middle_of_a_pass_an_interceptor_leaves_the_next_sequence_whole(make_model: MakeModel) -> None:
    model = make_model("completion")
    handles: list[Any] = []

    def once(call: LayerCall) -> Tensor:
        handles.pop().remove()
        return call.output

    handles.append(model.intercept(once))
    logits_of(model)
    steps: list[int] = []

    def note(call: LayerCall) -> Tensor:
        steps.append(call.state.step)
        return call.output

    interceptor = model.intercept(note)
    model.module(**model.encode_batch(PROMPTS).inputs)
    interceptor.remove()
    assert steps == [0]
