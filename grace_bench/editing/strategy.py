"""`EditorStrategy`: what an editor is, on Avalanche's `BaseTemplate`."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from grace_bench.common.credentials import without_secrets
from grace_bench.common.files import readable, write_synced
from grace_bench.common.progress import Progress
from grace_bench.common.state import copied
from grace_bench.data.avalanche import BasePlugin, BaseTemplate, EvaluationPlugin, trigger_plugins
from grace_bench.data.benchmark import EditExperience, EvalExperience
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import LayerKind
from grace_bench.editing.failures import ModelModes, RandomState, reason_of_failure, size_failure
from grace_bench.errors import MISFITS, EditFailure, UserError, first_error
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import EncodedBatch
from grace_bench.models.tasks.base import ItemScore
from grace_bench.results.schema import EditRecord

State = dict[str, Tensor | int | float | str | list[Any] | dict[str, Any] | None]
"""What a `state_dict` holds: tensors and JSON values."""

_EXPERIENCE_CALLBACKS = {
    f"{when}_{what}"
    for when in ("before", "after")
    for what in ("training", "training_exp", "eval", "eval_exp", "candidate")
}


class _Header(BaseModel):
    """What `editor.json` says of the tensors beside it."""

    model_config = ConfigDict(extra="forbid")

    editor: str
    settings: dict[str, Any]
    model: str
    model_fingerprint: str
    layer: str
    task: str
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EditBatch:
    """What an editor may know of the requests it edits.

    Attributes:
        prompts: B input texts.
        targets: B wanted answers.
        subjects: B subjects if the editor declares `needs_subject`, else None.
        encoded: The prompts with their targets as tensors.
    """

    prompts: tuple[str, ...]
    targets: tuple[str | int, ...]
    encoded: EncodedBatch
    subjects: tuple[str | None, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class EditOutcome:
    """What an edit did. Editors fill in what they know.

    Attributes:
        op: What happened to the codebook: `add`, `expand`, `split`, `hit` or `relabel`.
        key: Index of the entry that answers the request now.
        distance: Distance of the request's query to the nearest entry before the edit.
        n_keys: Entries after the edit.
        loss_first: Loss at the first step.
        loss: Loss at the last step.
        loss_after: Loss after the last step, by which an edit is known to have worked; None has it computed.
        steps: Gradient steps taken.
        failed: Why the edit could not be made; None if it was.
        is_close: Whether rounding, as in another batch, could have decided otherwise.
    """

    op: str | None = None
    key: int | None = None
    distance: float | None = None
    n_keys: int | None = None
    loss_first: float | None = None
    loss: float | None = None
    loss_after: float | None = None
    steps: int = 0
    failed: str | None = None
    is_close: bool = False


@dataclass(frozen=True)
class Answered:
    """What answers each of B queries, as edited so far.

    Attributes:
        versions: For each query what its answer depends on beside the query: equal versions, equal answers. None is the
            unedited model; others are texts or numbers, or tuples of them, and a loaded state gives those that the
            saved one gave.
        pending: Whether each is answered by a value that is left pending; empty if none is.
        entry: (B,) long, the codebook entry that answers, -1 for none; None for editors without entries.
        distance: (B,) distance to the nearest entry.
        contested: (B,) bool, whether the query lies in balls of two different labels.
    """

    versions: Sequence[Hashable]
    pending: Sequence[bool] = ()
    entry: Tensor | None = None
    distance: Tensor | None = None
    contested: Tensor | None = None

    def notes(self) -> list[dict[str, Any]]:
        """Returns what is known of each query's entry, as `ItemScore` names it."""
        if self.entry is None or self.distance is None or self.contested is None:
            return [{}] * len(self.versions)
        columns = zip(self.entry.tolist(), self.distance.tolist(), self.contested.tolist(), strict=True)
        return [{"entry": entry, "distance": distance, "contested": flag} for entry, distance, flag in columns]


