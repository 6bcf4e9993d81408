"""The base class of editors with a codebook: undo, state, and what answers a query."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.batch import Answered, EditOutcome, NamedEdit, State
from grace_bench.editing.commands import FigureKind
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._grace.codebook import Codebook, Retrieval
from grace_bench.editors._grace.recent import RecentEdits
from grace_bench.editors._grace.values import ValueTraining
from grace_bench.editors._grace.versions import Versions
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall, Replacement


class CodebookEditor(EditorStrategy):
    """An editor that answers from a codebook in front of one layer.

    Args:
        model: The model to edit.
        codebook: An empty codebook.
        n_iter: Steps of Adam on a value.
        lr: Learning rate of Adam.
        replacement: The positions of the layer's output that a value overwrites.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.
    """

    figures: ClassVar[Mapping[str, FigureKind]] = {
        "sweep": {
            "draw": "grace_bench.editors._grace.figures.sweep:draw_sweep",
            "takes": "runs",
            "shows": "scores of grace by deferral radius and edited block",
        },
        "overlap": {
            "draw": "grace_bench.editors._grace.figures.overlap:draw_overlap",
            "takes": "runs",
            "shows": "how the balls of codebooks come to overlap",
        },
        "toy": {
            "draw": "grace_bench.editors._grace.figures.toy:draw_toy",
            "takes": "options",
            "shows": "grace on points in the plane, its balls drawn; takes the options of a run",
        },
        "separability": {
            "draw": "grace_bench.editors._grace.figures.separability:draw_separability",
            "takes": "options",
            "shows": (
                "how well distance at a layer predicts that two inputs want the same answer; takes stream=, model= and "
                "other options of a run, several layers as layer=a,b and distance=a,b"
            ),
        },
    }
    traces = "grace_bench.editors._grace.traces:replay_file"

    def __init__(
        self,
        *,
        model: EditableModel,
        codebook: Codebook,
        n_iter: int,
        lr: float,
        replacement: Replacement,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        self.codebook = codebook
        self.replacement: Replacement = replacement
        self.values = ValueTraining(model, codebook, n_iter=n_iter, lr=lr, replacement=replacement)
        """Trains the values of the codebook."""
        self.versions = Versions(codebook)
        """The digests of the values."""
        self.recent = RecentEdits(model, codebook, self.values, self.versions)
        """The edits since the last flush."""
        self.intercept(self._answer)

    @property
    def needs_upstream(self) -> bool:
        return self.codebook.needs_whitening

    def calibrate(self, queries: Tensor) -> None:
        if self.codebook.distance != "mahalanobis":
            super().calibrate(queries)
        self.codebook.whiten(queries)

    def _answer(self, call: LayerCall) -> Tensor:
        """Overwrites the layer's output where a query lies within an entry's radius (Equation 2)."""
        if self.values.is_training:
            return self.values.answer(call)
        if not len(self.codebook):
            return call.output
        found = call.remember("grace", lambda: self._look_up(call))
        return call.replace(self.codebook.values[found.entry], found.hit, self.replacement)

    def _look_up(self, call: LayerCall) -> Retrieval:
        found = self.codebook.retrieve(call.query)
        call.state.entry = torch.where(found.hit, found.entry, -1)
        call.state.distance = found.distance
        call.state.contested = self.codebook.contested(call.query)
        return found

    def answered_by(self, queries: Tensor) -> Answered:
        if not len(self.codebook):
            return Answered([None] * len(queries))
        queries = queries.to(self.codebook.keys.device)
        found = self.codebook.retrieve(queries)
        entry = torch.where(found.hit, found.entry, -1)
        return Answered(
            versions=[None if e < 0 else self.versions[e] for e in entry.tolist()],
            pending=[self.recent.is_pending(e) for e in entry.tolist()] if self.n_pending else (),
            entry=entry,
            distance=found.distance,
            contested=self.codebook.contested(queries),
        )

    def forget(self, edit: NamedEdit, others: Sequence[NamedEdit]) -> None:
        """Removes the entry that the edit made.

        Radii that earlier made room for the entry stay as they are.

        Raises:
            UserError: If another edit made the entry that answers the edit, or the entry may answer other edits too.
        """
        entry = self._made_for(edit)
        shared = f"editor '{self.registered_name}' cannot undo edit '{edit.request_id}' alone: "
        if entry is None:
            raise UserError(f"{shared}its entry was made by another edit")
        twin = next((other for other in others if self._answering(other) == entry), None)
        if twin is not None:
            raise UserError(f"{shared}its entry also answers edit '{twin.request_id}'")
        if edit.is_followed:
            raise UserError(f"{shared}its entry may answer later edits, which have no request id")
        self.codebook.remove(entry)
        self.versions.clear()
        self.recent.begin()

    def _query_of(self, edit: NamedEdit) -> Tensor:
        """(1, D_in) the query of an edit."""
        return self.model.layer_call(self.model.encode_batch([edit.prompt], [edit.target])).query

    def _made_for(self, edit: NamedEdit) -> int | None:
        """The entry whose key is an edit's query; None if there is none."""
        return self.codebook.entry_at(self._query_of(edit)[0]) if len(self.codebook) else None

    def _answering(self, edit: NamedEdit) -> int | None:
        """The entry that answers an edit; None if none does."""
        found = self.codebook.retrieve(self._query_of(edit))
        return int(found.entry[0]) if found.hit[0] else None

    @property
    def n_pending(self) -> int:
        return self.recent.n_pending

    def flush(self) -> Sequence[EditOutcome]:
        return self.recent.flush()

    def undo_point(self) -> Callable[[], None]:
        n = self.recent.undo_point()
        return lambda: self.recent.undo(n)

    @contextmanager
    def as_of(self, n_edits: int) -> Iterator[None]:
        now = self.codebook, self.versions, self.n_edits
        self.codebook, changed = self.recent.as_of(n_edits)
        if changed:
            self.versions = self.versions.of(self.codebook, without=changed)
        self.n_edits = n_edits
        try:
            yield
        finally:
            self.codebook, self.versions, self.n_edits = now

    def changing_state(self) -> State:
        # Values are checked when they are trained; copying a codebook for every edit would cost more than the edit.
        return {}

    def rollback(self) -> None:
        super().rollback()
        self.codebook.clear()
        self.versions.clear()
        self.recent.clear()

    def state_dict(self) -> State:
        return {**super().state_dict(), **self.codebook.state_dict(), **self.recent.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.codebook.load_state_dict(state)
        self.versions.clear()
        self.recent.load_state_dict(state)

    def max_extra_parameters(self, n_edits: int) -> int:
        # In the worst case every edit adds an entry: a key, a value and a radius.
        whitening = self.codebook.whitening
        constant = 0 if whitening is None else whitening.matrix.numel() + whitening.mean.numel()
        return constant + n_edits * (self.codebook.keys.shape[1] + self.codebook.values.shape[1] + 1)
