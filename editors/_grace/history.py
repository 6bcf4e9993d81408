"""The most recent edits, so that they can be undone or looked back on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_bench.editors._grace.codebook import Before, Codebook


@dataclass
class _Made:
    """An edit: how many edits came before, its changes, its entry, and the entry's (D_out,) value before training."""

    n_edits: int
    before: Before
    entry: int
    value: Tensor | None = None


class History:
    """The changes that edits made to a codebook since `clear`, so that they can be undone, or the past be read.

    An edit adds at most one entry, and changes the radii and labels of few. Keys never change. A value changes when it
    is trained, which may be later than the edit it is trained for.

    Args:
        codebook: The codebook.
    """

    def __init__(self, codebook: Codebook) -> None:
        self._codebook = codebook
        self._made: list[_Made] = []

    def __len__(self) -> int:
        return len(self._made)

    def clear(self) -> None:
        """Forgets every edit; the codebook stays as it is."""
        self._made = []

    def record(self, n_edits: int, before: Before, entry: int) -> None:
        """Records an edit.

        Args:
            n_edits: The number of edits before it.
            before: `before` of its settlement.
            entry: The entry whose value is to be trained for it.
        """
        self._made.append(_Made(n_edits, before, entry))

    def record_value(self, place: int) -> None:
        """Records the value that is about to be trained for the edit at a place."""
        made = self._made[place]
        made.value = self._codebook.values[made.entry].clone()

    def undo(self, n: int) -> set[int]:
        """Undoes all but the first n edits; returns the entries whose values may have changed."""
        entries = set()
        for made in reversed(self._made[n:]):
            if made.value is not None:
                self._codebook.values[made.entry] = made.value
            self._codebook.undo(made.before)
            entries.add(made.entry)
        del self._made[n:]
        return entries

    def as_of(self, n_edits: int) -> tuple[Codebook, set[int]]:
        """Returns the codebook as it was after `n_edits` edits, and the entries whose values differ from today's.

        A value that was pending then and has been trained since is the trained one.
        """
        undone = [made for made in self._made if made.n_edits >= n_edits]
        n = undone[0].before.n_entries if undone else len(self._codebook)
        before, others = Before(n), {}
        for made in reversed(undone):
            before.radii.update({entry: radius for entry, radius in made.before.radii.items() if entry < n})
            before.labels.update({entry: label for entry, label in made.before.labels.items() if entry < n})
            if made.value is not None and made.entry < n:
                others[made.entry] = made.value
        values = self._codebook.values[:n]
        if others:
            values = values.clone()
            values[[*others]] = torch.stack([*others.values()])
        return self._codebook.as_it_was(before, values), set(others)

    def state_dict(self) -> dict[str, Any]:
        """Returns the edits: JSON values, and the (M, D_out) earlier values of the entries that were trained."""
        values = [made.value for made in self._made if made.value is not None]
        edits = [
            [
                made.n_edits,
                made.before.n_entries,
                [[entry, radius] for entry, radius in made.before.radii.items()],
                [[entry, [*label], mean] for entry, (label, mean) in made.before.labels.items()],
                made.entry,
                made.value is not None,
            ]
            for made in self._made
        ]
        return {"history": edits, **({"history_values": torch.stack(values)} if values else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, or one without a history."""
        values = iter(state.get("history_values", ()))
        self._made = [
            _Made(
                n_edits,
                Before(n_entries, dict(radii), {one: (tuple(label), mean) for one, label, mean in labels}),
                entry,
                next(values).to(self._codebook.values.device) if is_trained else None,
            )
            for n_edits, n_entries, radii, labels, entry, is_trained in state.get("history", ())
        ]
