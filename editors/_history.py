"""What a codebook was at the edits of late."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_bench.editors.codebook import Codebook


class _Edit(NamedTuple):
    """What an edit found: the clock, how many entries there were, and those that it changed as they were before."""

    clock: int
    n_keys: int
    entries: list[int]
    radii: list[float]
    label_ids: list[int]


class _Value(NamedTuple):
    """The (D_out,) value of an entry before an edit, told by its clock, had it trained."""

    clock: int
    entry: int
    value: Tensor


class History:
    """What changed in a codebook since `clear`, so that it can be read as it was.

    An edit adds an entry at most, and changes radii and labels of few. Keys never change. Values do when they are
    trained, which is later than the edit they are trained for.

    Args:
        codebook: The codebook.
    """

    def __init__(self, codebook: Codebook) -> None:
        self._codebook = codebook
        self._edits: list[_Edit] = []
        self._values: list[_Value] = []

    def clear(self) -> None:
        """Begins with the codebook as it is now."""
        self._edits, self._values = [], []

    @contextmanager
    def noting(self, clock: int) -> Iterator[None]:
        """Notes what one edit changes, values aside.

        Args:
            clock: Edits made before it.
        """
        radii, label_ids = self._codebook.radii.clone(), self._codebook.label_ids.clone()
        yield
        n = len(radii)
        changed = (self._codebook.radii[:n] != radii) | (self._codebook.label_ids[:n] != label_ids)
        entries = torch.nonzero(changed)[:, 0]
        found = _Edit(clock, n, entries.tolist(), radii[entries].tolist(), label_ids[entries].tolist())
        self._edits.append(found)

    def note_value(self, clock: int, entry: int) -> None:
        """Notes the value of an entry that is about to be trained for the edit before which the clock stood here."""
        self._values.append(_Value(clock, entry, self._codebook.values[entry].clone()))

    def as_of(self, clock: int) -> tuple[Codebook, set[int]]:
        """Returns the codebook as it was when the clock stood there, and the entries whose values were others then.

        Values that are still to be trained for an edit before are those from before their training.
        """
        undone = [edit for edit in self._edits if edit.clock >= clock]
        n = undone[0].n_keys if undone else len(self._codebook)
        radii, label_ids = self._codebook.radii[:n].clone(), self._codebook.label_ids[:n].clone()
        for edit in reversed(undone):
            older = [i for i, entry in enumerate(edit.entries) if entry < n]
            for i in older:
                radii[edit.entries[i]], label_ids[edit.entries[i]] = edit.radii[i], edit.label_ids[i]
        values = self._codebook.values[:n]
        others = [value for value in self._values if value.clock >= clock and value.entry < n]
        if others:
            values = values.clone()
            for value in reversed(others):
                values[value.entry] = value.value
        return self._codebook.as_it_was(radii, label_ids, values), {value.entry for value in others}

    def state_dict(self) -> dict[str, Any]:
        """Returns what is noted: JSON values, and the (M, D_out) values."""
        values = [value.value for value in self._values]
        return {
            "history": {"edits": [list(edit) for edit in self._edits], "trained": [[*v[:2]] for v in self._values]},
            **({"history_values": torch.stack(values)} if values else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `state_dict`, or one without a history."""
        noted = state.get("history", {"edits": [], "trained": []})
        self._edits = [_Edit(*edit) for edit in noted["edits"]]
        values = [value.to(self._codebook.values.device) for value in state.get("history_values", ())]
        self._values = [
            _Value(clock, entry, value) for (clock, entry), value in zip(noted["trained"], values, strict=True)
        ]
