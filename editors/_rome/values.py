"""The values that ROME's family writes (Meng et al. 2022, section 3.1; 2023, equation 16)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.editing.guard import check_loss
from grace_bench.editors._rome.facts import Fact, in_passes
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import IGNORED, EncodedBatch, stack

# Where the authors stop optimising a value.
_GOOD_ENOUGH = 5e-2


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How values are optimised.

    Attributes:
        n_iter: Maximum number of passes, each but the last followed by an Adam step.
        lr: Learning rate of Adam.
        kl_weight: Weight of KL(edited || unedited) of what follows the subject, which preserves its essence.
        weight_decay: Weight of |v* - v| / |v|².
        clamp: The largest |v* - v|, in units of |v|.
    """

    n_iter: int
    lr: float
    kl_weight: float
    weight_decay: float
    clamp: float


@dataclass(frozen=True)
class Value:
    """An optimised value.

    Attributes:
        entering: (C, D_in) what enters the layer at the fact's token in each context, the empty one first.
        leaving: (C, D_out) what leaves it there without the edit.
        delta: (D_out,) v* - v.
        losses: One row a pass: the total loss, and its parts: the target's negative log-likelihood, divergence, decay.
    """

    entering: Tensor
    leaving: Tensor
    delta: Tensor
    losses: list[tuple[float, float, float, float]]

    @property
    def initial(self) -> Tensor:
        """(D_out,) v, what the layer gives at the fact's token behind the empty context."""
        return self.leaving[0]

    @property
    def optimised(self) -> Tensor:
        """(D_out,) float64, v*."""
        return self.initial.double() + self.delta.double()


def optimise_values(model: EditableModel, facts: Sequence[Fact], optimisation: Optimisation) -> list[Value]:
    """Finds a value of the edited layer for each fact, each by itself, with the weights as they are.

    Raises:
        EditFailure: If a loss is not finite.
    """
    if not model.engine.batches_edits:
        return [value for fact in facts for value in _optimise(model, [fact], optimisation)]
    # Facts with equally many tokens behind the subject need the least padding.
    order = sorted(range(len(facts)), key=lambda index: _n_behind(facts[index].answered))
    values: dict[int, Value] = {}
    for chunk in in_passes([facts[index].answered for index in order]):
        chosen = [order[place] for place in chunk]
        values |= zip(chosen, _optimise(model, [facts[index] for index in chosen], optimisation), strict=True)
    return [values[index] for index in range(len(facts))]


def _n_behind(batch: EncodedBatch) -> int:
    """The most tokens of a row behind its query."""
    return int((batch.inputs["attention_mask"].sum(dim=1) - batch.query).max())


class _Shifted:
    """Shifts what the layer gives at the query of each row, by the delta of the fact that owns the row.

    Attributes:
        entering: (B, D_in) what entered the layer at the queries, and
        leaving: (B, D_out) what left it there without the shift, in the first pass of the optimisation.
        delta: (N, D_out) one row for each fact.
    """

    entering: Tensor
    leaving: Tensor
    delta: Tensor

    def __init__(self, owner: Tensor) -> None:
        self._owner = owner
        self._is_open = False

    def open(self) -> None:
        """Ends the preparation, in which the layer gives what is its own."""
        self._is_open = True

    def __call__(self, call: LayerCall) -> Tensor:
        if not self._is_open:
            return call.output
        if not hasattr(self, "delta"):
            self.entering, self.leaving = call.query.detach().float(), call.output_at_query.detach().float()
            n_facts = 1 + int(self._owner.max())
            self.delta = self.leaving.new_zeros(n_facts, self.leaving.shape[1]).requires_grad_()
        everywhere = torch.ones(len(call.position), dtype=torch.bool, device=call.output.device)
        return call.replace(call.output_at_query + self.delta[self._owner], everywhere, "replace_last")


