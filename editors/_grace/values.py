"""Training of codebook values: one at a time, or independent ones together."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grace_bench.editing.guard import loss_failure, size_failure
from grace_bench.editors._grace.codebook import Codebook
from grace_bench.models.editable import EditableModel, LayerCall, Replacement
from grace_bench.models.encoding import EncodedBatch


@dataclass(frozen=True)
class _Trained:
    """The values in training, the values that answer the other rows, and which rows are answered at all."""

    values: Tensor
    others: Tensor
    is_own: Tensor
    is_answered: Tensor


@dataclass(frozen=True)
class Training:
    """The training of one value.

    Attributes:
        losses: The loss at every step.
        failed: Why the value was left as it was; None if it was trained.
    """

    losses: Sequence[float]
    failed: str | None


class ValueTraining:
    """Trains values of a codebook on the answers of the model with them in place (GRACE, section 3.2, Equation 3).

    Args:
        model: The model to edit.
        codebook: Its entries.
        n_iter: Steps of Adam.
        lr: Its learning rate.
        replacement: The positions that a value overwrites.
    """

    def __init__(
        self, model: EditableModel, codebook: Codebook, *, n_iter: int, lr: float, replacement: Replacement
    ) -> None:
        self._model = model
        self._codebook = codebook
        self._n_iter = n_iter
        self._lr = lr
        self._replacement: Replacement = replacement
        self._trained: _Trained | None = None

    @property
    def is_training(self) -> bool:
        """Whether values are being trained, so that `answer` must answer the layer's calls."""
        return self._trained is not None

    @torch.enable_grad()  # Evaluation, which runs without gradients, has pending values trained.
    def train(self, entries: Sequence[int], answering: Sequence[int], encoded: EncodedBatch) -> list[Training]:
        """Trains the values of B different entries, each on its own row of the batch, as if it were alone.

        Adam works element by element, so values that share an optimiser have moments of their own. A row that its
        entry does not answer leaves the value as it is, and so does one whose loss is not finite at any step, the
        loss after the last step included, and one whose value is none or has exploded.

        Args:
            entries: The entries.
            answering: The entry that answered each row when its edit was made, -1 for none.
            encoded: The rows.

        Returns:
            The training of each entry.
        """
        assert encoded.labels is not None
        values = self._codebook.values[list(entries)].clone().requires_grad_()
        before = values.detach().abs().amax(dim=1)
        optimizer = torch.optim.Adam([values], lr=self._lr)
        losses: list[Tensor] = []
        answered = torch.tensor(answering, device=values.device)
        is_own = answered == torch.tensor(entries, device=values.device)
        self._trained = _Trained(values, self._codebook.values[answered], is_own[:, None], answered >= 0)
        try:
            # Positions before the overwritten one stay as they are.
            first_changed = max(0, int(encoded.query.min())) if self._replacement == "replace_last" else 0
            repeated = self._model.repeated(encoded, first_changed=first_changed)
            for _ in range(self._n_iter):
                optimizer.zero_grad()
                each = self._model.task.row_losses(repeated(), repeated.batch)
                each.sum().backward()
                optimizer.step()
                losses.append(each.detach())
            with torch.no_grad():
                losses.append(self._model.task.row_losses(repeated(), repeated.batch))
        finally:
            self._trained = None
        after = values.detach().abs().amax(dim=1)
        history = torch.stack([*losses, before.to(losses[0]), after.to(losses[0])])
        trainings = [_training(row[:-2], *row[-2:]) for row in history.T.tolist()]
        sound = [row for row, training in enumerate(trainings) if training.failed is None]
        self._codebook.values[[entries[row] for row in sound]] = values.detach()[sound]
        return trainings

    def answer(self, call: LayerCall) -> Tensor:
        """Overwrites the layer's output with the values in training where their entries answer."""
        trained = self._trained
        assert trained is not None
        values = torch.where(trained.is_own, trained.values, trained.others)
        return call.replace(values, trained.is_answered, self._replacement)


def _training(losses: Sequence[float], before: float, after: float) -> Training:
    """Judges a value by its losses, the last of them taken after the last step, and its largest entries."""
    failures = (loss_failure(loss, n_steps) for n_steps, loss in enumerate(losses))
    failed = next((failure for failure in failures if failure is not None), None)
    return Training(losses[:-1], failed or size_failure("the value", before, after))
