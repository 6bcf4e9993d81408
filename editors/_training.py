"""The training loop of editors that optimise parameters on each edit."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from grace_bench.editing.batch import EditOutcome
from grace_bench.editing.guard import check_loss
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch
from grace_bench.models.engine.engine import Repeated


def check_trainable(model: EditableModel) -> None:
    """Raises `UserError` if the edited layer has no weights."""
    if not any(True for _ in model.layer.parameters()):
        raise UserError(f"layer={model.layer_name} has no weights to fine-tune")


def repeated_passes(model: EditableModel, batches: Iterable[EncodedBatch]) -> Iterator[Repeated]:
    """Prepares many runs of each batch, from the layer on while recordings fit into memory."""
    n_bytes, records = 0, True
    for batch in batches:
        repeated = model.repeated(batch, records=records)
        n_bytes += repeated.n_bytes
        if n_bytes > model.engine.most_kept_bytes:
            n_bytes, records = 0, False
            repeated = model.repeated(batch, records=False)
        yield repeated


class EditTraining:
    """Training on one edit, until the model answers it or for `n_iter` steps.

    Args:
        model: The model, whose answers depend on the trained parameters.
        encoded: The edit.
        n_iter: Maximum number of steps.
        stops_when_answered: Whether to stop once the model gives the target.
        stops_below: A loss below which to stop.
        loss: Takes the logits and the batch that they belong to; None for the task's loss.
    """

    def __init__(
        self,
        model: EditableModel,
        encoded: EncodedBatch,
        *,
        n_iter: int,
        stops_when_answered: bool = True,
        stops_below: float | None = None,
        loss: Callable[[Tensor, EncodedBatch], Tensor] | None = None,
    ) -> None:
        self._task = model.task
        self._loss = loss or model.task.loss
        self._repeated = model.repeated(encoded)
        self._n_iter = n_iter
        self._stops_when_answered = stops_when_answered
        self._stops_below = stops_below
        self._losses: list[float] = []
        self._n_steps = 0

    def run(self, descend: Callable[[Tensor], None]) -> None:
        """Trains.

        Args:
            descend: Takes one step down a loss.

        Raises:
            EditFailure: If a loss is not finite.
        """
        for _ in range(self._n_iter):
            logits = self._repeated()
            loss = self._loss(logits, self._repeated.batch)
            self._losses.append(float(loss.detach()))
            check_loss(self._losses[-1], self._n_steps)
            if self._is_done(logits):
                break
            descend(loss)
            self._n_steps += 1

    def _is_done(self, logits: Tensor) -> bool:
        if self._stops_below is not None and self._losses[-1] < self._stops_below:
            return True
        return self._stops_when_answered and self._task.answered(logits, self._repeated.batch)

    @torch.no_grad()
    def outcome(self) -> EditOutcome:
        """Returns the losses of the training, and the loss of the model as it answers now.

        Raises:
            EditFailure: If the latter is not finite.
        """
        after = self._losses[-1]
        if self._n_steps == self._n_iter:
            after = float(self._loss(self._repeated(), self._repeated.batch))
        check_loss(after, self._n_steps)
        return EditOutcome(loss_first=self._losses[0], loss=self._losses[-1], loss_after=after, steps=self._n_steps)
