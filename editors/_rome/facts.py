"""Requests as ROME's family reads them: a fact about a subject, asked in several contexts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from grace_bench.editors._prefixes import behind
from grace_bench.errors import EditFailure
from grace_bench.models.calls import ModuleCall
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, stack

FactToken = Literal["subject_last", "subject_first", "subject_first_after_last"]
_TOKENS_A_PASS = 2048


@dataclass(frozen=True)
class Fact:
    """A request in C contexts; every input is queried at the fact's token.

    Attributes:
        asked: (C, T) the prompt behind each context; the first context is empty.
        answered: (C, T) the same with the target as labels.
        essence: (1, T) "{subject} is a", whose continuation an edit should not change.
    """

    asked: EncodedBatch
    answered: EncodedBatch
    essence: EncodedBatch


def encode_fact(
    model: EditableModel,
    prompt: str,
    target: str | int,
    subject: str | None,
    *,
    contexts: Sequence[str],
    token: FactToken = "subject_last",
) -> Fact:
    """Encodes a request behind each of C contexts, right-padded.

    Raises:
        EditFailure: If the subject does not occur in the prompt, or was cut off.
    """
    if not subject or subject not in prompt:
        raise EditFailure(f"the subject {subject!r} does not occur in the prompt")
    prompts = behind(contexts, prompt)
    return Fact(
        asked=_encode_at(model, prompts, subject, token),
        answered=_encode_at(model, prompts, subject, token, [target] * len(prompts)),
        essence=_encode_at(model, [f"{subject} is a"], subject, token),
    )


def at_facts(model: EditableModel, path: str, facts: Sequence[Fact]) -> tuple[Tensor, Tensor]:
    """Reads a model at the token of each of N facts, in all C contexts.

    Args:
        model: The model.
        path: A layer that the edited one contains, or the edited one itself.
        facts: The facts.

    Returns:
        (N, C, D_in) what enters the layer at the path, and (N, C, D_out) what leaves the edited one; float64, on the
        CPU.
    """
    batches = [fact.asked for fact in facts]
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    entered = torch.empty(0)

    def observe(call: ModuleCall) -> Tensor:
        nonlocal entered
        query = batch.query.to(call.input.device)
        entered = call.input[torch.arange(len(query), device=query.device), query]
        return call.output

    interceptor = model.intercept_at(path, observe)
    try:
        for chunk in in_passes(batches):
            batch = stack([batches[index] for index in chunk])
            # A causal model's later positions do not matter.
            batch = batch.until(int(batch.query.max()) + 1)
            left = model.layer_call(batch).output_at_query
            sizes = [len(batches[index]) for index in chunk]
            entering += entered.cpu().double().split(sizes)
            leaving += left.cpu().double().split(sizes)
    finally:
        interceptor.remove()
    return torch.stack(entering), torch.stack(leaving)


def mean_keys(keys: Tensor) -> Tensor:
    """Returns the (N, D) key of each fact of (N, C, D): half of the bare prompt's, half of the mean of the others'."""
    if keys.shape[1] == 1:
        return keys[:, 0]
    return (keys[:, 0] + keys[:, 1:].mean(dim=1)) / 2


def in_passes(batches: Sequence[EncodedBatch]) -> list[range]:
    """Returns which consecutive batches fit into one pass together."""
    passes: list[range] = []
    start = 0
    for end in range(1, len(batches) + 1):
        chosen = batches[start : end + 1]
        n_tokens = sum(map(len, chosen)) * max(batch.n_positions for batch in chosen)
        if end == len(batches) or n_tokens > _TOKENS_A_PASS:
            passes.append(range(start, end))
            start = end
    return passes


def _encode_at(
    model: EditableModel,
    prompts: Sequence[str],
    subject: str,
    token: FactToken,
    targets: Sequence[str | int] | None = None,
) -> EncodedBatch:
    encoded = model.encode_batch(prompts, targets)
    tokens = model.tokens
    last = torch.tensor([len(ids) - 1 for ids in tokens.prompt_ids(prompts)])
    spans = torch.tensor([tokens.subject_span(prompt, subject) for prompt in prompts])
    positions = {
        "subject_last": spans[:, 1],
        "subject_first": spans[:, 0],
        "subject_first_after_last": torch.minimum(spans[:, 1] + 1, last),
    }[token]
    # Counted back from the prompt's last token, because truncation shifts the tokens before it.
    n_cut = (last - encoded.query.cpu()).clamp(min=0)
    first = torch.tensor([tokens.cut_between(prompt)[0] for prompt in prompts])
    if bool(((n_cut > 0) & (positions < first + n_cut)).any()):
        raise EditFailure(f"the prompt is too long: the subject {subject!r} was cut off")
    return replace(encoded, query=(positions - n_cut).to(encoded.query.device))
