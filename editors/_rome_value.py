"""The value that ROME writes: optimised at the subject's last token (Meng et al. 2022, section 3.1)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.editing.guard import check_loss
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import EncodedBatch

# Where the authors stop optimising a value.
_GOOD_ENOUGH = 5e-2


def encode_at_subject(
    model: EditableModel, prompts: Sequence[str], subject: str, targets: Sequence[str | int] | None = None
) -> EncodedBatch:
    """Encodes prompts with the query at the subject's last token rather than the prompt's.

    Raises:
        EditFailure: If the subject was cut off.
    """
    encoded = model.encode_batch(prompts, targets)
    positions = torch.tensor([model.tokens.subject_position(prompt, subject) for prompt in prompts])
    last = torch.tensor([len(ids) - 1 for ids in model.tokens.prompt_ids(prompts)])
    # Counted back from the prompt's last token, because truncation shifts the tokens before it.
    n_cut = (last - encoded.query.cpu()).clamp(min=0)
    first = torch.tensor([model.tokens.cut_between(prompt)[0] for prompt in prompts])
    if bool(((n_cut > 0) & (positions < first + n_cut)).any()):
        raise EditFailure(f"the prompt is too long: the subject {subject!r} was cut off")
    return replace(encoded, query=(positions - n_cut).to(encoded.query.device))


def optimise_value(
    model: EditableModel,
    batch: EncodedBatch,
    described: EncodedBatch,
    value: Tensor,
    *,
    n_iter: int,
    lr: float,
    kl_weight: float,
    weight_decay: float,
    clamp: float,
) -> tuple[Tensor, list[float], int]:
    """Finds v* - v (section 3.1, equation 4).

    Args:
        model: The model.
        batch: The prompts with their target, queried at the subject.
        described: "{subject} is a", queried at the subject.
        value: (D_out,) v, the layer's output at the subject.
        n_iter, lr, kl_weight, weight_decay, clamp: As in `Rome`.

    Returns:
        (D_out,) v* - v, the loss of the target at every step, and the number of steps.

    Raises:
        EditFailure: If a loss is not finite.
    """
    delta = torch.zeros_like(value, requires_grad=True)
    largest = clamp * value.norm()

    def add(call: LayerCall) -> Tensor:
        rows = torch.ones(len(call.position), dtype=torch.bool, device=call.position.device)
        return call.replace(call.output_at_query + delta, rows, "replace_last")

    losses: list[float] = []
    steps = 0
    optimizer = torch.optim.Adam([delta], lr=lr)
    handle = model.intercept(add)
    try:
        repeated, describe = model.repeated(batch), model.repeated(described)
        unedited: Tensor | None = None
        for _ in range(n_iter):
            loss = model.task.loss(repeated(), repeated.batch)
            essence = describe()[:, -1].float().log_softmax(dim=-1)
            unedited = essence.detach() if unedited is None else unedited
            drift = functional.kl_div(unedited, essence, log_target=True, reduction="sum")
            decay = (delta.norm() / value.norm() ** 2).to(loss.device)
            total = loss + kl_weight * drift + weight_decay * decay
            losses.append(float(loss.detach()))
            check_loss(losses[-1], steps)
            if float(total.detach()) < _GOOD_ENOUGH:
                break
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            steps += 1
            with torch.no_grad():
                delta.mul_((largest / delta.norm()).clamp(max=1.0))
    finally:
        handle.remove()
    return delta.detach(), losses, steps
