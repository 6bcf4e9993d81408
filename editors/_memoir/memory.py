"""MEMOIR's residual memory: a second weight beside a linear layer, zero at first, of which edits train parts."""

from collections.abc import Callable

import torch
from torch import Tensor

from grace_bench.editing.guard import check_loss, size_failure
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch

_MAX_NORM = 1.0
_GOOD_ENOUGH = 0.02
_LEAST_CHANGE = 1e-4


class ResidualMemory:
    """Adds W_m (mask * a) to what a layer gives for a (Wang et al. 2025, equation 2).

    Args:
        size: D_in and D_out of the layer.
        device: Where it is.
    """

    def __init__(self, size: tuple[int, int], *, device: torch.device) -> None:
        self.matrix: Tensor | None = None
        """(D_in, D_out) float32, the transpose of W_m; None before the first edit."""
        self._size = size
        self._device = device
        self._trained: tuple[Tensor, Tensor] | None = None
        self._changes: list[tuple[Tensor, Tensor]] = []

    @property
    def is_training(self) -> bool:
        """Whether a part is in training, so that `added_in_training` must answer."""
        return self._trained is not None

    def train(
        self, model: EditableModel, encoded: EncodedBatch, mask: Tensor, *, n_iter: int, lr: float
    ) -> list[float]:
        """Trains the part of the inputs in a mask on a batch, by gradient descent.

        It ends after `n_iter` steps, once the loss is below 0.02, or once it changes by less than 1e-4.

        Args:
            model: The model, whose layer gets what `added_in_training` returns.
            encoded: The batch.
            mask: (D_in,) bool.
            n_iter: Maximum number of steps.
            lr: Learning rate; gradients are clipped at a norm of 1.

        Returns:
            The loss before each step, and after the last.

        Raises:
            EditFailure: If a loss or the part is not finite; the memory is unchanged.
        """
        matrix = torch.zeros(self._size, device=self._device) if self.matrix is None else self.matrix
        marked = mask.nonzero()[:, 0]
        before = matrix[marked]
        part = before.clone().requires_grad_()
        self._trained = (marked, part)
        try:
            losses = _descend(model, encoded, part, n_iter=n_iter, lr=lr)
        finally:
            self._trained = None
        after = part.detach()
        failure = size_failure("the memory", float(before.abs().max()), float(after.abs().max()))
        if failure is not None:
            raise EditFailure(failure)
        self._changes.append((marked, before))
        matrix[marked] = after
        self.matrix = matrix
        return losses

    def added_in_training(self, entering: Tensor, output: Tensor) -> Tensor:
        """Returns a layer's (B, T, D_out) output with what the part in training adds for its (B, T, D_in) input."""
        assert self._trained is not None
        marked, part = self._trained
        return output + (entering[..., marked].float() @ part).to(output.dtype)

    def added(self, entering: Tensor, output: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
        """Returns a layer's output with what the memory adds in some rows; the others stay as they are, bit for bit.

        Args:
            entering: (B, T, D_in) the layer's input.
            output: (B, T, D_out) its output.
            rows: (n,) the rows.
            masks: (n, D_in) bool, their masks.
        """
        if self.matrix is None or not len(rows):
            return output
        update = (entering[rows].float() * masks[:, None]) @ self.matrix
        return output.index_add(0, rows, update.to(output.dtype))

    def undo_point(self) -> Callable[[], None]:
        """Returns a function that undoes, bit for bit, the training from now on, until the next call."""
        changes: list[tuple[Tensor, Tensor]] = []
        self._changes, is_empty = changes, self.matrix is None

        def undo() -> None:
            for marked, before in reversed(changes):
                assert self.matrix is not None
                self.matrix[marked] = before
            changes.clear()
            if is_empty:
                self.matrix = None

        return undo

    def clear(self) -> None:
        """Forgets every edit."""
        self.matrix = None
        self._changes.clear()


def _descend(model: EditableModel, encoded: EncodedBatch, part: Tensor, *, n_iter: int, lr: float) -> list[float]:
    """Takes steps of clipped gradient descent; returns the loss before each, and after the last."""
    repeated = model.repeated(encoded)
    losses: list[float] = []
    while True:
        loss = model.task.loss(repeated(), repeated.batch)
        losses.append(float(loss.detach()))
        check_loss(losses[-1], len(losses) - 1)
        is_still = len(losses) > 1 and abs(losses[-1] - losses[-2]) < _LEAST_CHANGE
        if len(losses) > n_iter or losses[-1] < _GOOD_ENOUGH or is_still:
            return losses
        (gradient,) = torch.autograd.grad(loss, [part])
        with torch.no_grad():
            part -= lr * gradient * (_MAX_NORM / gradient.norm()).clamp(max=1.0)
