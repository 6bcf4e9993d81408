"""Optimised values: together as alone, and with either engine."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.data.requests import EditRequest
from grace_bench.editors._rome.facts import Fact, encode_fact
from grace_bench.editors._rome.values import Optimisation, Value, optimise_values
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

CONTEXTS = ["", "the river Tiber of", "Paris"]
BLOCKS = {"gpt2": "transformer.h.0", "llama": "model.layers.0"}
each_family = pytest.mark.parametrize("family", list(BLOCKS))


def optimisation(**given: Any) -> Optimisation:
    settings = {"n_iter": 12, "lr": 0.3, "kl_weight": 0.0625, "weight_decay": 0.5, "clamp": 2.0}
    return Optimisation(**{**settings, **given})


def facts_of(model: EditableModel, requests: Sequence[EditRequest]) -> list[Fact]:
    return [encode_fact(model, r.prompt, r.target, r.subject, contexts=CONTEXTS) for r in requests]


def of_different_lengths(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The subject is somewhere in the middle of the second prompt, and the prompts differ in length."""
    first, second, third = requests[:3]
    longer = f"in {second.prompt} the river is"
    return [first, second.model_copy(update={"prompt": longer}), third.model_copy(update={"target": "Sol of the Euro"})]


@each_family
def test_a_value_is_what_plain_steps_of_adam_find(
    family: str, make_causal: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_causal(family, layer=BLOCKS[family])
    (request,) = of_different_lengths(make_requests("completion"))[1:2]
    settings = optimisation(n_iter=6)
    (value,) = optimise_values(model, facts_of(model, [request]), settings)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = model.encode_batch([text]).inputs["input_ids"][0].tolist()
        return ids

    prompts = [f"{context}. {request.prompt}" if context else request.prompt for context in CONTEXTS]
    upto = request.prompt.rindex(str(request.subject)) + len(str(request.subject))
    # The target in the bare prompt, as the task reads it.
    answered = model.encode_batch([request.prompt], [request.target])
    assert answered.labels is not None
    target = [label for label in answered.labels[0].tolist() if label != -100]
    rows = [(ids_of(prompt), len(ids_of(prompt[: len(prompt) - len(request.prompt) + upto])) - 1) for prompt in prompts]
    essence = ids_of(f"{request.subject} is a")
    place_of_essence = len(ids_of(str(request.subject))) - 1

    delta: Tensor | None = None
    initial = torch.empty(0)

    def run(ids: list[int], place: int) -> Tensor:
        def add(_: Any, args: Any, output: Any) -> Any:
            nonlocal delta, initial
            hidden = output[0] if isinstance(output, tuple) else output
            if delta is None:
                initial = hidden[0, place].detach().clone()
                delta = torch.zeros_like(initial, requires_grad=True)
            changed = hidden.clone()
            changed[0, place] = changed[0, place] + delta
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = model.layer.register_forward_hook(add)
        try:
            return model.module(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        finally:
            handle.remove()

    losses = []
    adam: Any = None
    unedited: Tensor | None = None
    for step in range(settings.n_iter):
        nll = []
        for ids, place in rows:
            found = run(ids + target[:-1], place)[len(ids) - 1 :]
            nll.append(-found.gather(1, torch.tensor(target)[:, None]).mean())
        now = run(essence, place_of_essence)[place_of_essence]
        unedited = now.detach() if unedited is None else unedited
        assert delta is not None
        kl = settings.kl_weight * functional.kl_div(unedited, now, log_target=True, reduction="sum")
        decay = settings.weight_decay * delta.norm() / initial.norm() ** 2
        total = torch.stack(nll).mean() + kl + decay
        losses.append([float(x.detach()) for x in (total, torch.stack(nll).mean(), kl, decay)])
        if losses[-1][0] < 0.05 or step == settings.n_iter - 1:
            break
        adam = adam or torch.optim.Adam([delta], lr=settings.lr)
        adam.zero_grad()
        total.backward()
        adam.step()
        with torch.no_grad():
            largest = settings.clamp * initial.norm()
            if delta.norm() > largest:
                delta.mul_(largest / delta.norm())

    assert delta is not None
    torch.testing.assert_close(torch.tensor(value.losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(value.initial, initial, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value.delta, delta.detach(), rtol=0, atol=1e-3)
    assert losses[-1][0] < losses[0][0]


@each_family
def test_values_of_facts_together_are_those_of_each_alone_with_either_engine(
    family: str, make_causal: MakeModel, make_requests: MakeRequests
) -> None:
    requests = of_different_lengths(make_requests("completion"))

    def found(engine: str, groups: Sequence[Sequence[EditRequest]]) -> list[Value]:
        model = make_causal(family, layer=BLOCKS[family], engine=engine)
        return [v for group in groups for v in optimise_values(model, facts_of(model, group), optimisation())]

    plain = found("plain", [[request] for request in requests])
    for values in (found("exact", [requests]), found("exact", [[r] for r in requests]), found("plain", [requests])):
        for ours, theirs in zip(values, plain, strict=True):
            assert len(ours.losses) == len(theirs.losses)
            torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours.delta, theirs.delta, rtol=0, atol=1e-3)
            torch.testing.assert_close(ours.optimised, theirs.optimised, rtol=0, atol=1e-3)


def test_a_fact_that_is_good_enough_stops_while_others_go_on(
    make_causal: MakeModel, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No value of so small a model reaches the published limit.
    monkeypatch.setattr("grace_bench.editors._rome.values._GOOD_ENOUGH", 2.0)
    requests = of_different_lengths(make_requests("completion"))
    model = make_causal(layer=BLOCKS["gpt2"])
    together = optimise_values(model, facts_of(model, requests), optimisation())
    alone = [optimise_values(model, facts_of(model, [request]), optimisation())[0] for request in requests]
    steps = [len(value.losses) for value in together]
    assert 1 < min(steps) < max(steps)
    assert steps == [len(value.losses) for value in alone]
    for value, own in zip(together, alone, strict=True):
        assert all(total >= 2.0 for total, *_ in value.losses[:-1])
        assert value.losses[-1][0] < 2.0 or len(value.losses) == 12
        torch.testing.assert_close(value.delta, own.delta, rtol=0, atol=1e-3)


def test_a_value_stays_within_the_clamp_and_one_pass_changes_nothing(
    make_causal: MakeModel, make_requests: MakeRequests
) -> None:
    requests, model = make_requests("completion")[:2], make_causal(layer=BLOCKS["gpt2"])
    for value in optimise_values(model, facts_of(model, requests), optimisation(clamp=0.125)):
        assert float(value.delta.norm()) == pytest.approx(0.125 * float(value.initial.norm()), rel=1e-4)
    for value in optimise_values(model, facts_of(model, requests), optimisation(n_iter=1)):
        assert len(value.losses) == 1
        assert not value.delta.any()


def test_optimising_changes_neither_weights_nor_gradients_nor_hooks(
    make_causal: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_causal(layer=BLOCKS["gpt2"])
    request = make_requests("completion")[0]
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    batch = model.encode_batch([request.prompt])
    with torch.no_grad():
        logits = model.logits(batch).clone()
    optimise_values(model, facts_of(model, [request]), optimisation(n_iter=3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    with torch.no_grad():
        assert torch.equal(model.logits(batch), logits)


@pytest.mark.filterwarnings("ignore:.*passes are computed from their start")
def test_a_loss_that_is_not_finite_is_a_failed_edit_and_leaves_no_hook(
    make_causal: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_causal(layer=BLOCKS["gpt2"])
    request = make_requests("completion")[0]
    bias = model.module.transformer.ln_f.bias
    bias.data[0] = torch.nan
    with pytest.raises(EditFailure, match=r"^the loss is nan after 0 steps$"):
        optimise_values(model, facts_of(model, [request]), optimisation())
    bias.data[0] = 0.0
    batch = model.encode_batch([request.prompt])
    with torch.no_grad():
        assert torch.equal(model.logits(batch), make_causal().logits(batch))
