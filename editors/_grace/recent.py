"""The edits since the last flush: their outcomes, their pending values, and how to undo them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from grace_bench.editing.batch import EditOutcome
from grace_bench.editing.guard import is_programming_error, reason_of_failure
from grace_bench.editors._grace.codebook import Before, Codebook
from grace_bench.editors._grace.history import History
from grace_bench.editors._grace.values import Training, ValueTraining
from grace_bench.editors._grace.versions import Versions
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, stack

# More tokens at once cost memory and save no time: arithmetic is the limit by then.
_TRAINED_TOKENS = 2048


class _Pending(NamedTuple):
    """An edit whose value is pending: the index of its outcome, its request, and the entry that answers it."""

    place: int
    prompt: str
    target: str | int
    encoded: EncodedBatch
    answering: int


class RecentEdits:
    """The edits since the last flush.

    Keys, radii and labels never depend on values, so values are left pending, to be trained together: those of
    different entries do not depend on each other. If the training of one fails, its edit and all after it are undone.

    Args:
        model: The model to edit.
        codebook: Its entries.
        values: Trains values of the codebook.
        versions: The digests of values; those of changed values are dropped.
    """

    def __init__(self, model: EditableModel, codebook: Codebook, values: ValueTraining, versions: Versions) -> None:
        self._model = model
        self._codebook = codebook
        self._values = values
        self._versions = versions
        self._history = History(codebook)
        self._pending: dict[int, _Pending] = {}
        self.outcomes: list[EditOutcome] = []
        """The outcomes of the edits, in order; a failed one is the last."""
        self.n_settled = 0
        """The number of edits settled since the codebook was empty."""

    @property
    def n_pending(self) -> int:
        """The number of pending values."""
        return len(self._pending)

    @property
    def failed(self) -> str | None:
        """Why the last edit failed, so that it and all after it were undone; None if none failed."""
        return self.outcomes[-1].failed if self.outcomes else None

    def is_pending(self, entry: int) -> bool:
        """Whether the value of an entry is pending."""
        return entry in self._pending

    def begin(self) -> None:
        """Forgets how to undo the edits of the last flush, if no edit followed it."""
        if not self.outcomes:
            self._history.clear()

    def add(
        self,
        outcome: EditOutcome,
        before: Before,
        *,
        n_edits: int,
        prompt: str,
        target: str | int,
        encoded: EncodedBatch,
        answering: int,
    ) -> None:
        """Adds a settled edit and leaves its value pending.

        Args:
            outcome: Its outcome, whose `key` is the entry with the pending value.
            before: The changed part of the codebook, as it was before the edit.
            n_edits: The number of edits before it.
            prompt: The prompt.
            target: The target.
            encoded: Both as tensors.
            answering: The entry that answers the prompt, -1 for none.
        """
        assert outcome.key is not None
        entry, place = outcome.key, len(self.outcomes)
        self._history.record(n_edits, before, entry)
        self.outcomes.append(outcome)
        self.n_settled += 1
        if entry in self._pending:
            # Training for this edit starts from the value that the earlier edit produces.
            self.train()
            if self.failed is not None:
                return
        self._pending[entry] = _Pending(place, prompt, target, encoded, answering)

    def train(self) -> None:
        """Trains the pending values, those of similar size together; undoes the first failed edit and all after it."""
        entries = list(self._pending)
        tokens = [pending.encoded.n_positions for pending in self._pending.values()]
        failures: dict[int, str] = {}
        for chunk in self._model.task.batches(tokens, most_tokens=_TRAINED_TOKENS):
            chosen = [entries[i] for i in chunk]
            for entry, training in zip(chosen, self._train(chosen), strict=True):
                place = self._pending[entry].place
                if training.failed is not None:
                    failures[place] = training.failed
                    continue
                losses = training.losses
                self.outcomes[place] = replace(
                    self.outcomes[place], loss_first=losses[0], loss=losses[-1], steps=len(losses)
                )
        self._pending = {}
        if failures:
            first = min(failures)
            self.undo(first)
            self.outcomes.append(EditOutcome(failed=failures[first]))

    def _train(self, entries: Sequence[int]) -> list[Training]:
        """Trains values together; after an error one by one, to find the edit to blame."""
        chosen = [self._pending[entry] for entry in entries]
        encoded = stack([pending.encoded for pending in chosen])
        if not self._model.pads(encoded):
            trained: dict[int, Training] = {}
            for rows in encoded.equally_long:
                trained.update(zip(rows, self._train([entries[row] for row in rows]), strict=True))
            return [trained[row] for row in range(len(entries))]
        for entry, pending in zip(entries, chosen, strict=True):
            self._history.record_value(pending.place)
            self._versions.forget(entry)
        try:
            return self._values.train(entries, [pending.answering for pending in chosen], encoded)
        except Exception as error:
            reason = reason_of_failure(error)
            # The traceback of a programming error is worth more than the outcomes of the other edits.
            if reason is None or is_programming_error(error):
                raise
            if len(entries) == 1:
                return [Training((), reason)]
            return [training for entry in entries for training in self._train([entry])]

    def undo_point(self) -> int:
        """Returns the number of edits so far, which `undo` takes."""
        return len(self._history) if self.outcomes else 0

    def undo(self, n: int) -> None:
        """Undoes all edits but the first n."""
        self.n_settled -= len(self._history) - n
        for entry in self._history.undo(n):
            self._versions.forget(entry)
        del self.outcomes[n:]
        self._pending = {entry: pending for entry, pending in self._pending.items() if pending.place < n}

    def flush(self) -> list[EditOutcome]:
        """Trains the pending values, returns the outcomes and starts over. The past stays readable until `begin`."""
        self.train()
        outcomes, self.outcomes = self.outcomes, []
        return outcomes

    def as_of(self, n_edits: int) -> tuple[Codebook, set[int]]:
        """Returns the codebook after `n_edits` edits, and the entries with other values (see `History.as_of`)."""
        return self._history.as_of(n_edits)

    def clear(self) -> None:
        """Forgets every edit; the codebook is empty."""
        self.n_settled = 0
        self.outcomes, self._pending = [], {}
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        """Returns JSON values and tensors."""
        state: dict[str, Any] = {"n_settled": self.n_settled}
        if self.outcomes:
            state["outcomes"] = [asdict(outcome) for outcome in self.outcomes]
            state["pending"] = [
                [entry, pending.place, pending.prompt, pending.target, pending.answering]
                for entry, pending in self._pending.items()
            ]
            state |= self._history.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, after the codebook."""
        self.n_settled = int(state["n_settled"])
        self.outcomes = [EditOutcome(**outcome) for outcome in state.get("outcomes", ())]
        self._pending = {
            entry: _Pending(place, prompt, target, self._model.encode_batch([prompt], [target]), answering)
            for entry, place, prompt, target, answering in state.get("pending", ())
        }
        self._history.load_state_dict(state)
