"""Fine-tuning against a plain torch loop over Hugging Face's own loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from grace_bench.data.requests import EditRequest
from grace_bench.editors.ft import FineTune
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

TASKS = ("classification", "qa", "completion", "language_modelling")
each_task = pytest.mark.parametrize("task", TASKS)


@dataclass(frozen=True)
class Loop:
    """What the plain loop did for one request."""

    steps: int
    first_loss: float
    last_loss: float


def inputs_of(model: EditableModel, request: EditRequest) -> dict[str, Tensor]:
    """A request as Hugging Face models take it, tokenised word by word."""
    tokenizer, task = model.tokenizer, model.task.name

    def ids(text: Any) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(f"▁{word}") for word in str(text).split()]

    end = tokenizer.eos_token_id
    if task == "classification":
        return {"input_ids": torch.tensor([[*ids(request.prompt), end]]), "labels": torch.tensor([request.target])}
    if task == "qa":
        return {
            "input_ids": torch.tensor([[*ids(request.prompt), end]]),
            "labels": torch.tensor([[*ids(request.target), end]]),
        }
    prompt, target = ids(request.prompt), [*ids(request.target), *([end] if task == "completion" else [])]
    return {
        "input_ids": torch.tensor([[*prompt, *target]]),
        "labels": torch.tensor([[*(-100 for _ in prompt), *target]]),
    }


def is_answered(output: Any, labels: Tensor, task: str) -> bool:
    chosen = output.logits.argmax(dim=-1)
    if task in ("completion", "language_modelling"):
        chosen, labels = chosen[:, :-1], labels[:, 1:]
    return bool(((chosen == labels) | (labels == -100)).all())


def plain_loop(module: nn.Module, layer: str, inputs: dict[str, Tensor], task: str, *, n_iter: int, lr: float) -> Loop:
    parameters = list(module.get_submodule(layer).parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    steps = 0
    while steps < n_iter:
        output = module(**inputs)
        losses.append(output.loss.item())
        if is_answered(output, inputs["labels"], task):
            break
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        steps += 1
    return Loop(steps, losses[0], losses[-1])


def answers(model: EditableModel, request: EditRequest) -> bool:
    inputs = inputs_of(model, request)
    with torch.no_grad():
        return is_answered(model.module(**inputs), inputs["labels"], model.task.name)


def weights_of(model: EditableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def changed(model: EditableModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, before[name])}


@contextmanager
def counting_steps() -> Iterator[list[int]]:
    """Counts every step that any torch optimizer takes inside the context."""
    counted = [0]

    def count(*_: Any) -> None:
        counted[0] += 1

    handle = register_optimizer_step_post_hook(count)
    try:
        yield counted
    finally:
        handle.remove()


@each_task
def test_it_does_what_a_plain_loop_does(task: str, make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, requests = make_model(task), make_requests(task)[:3]
    reference = deepcopy(model.module)
    with FineTune(model=model, n_iter=60, lr=3e-3) as editor:
        for request in requests:
            expected = plain_loop(reference, model.layer_name, inputs_of(model, request), task, n_iter=60, lr=3e-3)
            outcome = editor.edit_text(request.prompt, request.target)
            assert outcome.steps == expected.steps
            assert outcome.loss_first == pytest.approx(expected.first_loss, abs=1e-4)
            assert outcome.loss == pytest.approx(expected.last_loss, abs=1e-4)
        for name, tensor in model.layer.state_dict().items():
            # The loop computes every pass whole; with a pruned tail sixty steps of Adam may round apart by this much.
            torch.testing.assert_close(
                tensor, reference.get_submodule(model.layer_name).state_dict()[name], rtol=0, atol=1e-3
            )
        assert expected.steps > 0


@each_task
def test_it_stops_at_the_first_step_after_which_the_request_is_answered(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    request = make_requests(task)[0]
    model = make_model(task)
    assert not answers(model, request)
    with FineTune(model=model, n_iter=200, lr=3e-3) as editor:
        steps = editor.edit_text(request.prompt, request.target).steps
        assert 1 < steps < 200
        assert answers(model, request)
    with FineTune(model=model, n_iter=steps - 1, lr=3e-3) as editor:
        assert editor.edit_text(request.prompt, request.target).steps == steps - 1
        assert not answers(model, request)


@each_task
def test_a_request_that_is_answered_already_takes_no_step_and_changes_nothing(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model(task), make_requests(task)[0]
    with FineTune(model=model, n_iter=200) as editor:
        editor.edit_text(request.prompt, request.target)
        before = weights_of(model)
        outcome = editor.edit_text(request.prompt, request.target)
        assert outcome.steps == 0
        assert outcome.loss == outcome.loss_first
        assert not changed(model, before)


@each_task
@pytest.mark.parametrize(("n_iter", "lr"), [(1, 1e-2), (7, 1e-9), (200, 3e-3)])
def test_the_steps_recorded_are_the_steps_taken(
    task: str, n_iter: int, lr: float, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model(task)
    with FineTune(model=model, n_iter=n_iter, lr=lr) as editor:
        for request in make_requests(task)[:3]:
            was_answered = answers(model, request)
            with counting_steps() as counted:
                outcome = editor.edit_text(request.prompt, request.target)
            assert outcome.steps == counted[0] <= n_iter
            assert (outcome.steps == 0) == was_answered
            if not answers(model, request):
                assert outcome.steps == n_iter


@each_task
def test_only_the_layers_own_parameters_change_and_all_of_them_are_frozen_again(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model(task)
    before = weights_of(model)
    own = {f"{model.layer_name}.{name}" for name, _ in model.layer.named_parameters()}
    with FineTune(model=model) as editor:
        for request in make_requests(task)[:3]:
            editor.edit_text(request.prompt, request.target)
        assert changed(model, before) == own
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.grad is None for parameter in model.parameters())


@each_task
@pytest.mark.parametrize("n_edits", [1, 4])
def test_rollback_is_exact(task: str, n_edits: int, make_model: MakeModel, make_requests: MakeRequests) -> None:
    model = make_model(task)
    before = weights_of(model)
    with FineTune(model=model) as editor:
        for request in make_requests(task)[:n_edits]:
            editor.edit_text(request.prompt, request.target)
        assert changed(model, before)
        editor.rollback()
        assert not changed(model, before)
        assert editor.n_edits == 0


@pytest.mark.parametrize(
    "option", [{"n_iter": 0}, {"n_iter": -1}, {"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}], ids=str
)
def test_an_option_that_is_out_of_range_is_refused_by_name(option: dict[str, Any], make_model: MakeModel) -> None:
    ((name, value),) = option.items()
    with pytest.raises(UserError, match=f"editor.{name}={value}"):
        FineTune(model=make_model("classification"), **option)


# --- the objectives of other papers


def last_token_loop(module: nn.Module, layer: str, prompt: Tensor, target: Tensor, *, n_iter: int, lr: float) -> Loop:
    """FT-L: every token of the target at the prompt's last position, until their mean loss is below 0.01."""
    parameters = list(module.get_submodule(layer).parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=lr)
    losses: list[float] = []
    steps = 0
    for _ in range(n_iter):
        logits = module(input_ids=prompt[None]).logits[0, -1]
        loss = (logits.logsumexp(dim=-1) - logits[target]).mean()
        losses.append(loss.item())
        if losses[-1] < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return Loop(steps, losses[0], losses[-1])


