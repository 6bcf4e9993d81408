"""The editor networks of MEND: from the gradient of one edit at a linear layer to the update of its weight."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch


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

    def __matmul__(self, inputs: Tensor) -> Tensor:
        """Maps (B, T, D_in) inputs to (B, T, D_out), each row by its own matrix."""
        return inputs @ self.u.transpose(1, 2) @ self.delta


class EditorNetworks(nn.Module):
    """Turns the gradients of an edit at some linear layers into updates of their weights (Mitchell et al. 2022).

    Layers of one shape share a network; each has its own scale, shift, normalisation and edit learning rate. Every
    network starts as the identity, so an update is a step along the negative normalised gradient.

    Args:
        sizes: D_in and D_out of each of L layers.
        rank: Rank of the networks' matrices.
        edit_lr: The initial edit learning rates.
        generator: Draws the first weights.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, rank: int, edit_lr: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.networks = nn.ModuleDict()
        for size in dict.fromkeys(self.sizes):
            width, n_layers = sum(size), self.sizes.count(size)
            self.networks[_name(size)] = nn.ModuleList(_Residual(width, n_layers, rank, generator) for _ in range(2))
        self.normalisers = nn.ModuleList(_Normaliser(sum(size)) for size in self.sizes)
        # Learned as logarithms: a step of the meta-optimiser then suits any magnitude, and no rate turns negative.
        self.log_edit_lr = nn.Parameter(torch.full((len(self.sizes),), math.log(edit_lr)))

    def observe(self, gradients: Sequence[RankOnes]) -> None:
        """Adds gradients to the running means and deviations that inputs are normalised with."""
        for normaliser, gradient in zip(self.normalisers, gradients, strict=True):
            cast(_Normaliser, normaliser).observe(_concatenated(gradient)[_contributing(gradient)])

    def forward(self, gradients: Sequence[RankOnes]) -> list[RankOnes]:
        """Returns the update of each layer's weight, for each row."""
        updates = []
        for layer, (size, gradient) in enumerate(zip(self.sizes, gradients, strict=True)):
            z = self.normalisers[layer](_concatenated(gradient))
            for block in cast(nn.ModuleList, self.networks[_name(size)]):
                z = block(z, self.sizes[:layer].count(size))
            u, delta = z.split(size, dim=-1)
            delta = delta * _contributing(gradient)[..., None]
            updates.append(RankOnes(u, -self.log_edit_lr[layer].exp() * delta))
        return updates


class _Residual(nn.Module):
    """z + max(0, s ⊙ (U V z + b) + o), with s and o of the given layer; initially the identity."""

    def __init__(self, width: int, n_layers: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(width, rank))
        self.right = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, width), generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(n_layers, width))
        self.shift = nn.Parameter(torch.zeros(n_layers, width))

    def forward(self, z: Tensor, layer: int) -> Tensor:
        inner = z @ self.right.T @ self.left.T + self.bias
        inner = inner * self.scale[layer] + self.shift[layer]
        # Everything is zero at the start, where a maximum passes a gradient and a ReLU does not.
        return z + torch.maximum(inner, torch.zeros_like(inner))


class _Normaliser(nn.Module):
    """Subtracts the mean and divides by the deviation of all observed vectors, dimension by dimension."""

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("squares", torch.zeros(width))

    def observe(self, z: Tensor) -> None:
        """Adds N vectors, (N, D), by the parallel form of Welford's update (Chan et al. 1983)."""
        if not len(z):
            return
        count = self.count + len(z)
        step = z.mean(dim=0) - self.mean
        self.squares += (z - z.mean(dim=0)).square().sum(dim=0) + step.square() * self.count * len(z) / count
        self.mean += step * len(z) / count
        self.count.copy_(count)

    def forward(self, z: Tensor) -> Tensor:
        deviation = (self.squares / self.count.clamp(min=1)).sqrt()
        # A dimension that never varied in training gives no scale for later values.
        return torch.where(deviation > 0, (z - self.mean) / deviation, 0.0)


def linear_size(path: str, module: nn.Module) -> tuple[int, int]:
    """Returns D_in and D_out of a linear layer.

    Raises:
        UserError: If it is not a linear layer.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        n_in, n_out = module.weight.shape
        return n_in, n_out
    raise UserError(f"layer={path!r} is a {type(module).__name__}: its weight is not that of a linear map")


def edit_gradients(
    model: EditableModel, layers: dict[str, nn.Module], batch: EncodedBatch
) -> tuple[Tensor, list[RankOnes]]:
    """Decomposes the gradients of each row's own loss with respect to the weights of linear layers.

    Args:
        model: The model.
        layers: L linear layers by dotted path.
        batch: B requests with labels.

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

    handles = [watch(path, module) for path, module in layers.items()]
    try:
        logits = model.logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    unused = next((path for path in layers if not probes[path]), None)
    if unused is not None:
        raise UserError(f"layer={unused!r} is never called")
    loss = torch.stack([model.task.loss(logits[i : i + 1], batch.row(i)) for i in range(len(batch))]).sum()
    every_probe = [probe for path in layers for probe in probes[path]]
    deltas = iter(torch.autograd.grad(loss, every_probe, materialize_grads=True))
    gradients = [
        RankOnes(
            torch.cat([_by_row(u, len(batch)) for u in entered[path]], dim=1).to(model.device),
            torch.cat([_by_row(next(deltas), len(batch)) for _ in probes[path]], dim=1).to(model.device),
        )
        for path in layers
    ]
    return logits.detach(), gradients


@contextmanager
def updated(layers: dict[str, nn.Module], updates: Sequence[RankOnes]) -> Iterator[None]:
    """Applies to each row of a batch its own update of the weights; gradients flow through the updates."""

    def add(module: nn.Module, update: RankOnes) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            change = update @ _by_row(args[0], len(update.u)).to(update.u.device)
            return output + change.reshape(output.shape).to(output)

        return module.register_forward_hook(hook)

    handles = [add(module, update) for module, update in zip(layers.values(), updates, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def add_to_weight(module: nn.Module, change: Tensor) -> None:
    """Adds a (D_out, D_in) change to a linear layer's weight, in float32 before it is rounded."""
    weight: Any = module.weight
    change = change.to(weight.device)
    weight.data.copy_(weight.data.float() + (change.T if isinstance(module, Conv1D) else change))


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _concatenated(gradient: RankOnes) -> Tensor:
    return torch.cat([gradient.u, gradient.delta], dim=-1)


def _contributing(gradient: RankOnes) -> Tensor:
    """(B, S) bool, the positions that contribute to the loss."""
    return (gradient.delta != 0).any(dim=-1)


def _by_row(activations: Tensor, n_rows: int) -> Tensor:
    """Views activations as (B, T, D) in float32; a layer outside a sequence has T = 1."""
    return activations.float().reshape(n_rows, -1, activations.shape[-1])
