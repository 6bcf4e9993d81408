"""The edits that WISE replays while it trains on another (Wang et al. 2024, appendix B.3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grace_bench.editing.batch import State

Request = tuple[str, str, str]
"""The prompt, the target and the irrelevant prompt of an edit."""


@dataclass
class PastEdits:
    """Earlier edits, in groups that end at merges.

    Attributes:
        finished: The groups whose memories were merged.
        present: The edits since the last merge.
        turns: For each finished group, how many of its edits were replayed so far.
    """

    finished: tuple[tuple[Request, ...], ...] = ()
    present: tuple[Request, ...] = ()
    turns: tuple[int, ...] = ()

    def add(self, request: Request, *, merged: bool) -> None:
        """Adds an edit, after which memories were merged or not."""
        self.present = (*self.present, request)
        if merged:
            self.finished, self.turns, self.present = (*self.finished, self.present), (*self.turns, 0), ()

    def next_finished(self) -> list[Request]:
        """Returns the next edit of each finished group, one after the other in every group."""
        found = [group[turn % len(group)] for group, turn in zip(self.finished, self.turns, strict=True)]
        self.turns = tuple(turn + 1 for turn in self.turns)
        return found

    def undo_point(self) -> Callable[[], None]:
        """Returns a function that undoes all later changes."""
        before = dict(vars(self))
        return lambda: vars(self).update(before)

    def state_dict(self) -> State:
        """Returns everything as JSON values, under one name."""
        groups = [[list(request) for request in group] for group in (*self.finished, self.present)]
        return {"past": {"groups": groups, "turns": list(self.turns)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        *finished, present = (tuple((a, b, c) for a, b, c in group) for group in state["past"]["groups"])
        self.finished, self.present, self.turns = tuple(finished), present, tuple(state["past"]["turns"])
