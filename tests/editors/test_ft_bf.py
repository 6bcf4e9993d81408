"""LocFT-BF against a plain torch loop, and what it keeps of earlier requests."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editors.ft_bf import FineTuneBreadthFirst
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.engine.engine import make_engine

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
BatchOf = Callable[[EditableModel, Sequence[EditRequest]], EditBatch]


def weights(model: EditableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.layer.state_dict().items()}


def tokens(model: EditableModel, request: EditRequest) -> tuple[list[int], list[int]]:
    tokenizer = model.tokenizer
    prompt, target = (
        tokenizer.convert_tokens_to_ids([f"▁{word}" for word in str(text).split()])
        for text in (request.prompt, request.target)
    )
    return prompt, [*target, tokenizer.eos_token_id]


def plain_loop(
    module: nn.Module, layer: str, requests: Sequence[tuple[list[int], list[int]]], *, lr: float, n_epochs: int
) -> tuple[int, list[float]]:
    """Breadth-first training where all requests fit into one step, each read alone."""
    parameters = list(module.get_submodule(layer).parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    steps = 0
    while len(losses) < n_epochs and (not losses or losses[-1] >= 0.01):
        parts = []
        for prompt, target in requests:
            logits = module(input_ids=torch.tensor([[*prompt, *target[:-1]]])).logits[0, len(prompt) - 1 :]
            parts.append(functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        loss = torch.stack(parts).sum() / sum(len(target) for _, target in requests)
        losses.append(loss.item())
        if losses[-1] >= 0.01:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
    return steps, losses


@pytest.mark.parametrize(("lr", "n_epochs", "stops"), [(3e-3, 25, False), (2e-2, 100, True)])
def test_it_does_what_a_plain_loop_does_from_the_original_weights_each_time(
    lr: float, n_epochs: int, stops: bool, make_model: MakeModel, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_model("completion"), make_requests("completion")[:5]
    unedited = deepcopy(model.module)
    with FineTuneBreadthFirst(model=model, lr=lr, n_epochs=n_epochs) as editor:
        for start, end in ((0, 3), (3, 5)):
            reference = deepcopy(unedited)
            encoded = [tokens(model, request) for request in requests[:end]]
            steps, losses = plain_loop(reference, model.layer_name, encoded, lr=lr, n_epochs=n_epochs)
            outcome = editor.edit(batch_of(model, requests[start:end]))
            assert (outcome.steps < n_epochs) == stops
            assert abs(outcome.steps - steps) <= (1 if stops else 0)
            assert outcome.loss_first == pytest.approx(losses[0], abs=1e-4)
            if not stops:
                assert outcome.loss == pytest.approx(losses[-1], abs=1e-3)
                own = reference.get_submodule(model.layer_name).state_dict()
                for name, tensor in model.layer.state_dict().items():
                    # Adam turns gradients that are next to nothing into whole steps.
                    assert float((tensor - own[name]).norm()) < 0.02 * float(
                        (own[name] - unedited.get_submodule(model.layer_name).state_dict()[name]).norm()
                    )


def edited(editor: FineTuneBreadthFirst, turns: Sequence[EditBatch]) -> list[EditOutcome]:
    return [editor.edit(turn) for turn in turns]


def test_the_result_does_not_depend_on_how_requests_were_batched(
    make_model: MakeModel, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    requests = make_requests("completion")[:5]
    found = []
    for cuts in ((5,), (2, 5), (1, 2, 3, 4, 5)):
        model = make_model("completion")
        with FineTuneBreadthFirst(model=model, lr=3e-3, n_epochs=4, batch_size=2) as editor:
            starts = (0, *cuts[:-1])
            edited(editor, [batch_of(model, requests[a:b]) for a, b in zip(starts, cuts, strict=True)])
            found.append(weights(model))
    assert all(torch.equal(other[name], tensor) for other in found for name, tensor in found[0].items())


def test_a_step_is_skipped_where_its_loss_is_low_already(
    make_model: MakeModel, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_model("completion"), make_requests("completion")[:4]
    with FineTuneBreadthFirst(model=model, lr=1e-2, n_epochs=200, batch_size=1) as editor:
        outcome = editor.edit(batch_of(model, requests))
        assert outcome.loss is not None
        assert outcome.loss < 0.01
        learnt = deepcopy(model.module.state_dict())
    model.module.load_state_dict(learnt)
    with FineTuneBreadthFirst(model=model) as editor:
        before = weights(model)
        outcome = editor.edit(batch_of(model, requests))
        assert outcome.steps == 0
        assert all(torch.equal(weights(model)[name], tensor) for name, tensor in before.items())


def test_a_request_replaces_the_one_with_its_prompt_but_no_running_text(
    make_model: MakeModel, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    first, second = make_requests("completion")[:2]
    other = first.model_copy(update={"target": "Lima"})
    model = make_model("completion")
    with FineTuneBreadthFirst(model=model, n_epochs=1) as editor:
        edited(editor, [batch_of(model, [first, second]), batch_of(model, [other])])
        assert editor.requests == [(second.prompt, second.target), (first.prompt, "Lima")]
        with FineTuneBreadthFirst(model=make_model("completion"), n_epochs=1) as resumed:
            resumed.load_state_dict(editor.state_dict())
            assert resumed.requests == editor.requests
        editor.rollback()
        assert editor.requests == []
    model = make_model("language_modelling")
    texts = [EditRequest(id=str(i), prompt="", target=text) for i, text in enumerate(("Rome is in Italy", "Lima Sol"))]
    with FineTuneBreadthFirst(model=model, n_epochs=1) as editor:
        edited(editor, [batch_of(model, [text]) for text in texts])
        assert [target for _, target in editor.requests] == ["Rome is in Italy", "Lima Sol"]


def test_every_engine_and_any_memory_for_recordings_give_the_same_training(
    make_model: MakeModel, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    requests = make_requests("completion")
    found: list[tuple[EditOutcome, dict[str, Tensor]]] = []
    for engine, memory in (("plain", None), ("exact", None), ("exact", 0)):
        model = make_model("completion")
        model.engine = make_engine(engine, model, memory_mb=memory)
        with FineTuneBreadthFirst(model=model, lr=3e-3, n_epochs=5, batch_size=2) as editor:
            outcome = editor.edit(batch_of(model, requests))
            found.append((outcome, weights(model)))
    for outcome, own in found[1:]:
        assert outcome.steps == found[0][0].steps
        assert outcome.loss == pytest.approx(found[0][0].loss, abs=1e-3)
        for name, tensor in found[0][1].items():
            torch.testing.assert_close(own[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize("option", [{"lr": 0.0}, {"n_epochs": 0}, {"batch_size": 0}, {"seed": -1}], ids=str)
def test_an_option_that_is_out_of_range_is_refused_by_name(option: dict[str, Any], make_model: MakeModel) -> None:
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=f"editor.{name}={value}"):
        FineTuneBreadthFirst(model=make_model("completion"), **option)
