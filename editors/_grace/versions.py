"""Digests of codebook values: besides the query, the only thing an answer depends on."""

import hashlib
from collections.abc import Set

from grace_bench.editors._grace.codebook import Codebook


class Versions:
    """The digests of the values of a codebook, each computed once.

    Args:
        codebook: The codebook.
    """

    def __init__(self, codebook: Codebook) -> None:
        self._codebook = codebook
        self._digests: dict[int, str] = {}

    def __getitem__(self, entry: int) -> str:
        if entry not in self._digests:
            value = self._codebook.values[entry].cpu().numpy().tobytes()
            self._digests[entry] = hashlib.blake2b(value, digest_size=16).hexdigest()
        return self._digests[entry]

    def forget(self, entry: int) -> None:
        """Drops the digest of an entry whose value changes."""
        self._digests.pop(entry, None)

    def clear(self) -> None:
        """Drops every digest."""
        self._digests = {}

    def of(self, codebook: Codebook, *, without: Set[int]) -> "Versions":
        """Returns the digests of another codebook that differs only in the values of some entries."""
        versions = Versions(codebook)
        versions._digests = {entry: digest for entry, digest in self._digests.items() if entry not in without}
        return versions
