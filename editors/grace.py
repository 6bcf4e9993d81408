"""GRACE: General Retrieval Adaptors for Continual Editing (Hartvigsen et al., NeurIPS 2023)."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.failures import reason_of_failure
from grace_bench.editing.strategy import Answered, EditBatch, EditorStrategy, EditOutcome, State
from grace_bench.editors._grace.codebook import Codebook, Distance, Fidelity, Overlap, Retrieval
from grace_bench.editors._grace.history import History
from grace_bench.editors._grace.values import Training, ValueTraining
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel, LayerCall, Replacement
from grace_bench.models.encoding import EncodedBatch, stack
from grace_bench.registry import register_editor

ValueInit = Literal["cold", "warm"]

# More tokens at once only cost memory: the arithmetic is then the limit.
_TRAINED_TOKENS = 2048


class _Pending(NamedTuple):
    """An edit whose value is not trained yet: where its outcome stands, what it trains on, and what answers it."""

    place: int
    prompt: str
    target: str | int
    encoded: EncodedBatch
    answering: int


@register_editor("grace")
class Grace(EditorStrategy):
    """A codebook of keys, values and deferral radii in front of one layer; the weights never change.

    Args:
        model: The model to edit.
        eps_init: Deferral radius of a new entry, in the units of the distance (paper: 1.0, its QA example 3.0).
        n_iter: Steps of Adam on an entry's value.
        lr: Learning rate of Adam.
        value_init: `cold` starts a value uniformly in [0, 1), `warm` at the layer's own output.
        replacement: The positions of the layer's output an entry overwrites: the query position, all of them, or those
            before the query.
        distance: Between keys and queries: `euclidean`, `cosine`, or `mahalanobis`, which `calibrate` makes ready: the
            covariance is that of upstream activations, so that directions in which inputs differ anyway count less.
        fidelity: `reference` reproduces the official code step by step; `strict` corrects what
            `docs/fidelity.md` lists.
        overlap: `allow` lets balls of different labels overlap, as in the paper; with `shrink` a new or growing ball
            ends where one of another label begins.
        seed: Seeds cold values; every edit has a generator of its own, so that nothing else moves them.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is not one of its choices, or a number is out of range, naming it.
    """

    is_reference = True
    search_space: ClassVar = {
        "eps_init": (0.5, 1.0, 3.0),
        "replacement": ("replace_prompt", "replace_last"),
    }

    def __init__(
        self,
        *,
        model: EditableModel,
        eps_init: float = 1.0,
        n_iter: int = 100,
        lr: float = 1.0,
        value_init: ValueInit = "cold",
        replacement: Replacement = "replace_prompt",
        distance: Distance = "euclidean",
        fidelity: Fidelity = "strict",
        overlap: Overlap = "allow",
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_choice("editor.value_init", value_init, get_args(ValueInit))
        check_choice("editor.replacement", replacement, get_args(Replacement))
        check_choice("editor.distance", distance, get_args(Distance))
        check_choice("editor.fidelity", fidelity, get_args(Fidelity))
        check_choice("editor.overlap", overlap, get_args(Overlap))
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_whole("editor.seed", seed, least=0)
        self.eps_init = eps_init
        self.n_iter = n_iter
        self.lr = lr
        self.value_init = value_init
        self.replacement: Replacement = replacement
        self.distance = distance
        self.fidelity = fidelity
        self.overlap = overlap
        self.seed = seed
        self.codebook = Codebook(
            eps_init=eps_init,
            distance=distance,
            fidelity=fidelity,
            overlap=overlap,
            device=model.layer_device,
            precision=model.layer_dtype,
        )
        self._n_settled = 0
        self._values = ValueTraining(model, self.codebook, n_iter=n_iter, lr=lr, replacement=replacement)
        self._outcomes: list[EditOutcome] = []
        self._pending: dict[int, _Pending] = {}
        self._versions: dict[int, str] = {}
        self._history = History(self.codebook)
        self.intercept(self._answer)

    @property
    def needs_upstream(self) -> bool:
        return self.codebook.needs_whitening

    def calibrate(self, queries: Tensor) -> None:
        if self.distance != "mahalanobis":
            super().calibrate(queries)
        self.codebook.whiten(queries)

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Settles each request in order; the outcome is that of the last one.

        Keys, radii and labels never depend on values, so values are left pending, to be trained together: those of
        different entries do not depend on each other. Where an earlier one turns out to be no finite number, this edit
        and those that follow are not made until `flush` has told so.

        Raises:
            EditFailure: If the edit cannot be made; the editor is as it was before it.
            UserError: If the distance needs `calibrate` first.
        """
        if self.codebook.needs_whitening:
            raise UserError(
                "editor.distance=mahalanobis needs upstream activations before the first edit: call "
                "editor.calibrate(model.queries(prompts)) with inputs that the model is used for"
            )
        if not self._outcomes:
            # Whoever asks for the past does so before the edits that a flush finished are followed by another.
            self._history.clear()
        for index, (prompt, target) in enumerate(zip(batch.prompts, batch.targets, strict=True)):
            if self._has_failed:
                break
            self._edit_one(prompt, target, batch.encoded.row(index))
        return EditOutcome() if self._has_failed else self._outcomes[-1]

    @property
    def n_pending(self) -> int:
        return len(self._pending)

    def flush(self) -> Sequence[EditOutcome]:
        self._train_pending()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def undo_point(self) -> Callable[[], None]:
        n_made = len(self._history) if self._outcomes else 0
        return lambda: self._take_back(n_made)

    def changing_state(self) -> State:
        # Values are checked when they are trained; copying a codebook for every edit would cost more than the edit.
        return {}

    def rollback(self) -> None:
        super().rollback()
        self.codebook.clear()
        self._n_settled = 0
        self._outcomes, self._pending, self._versions = [], {}, {}
        self._history.clear()

    @contextmanager
    def as_of(self, n_edits: int) -> Iterator[None]:
        now = self.codebook, self._versions, self.n_edits
        self.codebook, others = self._history.as_of(n_edits)
        if others:
            self._versions = {entry: version for entry, version in self._versions.items() if entry not in others}
        self.n_edits = n_edits
        try:
            yield
        finally:
            self.codebook, self._versions, self.n_edits = now

    def answered_by(self, queries: Tensor) -> Answered:
        if not len(self.codebook):
            return Answered([None] * len(queries))
        found = self.codebook.retrieve(queries.to(self.codebook.keys.device))
        entry = torch.where(found.hit, found.entry, -1)
        return Answered(
            versions=[None if e < 0 else self._version(e) for e in entry.tolist()],
            pending=[e in self._pending for e in entry.tolist()] if self._pending else (),
            entry=entry,
            distance=found.distance,
            contested=self.codebook.contested(queries.to(self.codebook.keys.device)),
        )

    def state_dict(self) -> State:
        state = {**super().state_dict(), **self.codebook.state_dict(), "n_settled": self._n_settled}
        if self._outcomes:
            state["outcomes"] = [asdict(outcome) for outcome in self._outcomes]
            state["pending"] = [
                [entry, waiting.place, waiting.prompt, waiting.target, waiting.answering]
                for entry, waiting in self._pending.items()
            ]
            state |= self._history.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.codebook.load_state_dict(state)
        self._n_settled = int(state["n_settled"])
        self._versions = {}
        self._outcomes = [EditOutcome(**outcome) for outcome in state.get("outcomes", ())]
        self._pending = {
            entry: _Pending(place, prompt, target, self.model.encode_batch([prompt], [target]), answering)
            for entry, place, prompt, target, answering in state.get("pending", ())
        }
        self._history.load_state_dict(state)

    def max_extra_parameters(self, n_edits: int) -> int:
        # At worst every edit makes an entry: a key, a value and a radius.
        whitening = self.codebook.whitening
        constant = 0 if whitening is None else whitening.matrix.numel() + whitening.mean.numel()
        return constant + n_edits * (self.codebook.keys.shape[1] + self.codebook.values.shape[1] + 1)

    def initial_value(self, call: LayerCall) -> Tensor:
        """Returns the (D_out,) value that a new entry starts from."""
        if self.value_init == "warm":
            return call.output_at_query[0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._n_settled)
        return torch.rand(call.output.shape[-1], generator=generator).to(call.output.device)

    def _edit_one(self, prompt: str, target: str | int, encoded: EncodedBatch) -> None:
        call = self.model.layer_call(encoded)
        assert encoded.labels is not None
        if self.replacement == "replace_prompt" and not _has_token_before(encoded, call):
            raise EditFailure("the prompt is one token, so replace_prompt has nothing to overwrite")
        if not bool(call.query.isfinite().all()):
            raise EditFailure("what enters the layer at the query is not finite")
        settled = self.codebook.settle(
            call.query[0],
            encoded.target_ids[0],
            lambda: self.initial_value(call),
            label_mean=float(encoded.labels.float().mean()),
        )
        self._n_settled += 1
        found = self.codebook.retrieve(call.query)
        entry, place = int(found.entry[0]), len(self._outcomes)
        self._history.note(self.n_edits, settled.before, entry)
        self._outcomes.append(
            EditOutcome(
                op=settled.op,
                key=entry,
                distance=settled.distance,
                n_keys=len(self.codebook),
                is_close=settled.is_close,
            )
        )
        waits = self.fidelity == "strict" and self.model.engine.batches_edits
        if entry in self._pending:
            # What comes later goes on from the value that waits.
            self._train_pending()
            if self._has_failed:
                return
        answering = entry if found.hit[0] else -1
        self._pending[entry] = _Pending(place, prompt, target, encoded, answering)
        if waits:
            return
        self._train_pending()
        if self._has_failed:
            raise EditFailure(self._outcomes.pop().failed)

    @property
    def _has_failed(self) -> bool:
        """Whether an edit since the last flush was found to have failed; those after it were taken back with it."""
        return bool(self._outcomes) and self._outcomes[-1].failed is not None

    def _train_pending(self) -> None:
        """Trains the values that wait, those of like size together; takes back the first that fails and all after."""
        entries = list(self._pending)
        tokens = [pending.encoded.n_positions for pending in self._pending.values()]
        failures: dict[int, str] = {}
        for chunk in self.model.task.batches(tokens, most_tokens=_TRAINED_TOKENS):
            chosen = [entries[i] for i in chunk]
            for entry, training in zip(chosen, self._train(chosen), strict=True):
                place = self._pending[entry].place
                if training.failed is not None:
                    failures[place] = training.failed
                    continue
                losses = training.losses
                self._outcomes[place] = replace(
                    self._outcomes[place], loss_first=losses[0], loss=losses[-1], steps=len(losses)
                )
        self._pending = {}
        if failures:
            first = min(failures)
            self._take_back(first)
            self._outcomes.append(EditOutcome(failed=failures[first]))

    def _train(self, entries: Sequence[int]) -> list[Training]:
        """Trains values that wait together; where that ends in an error, one by one, to find out whose it is."""
        waiting = [self._pending[entry] for entry in entries]
        for entry, pending in zip(entries, waiting, strict=True):
            self._history.note_value(pending.place)
            self._versions.pop(entry, None)
        try:
            return self._values.train(
                entries, [pending.answering for pending in waiting], stack([pending.encoded for pending in waiting])
            )
        except Exception as error:
            reason = reason_of_failure(error)
            if reason is None:
                raise
            if len(entries) == 1:
                return [Training((), reason)]
            return [training for entry in entries for training in self._train([entry])]

    def _take_back(self, n_made: int) -> None:
        """Takes all edits since the last flush back but the first `n_made`."""
        self._n_settled -= len(self._history) - n_made
        for entry in self._history.take_back(n_made):
            self._versions.pop(entry, None)
        del self._outcomes[n_made:]
        self._pending = {entry: pending for entry, pending in self._pending.items() if pending.place < n_made}

    def _version(self, entry: int) -> str:
        """What answers of an entry depend on: the digest of its value."""
        if entry not in self._versions:
            value = self.codebook.values[entry].cpu().numpy().tobytes()
            self._versions[entry] = hashlib.blake2b(value, digest_size=16).hexdigest()
        return self._versions[entry]

    def train_value(self, entry: int, encoded: EncodedBatch) -> list[float]:
        """Trains one entry's value on one request's loss, which it returns step by step (section 3.2, Equation 3).

        Raises:
            EditFailure: If a loss or the value is no finite number; the value is as it was.
        """
        self._versions.pop(entry, None)
        found = self.codebook.retrieve(self.model.layer_call(encoded).query)
        (training,) = self._values.train([entry], [int(found.entry[0]) if found.hit[0] else -1], encoded)
        if training.failed is not None:
            raise EditFailure(training.failed)
        return [*training.losses]

    def _answer(self, call: LayerCall) -> Tensor:
        """Overwrites the layer's output where a query lies within an entry's radius (Equation 2)."""
        if self._values.is_going_on:
            return self._values.answer(call)
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


def _has_token_before(encoded: EncodedBatch, call: LayerCall) -> bool:
    """Whether any real token precedes the query."""
    mask = encoded.inputs.get("attention_mask")
    position = int(call.position[0])
    if mask is None or mask.shape[1] != call.input.shape[1]:
        return position > 0
    return bool(mask[0, :position].any())
