"""The safety net around edits: a failed edit is undone, and its reason is known."""

import errno
import math
import random
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from grace_bench.common.credentials import without_secrets
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.saving import split_state
from grace_bench.errors import EditFailure, RunFailure, UserError, reason_of
from grace_bench.models.editable import EditableModel

# Errors that the next edit would raise too: mistakes of the user, lack of memory, a device that has stopped working.
_NOT_OF_ONE_EDIT = (UserError, RunFailure, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
# The same holds for a full disk or exhausted resources. Other system errors, such as a server that does not answer,
# concern one edit.
_EXHAUSTED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
)
_PROGRAMMING_ERRORS = (
    *(AssertionError, AttributeError, ImportError, KeyError, NameError, NotImplementedError, RecursionError),
    *(SyntaxError, TypeError),
)
"""Errors that show a mistake in the editor's code whatever the numbers are.

Numerics raise ArithmeticError, RuntimeError (torch.linalg as well) and ValueError. IndexError is missing because torch
raises it for a token or position outside a table, which depends on the request.
"""
_LARGEST = 1e6
"""No weight or activation of a working model is larger than this after growing a thousandfold in one edit."""
_MOST_GROWTH = 1e3


class GuardedEditor(Protocol):
    """An editor as far as its guard uses it; `EditorStrategy` documents the members."""

    model: EditableModel

    @property
    def n_pending(self) -> int: ...  # noqa: D102

    @property
    def finishes_later(self) -> bool: ...  # noqa: D102

    def edit(self, batch: EditBatch) -> EditOutcome: ...  # noqa: D102

    def flush(self) -> Sequence[EditOutcome]: ...  # noqa: D102

    def changing_state(self) -> State: ...  # noqa: D102

    def undo_point(self) -> Callable[[], None]: ...  # noqa: D102


class Guard:
    """Makes one editor's edits so that a failed edit leaves no trace.

    Args:
        editor: The editor.
    """

    def __init__(self, editor: GuardedEditor) -> None:
        self._editor = editor
        self._undo_pending: Callable[[], None] | None = None

    def attempt(self, batch: EditBatch) -> EditOutcome:
        """Makes an edit; if it fails, undoes it and restores the random generators.

        The modes of the model are restored in either case: dropout left on would disturb every later answer.

        Raises:
            EditFailure: If the edit failed, with the reason. An error that the editor raised is its cause.
        """
        editor = self._editor
        undo, random_state, n_pending = editor.undo_point(), RandomState(editor.model.device), editor.n_pending
        modes, sizes = ModelModes(editor.model.module), self._sizes()
        try:
            outcome = editor.edit(batch)
            modes.restore_training()
            failure = outcome.failed or self._failure_of(outcome, batch, sizes)
            if failure is not None:
                raise EditFailure(failure)
        except Exception as error:
            modes.restore()
            undo()
            random_state.restore()
            reason = reason_of_failure(error)
            if reason is None:
                raise
            raise EditFailure(reason) from error
        if not n_pending:
            # It may hold a copy of everything that edits change.
            self._undo_pending = undo if editor.finishes_later else None
        return outcome

    def finish(self) -> Sequence[EditOutcome]:
        """Returns the outcomes of `flush`; if that raises, undoes all pending edits.

        Raises:
            EditFailure: If one of these edits is to blame. The error that the editor raised is its cause.
        """
        undo, self._undo_pending = self._undo_pending, None
        modes = ModelModes(self._editor.model.module)
        try:
            outcomes = self._editor.flush()
        except Exception as error:
            reason = reason_of_failure(error)
            modes.restore()
            if undo is not None:
                undo()
            if reason is None or undo is None:
                raise
            raise EditFailure(reason) from error
        modes.restore_training()
        return [
            outcome if outcome.failed is None else replace(outcome, failed=without_secrets(outcome.failed))
            for outcome in outcomes
        ]

    def finish_all(self) -> Sequence[EditOutcome]:
        """Like `finish`, but for use outside a run, where nobody repeats the edits undone with a failed one.

        Raises:
            EditFailure: If any of them failed.
        """
        outcomes = self.finish()
        if outcomes and outcomes[-1].failed is not None:
            raise EditFailure(outcomes[-1].failed)
        return outcomes

    def _sizes(self) -> dict[str, float]:
        """Returns the largest magnitude in each tensor that edits may change, by name."""
        return {name: _largest(tensor) for name, tensor in split_state(self._editor.changing_state())[0].items()}

    def _failure_of(self, outcome: EditOutcome, batch: EditBatch, sizes: Mapping[str, float]) -> str | None:
        """Returns which loss of an edit is not finite, or which tensor exploded from these sizes; None if none."""
        losses = {
            "at the first step": outcome.loss_first,
            "at the last step": outcome.loss,
            "after the edit": outcome.loss_after,
        }
        after = self._sizes()
        are_finite = all(loss is None or math.isfinite(loss) for loss in losses.values())
        if after and outcome.loss_after is None and are_finite:
            losses["after the edit"] = self._loss(batch)
        for when, loss in losses.items():
            if loss is not None and not math.isfinite(loss):
                return f"the loss is {loss} {when}"
        failures = (size_failure(name, sizes.get(name, 0.0), size) for name, size in after.items())
        return next((f"{failure} after the edit" for failure in failures if failure is not None), None)

    @torch.no_grad()
    def _loss(self, batch: EditBatch) -> float:
        model, encoded = self._editor.model, batch.encoded
        if model.as_read(batch.prompts) != list(batch.prompts):
            # The edit may have changed what the model reads.
            encoded = model.encode_batch(batch.prompts, batch.targets)
        return float(model.task.loss(*model.labelled_logits(encoded)))


