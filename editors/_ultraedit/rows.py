"""What UltraEdit reads: the passes of a batch, and what a layer saw in them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grace_bench.models.encoding import IGNORED, EncodedBatch


@dataclass(frozen=True)
class Rows:
    """What a linear layer saw at R tokens.

    Attributes:
        keys: (R, D_in) float32, h, its inputs.
        gradients: (R, D_out) float32, g, the gradients of the loss with respect to its outputs.
    """

    keys: Tensor
    gradients: Tensor

    @property
    def joined(self) -> Tensor:
        """(R, D_in + D_out) x = [h, g]."""
        return torch.cat([self.keys, self.gradients], dim=1)


def passes_of(batch: EncodedBatch, size: int) -> list[EncodedBatch]:
    """Cuts a batch into passes of at most `size` rows, the longest inputs first.

    An input ends with the token at which the last one of its target is predicted.
    """
    assert batch.labels is not None
    is_read = (batch.labels != IGNORED).flip(1).cumsum(dim=1).flip(1) > 0
    mask = batch.inputs["attention_mask"] * is_read
    lengths = mask.sum(dim=1).tolist()
    order = sorted(range(len(batch)), key=lambda row: -lengths[row])
    given = replace(batch, inputs={**batch.inputs, "attention_mask": mask})
    return [_narrowed(given.rows(order[start : start + size])) for start in range(0, len(order), size)]


def _narrowed(batch: EncodedBatch) -> EncodedBatch:
    """The batch without the positions that no row reads."""
    columns = batch.inputs["attention_mask"].any(dim=0).nonzero()[:, 0]
    narrowed = replace(
        batch,
        inputs={name: tensor[:, columns] for name, tensor in batch.inputs.items()},
        query=batch.query - columns[0],
    )
    return narrowed.columns(columns)
