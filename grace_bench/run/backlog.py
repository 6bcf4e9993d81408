"""The backlog of a run: candidates whose records are not written yet, and evaluations queued behind them.

An editor may leave values pending, to train those of several edits together. Until they are trained, the model's
answers are unknown. So the scores right after these edits, and evaluations due in between, are computed when the
backlog is settled, each with the editor as it was at that number of edits.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

from grace_bench.common.state import copied, restored
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditOutcome
from grace_bench.editing.guard import failed_outcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import EditFailure
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.tasks.base import ItemScore
from grace_bench.run.cost import CostMeter
from grace_bench.run.position import Position

ScoredAfter = Mapping[str, Sequence[ItemScore]]
"""What was scored right after an edit, by the name of its stream, `edited` for the request; empty without an edit."""
LOOKAHEAD = 32
"""Maximum number of candidates scored together, and of edits in the backlog."""


@dataclass
class PendingCandidate:
    """A candidate whose record is not written yet.

    Attributes:
        index: Its index in the stream.
        n_edits: Edits made so far, its own included.
        before: Its score before the edit.
        outcome: The outcome of its edit; None if it was not edited. The score after the edit is not known yet.
        seconds: Duration of its edit so far.
    """

    index: int
    n_edits: int
    before: ItemScore
    outcome: EditOutcome | None = None
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns the candidate as JSON values, with only the recorded part of its score."""
        outcome = None if self.outcome is None else asdict(self.outcome)
        return {**vars(self), "before": self.before.state_dict(), "outcome": outcome}


@dataclass(frozen=True)
class QueuedEvaluation:
    """An evaluation that is due, with the run's position at that time.

    Attributes:
        index: Index of the candidate that it follows, -1 before the first.
        n_edits: Edits made so far.
        edited, superseded: As in `Position`.
    """

    index: int
    n_edits: int
    edited: list[int]
    superseded: list[int]


