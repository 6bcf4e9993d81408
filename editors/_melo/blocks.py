"""MELO's dynamic LoRA: low-rank blocks beside linear modules, of which each input gets at most one."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from grace_bench.editing.guard import check_loss, size_failure
from grace_bench.editors._melo.clusters import NO_BLOCK
from grace_bench.editors._rows import Rows
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch

_HALVED_EVERY = 20
_N_DEFAULT = 2
"""The number of modules, where none are named; the authors take two in GPT2-XL."""

Block = dict[str, tuple[Tensor, Tensor]]
"""By the path of a module, A (D_in, rank) and B (rank, D_out)."""


class Blocks:
    """Low-rank blocks: each has an A and a B for every module, and adds n x A B to what the module gives (section 3.2).

    The factor n is the planned number of blocks: blocks are slices of one LoRA whose alpha is its rank, scaled up by
    its rank over theirs.

    Args:
        sizes: D_in and D_out of each module, by its path.
        rank: The rank of a block.
        n_planned: n.
        seed: Seeds the first A of every block.
        device: Where the tensors are.
    """

    def __init__(
        self, sizes: Mapping[str, tuple[int, int]], *, rank: int, n_planned: int, seed: int, device: torch.device
    ) -> None:
        self.sizes = dict(sizes)
        self.rank = rank
        self.n_planned = n_planned
        self.trained: Block | None = None
        """The block in training, which then answers every input; None outside training."""
        self.draw: Callable[[int], Block] = self._drawn
        """Returns the block with which the training of a batch begins, given its number."""
        self._seed = seed
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

    def train(self, model: EditableModel, encoded: EncodedBatch, *, n_iter: int, lr: float) -> list[float]:
        """Trains a block on a batch and adds it.

        Returns:
            The loss before each step of Adam, and after the last.

        Raises:
            EditFailure: If a loss or the block is not finite.
        """
        block = self.draw(len(self))
        parameters = [part.requires_grad_() for maps in block.values() for part in maps]
        sizes = [_largest(part) for part in parameters]
        adam = torch.optim.Adam(parameters, lr=lr)
        decay = torch.optim.lr_scheduler.StepLR(adam, _HALVED_EVERY, 0.5)
        losses: list[float] = []
        self.trained = block
        try:
            repeated = model.repeated(encoded)
            for step in range(n_iter):
                adam.zero_grad()
                loss = model.task.loss(repeated(), repeated.batch)
                losses.append(float(loss.detach()))
                check_loss(losses[-1], step)
                loss.backward()
                adam.step()
                decay.step()
            with torch.no_grad():
                losses.append(float(model.task.loss(repeated(), repeated.batch)))
        finally:
            self.trained = None
        failures = (
            size_failure("the block", size, _largest(part)) for part, size in zip(parameters, sizes, strict=True)
        )
        failure = next((failure for failure in failures if failure is not None), None)
        if failure is not None:
            raise EditFailure(failure)
        self.add(block)
        return losses

    def _drawn(self, index: int) -> Block:
        """A block with A uniform in +-1 / sqrt(n rank), and B zero."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        bound = (self.n_planned * self.rank) ** -0.5
        block = {}
        for path, (n_in, n_out) in self.sizes.items():
            a = (2 * torch.rand(n_in, self.rank, generator=generator) - 1) * bound
            block[path] = (a.to(self._device), torch.zeros(self.rank, n_out, device=self._device))
        return block

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
            update = entering.float() @ a @ b * self.n_planned
            return output + update.to(output.dtype)
        blocks = blocks.to(output.device)
        rows = (blocks != NO_BLOCK).nonzero()[:, 0]
        if not len(rows):
            return output
        a, b = (self._rows[path, name].tensor[blocks[rows].to(self._device)].to(output.device) for name in ("A", "B"))
        update = entering[rows].float() @ a @ b * self.n_planned
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


def later_layers(model: EditableModel) -> list[str]:
    """Returns the modules that have the name of the model's layer in the two blocks behind it.

    Where there are none, it is the layer itself.
    """
    modules = dict(model.module.named_modules())
    found = re.match(r"(.*?\.)(\d+)(\..*)?$", model.layer_name)
    if found is None:
        return [model.layer_name]
    later = [f"{found[1]}{int(found[2]) + step}{found[3] or ''}" for step in range(1, _N_DEFAULT + 1)]
    return [path for path in later if path in modules] or [model.layer_name]


def _largest(part: Tensor) -> float:
    return float(part.detach().abs().max())