class EditorStrategy(BaseTemplate, ABC):
    """A lifelong model editor: consumes requests one at a time and changes what the model answers.

    A subclass implements `edit`, keeps all that changes in `state_dict`, and takes back what it did in `rollback`.
    Its constructor takes keyword arguments only; each becomes an option `editor.<name>=` on the command line, and is
    kept in an attribute of its name.

    Args:
        model: The model to edit.
        plugins: Avalanche plugins that live on experience-level callbacks.
        evaluator: Avalanche's evaluation plugin, with metrics and loggers.

    Attributes:
        needs_subject: Whether `edit` reads the subject of a request.
        needs_replay: Whether it keeps earlier requests.
        needs_meta_training: Whether `meta_train` must come before its first edit.
        freezes_weights: Whether the model's own weights never change.
        supported_tasks: The tasks it works on.
        is_reference: Whether the demo runs it on every stream, for other editors to be compared with.
        layer_kind: The layers of a stream's model that tuning tries: `any` layer, `mlp_output` for the last map of a
            feed-forward block, or `several` for lists of layers under the option `layers`.
        search_space: The values that tuning tries, by option of the constructor, the preferred value first.

    Raises:
        UserError: If the model's task is not supported, or a plugin needs a training loop that editing does not have.
    """

    registered_name: ClassVar[str]
    needs_subject: ClassVar[bool] = False
    needs_replay: ClassVar[bool] = False
    needs_meta_training: ClassVar[bool] = False
    freezes_weights: ClassVar[bool] = True
    supported_tasks: ClassVar[tuple[str, ...]] = ("classification", "qa", "completion", "language_modelling")
    is_reference: ClassVar[bool] = False
    layer_kind: ClassVar[LayerKind] = "any"
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType({})

    def __init__(
        self,
        *,
        model: EditableModel,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        name = getattr(self, "registered_name", type(self).__name__)
        if model.task.name not in self.supported_tasks:
            raise UserError(
                f"editor '{name}' does not work on {model.task.name} (it does on {', '.join(self.supported_tasks)})"
            )
        everything = [*plugins, *([] if evaluator is None else [evaluator])]
        for plugin in everything:
            _refuse_sgd_plugin(plugin)
        super().__init__(model=model, device=model.device, plugins=everything)
        self.model: EditableModel = model
        self.evaluator = evaluator
        self.n_edits = 0
        """The clock: edits made so far."""
        self.scores: list[ItemScore] = []
        """The scores of the evaluation experience at hand, for metric plugins."""
        self.record: EditRecord | None = None
        """The candidate at hand, for metric plugins and loggers, during `after_candidate`."""
        self.request: EditRequest | None = None
        """The request of that candidate, with all its fields."""
        self.outcome = EditOutcome()
        """What the last edit did."""
        self.score_requests: Callable[[Sequence[EditRequest]], list[ItemScore]] = model.score
        """Scores the requests of an evaluation experience; a run replaces it by one that scores only what changed."""
        self._interceptors: list[Any] = []
        self._is_suspended = False
        self._undo_waiting: Callable[[], None] | None = None
        self._rewritten: dict[str, nn.Module] = {}
        self._untouched: dict[str, Tensor] = {}
        if not self.freezes_weights:
            self.rewrite(model.layer_name)

    @abstractmethod
    def edit(self, batch: EditBatch) -> EditOutcome:
        """Makes the model answer each request of the batch with its target.

        Values that only the answers depend on may be left pending until `flush`.

        Raises:
            EditFailure: If this edit cannot be made. Whatever else is raised fails it too, and so does a loss or state
                that is no finite number: a run puts everything back as it was before (`undo_point`), records why, and
                goes on. Only what no single edit is to blame for, such as want of memory, ends the run.
        """

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        """Makes ready what the unedited model alone decides; a run calls it once, before its first edit.

        Args:
            train: The requests that the stream marks for training; none of them is edited or used for tuning.
            progress: Called as a long preparation goes on.

        Raises:
            UserError: If the editor must be meta-trained first, or lacks what it prepares from.
        """

    @property
    def needs_upstream(self) -> bool:
        """Whether `calibrate` must come before its first edit, with the options it has."""
        return False

    def calibrate(self, queries: Tensor) -> None:
        """Tells of the inputs that the model is used for; a run calls it once, before its first edit, if it is needed.

        Args:
            queries: (n, D_in) what enters the edited layer at their queries (`EditableModel.queries`). More of upstream
                requests, their answers for one, no editor is shown.

        Raises:
            UserError: If the editor needs none, has edits already, or cannot work with them.
        """
        raise UserError(f"editor '{self.registered_name}' needs no upstream activations with its options")

    def meta_train(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> dict[str, float]:
        """Trains the editor itself on requests of the stream's `train` role, keeps the result and makes it ready.

        What was trained before on the same content is reused, and what was interrupted is continued.

        Returns:
            Figures of the training, by name.

        Raises:
            UserError: If the editor needs no meta-training.
        """
        raise UserError(f"editor '{self.registered_name}' needs no meta-training")

    def max_extra_parameters(self, n_edits: int) -> int:
        """Returns the most numbers that `n_edits` edits may add to the model; `extra_parameters` stays within it."""
        return 0

    def flush(self) -> Sequence[EditOutcome]:
        """Finishes what `edit` left pending.

        Returns:
            The outcomes of all edits since the last flush, in their order; empty if they were whole when made. One that
            failed is the last: it and those after it were taken back, and those are to be made again.
        """
        return ()

    @property
    def n_pending(self) -> int:
        """How many edits wait for `flush`."""
        return 0

    @contextmanager
    def as_of(self, n_edits: int) -> Iterator[None]:
        """Lets the editor answer inside the context as it did after `n_edits` edits, the clock included.

        An editor that leaves edits pending can do so for each clock since the first edit that the last flush finished,
        until the next edit; others know no past.
        """
        if n_edits != self.n_edits:
            raise RuntimeError(f"editor '{self.registered_name}' answers as of {self.n_edits} edits, not {n_edits}")
        yield

    @property
    def knows_past(self) -> bool:
        """Whether the editor implements `as_of`."""
        return type(self).as_of is not EditorStrategy.as_of

    def changing_state(self) -> State:
        """Returns the part of `state_dict` that edits may change, all of it unless an editor says less.

        After an edit its tensors are to be finite, and none may have exploded (`failures.size_failure`).
        """
        return self.state_dict()

    def undo_point(self) -> Callable[[], None]:
        """Returns what takes back everything that edits change from now on, bit for bit.

        This one copies the state that may change. An editor that keeps much and changes little of it in an edit has one
        of its own.
        """
        before = copied(self.changing_state())

        def undo() -> None:
            changed = self.changing_state()
            kept = {name: value for name, value in self.state_dict().items() if name not in changed}
            self.load_state_dict({**kept, **before})

        return undo

    def answered_by(self, queries: Tensor) -> Answered | None:
        """Says what answers queries, so that only what may have changed is scored again.

        Args:
            queries: (B, D_in) what enters the edited layer at the queries.

        Returns:
            None where every edit may change every answer, as it does when weights are rewritten.
        """
        return None

    @property
    def tells_what_changed(self) -> bool:
        """Whether the editor implements `answered_by`."""
        return type(self).answered_by is not EditorStrategy.answered_by

    def intercept(self, answer: Callable[[LayerCall], Tensor]) -> None:
        """Lets `answer` decide what the edited layer gives, until `detach` (see `EditableModel.intercept`)."""
        self._interceptors.append(self.model.intercept(answer))

    def rewrite(self, path: str) -> None:
        """Declares that edits change the weights of a module, so that they are rolled back, suspended and saved.

        The edited layer is declared already unless `freezes_weights`.

        Raises:
            UserError: If the model has no such module, or its weights are offloaded.
        """
        module = self.model.find_layer(path)
        if any(tensor.is_meta for tensor in module.state_dict().values()):
            raise UserError(
                f"layer={path}: its weights are offloaded, where editor '{self.registered_name}' cannot rewrite them; "
                f"keep them on a device with device_map="
            )
        self._rewritten[path] = module
        self._untouched = {name: tensor.clone() for name, tensor in self._weights().items()}
        self.model.engine.rewrites([*self._rewritten.values()])

    def restore_weights(self) -> None:
        """Gives the rewritten modules their unedited weights back, bit for bit."""
        self._load_weights(self._untouched)

    def rollback(self) -> None:
        """Undoes every edit: the model answers as it did before the first one, bit for bit."""
        self.restore_weights()
        self.n_edits = 0

    def detach(self) -> None:
        """Undoes every edit and takes the interceptors off the layer."""
        self.rollback()
        for handle in self._interceptors:
            handle.remove()
        self._interceptors.clear()
        self.model.engine.forget()
        self.model.engine.rewrites([])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Lets the unedited model answer inside the context; afterwards every edit holds again."""
        if self._is_suspended:
            yield
            return
        edited = {name: tensor.clone() for name, tensor in self._weights().items()}
        self.restore_weights()
        self._is_suspended = True
        try:
            with self.model.bypassing():
                yield
        finally:
            self._is_suspended = False
            self._load_weights(edited)

    def state_dict(self) -> State:
        """Returns all that is needed to go on editing, rewritten weights included: tensors and JSON values.

        Asking for it changes nothing: edits that wait for `flush` go on waiting, in whoever takes the state up too.
        """
        return {"n_edits": self.n_edits, **{f"weights.{name}": tensor for name, tensor in self._weights().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `state_dict`."""
        self.n_edits = int(state["n_edits"])
        self._load_weights({name: state[f"weights.{name}"] for name in self._weights()})

    def answering_state(self) -> State:
        """Returns only what answering needs, for `save_pretrained`: the rewritten weights, or else the whole state."""
        return self.state_dict() if self.freezes_weights else EditorStrategy.state_dict(self)

    def load_answering_state(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `answering_state`: the model answers as edited, and editing may go on from there."""
        if self.freezes_weights:
            self.load_state_dict(state)
        else:
            EditorStrategy.load_state_dict(self, state)

    def _weights(self) -> dict[str, Tensor]:
        """The weights and buffers of the rewritten modules, by dotted path."""
        return {
            f"{path}.{name}": tensor.detach()
            for path, module in self._rewritten.items()
            for name, tensor in module.state_dict().items()
        }

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for path, module in self._rewritten.items():
            module.load_state_dict({name: weights[f"{path}.{name}"] for name in module.state_dict()})

    def settings(self) -> dict[str, Any]:
        """Returns the constructor arguments that rebuild this editor, model and plugins aside.

        They are read from the attributes of the same names.
        """
        given = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in given if name not in ("model", "plugins", "evaluator")}

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves what answering needs as `editor.safetensors` and `editor.json`.

        Args:
            folder: Made if it is not there.

        Raises:
            RuntimeError: While `suspended`, when there are no edits to save.
            EditFailure: If an edit that waited could not be made.
        """
        if self._is_suspended:
            raise RuntimeError("a suspended editor cannot be saved")
        self._finish_all()
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors, values = split_state(self.answering_state())
        write_synced(path / "editor.safetensors", save(tensors))
        with self.suspended():
            # Taken when first asked for, and then it must be of the unedited weights.
            fingerprint = self.model.fingerprint
        header = _Header(
            editor=self.registered_name,
            settings=self.settings(),
            model=self.model.name,
            model_fingerprint=fingerprint,
            layer=self.model.layer_name,
            task=self.model.task.name,
            state=values,
        )
        write_synced(path / "editor.json", f"{header.model_dump_json(indent=2)}\n".encode())

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, model: EditableModel) -> Self:
        """Loads a saved editor onto the model it was saved for.

        Raises:
            UserError: If the files are missing or broken, or were saved for other weights or another layer.
        """
        path = Path(folder)
        try:
            header = _Header.model_validate_json(readable(path / "editor.json").read_bytes())
            tensors = load_file(readable(path / "editor.safetensors"), device=str(model.device))
        except ValidationError as error:
            raise UserError(f"{path / 'editor.json'}: {first_error(error)}") from error
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no saved editor can be read here ({error})") from error
        if header.editor != cls.registered_name:
            raise UserError(f"{path}: holds editor '{header.editor}', not '{cls.registered_name}'")
        if header.model_fingerprint != model.fingerprint:
            raise UserError(f"{path}: was saved for other weights than those of model {model.name}")
        if header.layer != model.layer_name:
            raise UserError(f"{path}: was saved for layer {header.layer}, not {model.layer_name}")
        known = inspect.signature(cls).parameters.keys() - {"model", "plugins", "evaluator"}
        unknown = next((name for name in header.settings if name not in known), None)
        if unknown is not None:
            raise UserError(f"{path / 'editor.json'}: field 'settings.{unknown}': editor '{header.editor}' has none")
        try:
            editor = cls(model=model, **header.settings)
        except UserError as error:
            raise UserError(f"{path / 'editor.json'}: {error}") from error
        try:
            editor.load_answering_state({**header.state, **tensors})
        except MISFITS as error:
            editor.detach()
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: the saved state is not whole ({type(error).__name__}: {reason})") from error
        return editor

    @property
    def extra_parameters(self) -> int:
        """How many numbers the editor adds to the model; weights it rewrites are none."""
        tensors, _ = split_state(self.answering_state())
        rewritten = sum(tensor.numel() for tensor in self._untouched.values())
        return sum(tensor.numel() for tensor in tensors.values()) - rewritten

    def edit_text(self, prompt: str, target: str | int, *, subject: str | None = None) -> EditOutcome:
        """Edits one request given as text and finishes it.

        Args:
            prompt: The input text.
            target: The wanted answer, or a label id.
            subject: The entity the prompt is about, for editors that need one.

        Raises:
            EditFailure: If it cannot be made; everything is as it was before it.
        """
        batch = EditBatch(
            prompts=(prompt,),
            targets=(target,),
            subjects=(subject,) if self.needs_subject else None,
            encoded=self.model.encode_batch([prompt], [target]),
        )
        outcome = self._attempt(batch)
        flushed = self._finish_all()
        self.n_edits += 1
        return flushed[-1] if flushed else outcome

    def _attempt(self, batch: EditBatch) -> EditOutcome:
        """Makes an edit, or leaves everything as it was before it, the random generators included.

        The model is in the modes that it was in before, either way: dropout would go on in every later answer.

        Raises:
            EditFailure: Saying why it could not be made.
        """
        undo, random_state, n_waiting = self.undo_point(), RandomState(self.model.device), self.n_pending
        modes, sizes = ModelModes(self.model.module), self._largest_entries()
        try:
            outcome = self.edit(batch)
            modes.restore_training()
            failure = outcome.failed or self._failure_of(outcome, batch, sizes)
            if failure is not None:
                raise EditFailure(failure)
        except Exception as error:
            modes.restore()
            undo()
            random_state.restore()
            reason = reason_of_failure(error)
            if reason is None:
                raise
            raise EditFailure(reason) from error
        if not n_waiting:
            self._undo_waiting = undo
        return outcome

    def _largest_entries(self) -> dict[str, float]:
        """The largest magnitude in each tensor that edits may change, by name."""
        return {name: _largest(tensor) for name, tensor in split_state(self.changing_state())[0].items()}

    def _failure_of(self, outcome: EditOutcome, batch: EditBatch, sizes: Mapping[str, float]) -> str | None:
        """Says what of a finished edit is no finite number or has exploded since it had these sizes; None if all is."""
        losses = {
            "at the first step": outcome.loss_first,
            "at the last step": outcome.loss,
            "after the edit": outcome.loss_after,
        }
        after = self._largest_entries()
        if (
            after
            and outcome.loss_after is None
            and all(loss is None or math.isfinite(loss) for loss in losses.values())
        ):
            losses["after the edit"] = self._loss(batch)
        for when, loss in losses.items():
            if loss is not None and not math.isfinite(loss):
                return f"the loss is {loss} {when}"
        failures = (size_failure(name, sizes.get(name, 0.0), size) for name, size in after.items())
        return next((f"{failure} after the edit" for failure in failures if failure is not None), None)

    @torch.no_grad()
    def _loss(self, batch: EditBatch) -> float:
        return float(self.model.task.loss(self.model.logits(batch.encoded), batch.encoded))

    def finish(self) -> Sequence[EditOutcome]:
        """Returns what `flush` does, and takes all edits that waited back if it ends in an error.

        Raises:
            EditFailure: If one of these edits is to blame for that.
        """
        undo, self._undo_waiting = self._undo_waiting, None
        modes = ModelModes(self.model.module)
        try:
            outcomes = self.flush()
        except Exception as error:
            reason = reason_of_failure(error)
            modes.restore()
            if undo is not None:
                undo()
            if reason is None or undo is None:
                raise
            raise EditFailure(reason) from error
        modes.restore_training()
        return [
            outcome if outcome.failed is None else replace(outcome, failed=without_secrets(outcome.failed))
            for outcome in outcomes
        ]

    def _finish_all(self) -> Sequence[EditOutcome]:
        """Finishes what waits, outside a run, where nobody makes edits again that were taken back with a failed one.

        Raises:
            EditFailure: If there is a failed one.
        """
        outcomes = self.finish()
        if outcomes and outcomes[-1].failed is not None:
            raise EditFailure(outcomes[-1].failed)
        return outcomes

    def observe_candidate(self, request: EditRequest, record: EditRecord) -> None:
        """Tells metric plugins and loggers of a candidate whose record is complete: callback `after_candidate`."""
        self.request, self.record = request, record
        trigger_plugins(self, "after_candidate")
        self.request = self.record = None

    def _train_exp(self, experience: Any, eval_streams: Any, **kwargs: Any) -> None:
        visible = cast(EditExperience, experience).for_editor(needs_subject=self.needs_subject)
        self.experience = visible
        batch = EditBatch(
            prompts=(visible.prompt,),
            targets=(visible.target,),
            subjects=(visible.subject,) if self.needs_subject else None,
            encoded=self.model.encode_batch([visible.prompt], [visible.target]),
        )
        try:
            self.outcome = self._attempt(batch)
        except EditFailure as failure:
            self.outcome = EditOutcome(failed=str(failure))
        self.n_edits += 1

    def _eval_exp(self, **kwargs: Any) -> None:
        experience = cast(EvalExperience, self.experience)
        # A loop of Avalanche's own evaluates without asking first whether edits wait.
        self._finish_all()
        self.scores = self.score_requests(experience.requests)

    def _eval_cleanup(self) -> None:
        super()._eval_cleanup()
        self.scores = []


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Lets gradients reach some parameters of a frozen model, for as long as the context lasts."""
    chosen = list(parameters)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield chosen
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
            parameter.grad = None


def _largest(tensor: Tensor) -> float:
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(torch.linalg.vector_norm(tensor, math.inf))


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits a state into what goes to safetensors and what goes to JSON."""
    tensors = {name: value.detach().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _refuse_sgd_plugin(plugin: Any) -> None:
    """Raises if a plugin, metric or logger depends on callbacks of an SGD loop, which editing does not have."""
    if isinstance(plugin, EvaluationPlugin):
        for part in [*plugin.metrics, *plugin.loggers]:
            _refuse_sgd_plugin(part)
        return
    from grace_bench.data.avalanche import BaseLogger

    # Text and CSV loggers print at the end of an epoch, which they can do without.
    spare = {"after_training_epoch"} if isinstance(plugin, BaseLogger) else set()
    needed = sorted(
        name for name in _own_callbacks(type(plugin)) if name not in _EXPERIENCE_CALLBACKS and name not in spare
    )
    if needed:
        raise UserError(
            f"Avalanche plugin {type(plugin).__name__} needs an SGD training loop ({', '.join(needed)}), which editing "
            f"does not have; plugins that use experience-level callbacks work"
        )


def _own_callbacks(cls: type) -> set[str]:
    """Names of the callbacks a class implements itself rather than inheriting Avalanche's empty ones."""
    from grace_bench.data.avalanche import BaseLogger, BasePlugin, BaseSGDPlugin, PluginMetric, SupervisedPlugin
    from grace_bench.data.avalanche import TrainingPlugin as TrainingPlugin

    empty = {BasePlugin, BaseSGDPlugin, SupervisedPlugin, TrainingPlugin, PluginMetric, BaseLogger, object}
    return {
        name
        for base in cls.__mro__
        if base not in empty
        for name in vars(base)
        if name.startswith(("before_", "after_"))
    }
