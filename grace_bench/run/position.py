"""The position of a run in its stream, and its next step."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from grace_bench.common.state import restored
from grace_bench.data.requests import EditRequest
from grace_bench.run.settings import Schedule


class Step(Enum):
    """The next step of a run."""

    EVALUATE = "evaluate"
    """Evaluate at the current number of edits, unless already done."""
    TAKE_CANDIDATE = "take a candidate"
    SETTLE = "settle"
    """Finish pending edits. If one of them fails, the candidates after it are repeated."""


@dataclass(frozen=True)
class _State:
    index: int
    edited: list[int]
    superseded: list[int]
    n_failed: int
    n_close: int
    last_evaluation: int | None


class Position:
    """The position of a run in its stream.

    Args:
        candidates: The candidates, in the order of the run.

    Attributes:
        index: Index of the next candidate.
        edited: Indices of the edited requests on which ERR is measured.
        superseded: Indices of the edited requests whose input was edited again with another target.
        n_failed: Number of failed edits, which still count as edits.
        n_close: Number of edits in which rounding could have changed a decision.
        last_evaluation: `n_edits` of the newest evaluation; None before the first.
    """

    def __init__(self, candidates: Sequence[EditRequest]) -> None:
        self._candidates = candidates
        self._by_prompt: defaultdict[str, list[int]] = defaultdict(list)
        self.index = 0
        self.edited: list[int] = []
        self.superseded: list[int] = []
        self.n_failed = 0
        self.n_close = 0
        self.last_evaluation: int | None = None

    @property
    def n_edits(self) -> int:
        """The number of edits so far, failed ones included."""
        return len(self.edited) + len(self.superseded)

    def advance(self, *, edited: bool) -> None:
        """Advances to the next candidate; `edited` says whether the current one was edited."""
        if edited:
            self._add(self.index)
        self.index += 1

    def go_back(self, index: int) -> None:
        """Makes a candidate the next one again: the editor undid its edit and those after it."""
        kept = sorted(i for i in (*self.edited, *self.superseded) if i < index)
        self.index, self.edited, self.superseded = index, [], []
        self._by_prompt.clear()
        for i in kept:
            self._add(i)

    def is_due(self, schedule: Schedule) -> bool:
        """Returns whether the schedule wants an evaluation before the next candidate."""
        if schedule.eval_every != "step":
            return schedule.is_due(self.n_edits)
        at, candidates = self.index, self._candidates
        return at == 0 or (at < len(candidates) and candidates[at].step != candidates[at - 1].step)

    def is_at_the_end(self, schedule: Schedule) -> bool:
        """Returns whether the stream is exhausted or the run has made all its edits."""
        return schedule.is_full(self.n_edits) or self.index >= len(self._candidates)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position as JSON values."""
        return asdict(
            _State(self.index, self.edited, self.superseded, self.n_failed, self.n_close, self.last_evaluation)
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        vars(self).update(asdict(restored(_State, state)))
        self._by_prompt.clear()
        for index in self.edited:
            self._by_prompt[self._candidates[index].prompt].append(index)

    def _add(self, index: int) -> None:
        request = self._candidates[index]
        same_input = self._by_prompt[request.prompt]
        # Running text has an empty prompt: its whole text is the target, so no text supersedes another.
        if request.prompt.strip():
            for earlier in [i for i in same_input if self._candidates[i].target != request.target]:
                same_input.remove(earlier)
                self.edited.remove(earlier)
                self.superseded.append(earlier)
        same_input.append(index)
        self.edited.append(index)


def reached_together(candidates: Sequence[EditRequest], most: int, *, by_step: bool = False) -> list[range]:
    """Returns the indices of the candidates in batches of at most `most`; only a larger group makes a larger batch.

    The members of a group follow each other, and are never separated.

    Args:
        candidates: The candidates, in the order of the run.
        most: The largest batch.
        by_step: Whether a batch ends where a time step ends.
    """
    batches: list[range] = []
    first = 0
    while first < len(candidates):
        end = _end_of_group(candidates, first)
        while end < len(candidates) and _end_of_group(candidates, end) - first <= most:
            if by_step and candidates[end].step != candidates[end - 1].step:
                break
            end = _end_of_group(candidates, end)
        batches.append(range(first, end))
        first = end
    return batches


def _end_of_group(candidates: Sequence[EditRequest], first: int) -> int:
    """The index after the group that begins with a candidate."""
    group, end = candidates[first].group, first + 1
    while group is not None and end < len(candidates) and candidates[end].group == group:
        end += 1
    return end


def walk(schedule: Schedule, position: Position) -> Iterator[Step]:
    """Yields the steps of a run, from its current position to its end.

    Args:
        schedule: When the run edits and evaluates.
        position: The current position. The caller advances it by each step before requesting the next.
    """
    while True:
        if position.is_due(schedule):
            yield Step.EVALUATE
        if not position.is_at_the_end(schedule):
            yield Step.TAKE_CANDIDATE
            continue
        yield Step.SETTLE
        if position.is_at_the_end(schedule):
            break
    yield Step.EVALUATE
