"""Editor networks: from the gradients of edits at linear layers to updates of their weights."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from grace_bench.editors._meta.gradients import RankOnes


class EditorNetworks(nn.Module):
    """Turns the gradients of an edit at some linear layers into updates of their weights (Mitchell et al. 2022).

    Layers of one shape share a network; each has its own scale, shift, normalisation and edit learning rate. Every
    network starts as the identity, so an update is a step along the negative normalised gradient.

    Args:
        sizes: D_in and D_out of each of L layers.
        rank: Rank of the networks' matrices.
        edit_lr: The initial edit learning rates.
        generator: Draws the first weights.
        n_blocks: Residual blocks of a network.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        *,
        rank: int,
        edit_lr: float,
        generator: torch.Generator,
        n_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.networks = nn.ModuleDict()
        for size in dict.fromkeys(self.sizes):
            width, n_layers = sum(size), self.sizes.count(size)
            blocks = (_Residual(width, n_layers, rank, generator) for _ in range(n_blocks))
            self.networks[_name(size)] = nn.ModuleList(blocks)
        self.normalisers = nn.ModuleList(_Normaliser(sum(size)) for size in self.sizes)
        # Learned as logarithms: a step of the meta-optimiser then suits any magnitude, and no rate turns negative.
        self.log_edit_lr = nn.Parameter(torch.full((len(self.sizes),), math.log(edit_lr)))

    def observe(self, gradients: Sequence[RankOnes]) -> None:
        """Adds gradients to the running means and deviations that inputs are normalised with."""
        for normaliser, gradient in zip(self.normalisers, gradients, strict=True):
            cast(_Normaliser, normaliser).observe(_concatenated(gradient)[gradient.contributing()])

    def forward(self, gradients: Sequence[RankOnes]) -> list[RankOnes]:
        """Returns the update of each layer's weight, for each row."""
        updates = []
        for layer, (size, gradient) in enumerate(zip(self.sizes, gradients, strict=True)):
            z = self.normalisers[layer](_concatenated(gradient))
            for block in cast(nn.ModuleList, self.networks[_name(size)]):
                z = block(z, self.sizes[:layer].count(size))
            u, delta = z.split(size, dim=-1)
            delta = delta * gradient.contributing()[..., None]
            updates.append(RankOnes(u, -self.log_edit_lr[layer].exp() * delta))
        return updates


class AggregatingNetworks(EditorNetworks):
    """Turns the gradients of many edits into one shift of each weight by least squares (Tan et al. 2024, section 4).

    The update of a position, alone, would change what the layer gives for the position's own input k by
    v = -η (k·k̂) ĝ, where k̂ and ĝ come from the network. The shift is the one whose changes come closest to all v.

    Args:
        sizes: D_in and D_out of each of L layers.
        rank: Rank of the networks' matrices.
        edit_lr: The initial edit learning rates.
        generator: Draws the first weights.
        n_blocks: Residual blocks of a network.
    """

    def __init__(
        self, sizes: Sequence[tuple[int, int]], *, rank: int, edit_lr: float, generator: torch.Generator, n_blocks: int
    ) -> None:
        super().__init__(sizes, rank=rank, edit_lr=edit_lr, generator=generator, n_blocks=n_blocks)
        self.log_ridge = nn.Parameter(torch.zeros(len(self.sizes)))
        """λ of each layer: e^λ is added to the diagonal of the normal equations."""

    def shifts(self, gradients: Sequence[RankOnes]) -> list[Tensor]:
        """Returns the (D_out, D_in) shift of each layer's weight; gradients flow through the linear solve."""
        flat = [_flattened(gradient) for gradient in gradients]
        return [
            least_squares(keys := gradient.u[0], _own_change(update, keys), log_ridge.exp())
            for gradient, update, log_ridge in zip(flat, self(flat), self.log_ridge, strict=True)
        ]


def least_squares(keys: Tensor, values: Tensor, ridge: Tensor) -> Tensor:
    """Returns the Δ that minimises Σ |Δ k - v|² + ridge |Δ|² (Tan et al. 2024, eq. 4).

    Args:
        keys: (n, D_in), the k as rows.
        values: (n, D_out), the v as rows.
        ridge: A positive number.

    Returns:
        (D_out, D_in), in the keys' dtype; computed in float64 where the device has it.
    """
    dtype = torch.float32 if keys.device.type == "mps" else torch.float64
    k, v = keys.to(dtype), values.to(dtype)
    n, width = k.shape
    # Both are the same matrix; the smaller system is solved. One that has no solution gives values that are not finite.
    if n <= width:
        gram = k @ k.T + ridge.to(dtype) * torch.eye(n, dtype=dtype, device=k.device)
        shift = v.T @ torch.linalg.solve_ex(gram, k).result
    else:
        moments = k.T @ k + ridge.to(dtype) * torch.eye(width, dtype=dtype, device=k.device)
        shift = torch.linalg.solve_ex(moments, k.T @ v).result.T
    return shift.to(keys.dtype)


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


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _concatenated(gradient: RankOnes) -> Tensor:
    return torch.cat([gradient.u, gradient.delta], dim=-1)


def _flattened(gradient: RankOnes) -> RankOnes:
    """The contributing positions of all rows, as one row."""
    contributing = gradient.contributing()
    return RankOnes(gradient.u[contributing][None], gradient.delta[contributing][None])


def _own_change(update: RankOnes, keys: Tensor) -> Tensor:
    """What each of N rank-one terms alone changes for its own (N, D_in) input: (N, D_out)."""
    return (update.u[0] * keys).sum(dim=-1, keepdim=True) * update.delta[0]
