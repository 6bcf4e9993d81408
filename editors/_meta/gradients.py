"""Gradients at linear layers as rank-one terms, and passes of the model with other weights in these layers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch
from grace_bench.models.engine.engine import Repeated
from grace_bench.models.linear import dimensions

EditTokens = Literal["answer", "all"]
"""The positions of an edit that networks see: those from which its target is predicted, or all that reach its loss."""


@dataclass(frozen=True)
class RankOnes:
    """A matrix of a linear layer's shape for each of B rows, as the sum over S positions of outer products δ uᵀ.

    Attributes:
        u: (B, S, D_in) in float32.
        delta: (B, S, D_out) in float32; zero at positions that contribute nothing, such as padding.
    """

    u: Tensor
    delta: Tensor

    def total(self) -> Tensor:
        """Returns the (D_out, D_in) sum over rows and positions."""
        return torch.einsum("bso,bsi->oi", self.delta, self.u)

    def contributing(self) -> Tensor:
        """Returns which positions contribute anything, (B, S) bool."""
        return (self.delta != 0).any(dim=-1)

    def __matmul__(self, inputs: Tensor) -> Tensor:
        """Maps (B, T, D_in) inputs to (B, T, D_out), each row by its own matrix."""
        return inputs @ self.u.transpose(1, 2) @ self.delta


def linear_size(path: str, module: nn.Module) -> tuple[int, int]:
    """Returns D_in and D_out of a linear layer.

    Raises:
        UserError: If it is not a linear layer.
    """
    size = dimensions(module)
    if size is None:
        raise UserError(f"layer={path!r} is a {type(module).__name__}: its weight is not that of a linear map")
    return size


def edit_gradients(
    model: EditableModel, layers: dict[str, nn.Module], batch: EncodedBatch | Repeated
) -> tuple[Tensor, list[RankOnes]]:
    """Decomposes the gradients of each row's own loss with respect to the weights of linear layers.

    Args:
        model: The model.
        layers: L linear layers by dotted path.
        batch: B requests with labels, or how to run them.

    Returns:
        The logits, and the gradients of each layer: u are its inputs, δ the gradients at its outputs.

    Raises:
        UserError: If a layer does not contribute to the model's answers.
    """
    entered: dict[str, list[Tensor]] = {path: [] for path in layers}
    probes: dict[str, list[Tensor]] = {path: [] for path in layers}

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            entered[path].append(args[0].detach())
            probes[path].append(torch.zeros_like(output, requires_grad=True))
            return output + probes[path][-1]

        return module.register_forward_hook(hook)

    run = batch if isinstance(batch, Repeated) else Repeated(batch, partial(model.logits, batch))
    handles = [watch(path, module) for path, module in layers.items()]
    try:
        logits = run()
    finally:
        for handle in handles:
            handle.remove()
    unused = next((path for path in layers if not probes[path]), None)
    if unused is not None:
        raise UserError(f"layer={unused!r} is never called")
    n_rows = len(run.batch)
    loss = torch.stack([model.task.loss(logits[i : i + 1], run.batch.row(i)) for i in range(n_rows)]).sum()
    every_probe = [probe for path in layers for probe in probes[path]]
    deltas = iter(torch.autograd.grad(loss, every_probe, materialize_grads=True))
    gradients = [
        RankOnes(
            torch.cat([_by_row(u, n_rows) for u in entered[path]], dim=1).to(model.device),
            torch.cat([_by_row(next(deltas), n_rows) for _ in probes[path]], dim=1).to(model.device),
        )
        for path in layers
    ]
    return logits.detach(), gradients


def seen_gradients(
    model: EditableModel, layers: dict[str, nn.Module], batch: EncodedBatch, tokens: EditTokens
) -> tuple[Tensor, list[RankOnes]]:
    """Returns logits and gradients as `edit_gradients` does, restricted to some positions.

    A layer that has no positions from which a target is predicted keeps all of them: one of an encoder, or of a model
    that gives classes.
    """
    logits, gradients = edit_gradients(model, layers, batch)
    assert batch.labels is not None
    if tokens == "all" or batch.labels.dim() < 2:
        return logits, gradients
    has_encoder = getattr(model.config, "is_encoder_decoder", False)
    encoder = set(model.module.get_encoder().modules()) if has_encoder else set()  # type: ignore[operator]
    labelled = (batch.labels != IGNORED).to(model.device)
    return logits, [
        gradient if module in encoder else RankOnes(gradient.u, gradient.delta * labelled[..., None])
        for module, gradient in zip(layers.values(), gradients, strict=True)
    ]


@contextmanager
def updated(layers: dict[str, nn.Module], updates: Sequence[RankOnes]) -> Iterator[None]:
    """Applies to each row of a batch its own update of the weights; gradients flow through the updates."""

    def change_of(update: RankOnes) -> Callable[[Tensor], Tensor]:
        return lambda inputs: update @ _by_row(inputs, len(update.u)).to(update.u.device)

    with _adding(layers, [change_of(update) for update in updates]):
        yield


@contextmanager
def shifted(layers: dict[str, nn.Module], shifts: Sequence[Tensor]) -> Iterator[None]:
    """Applies to every row of a batch the same (D_out, D_in) shift of each weight; gradients flow to the shifts."""

    def change_of(shift: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda inputs: functional.linear(inputs.to(shift), shift)

    with _adding(layers, [change_of(shift) for shift in shifts]):
        yield


@contextmanager
def _adding(layers: dict[str, nn.Module], changes: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Adds to the output of each layer a change that is computed from its input."""

    def add(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + change(args[0]).reshape(output.shape).to(output)

        return module.register_forward_hook(hook)

    handles = [add(module, change) for module, change in zip(layers.values(), changes, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_row(activations: Tensor, n_rows: int) -> Tensor:
    """Views activations as (B, T, D) in float32; a layer outside a sequence has T = 1."""
    return activations.float().reshape(n_rows, -1, activations.shape[-1])
