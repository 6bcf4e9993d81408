"""Edits gone wrong: which errors are an editor's on one request, and which losses end an edit."""

import errno
import math
import random

import numpy as np
import torch
from torch import nn

from grace_bench.common.credentials import without_secrets
from grace_bench.errors import EditFailure, RunFailure, UserError, reason_of

# The next edit would meet them too: the user's mistakes, no memory, a device that has stopped working.
_NOT_OF_ONE_EDIT = (UserError, RunFailure, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)
# So would a disk or a machine that gives no more; other errors of the system, such as a server that does not answer an
# editor, are of one edit.
_EXHAUSTED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
)
_LARGEST = 1e6
"""No weight or activation of a model that works is larger, and grew to that by a thousand times in one edit."""
_MOST_GROWTH = 1e3


def reason_of_failure(error: Exception) -> str | None:
    """Returns in one line why an edit failed that ended in an error; None if no single edit is to blame for that.

    What the line says is kept and shown, so secrets are taken out of it.

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
    # Out of memory on the CPU is a plain RuntimeError to torch.
    if isinstance(error, _NOT_OF_ONE_EDIT) or "can't allocate memory" in str(error):
        return None
    name = type(error).__name__
    return name if reason == name else f"{name}: {reason}"


def loss_failure(loss: float, n_steps: int) -> str | None:
    """Returns what is wrong with a loss, taken after so many steps of training; None for a finite one.

    >>> loss_failure(math.nan, 3)
    'the loss is nan after 3 steps'
    >>> loss_failure(0.1, 3) is None
    True
    """
    if math.isfinite(loss):
        return None
    return f"the loss is {loss} after {n_steps} {'step' if n_steps == 1 else 'steps'}"


def size_failure(what: str, before: float, after: float) -> str | None:
    """Returns what is wrong with numbers that an edit trained, by the largest magnitude among them before and after.

    They have exploded if they are no finite numbers, or larger than a million after growing by a thousand times.

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


def check_loss(loss: float, n_steps: int) -> None:
    """Ends an edit whose loss is no finite number.

    Raises:
        EditFailure: Saying after how many steps it was not.
    """
    failure = loss_failure(loss, n_steps)
    if failure is not None:
        raise EditFailure(failure)


class RandomState:
    """The random generators that an edit may draw from, as they are when this is made.

    Args:
        device: Where the model is; the CPU's generator is kept beside its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._cuda = None if self._device is None else torch.cuda.get_rng_state(self._device)
        self._torch, self._python, self._numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()

    def restore(self) -> None:
        """Puts them back."""
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        if self._device is not None and self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


class ModelModes:
    """Which parts of a model are in training mode and which parameters take gradients, as they are when this is made.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._training = [(part, part.training) for part in module.modules()]
        self._gradients = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore_training(self) -> None:
        """Puts the modes of the parts back."""
        for part, training in self._training:
            if part.training != training:
                part.training = training

    def restore(self) -> None:
        """Puts all of it back; parameters that took no gradients lose those they got."""
        self.restore_training()
        for parameter, takes_gradients in self._gradients:
            if parameter.requires_grad != takes_gradients:
                parameter.requires_grad_(takes_gradients)
                parameter.grad = None
