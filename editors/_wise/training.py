"""Training a side memory on one edit (Wang et al. 2024, section 2.3.1)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.editing.guard import check_loss
from grace_bench.editors._wise.memory import SideMemories, mean_at
from grace_bench.editors._wise.rows import EditRows
from grace_bench.models.calls import LayerCall
from grace_bench.models.encoding import IGNORED, EncodedBatch

_WEIGHT_DECAY = 1e-5
_FIRST = 1e9
"""The loss before the first step, so that training does not stop there."""
_SETTLED = 1e-4, 0.02
"""Training stops when the loss changed by at most the first between two steps, and is at most the second."""
_REPLAYED_BELOW, _REPLAYED_ABOVE = 5.0, 20.0
"""Bounds of the activation of replayed edits of finished memories and of the present one (appendix B.3)."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How a side memory is trained; the fields are options of `Wise`."""

    edit_lr: float
    n_iter: int
    act_margin: Sequence[float]
    norm_constraint: float | None


@dataclass
class Trained:
    """The result of a training.

    Attributes:
        weight: The trained weight.
        activation: The activation of the edit with that weight; in the authors' code before the last update.
        losses: A row for each update: the total, the loss of the target, the activation loss, and with replay its two
            terms.
        after: The loss of the target after the last update.
    """

    weight: Tensor
    activation: float = 0.0
    losses: list[tuple[float, ...]] = field(default_factory=list)
    after: float = 0.0


