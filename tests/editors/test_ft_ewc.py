"""EWC: the Fisher information against autograd sample by sample, the penalty against the formula."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.data.requests import EditRequest
from grace_bench.editors.ft import FineTune
from grace_bench.editors.ft_ewc import FineTuneEwc
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

each_task = pytest.mark.parametrize("task", ["classification", "qa", "completion", "language_modelling"])


def squared_gradients(model: EditableModel, request: EditRequest) -> list[Tensor]:
    """The squared gradient of the target's log-likelihood, its tokens' log-probabilities added up by hand."""
    batch = model.encode_batch([request.prompt], [request.target])
    parameters = list(model.layer.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    assert batch.labels is not None
    log_probabilities = functional.log_softmax(model.logits(batch).double(), dim=-1).reshape(-1, model_width(model))
    total = sum(
        log_probabilities[position, label]
        for position, label in enumerate(batch.labels.flatten().tolist())
        if label != -100
    )
    assert isinstance(total, Tensor)
    gradients = torch.autograd.grad(total, parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return [gradient**2 for gradient in gradients]


def model_width(model: EditableModel) -> int:
    return int(model.config.num_labels if model.task.name == "classification" else model.config.vocab_size)


@each_task
def test_the_fisher_information_is_the_mean_squared_gradient_of_each_sample(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)[:3]
    editor = FineTuneEwc(model=model)
    fisher = editor.fisher([model.encode_batch([r.prompt], [r.target]) for r in requests])
    samples = [squared_gradients(model, request) for request in requests]
    expected = [torch.stack(tensors).mean(dim=0) for tensors in zip(*samples, strict=True)]
    assert sum(float(tensor.sum()) for tensor in expected) > 0
    for ours, theirs in zip(fisher, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-9)


def test_before_the_first_edit_there_is_nothing_to_hold_on_to(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    editor = FineTuneEwc(model=make_model("qa"), ewc_lambda=1e6)
    assert editor.penalty(list(editor.model.layer.parameters())) == 0.0
    plain, request = FineTune(model=make_model("qa")), make_requests("qa")[0]
    assert editor.edit_text(request.prompt, request.target) == plain.edit_text(request.prompt, request.target)


def test_the_penalty_is_half_lambda_times_fisher_times_the_squared_distance_to_the_last_edits_weights(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model("completion"), make_requests("completion")[0]
    editor = FineTuneEwc(model=model, ewc_lambda=3.0)
    editor.edit_text(request.prompt, request.target)
    anchor = [parameter.clone() for parameter in model.layer.parameters()]
    assert float(editor.penalty(anchor)) == 0.0
    moved = [parameter + 0.5 for parameter in anchor]
    fisher = editor.fisher([model.encode_batch([request.prompt], [request.target])])
    expected = 1.5 * sum(float((tensor * 0.25).sum()) for tensor in fisher)
    assert float(editor.penalty(moved)) == pytest.approx(expected, rel=1e-4)


def test_a_strong_penalty_holds_later_edits_near_the_earlier_ones(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    first, second = make_requests("completion")[:2]
    distances = []
    for ewc_lambda in (1e-3, 1e6):
        model = make_model("completion")
        editor = FineTuneEwc(model=model, ewc_lambda=ewc_lambda, n_iter=20, lr=3e-3)
        editor.edit_text(first.prompt, first.target)
        (fisher, *_), before = editor.fisher([model.encode_batch([first.prompt], [first.target])]), weight(model)
        editor.edit_text(second.prompt, second.target)
        distances.append(float((fisher * (weight(model) - before) ** 2).sum()))
    assert distances[1] < distances[0] / 2


def weight(model: EditableModel) -> Tensor:
    return next(model.layer.parameters()).detach().clone()


def test_only_the_last_edits_count(make_model: MakeModel, make_requests: MakeRequests) -> None:
    requests = make_requests("qa")[:3]
    editor = FineTuneEwc(model=make_model("qa"), n_samples=2)
    for request in requests:
        editor.edit_text(request.prompt, request.target)
    assert editor.state_dict()["recent"] == [[r.prompt, r.target] for r in requests[1:]]


def test_answering_needs_the_layers_weights_only(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, request = make_model("qa"), make_requests("qa")[0]
    editor = FineTuneEwc(model=model)
    editor.edit_text(request.prompt, request.target)
    assert set(editor.answering_state()) == {"n_edits", f"weights.{model.layer_name}.weight"}
    assert {"fisher.0", "anchor.0", "recent"} <= set(editor.state_dict())


@pytest.mark.parametrize(("option", "value"), [("ewc_lambda", 0), ("ewc_lambda", -1.0), ("n_samples", 0)])
def test_an_option_out_of_range_is_named(option: str, value: float, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"editor\.{option}={value}"):
        FineTuneEwc(model=make_model("qa"), **{option: value})  # type: ignore[arg-type]
