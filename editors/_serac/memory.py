"""SERAC's memory: edits in order, with the embeddings that questions are compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grace_bench.editing.batch import State
from grace_bench.editors._rows import Rows
from grace_bench.editors._serac.networks import Distance, distances
from grace_bench.errors import EditFailure


class EditMemory:
    """Stores edits and finds the one that is most similar to a question.

    Args:
        width: The length D of an embedding.
        device: Where embeddings are.
        distance: The kind of distance.
        heads: The number of parts of an embedding.
        bound: Whether tanh bounds embeddings.
    """

    def __init__(self, width: int, *, device: torch.device, distance: Distance, heads: int, bound: bool) -> None:
        self.width = width
        self.facts: list[tuple[str, str]] = []
        """The prompts and targets of all edits."""
        self._keys = Rows(0, width, device=device)
        self._how: dict[str, Any] = {"kind": distance, "heads": heads, "bound": bound}

    def __len__(self) -> int:
        return len(self.facts)

    def add(self, prompt: str, target: str, key: Tensor) -> None:
        """Adds an edit with its (D,) embedding.

        Raises:
            EditFailure: If that is not finite.
        """
        if not bool(key.isfinite().all()):
            raise EditFailure("the embedding of the prompt is not finite")
        self._keys.extend(key[None])
        self.facts.append((prompt, target))

    def log_similarities(self, query: Tensor) -> Tensor:
        """Returns the (N,) float64 logarithms of the similarities of a (D,) embedding to all edits."""
        # In float64, on the CPU and one question at a time, they depend on nothing but the two embeddings.
        return -distances(query.cpu().double(), self._keys.tensor.cpu().double(), **self._how)

    def nearest(self, query: Tensor) -> tuple[float, int]:
        """Returns the similarity of the edit most similar to a (D,) embedding, and its number; the newest in ties."""
        similarities = self.log_similarities(query)
        best = similarities.max()
        return float(best.exp()), int((similarities == best).nonzero()[-1])

    def truncate(self, n: int) -> None:
        """Removes all but the first `n` edits."""
        del self.facts[n:]
        self._keys.truncate(n)

    def keep(self, indices: Sequence[int]) -> None:
        """Removes all edits but some, given in order."""
        keys, facts = self._keys.tensor[indices], [self.facts[index] for index in indices]
        self.truncate(0)
        self._keys.extend(keys)
        self.facts = facts

    def state_dict(self) -> State:
        """Returns all edits."""
        return {"keys": self._keys.tensor, "facts": [list(fact) for fact in self.facts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`.

        Raises:
            RuntimeError: If there is not one embedding of every edit.
        """
        keys, facts = state["keys"], state["facts"]
        if keys.shape != (len(facts), self.width):
            raise RuntimeError(f"keys are {tuple(keys.shape)}, not {(len(facts), self.width)}")
        self.truncate(0)
        self._keys.extend(keys.to(self._keys.tensor.device, torch.float32))
        self.facts = [(prompt, target) for prompt, target in facts]
