"""MEMOIR's masks: which inputs of a layer an edit may use, and which earlier edit a prompt resembles."""

import torch
from torch import Tensor

from grace_bench.editors._rows import Rows

_BITS = 8
_AT_ONCE = 2**22
"""The most numbers that are unpacked at once."""


class Masks:
    """The masks of edits, packed eight to a byte (TopHash: Wang et al. 2025, section 3.1).

    A mask marks k of D_in inputs of a layer: those to which a fixed random permutation sends the k largest entries of a
    feature, by magnitude.

    Args:
        width: D_in.
        k: The number of marked inputs.
        seed: Seeds the permutation.
        device: Where masks are compared.
    """

    def __init__(self, width: int, *, k: int, seed: int, device: torch.device) -> None:
        self.k = k
        self._width = width
        self._permutation = torch.randperm(width, generator=torch.Generator().manual_seed(seed)).to(device)
        self._powers = 2 ** torch.arange(_BITS, device=device)
        self._packed = Rows(0, 0, device=device, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._packed.tensor)

    @property
    def packed(self) -> Tensor:
        """(N, D_in / 8, rounded up) uint8."""
        return self._packed.tensor

    def of(self, features: Tensor) -> Tensor:
        """Returns the (B, D_in) bool masks of (B, D_in) features."""
        # A stable order decides between equal magnitudes in the same way in every batch.
        largest = features.abs().argsort(dim=1, descending=True, stable=True)[:, : self.k]
        masks = torch.zeros(features.shape, dtype=torch.bool, device=features.device)
        return masks.scatter_(1, self._permutation[largest], True)

    def extend(self, masks: Tensor) -> None:
        """Adds (n, D_in) bool masks."""
        padded = torch.nn.functional.pad(masks.byte(), (0, -self._width % _BITS)).unflatten(1, (-1, _BITS))
        self._packed.extend((padded * self._powers).sum(dim=2).byte())

    def extend_packed(self, packed: Tensor) -> None:
        """Adds masks that are packed already."""
        if len(packed):
            self._packed.extend(packed)

    def truncate(self, n: int) -> None:
        """Removes all but the first `n` masks."""
        self._packed.truncate(n)

    def unpacked(self, entries: Tensor) -> Tensor:
        """Returns the (n, D_in) bool masks of (n,) entries."""
        return self._bits(self.packed[entries])

    def most_alike(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Finds the stored mask that has the most in common with each of (B, D_in) masks, the newest in a tie.

        Returns:
            The (B,) entries, and the (B,) shares of k that both mark.
        """
        queries = masks.float().T
        entry = torch.full((len(masks),), -1, device=masks.device)
        most = torch.full((len(masks),), -1.0, device=masks.device)
        start = 0
        # Sums of ones are exact in float32, in any order, up to 2^24.
        for packed in self.packed.split(max(1, _AT_ONCE // self._width)):
            common = self._bits(packed).float() @ queries
            best = common.amax(dim=0)
            newest = len(packed) - 1 - common.flip(0).argmax(dim=0)
            is_better = best >= most
            entry, most = torch.where(is_better, newest + start, entry), torch.where(is_better, best, most)
            start += len(packed)
        return entry, most / self.k

    def _bits(self, packed: Tensor) -> Tensor:
        bits = (packed[..., None] & self._powers.byte()) != 0
        return bits.flatten(1)[:, : self._width]
