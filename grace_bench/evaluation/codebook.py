"""The interface of an editor's codebook that metrics and loggers may use."""

from typing import Protocol, runtime_checkable

from torch import Tensor


class Codebook(Protocol):
    """Entries in front of a layer, each with a radius within which it answers."""

    def __len__(self) -> int:
        """Returns the number of entries."""

    @property
    def radii(self) -> Tensor:
        """(N,) the radii."""

    def overlap(self) -> float:
        """Returns the share of pairs of entries with different labels whose balls intersect."""


@runtime_checkable
class HasCodebook(Protocol):
    """An editor with a codebook, in the attribute `codebook`."""

    codebook: Codebook