def failed_outcome(failure: EditFailure) -> EditOutcome:
    """Returns the outcome of an edit that a guard found to have failed.

    Its traceback is set if the editor raised a programming error.
    """
    cause = failure.__cause__
    if cause is None or not is_programming_error(cause):
        return EditOutcome(failed=str(failure))
    return EditOutcome(failed=str(failure), traceback=without_secrets("".join(traceback.format_exception(cause))))


def is_programming_error(error: BaseException) -> bool:
    """Returns whether an error shows a mistake in the editor's code, whatever the numbers are.

    >>> is_programming_error(NameError("name 'loss' is not defined")), is_programming_error(ValueError("nan"))
    (True, False)
    """
    return isinstance(error, _PROGRAMMING_ERRORS)


def reason_of_failure(error: Exception) -> str | None:
    """Returns in one line why an edit that raised an error failed; None if no single edit is to blame.

    The line is recorded and shown, so secrets are removed from it.

    >>> reason_of_failure(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero'
    >>> reason_of_failure(MemoryError()) is None
    True
    """
    reason = without_secrets(reason_of(error))
    if isinstance(error, EditFailure):
        return reason
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        return None
    # torch raises a plain RuntimeError when the CPU is out of memory.
    if isinstance(error, _NOT_OF_ONE_EDIT) or "can't allocate memory" in str(error):
        return None
    name = type(error).__name__
    return name if reason == name else f"{name}: {reason}"


def loss_failure(loss: float, n_steps: int) -> str | None:
    """Returns what is wrong with a loss after `n_steps` training steps; None if it is finite.

    >>> loss_failure(math.nan, 3)
    'the loss is nan after 3 steps'
    >>> loss_failure(0.1, 3) is None
    True
    """
    if math.isfinite(loss):
        return None
    return f"the loss is {loss} after {n_steps} {'step' if n_steps == 1 else 'steps'}"


def check_loss(loss: float, n_steps: int) -> None:
    """Raises if the loss of an edit is not finite.

    Raises:
        EditFailure: If it is not; names the loss and the number of steps.
    """
    failure = loss_failure(loss, n_steps)
    if failure is not None:
        raise EditFailure(failure)


def size_failure(what: str, before: float, after: float) -> str | None:
    """Returns what is wrong with trained numbers, given their largest magnitude before and after the edit.

    They have exploded if they are not finite, or exceed a million after growing by a factor of more than a thousand.

    >>> size_failure("the value", 0.5, 1e30)
    'the value exploded (largest entry 0.5 before, 1e+30 after)'
    >>> size_failure("the value", 0.5, math.inf)
    'the value is not finite'
    >>> size_failure("the value", 0.5, 400.0) is None
    True
    """
    if not math.isfinite(after):
        return f"{what} is not finite" if math.isfinite(before) else None
    if after > max(_LARGEST, _MOST_GROWTH * before):
        return f"{what} exploded (largest entry {before:.3g} before, {after:.3g} after)"
    return None


class RandomState:
    """The state of the random generators that an edit may draw from, captured on construction.

    Args:
        device: The model's device; its generator is captured beside the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Sets the generators to the captured state."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class ModelModes:
    """Which parts of a model are in training mode and which parameters require gradients, captured on construction.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._training = [(part, part.training) for part in module.modules()]
        self._gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore_training(self) -> None:
        """Restores the modes of the parts."""
        for part, training in self._training:
            if part.training != training:
                part.training = training

    def restore(self) -> None:
        """Restores modes and `requires_grad`; a parameter that required no gradient loses any it received."""
        self.restore_training()
        for parameter, requires_grad in self._gradients:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
                parameter.grad = None


def _largest(tensor: Tensor) -> float:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    # Several times as fast as a norm; NaN comes through.
    lowest, highest = tensor.aminmax()
    return float(torch.maximum(-lowest, highest))
