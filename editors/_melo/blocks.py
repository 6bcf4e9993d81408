"""MELO's dynamic LoRA: low-rank blocks beside linear modules, of which each input gets at most one."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grace_bench.editors._grace.rows import Rows
from grace_bench.editors._melo.clusters import NO_BLOCK

Block = dict[str, tuple[Tensor, Tensor]]
"""By the path of a module, A (D_in, rank) and B (rank, D_out)."""


class Blocks:
    """Low-rank blocks: each has an A and a B for every module, and adds scale * x A B to what the module gives.

    Args:
        sizes: D_in and D_out of each module, by its path.
        rank: The rank of a block.
        scale: The factor.
        device: Where the tensors are.
    """

    def __init__(self, sizes: Mapping[str, tuple[int, int]], *, rank: int, scale: float, device: torch.device) -> None:
        self.sizes = dict(sizes)
        self.rank = rank
        self.scale = scale
        self.trained: Block | None = None
        """The block in training, which then answers every input; None outside training."""
        self._rows = {
            (path, name): Rows(0, 0, 0, device=device, dtype=torch.float32) for path in sizes for name in ("A", "B")
        }
        self._digests: dict[int, str] = {}
        self._device = device

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())).tensor)

    @property
    def n_numbers(self) -> int:
        """The size of a block."""
        return sum(self.rank * (n_in + n_out) for n_in, n_out in self.sizes.values())

    def block(self, index: int) -> Block:
        """Returns a block."""
        return {path: (self._rows[path, "A"].tensor[index], self._rows[path, "B"].tensor[index]) for path in self.sizes}

    def add(self, block: Block) -> None:
        """Adds a block."""
        for path, (a, b) in block.items():
            self._rows[path, "A"].extend(a.detach()[None])
            self._rows[path, "B"].extend(b.detach()[None])

    def truncate(self, n: int) -> None:
        """Removes all but the first `n` blocks."""
        for rows in self._rows.values():
            rows.truncate(n)
        self._digests = {index: digest for index, digest in self._digests.items() if index < n}

    def added(self, path: str, entering: Tensor, output: Tensor, blocks: Tensor) -> Tensor:
        """Returns a module's output with what the blocks of the rows add.

        Args:
            path: The module.
            entering: (B, T, D_in) its input.
            output: (B, T, D_out) its output; rows without a block stay as they are, bit for bit.
            blocks: (B,) blocks, `NO_BLOCK` for none. The block in training, if there is one, answers all.
        """
        if self.trained is not None:
            a, b = (part.to(output.device) for part in self.trained[path])
            update = entering.float() @ a @ b * self.scale
            return output + update.to(output.dtype)
        blocks = blocks.to(output.device)
        rows = (blocks != NO_BLOCK).nonzero()[:, 0]
        if not len(rows):
            return output
        a, b = (self._rows[path, name].tensor[blocks[rows].to(self._device)].to(output.device) for name in ("A", "B"))
        update = entering[rows].float() @ a @ b * self.scale
        return output.index_add(0, rows, update.to(output.dtype))

    def digest(self, index: int) -> str:
        """Returns a digest of a block's numbers, computed once."""
        if index not in self._digests:
            digest = hashlib.blake2b(digest_size=16)
            for maps in self.block(index).values():
                for one in maps:
                    digest.update(one.cpu().contiguous().numpy().tobytes())
            self._digests[index] = digest.hexdigest()
        return self._digests[index]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the blocks: (N, D_in, rank) and (N, rank, D_out) for each module."""
        return {f"{name}.{path}": rows.tensor.clone() for (path, name), rows in self._rows.items() if len(self)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        self.truncate(0)
        for (path, name), rows in self._rows.items():
            if f"{name}.{path}" in state:
                rows.extend(state[f"{name}.{path}"])