class MemoryTraining:
    """Gradient descent on the masked entries of a side memory.

    Only the layer is computed with the trained weight: all that lies before it is recorded once, and the irrelevant
    prompt is read no farther.

    Args:
        memories: The memories.
        descent: The settings.
        mask: The entries to train, bool, in the shape of the weight.
        replayed: Called in every step; returns the edits to replay: of finished memories, and of the present one.
    """

    def __init__(
        self,
        memories: SideMemories,
        descent: Descent,
        mask: Tensor,
        *,
        replayed: Callable[[], tuple[Sequence[EditRows], Sequence[EditRows]]] | None = None,
    ) -> None:
        self._memories = memories
        self._descent = descent
        self._mask = mask
        self._replayed = replayed
        self._is_reference = memories.sharding.fidelity == "reference"
        self._weight = memories.begin().requires_grad_()
        self._own: Tensor | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def answer(self, call: LayerCall) -> Tensor:
        """Returns the layer's output with the trained weight."""
        memories = self._memories
        leaving = memories.output(call.input, self._weight)
        if self._own is None:
            # Every pass reads the same rows, and what enters the layer never changes.
            self._own = memories.own(call.input)
        self._seen = memories.activations(leaving, self._own), memories.positions(call)
        return leaving.to(call.output.dtype)

    def run(self, rows: EditRows) -> Trained:
        """Trains on one edit.

        Raises:
            EditFailure: If a loss is not finite.
        """
        descent, model = self._descent, self._memories.model
        repeated = model.repeated(rows.batch)
        outside = None if rows.irrelevant is None else self._entering(rows.irrelevant)
        trained = Trained(self._weight)
        before, last = 0.0, _FIRST
        for step in range(descent.n_iter):
            target_loss = self._target_loss(repeated(), repeated.batch)
            activations, positions = self._activations()
            inside = mean_at(activations, positions if rows.inside is None else rows.inside)
            if outside is not None:
                beyond = self._activation_of(*outside)
            else:
                assert rows.outside is not None
                beyond = mean_at(activations, rows.outside)
            margin = margin_loss(inside, beyond, descent.act_margin)
            is_settled = abs(last - before) <= _SETTLED[0] and last <= _SETTLED[1]
            trained.activation = float(mean_at(activations, positions)[: len(inside)].mean().detach())
            if is_settled:
                break
            replay = self._replay_losses()
            loss = target_loss + margin + sum(replay)
            trained.losses.append(tuple(float(part.detach()) for part in (loss, target_loss, margin, *replay)))
            check_loss(trained.losses[-1][0], step)
            self._step(loss)
            before, last = last, trained.losses[-1][0]
        with torch.no_grad():
            trained.after = float(self._target_loss(repeated(), repeated.batch))
            if not self._is_reference:
                trained.activation = float(mean_at(*self._activations()).mean())
        check_loss(trained.after, len(trained.losses))
        trained.weight = self._weight.detach()
        return trained

    def _step(self, loss: Tensor) -> None:
        """Takes one step of SGD on the masked entries, and keeps the weight near the layer's own."""
        (gradient,) = torch.autograd.grad(loss, [self._weight])
        descent = self._descent
        with torch.no_grad():
            if self._is_reference:
                # The authors' decay shrinks the entries outside the mask as well.
                gradient = (gradient * self._mask).add(self._weight, alpha=_WEIGHT_DECAY)
            else:
                gradient = gradient.add(self._weight, alpha=_WEIGHT_DECAY) * self._mask
            self._weight.add_(gradient, alpha=-descent.edit_lr)
            if descent.norm_constraint is not None:
                original = self._memories.original
                low, high = original - descent.norm_constraint, original + descent.norm_constraint
                self._weight.clamp_(low, high)

    def _target_loss(self, logits: Tensor, batch: EncodedBatch) -> Tensor:
        """The mean over rows of the cross-entropy of their targets."""
        if not self._is_reference:
            return self._memories.model.task.row_losses(logits, batch).mean()
        assert batch.labels is not None
        # The authors' mean counts the position before the target's first token.
        n_counted = ((batch.labels != IGNORED).sum(dim=1) + 1).clamp(max=batch.n_positions - 1)
        losses = functional.cross_entropy(
            logits.float().flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(batch.labels)
        return (losses.sum(dim=1) / n_counted)[n_counted > 1].mean()

    def _activations(self) -> tuple[Tensor, Tensor]:
        """The activations of the last pass, and the positions that count."""
        assert self._seen is not None
        return self._seen

    def _entering(self, batch: EncodedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What enters the layer when a batch is read, what leaves it then, and the positions that count."""
        with self._memories.model.bypassing():
            call = self._memories.model.layer_call(batch)
        return call.input, self._memories.own(call.input), self._memories.positions(call)

    def _activation_of(self, entering: Tensor, own: Tensor, positions: Tensor) -> Tensor:
        """The activation of each row."""
        leaving = self._memories.output(entering, self._weight)
        return mean_at(self._memories.activations(leaving, own), positions)

    def _replayed_activation(self, rows: EditRows) -> Tensor:
        """The activation of each row of a request."""
        activation = self._activation_of(*self._entering(rows.batch))
        return activation if rows.outside is None else activation[:-1]

    def _replay_losses(self) -> tuple[Tensor, ...]:
        """What keeps replayed edits of finished memories below a bound, and those of the present one above another."""
        if self._replayed is None:
            return ()
        finished, present = ([self._replayed_activation(rows) for rows in some] for some in self._replayed())
        if not finished:
            return ()
        negative = torch.stack([positive_mean(activation - _REPLAYED_BELOW) for activation in finished]).mean()
        positive = torch.stack([positive_mean(_REPLAYED_ABOVE - activation) for activation in present]).mean()
        return negative, positive


def margin_loss(inside: Tensor, outside: Tensor, margin: Sequence[float]) -> Tensor:
    """Returns the activation loss of an edit (Wang et al. 2024, equation 5).

    Args:
        inside: (C,) activations of the edit.
        outside: (K,) activations of what the edit should leave alone.
        margin: The largest activation outside α, the smallest inside β, and the smallest difference γ.
    """
    alpha, beta, gamma = margin
    pairs = outside[:, None] - inside[None, :] + gamma
    return positive_mean(pairs) + positive_mean(outside - alpha) + positive_mean(beta - inside)


def positive_mean(values: Tensor) -> Tensor:
    """Returns the mean of the positive values; 0 without any.

    >>> positive_mean(torch.tensor([3.0, -5.0, 1.0]))
    tensor(2.)
    """
    positive = values > 0
    return torch.where(positive, values, 0.0).sum() / positive.sum().clamp(min=1)