class Backlog:
    """The candidates and evaluations that a run has not recorded yet, in stream order.

    Args:
        strategy: The editor.
        rescorer: Scores candidates and evaluation streams.
        position: The run's position; set back if a pending edit fails.
        candidates: All candidates of the stream.
        meter: Counts the time spent scoring.
        requests_of: Returns all requests that an evaluation scores.
        related_to: Returns the requests beside a candidate's own that are scored right after its edit, by the name of
            their stream.
    """

    def __init__(
        self,
        *,
        strategy: EditorStrategy,
        rescorer: Rescorer,
        position: Position,
        candidates: Sequence[EditRequest],
        meter: CostMeter,
        requests_of: Callable[[QueuedEvaluation], Sequence[EditRequest]],
        related_to: Callable[[EditRequest], Mapping[str, Sequence[EditRequest]]],
    ) -> None:
        self._strategy = strategy
        self._rescorer = rescorer
        self._position = position
        self._candidates = candidates
        self._meter = meter
        self._requests_of = requests_of
        self._related_to = related_to
        self._entries: list[PendingCandidate | QueuedEvaluation] = []
        # After a flush that raised, edits up to this index are flushed one by one, which shows the one to blame.
        self._alone_until = -1

    @property
    def n_edits(self) -> int:
        """The number of edits in the backlog."""
        return sum(isinstance(entry, PendingCandidate) and entry.outcome is not None for entry in self._entries)

    def add_candidate(self, candidate: PendingCandidate) -> None:
        """Appends a candidate."""
        self._entries.append(candidate)

    def queue_evaluation(self) -> None:
        """Appends an evaluation at the run's current position."""
        at = self._position
        self._entries.append(QueuedEvaluation(at.index - 1, at.n_edits, [*at.edited], [*at.superseded]))

    def has_evaluation(self, n_edits: int) -> bool:
        """Returns whether an evaluation at this number of edits is queued."""
        return any(isinstance(entry, QueuedEvaluation) and entry.n_edits == n_edits for entry in self._entries)

    def must_settle(self) -> bool:
        """Returns whether the backlog must be settled before the next candidate."""
        is_alone = self._position.index - 1 <= self._alone_until
        return is_alone or not 0 < self._strategy.n_pending < LOOKAHEAD

    def settle(
        self,
        *,
        record: Callable[[PendingCandidate, ScoredAfter], None],
        evaluate: Callable[[QueuedEvaluation], None],
    ) -> None:
        """Finishes pending edits and empties the backlog.

        The edits share the time of finishing equally. If one of them fails, the position is set back to the candidate
        after it, and the backlog forgets what came later.

        Args:
            record: Called with each candidate and what was scored right after its edit.
            evaluate: Called with each queued evaluation, to run it.
        """
        self._flush()
        entries, self._entries = self._entries, []
        edits = [entry for entry in entries if isinstance(entry, PendingCandidate) and entry.outcome is not None]
        evaluations = [entry for entry in entries if isinstance(entry, QueuedEvaluation)]
        with self._rescorer.keeping_versions():
            after = self._score_after(edits, evaluations)
            for entry in entries:
                with self._as_of(entry.n_edits):
                    if isinstance(entry, PendingCandidate):
                        record(entry, after.get(entry.index, {}))
                    else:
                        evaluate(entry)

    def state_dict(self) -> dict[str, Any]:
        """Returns the backlog, and the state that determines how later edits are grouped, as JSON values."""
        return {
            "candidates": [entry.state_dict() for entry in self._entries if isinstance(entry, PendingCandidate)],
            "evaluations": [
                [place, copied(vars(entry))]
                for place, entry in enumerate(self._entries)
                if isinstance(entry, QueuedEvaluation)
            ],
            "alone_until": self._alone_until,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""
        candidates = [restored(PendingCandidate, candidate) for candidate in state["candidates"]]
        if not all(0 <= candidate.index < len(self._candidates) for candidate in candidates):
            raise ValueError("a pending candidate is not in the stream")
        self._entries = [*candidates]
        for place, evaluation in state["evaluations"]:
            self._entries.insert(place, restored(QueuedEvaluation, evaluation))
        self._alone_until = int(state["alone_until"])

    def _as_of(self, n_edits: int) -> AbstractContextManager[None]:
        return self._strategy.as_of(n_edits) if self._strategy.knows_past else nullcontext()

    def _score_after(
        self, edits: Sequence[PendingCandidate], evaluations: Sequence[QueuedEvaluation]
    ) -> dict[int, ScoredAfter]:
        """Scores requests right after their edits, by index, together with the requests of queued evaluations."""
        scorer, together = self._rescorer, [self._candidates[edit.index] for edit in edits]
        if len(evaluations) > 1:
            # Few answers differ between these evaluations, so most scores can be copied from the last one.
            together += self._requests_of(evaluations[-1])
        with self._meter.scoring(), scorer.evaluation() if len(evaluations) > 1 else nullcontext():
            after = dict(zip([edit.index for edit in edits], scorer.score(together), strict=False))
            changed: set[int | None] = set()
            for edit in reversed(edits if self._strategy.knows_past else ()):
                assert edit.outcome is not None
                # An entry that a later edit changed or displaced may have answered differently.
                is_past = edit.outcome.key in changed or after[edit.index].entry != edit.outcome.key
                if is_past and edit is not edits[-1]:
                    with self._as_of(edit.n_edits):
                        after[edit.index] = scorer.score([self._candidates[edit.index]])[0]
                changed.add(edit.outcome.key)
            return {
                edit.index: {"edited": [after[edit.index]], **related}
                for edit, related in zip(edits, self._score_related(edits), strict=True)
            }

    def _score_related(self, edits: Sequence[PendingCandidate]) -> list[ScoredAfter]:
        """Scores what is related to each edit, right after it."""
        related = [self._related_to(self._candidates[edit.index]) for edit in edits]
        if not any(related):
            return [{} for _ in edits]
        each = [[request for requests in streams.values() for request in requests] for streams in related]
        knows_past = self._strategy.knows_past
        items: Iterator[ItemScore] = iter(())
        if self._rescorer.is_incremental or not knows_past:
            # Few answers differ between these edits, so most scores are those of the last one; without a past, all are.
            items = iter(self._rescorer.score(list(chain(*each))))
        scored: list[ScoredAfter] = []
        for edit, streams, requests in zip(edits, related, each, strict=True):
            if knows_past:
                with self._as_of(edit.n_edits):
                    items = iter(self._rescorer.score(requests))
            scored.append({name: [next(items) for _ in of_stream] for name, of_stream in streams.items()})
        return scored

    def _flush(self) -> None:
        """Finishes the pending edits; if one fails, sets the run's position back."""
        # An edit that failed immediately has nothing to finish.
        edits = [
            entry
            for entry in self._entries
            if isinstance(entry, PendingCandidate) and entry.outcome is not None and entry.outcome.failed is None
        ]
        if not edits:
            return
        started = time.perf_counter()
        try:
            flushed = self._strategy.finish()
        except EditFailure as failure:
            if len(edits) > 1:
                self._alone_until = edits[-1].index
                self._go_back(edits[0].index)
                return
            flushed = [failed_outcome(failure)]
        share = (time.perf_counter() - started) / len(edits)
        for edit in edits:
            edit.seconds += share
        for edit, outcome in zip(edits, flushed, strict=False):
            edit.outcome = outcome
        if flushed and flushed[-1].failed is not None:
            self._go_back(edits[len(flushed) - 1].index + 1)
        elif flushed and len(flushed) != len(edits):
            raise RuntimeError(f"flush gave {len(flushed)} outcomes of {len(edits)} edits")

    def _go_back(self, index: int) -> None:
        """Makes a candidate the next one again: the editor undid its edit and those after it."""
        self._position.go_back(index)
        self._strategy.n_edits = self._position.n_edits
        self._entries = [entry for entry in self._entries if entry.index < index]