@pytest.mark.parametrize("target", ["Lima", "Lima Peru Rome"])
def test_last_token_does_what_a_plain_loop_over_the_prompt_does(
    target: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model("completion"), make_requests("completion")[0]
    reference = deepcopy(model.module)
    ids = model.tokenizer.convert_tokens_to_ids([f"▁{word}" for word in f"{request.prompt} {target}".split()])
    n_target = len(target.split())
    prompt, wanted = torch.tensor(ids[:-n_target]), torch.tensor(ids[-n_target:])
    expected = last_token_loop(reference, model.layer_name, prompt, wanted, n_iter=40, lr=3e-3)
    with FineTune(model=model, n_iter=40, lr=3e-3, objective="last_token") as editor:
        outcome = editor.edit_text(request.prompt, target)
        assert (outcome.steps, outcome.steps == 40) == (expected.steps, n_target > 1)
        assert outcome.loss_first == pytest.approx(expected.first_loss, abs=1e-4)
        assert outcome.loss == pytest.approx(expected.last_loss, abs=1e-4)
        for name, tensor in model.layer.state_dict().items():
            own = reference.get_submodule(model.layer_name).state_dict()[name]
            torch.testing.assert_close(tensor, own, rtol=0, atol=1e-3)


def test_last_token_is_the_first_position_of_a_decoder_and_the_class_of_a_classifier(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    request = make_requests("qa")[0]
    model = make_model("qa")
    ids = inputs_of(model, request)
    with torch.no_grad():
        start = torch.tensor([[model.decoder_start]])
        logits = model.module(input_ids=ids["input_ids"], decoder_input_ids=start).logits[0, 0]
    with FineTune(model=model, n_iter=5, objective="last_token") as editor:
        outcome = editor.edit_text(request.prompt, request.target)
    assert outcome.loss_first == pytest.approx(
        float((logits.logsumexp(0) - logits[ids["labels"][0, :-1]]).mean()), abs=1e-4
    )
    request = make_requests("classification")[0]
    steps = []
    for objective in ("target", "last_token"):
        with FineTune(model=make_model("classification"), objective=objective) as editor:
            steps.append(editor.edit_text(request.prompt, request.target))
    assert steps[0] == steps[1]


def test_an_empty_prompt_has_no_last_token(make_model: MakeModel) -> None:
    with (
        FineTune(model=make_model("language_modelling"), objective="last_token") as editor,
        pytest.raises(EditFailure, match="the prompt is empty"),
    ):
        editor.edit_text("", "the river of Italy is Tiber")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_leaves_the_bound_around_what_it_was_before_the_edit(
    dtype: torch.dtype, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, bound = make_model("completion", dtype=dtype), 2e-3
    with FineTune(model=model, n_iter=20, lr=1e-3, norm_constraint=bound) as editor:
        for request in make_requests("completion")[:2]:
            before = weights_of(model)
            assert editor.edit_text(request.prompt, request.target).steps > 2
            for name in changed(model, before):
                moved = (model.module.state_dict()[name].float() - before[name].float()).abs()
                rounding = torch.finfo(dtype).eps * (before[name].float().abs() + bound) + 1e-7
                assert bool((moved <= bound + rounding).all())
                if dtype is torch.float32:
                    assert float(moved.max()) == pytest.approx(bound, rel=1e-3)


def test_a_request_is_trained_bare_and_behind_each_prefix(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, request = make_model("completion"), make_requests("completion")[0]
    options = {"n_iter": 30, "lr": 3e-3, "n_prefixes": 2, "prefix_lengths": [3, 5]}
    with FineTune(model=model, **options) as editor:
        with pytest.raises(UserError, match=r"editor 'ft' must be made ready .* prepare"):
            editor.edit_text(request.prompt, request.target)
        editor.prepare([])
        assert [bool(context) for context in editor.contexts] == [False, True, True, True, True]
        prompts = [f"{context}. {request.prompt}" if context else request.prompt for context in editor.contexts]
        losses = []
        for prompt in prompts:
            encoded = model.encode_batch([prompt], [request.target])
            with torch.no_grad():
                losses.append(float(model.task.loss(model.logits(encoded), encoded)))
        outcome = editor.edit_text(request.prompt, request.target)
        assert outcome.loss_first == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        # It stops when every row is answered.
        assert outcome.steps < 30
        assert answers(model, request)
        with FineTune(model=make_model("completion"), **options) as other:
            other.load_state_dict(editor.state_dict())
            assert other.contexts == editor.contexts


@pytest.mark.parametrize(
    ("task", "option", "message"),
    [
        ("completion", {"objective": "first"}, "editor.objective=first"),
        ("completion", {"norm_constraint": 0.0}, "editor.norm_constraint=0.0"),
        ("completion", {"n_prefixes": -1}, "editor.n_prefixes=-1"),
        ("completion", {"prefix_lengths": [0]}, "editor.prefix_lengths=0"),
        ("qa", {"n_prefixes": 1}, "editor.n_prefixes=1 is for completion and language_modelling, not for qa"),
    ],
    ids=str,
)
def test_an_option_of_an_objective_that_does_not_fit_is_refused_by_name(
    task: str, option: dict[str, Any], message: str, make_model: MakeModel
) -> None:
    with pytest.raises(UserError, match=message):
        FineTune(model=make_model(task), **option)
