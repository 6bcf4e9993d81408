"""Merging side memories into one weight (Wang et al. 2024, section 2.3.2)."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

MergeName = Literal["ties", "magnitude", "magnitude_norm", "sign", "linear", "slerp"]
_PARALLEL = 0.9995
"""The cosine from which on slerp takes the straight line."""


def merge(
    original: Tensor, weights: Sequence[Tensor], shares: Sequence[float], *, how: MergeName, density: float
) -> Tensor:
    """Returns one weight made of several.

    Args:
        original: The weight W₀ that all of them started from, of any shape.
        weights: At least one weight of its shape.
        shares: One number each. `linear` and `slerp` go from W₀ towards the first weight by its share, and ignore
            the others, as the authors' code does.
        how: `ties` (Yadav et al. 2023) keeps the largest changes of each weight and averages, entry by entry, those
            whose sign prevails; `sign` does so without keeping only the largest. `magnitude` sums the largest changes,
            `magnitude_norm` averages them.
        density: The share of a weight's entries that `ties`, `magnitude` and `magnitude_norm` keep.

    >>> merge(torch.zeros(2), [torch.tensor([3.0, 1.0]), torch.tensor([1.0, -2.0])], [0.5, 0.5], how="sign", density=1)
    tensor([ 2., -2.])
    """
    if how == "linear":
        return torch.lerp(original, weights[0], shares[0])
    if how == "slerp":
        return _slerp(original, weights[0], shares[0])
    changes = [weight - original for weight in weights]
    if how != "sign":
        changes = [_trimmed(change, density) for change in changes]
    weighted = torch.stack([share * change for share, change in zip(shares, changes, strict=True)])
    if how == "magnitude":
        return original + weighted.sum(dim=0)
    if how == "magnitude_norm":
        return original + weighted.sum(dim=0) / sum(shares)
    agrees = weighted.sign() == torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    total = (weighted * agrees).sum(dim=0)
    share = torch.einsum("j,j...->...", total.new_tensor(shares), agrees.to(total.dtype))
    return original + total / share.masked_fill(share == 0, 1.0)


def _trimmed(change: Tensor, density: float) -> Tensor:
    """The change with only its largest entries, zero elsewhere."""
    flat = change.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def _slerp(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point on the arc from one weight to another, both taken as vectors."""
    cosine = (start / start.norm() * (end / end.norm())).sum()
    if float(cosine.abs()) > _PARALLEL:
        return torch.lerp(start, end, share)
    angle = cosine.arccos()
    return ((1 - share) * angle).sin() / angle.sin() * start + (share * angle).sin() / angle.sin() * end