def _optimise(model: EditableModel, facts: Sequence[Fact], optimisation: Optimisation) -> list[Value]:
    """Optimises the values of a few facts in the same passes; each has an Adam state of its own."""
    device = model.layer_device
    # In one pass the target behind each context, and what follows the subject's essence.
    answered = stack([fact.answered for fact in facts])
    batch = stack([replace(answered, content=None), *(_until_query(fact.essence) for fact in facts)]).aligned_at_query()
    n_rows = torch.tensor([len(fact.answered) for fact in facts])
    n_answered = len(answered)
    owner = torch.arange(len(facts)).repeat_interleave(n_rows)
    shifted = _Shifted(torch.cat([owner, torch.arange(len(facts))]).to(device))
    losses: list[list[tuple[float, float, float, float]]] = [[] for _ in facts]
    active = torch.ones(len(facts), dtype=torch.bool)
    unedited: Tensor | None = None
    adam: torch.optim.Adam | None = None
    handle = model.intercept(shifted)
    try:
        # Rows are aligned: nothing changes before the one position at which all are queried.
        repeated = model.repeated(batch, first_changed=int(batch.query[0]))
        labels = repeated.batch.labels
        assert labels is not None
        shifted.open()
        for step in range(optimisation.n_iter):
            logits = repeated()
            delta = shifted.delta
            if adam is None:
                adam = torch.optim.Adam([delta], lr=optimisation.lr)
                norms = shifted.leaving[(n_rows.cumsum(0) - n_rows).to(device)].norm(dim=1)
                largest = optimisation.clamp * norms
            nll = _means(_row_losses(logits[:n_answered], labels[:n_answered]), owner, len(facts))
            now = _at_labels(logits[n_answered:], labels[n_answered:]).log_softmax(dim=-1)
            unedited = now.detach() if unedited is None else unedited
            drift = functional.kl_div(unedited, now, log_target=True, reduction="none").sum(dim=-1)
            decay = optimisation.weight_decay * (delta.norm(dim=1) / norms**2).to(nll.device)
            kl = optimisation.kl_weight * drift
            total = nll + kl + decay
            columns = torch.stack([total, nll, kl, decay], dim=1).detach().cpu().tolist()
            for index in active.nonzero()[:, 0].tolist():
                losses[index].append(tuple(columns[index]))
                check_loss(columns[index][1], step)
            active &= total.detach().cpu() >= _GOOD_ENOUGH
            if step == optimisation.n_iter - 1 or not bool(active.any()):
                break
            adam.zero_grad()
            total.sum().backward()
            before = delta.detach().clone()
            adam.step()
            with torch.no_grad():
                moved = delta * (largest / delta.norm(dim=1)).clamp(max=1.0)[:, None]
                delta.copy_(torch.where(active.to(device)[:, None], moved, before))
    finally:
        handle.remove()
    sizes = n_rows.tolist()
    entering, leaving = (rows[:n_answered].cpu().split(sizes) for rows in (shifted.entering, shifted.leaving))
    found = zip(entering, leaving, shifted.delta.detach().cpu(), losses, strict=True)
    return [Value(*value) for value in found]


def _until_query(essence: EncodedBatch) -> EncodedBatch:
    """One row up to its query, with a label there, so that the engine computes the logits there."""
    asked = essence.until(int(essence.query[0]) + 1)
    ids = asked.inputs["input_ids"]
    return replace(asked, labels=functional.pad(ids[:, -1:], (ids.shape[1] - 1, 0), value=IGNORED))


def _at_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, V) float32 logits at the one labelled position of each row."""
    return logits[labels != IGNORED].float()


def _row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean negative log-likelihood of each row's labels."""
    flat = functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view(labels.shape).sum(dim=1) / (labels != IGNORED).sum(dim=1)


def _means(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """(n,) means of the values of each owner."""
    owner = owner.to(values.device)
    return values.new_zeros(n).index_add(0, owner, values) / owner.bincount(minlength=n)
