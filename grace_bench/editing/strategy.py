"""`EditorStrategy`: the methods that an author implements, and those that every editor inherits."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, get_args

from torch import Tensor

from grace_bench.common.signatures import choice_fault, class_fault, constructor_fault, hide_argument
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.data.stream import LayerKind
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, NamedEdit, State
from grace_bench.editing.commands import FigureKind
from grace_bench.editing.export import Export, export_editor
from grace_bench.editing.guard import Guard, failed_outcome
from grace_bench.editing.hooks import NAMED, OptionalHooks
from grace_bench.editing.saving import GIVEN_BY_THE_HARNESS, load_editor, option_names, save_editor, split_state
from grace_bench.editing.template import EditingTemplate
from grace_bench.editing.weights import RewrittenWeights
from grace_bench.errors import EditFailure, UserError, did_you_mean
from grace_bench.models.calls import ModuleCall
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.network import PromptReader


class EditorStrategy(OptionalHooks, EditingTemplate, ABC):
    """A lifelong model editor: edits requests as they come and changes what the model answers.

    A subclass implements `edit`. If edits change anything but rewritten weights, it extends `rollback`, `state_dict`
    and `load_state_dict`. The methods of `OptionalHooks` and the class attributes have defaults.

    An editor acts on the model through `intercept`, which changes what the edited layer returns, through
    `intercept_prompts`, which changes what the model reads, or by rewriting weights, which the base class rolls back,
    suspends and saves. The layers that edits rewrite are declared, by `layers` or `rewrite`; then `edit` changes their
    weights in place, or by `add_to_weight`.
    Its constructor takes keyword arguments only. Each is an option `editor.<name>=`, stored in an attribute of its
    name.

    Args:
        model: The model to edit.
        layers: Dotted paths of the layers that edits rewrite; None for the model's own. Unused if `freezes_weights`.
        plugins: Avalanche plugins with experience-level callbacks.
        evaluator: Avalanche's evaluation plugin, with metrics and loggers.

    Attributes:
        about: The editor in the words of a table, or None.
        edits_together: Whether a batch of requests is one operation, as for MEMIT. Other editors get one request at a
            time.
        needs_subject: Whether `edit` reads the subjects of requests.
        needs_replay: Whether the editor stores earlier requests.
        needs_meta_training: Whether `meta_train` must run before the first edit.
        freezes_weights: Whether the model's weights never change. If false, `layers` are declared as rewritten.
        supported_tasks: The tasks the editor works on.
        figures: The kinds of figures that the editor adds to `grace-bench figure`, by name.
        is_reference: Whether the demo runs the editor on every stream, as a reference for the others.
        layer_kind: The layers of a stream's model that tuning tries: `any` layer, `mlp_output` for the last map of a
            feed-forward block, or lists of layers under the option `layers`: `mlp_outputs`, or `several` of any kind.
        search_space: The values that tuning tries, by option of the constructor, the preferred value first.
        younger_options: Options that were added after runs had been made. With their default they are not part of the
            hash that names run folders.
        traces: `module:function` that replays a recording for `grace-bench verify` (`commands.Replay`), or None.

    Raises:
        UserError: If the model's task is not supported, a layer is missing from the model or named twice, or a plugin
            needs a training loop that editing does not have.
    """

    registered_name: ClassVar[str]
    about: ClassVar[About | None] = None
    edits_together: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False
    needs_replay: ClassVar[bool] = False
    needs_meta_training: ClassVar[bool] = False
    freezes_weights: ClassVar[bool] = True
    supported_tasks: ClassVar[tuple[str, ...]] = get_args(TaskName)
    figures: ClassVar[Mapping[str, FigureKind]] = {}
    younger_options: ClassVar[tuple[str, ...]] = ()
    traces: ClassVar[str | None] = None
    is_reference: ClassVar[bool] = False
    layer_kind: ClassVar[LayerKind] = "any"
    search_space: ClassVar[Mapping[str, Sequence[Any]]] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if inspect.unwrap(cls.__init__) is inspect.unwrap(EditorStrategy.__init__):
            # A subclass passes `layers` on; it is no option of a subclass that has no constructor of its own.
            hide_argument(cls.__init__, "layers")

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        name = getattr(self, "registered_name", type(self).__name__)
        if model.task.name not in self.supported_tasks:
            raise UserError(
                f"editor '{name}' does not work on {model.task.name} (it does on {', '.join(self.supported_tasks)})"
            )
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        self._guard = Guard(self)
        self._interceptors: list[Any] = []
        self._named: dict[str, NamedEdit] = {}
        self._name_of: dict[str, str] = {}
        self._unfollowed: set[str] = set()
        self._weights = RewrittenWeights(model, editor=name)
        if not self.freezes_weights:
            option = "editor.layers" if "layers" in option_names(type(self)) else "layers"
            paths = [model.layer_name] if layers is None else checked_paths(layers, option)
            option = "layer" if layers is None else option
            for path in paths:
                self._weights.add(path, option=option)

    # --- the contract

    @abstractmethod
    def edit(self, batch: EditBatch) -> EditOutcome:
        """Makes the model answer each request of the batch with its target.

        Values that affect only answers may be left pending until `flush`.

        Raises:
            EditFailure: If the edit fails. Any other error fails it too, as does a loss or state that is not finite:
                the edit is undone, the reason recorded, and the run continues. Errors that no single edit is to blame
                for, such as lack of memory, end the run.
        """

    def rollback(self) -> None:
        """Undoes every edit: the model answers as before the first one, bit for bit."""
        self.restore_weights()
        self.n_edits = 0
        self._name_all(())

    def state_dict(self) -> State:
        """Returns everything needed to continue editing, rewritten weights included, as tensors and JSON values.

        The call has no effect: pending edits stay pending, here and in an editor that loads the state.
        """
        # Absent where no edit was given an id, so that such states are those of earlier versions.
        named = {NAMED: [[*vars(edit).values()] for edit in self._named.values()]} if self._named else {}
        return {"n_edits": self.n_edits, **named, **self._weights.state_dict()}

    def weights_state(self) -> State:
        """Returns the number of edits and the rewritten weights: what `changing_state` holds if edits change no more.

        Unlike `state_dict` it takes the same time however many edits can be undone by their ids.
        """
        return {"n_edits": self.n_edits, **self._weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resumes from a state returned by `state_dict`."""
        self.n_edits = int(state["n_edits"])
        self._name_all(state.get(NAMED, ()))
        self._weights.load_state_dict(state)

    # --- how an editor acts on the model

    def intercept(self, answer: Callable[[LayerCall], Tensor]) -> None:
        """Lets `answer` decide what the edited layer returns, until `detach` (see `EditableModel.intercept`)."""
        self._interceptors.append(self.model.intercept(answer))

    def intercept_prompts(self, read: PromptReader) -> None:
        """Lets `read` decide which text the model reads in place of each prompt, until `detach`.

        The text is read wherever a prompt becomes tokens: to answer, to score, and for the losses of edits. It is
        bypassed while the editor is `suspended` (see `EditableModel.intercept_prompts`). An editor that changes nothing
        else implements `answered_by` by `Answered([None] * len(queries))`: then only requests that are read in other
        words are scored again.
        """
        self._interceptors.append(self.model.intercept_prompts(read))

    def intercept_at(self, path: str, answer: Callable[[ModuleCall], Tensor], *, option: str = "layer") -> None:
        """Lets `answer` decide what another module returns, until `detach` (see `Network.intercept_at`)."""
        self._interceptors.append(self.model.intercept_at(path, answer, option=option))

    def rewrite(self, path: str) -> None:
        """Declares, before the first edit, that edits change the weights of the module at a dotted path.

        Raises:
            UserError: If the model has no such module, or its weights are offloaded and cannot be loaded.
        """
        self._weights.add(path)

    def add_to_weight(self, path: str, update: Tensor) -> None:
        """Adds an update to the weight of a declared linear layer, `nn.Linear` or transformers' `Conv1D`.

        The sum is computed in float32, or float64 if the update is. From the first update on, a weight in bfloat16 or
        float16 is the rounded value of a float32 copy, its master, so that updates smaller than its rounding add up.
        A master is part of the state; it adds no parameters. Such a weight must not be changed in any other way.

        Args:
            path: The layer's dotted path.
            update: (D_out, D_in), on any device.

        Raises:
            EditFailure: If the update is not finite; nothing has changed.
            KeyError: If the layer is not declared.
            ValueError: If the update has another shape.
        """
        self._weights.add_to_weight(path, update)

    def weight_of(self, path: str) -> Tensor:
        """Returns the (D_out, D_in) weight of a declared linear layer, to read only, in float32 or float64.

        It is the master if there is one (see `add_to_weight`).

        Raises:
            KeyError: If the layer is not declared.
        """
        return self._weights.weight_of(path)

    def unedited_weight_of(self, path: str) -> Tensor:
        """Returns the (D_out, D_in) weight that a declared linear layer had before the first edit, to read only.

        Raises:
            KeyError: If the layer is not declared.
        """
        return self._weights.unedited_weight_of(path)

    def restore_weights(self) -> None:
        """Gives the rewritten modules their unedited weights back, bit for bit."""
        self._weights.restore()

    def suspended(self) -> AbstractContextManager[None]:
        """Lets the unedited model answer inside the context; afterwards every edit holds again."""
        return self._weights.suspended()

    def detach(self) -> None:
        """Undoes every edit and removes the interceptors."""
        self.rollback()
        for handle in self._interceptors:
            handle.remove()
        self._interceptors.clear()
        self._weights.release()
        self.model.engine.forget()
        self.model.engine.rewrites([])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    # --- using an editor

    def edit_text(
        self,
        prompt: str,
        target: str | int,
        *,
        subject: str | None = None,
        locality: Sequence[str] = (),
        request_id: str | None = None,
    ) -> EditOutcome:
        """Edits one request given as text, and finishes it.

        Args:
            prompt: The input text.
            target: The wanted answer, or a label id.
            subject: The entity the prompt is about, for editors that need one.
            locality: Prompts whose answers must not change, for editors that are shown such (`needs_locality`).
            request_id: A name by which the edit can be undone (`undo`); it is saved with the editor.

        Raises:
            EditFailure: If the edit fails; it is undone. An error that the editor raised is its cause.
            UserError: If the target is not one of the model's labels, or another prompt's edit has the id.
        """
        self._check_name(request_id, prompt)
        outcome = self._attempt(self._batch_of([prompt], [target], [subject], [locality]))
        flushed = self._finish_all()
        self._count_edit(prompt, target, request_id)
        return flushed[-1] if flushed else outcome

    def edit_texts(self, requests: Sequence[EditRequest]) -> list[EditOutcome]:
        """Edits several requests and finishes them, as one batch if the editor declares `edits_together`.

        Each edit can be undone by the id of its request (`undo`). Of a batch that fails, the requests are edited one by
        one.

        Args:
            requests: The requests; of each only the prompt, the target and the id are read, the subject if the editor
                needs it, and the prompts of its locality probes if it is shown them.

        Returns:
            The outcomes in the order of the requests; those of edits that failed, and are undone, say why.

        Raises:
            UserError: If a target is not one of the model's labels, or edits of two prompts would have one id.
        """
        seen: dict[str, str] = {}
        for request in requests:
            self._check_name(request.id, request.prompt)
            if seen.setdefault(request.id, request.prompt) != request.prompt:
                raise UserError(f"two requests have the id '{request.id}'")
        groups = [requests] if self.edits_together and requests else [[request] for request in requests]
        return [outcome for group in groups for outcome in self._edit_group(group)]

    def _edit_group(self, requests: Sequence[EditRequest]) -> list[EditOutcome]:
        """Edits requests together and finishes them."""
        outcomes = self._edit_together(
            [request.prompt for request in requests],
            [request.target for request in requests],
            [request.subject for request in requests],
            [[probe.prompt for probe in request.locality] for request in requests],
        )
        try:
            flushed = self._finish_all()
        except EditFailure as failure:
            outcomes = [failed_outcome(failure)] * len(requests)
        else:
            outcomes = list(flushed) if len(flushed) == len(requests) else outcomes
        for request, outcome in zip(requests, outcomes, strict=True):
            if outcome.failed is None:
                self._count_edit(request.prompt, request.target, request.id)
        return outcomes

    @property
    def can_undo(self) -> bool:
        """Whether the editor can undo single edits."""
        return type(self).forget is not OptionalHooks.forget

    def name_edits(self, requests: Sequence[EditRequest]) -> None:
        """Gives edits that were made without a request id, as a run makes them, the ids of their requests.

        Args:
            requests: The requests of all edits that did not fail, in the order in which they were edited.
        """
        for request in requests:
            self._name_edit(request.prompt, request.target, request.id)

    def undo(self, request_id: str) -> None:
        """Undoes the edit that was given an id; the other edits are answered as before.

        Its prompt is answered as if it had never been edited. `n_edits` still counts it. Where a prompt was edited
        several times, only the id of the last edit is known, and undoing it undoes them all.

        Raises:
            UserError: If no edit has the id, or the editor cannot undo it, with the reason; nothing has changed.
        """
        edit = self._named.get(request_id)
        if edit is None:
            raise UserError(f"no edit has the request id '{request_id}'{did_you_mean(request_id, self._named)}")
        others = [other for other in self._named.values() if other is not edit]
        self._finish_all()
        self.forget(edit, others)
        self._drop_name(request_id)

    def _check_name(self, request_id: str | None, prompt: str) -> None:
        """Raises `UserError` if the edit of another prompt has an id."""
        known = None if request_id is None else self._named.get(request_id)
        if known is not None and known.prompt != prompt:
            raise UserError(f"an edit of another prompt has the request id '{request_id}': undo it first")

    def _count_edit(self, prompt: str, target: str | int, request_id: str | None = None) -> None:
        super()._count_edit(prompt, target)
        self._name_edit(prompt, target, request_id)

    def _name_edit(self, prompt: str, target: str | int, request_id: str | None) -> None:
        for known in (self._name_of.get(prompt), request_id):
            self._drop_name(known)
        if request_id is None:
            for name in self._unfollowed & self._named.keys():
                self._named[name] = replace(self._named[name], is_followed=True)
            self._unfollowed.clear()
        else:
            self._name(NamedEdit(request_id, prompt, target))

    def _name_all(self, edits: Iterable[Sequence[Any]]) -> None:
        self._named, self._name_of, self._unfollowed = {}, {}, set()
        for values in edits:
            self._name(NamedEdit(*values))

    def _name(self, edit: NamedEdit) -> None:
        self._named[edit.request_id] = edit
        # Running text has no prompt that another edit could share.
        if edit.prompt.strip():
            self._name_of[edit.prompt] = edit.request_id
        if not edit.is_followed:
            self._unfollowed.add(edit.request_id)

    def _drop_name(self, request_id: str | None) -> None:
        edit = None if request_id is None else self._named.pop(request_id, None)
        if edit is not None:
            self._name_of.pop(edit.prompt, None)

    def finish(self) -> Sequence[EditOutcome]:
        """Returns the outcomes of `flush`; if that raises, undoes all pending edits.

        Raises:
            EditFailure: If one of these edits is to blame. The error that the editor raised is its cause.
        """
        return self._guard.finish()

    def _attempt(self, batch: EditBatch) -> EditOutcome:
        return self._guard.attempt(batch)

    def _finish_all(self) -> Sequence[EditOutcome]:
        return self._guard.finish_all()

    # --- exporting and saving

    @property
    def rewrites_only(self) -> bool:
        """Whether edits change weights and nothing else."""
        return not self._interceptors

    def export(self, folder: str | Path, *, dtype: str | None = None) -> Export:
        """Writes the edited model to a new folder, for use without a run (docs/deploy.md).

        Rewritten weights become a folder of a transformers model that is loaded like any other; an `adapter` becomes
        one of peft. Of other editors it is the saved editor, and the model unless the hub has it. `load_edited` loads
        all three.

        Args:
            folder: The folder, which must not exist or be empty.
            dtype: Of the weights that are written, `float32`, `bfloat16` or `float16`; None for the model's.

        Returns:
            What was written, with a line that says how to load it, and why it is no plain model if it is none.

        Raises:
            UserError: If the folder is there, the model is no transformers model, or what the editor changes cannot be
                written in another dtype.
            RuntimeError: While `suspended`, when there are no edits to export.
            EditFailure: If a pending edit failed.
        """
        self._refuse_suspended("exported")
        self._finish_all()
        return export_editor(self, folder, dtype=dtype)

    def _refuse_suspended(self, what: str) -> None:
        if self._weights.is_suspended:
            raise RuntimeError(f"a suspended editor cannot be {what}")

    def settings(self) -> dict[str, Any]:
        """Returns the options that rebuild this editor, read from the attributes of their names."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    def save_pretrained(self, folder: str | Path) -> None:
        """Saves the `answering_state` as `editor.safetensors` and `editor.json`; creates the folder if necessary.

        Raises:
            RuntimeError: While `suspended`, when there are no edits to save.
            EditFailure: If a pending edit failed.
        """
        self._refuse_suspended("saved")
        self._finish_all()
        save_editor(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, model: EditableModel) -> Self:
        """Loads a saved editor onto the model it was saved for.

        Raises:
            UserError: If the files are missing or damaged, or were saved for other weights or another layer.
        """
        return load_editor(cls, folder, model=model)

    def answering_state(self) -> State:
        """Returns the state for `save_pretrained`: the rewritten weights, or the whole state if weights are frozen."""
        return self.state_dict() if self.freezes_weights else EditorStrategy.state_dict(self)

    def load_answering_state(self, state: Mapping[str, Any]) -> None:
        """Loads a state returned by `answering_state`: the model answers as edited, and editing may continue."""
        if self.freezes_weights:
            self.load_state_dict(state)
        else:
            EditorStrategy.load_state_dict(self, state)

    @property
    def extra_parameters(self) -> int:
        """How many numbers the editor adds to the model; rewritten weights add none."""
        tensors, _ = split_state(self.answering_state())
        return sum(tensor.numel() for tensor in tensors.values()) - self._weights.n_numbers

    # --- registering

    @classmethod
    def check_class(cls) -> str | None:
        """Returns in one line why the class cannot be registered and what to do about it; None if it can."""
        fault = class_fault(cls) or constructor_fault(cls, base=EditorStrategy, given=GIVEN_BY_THE_HARNESS)
        if fault is not None:
            return fault
        for flag in ("edits_together", "needs_subject", "needs_replay", "needs_meta_training", "freezes_weights"):
            if type(value := getattr(cls, flag)) is not bool:
                return f"{flag} of {cls.__name__} is {value!r}: set it to True or False"
        if not isinstance(cls.about, About | None):
            return f"about of {cls.__name__} is {cls.about!r}: set it to an About(...)"
        tasks = cls.supported_tasks
        if not isinstance(tasks, tuple) or not tasks:
            return f"supported_tasks of {cls.__name__} is {tasks!r}: set it to a tuple, such as ('qa',)"
        faults = (choice_fault(f"a supported task of {cls.__name__}", task, get_args(TaskName)) for task in tasks)
        return next((fault for fault in faults if fault is not None), None)


def checked_paths(layers: Sequence[str], option: str) -> Sequence[str]:
    """Returns dotted paths as given.

    Raises:
        UserError: If they are no list of texts, or one is named twice.
    """
    if isinstance(layers, str) or not layers or not all(isinstance(path, str) for path in layers):
        raise UserError(f"{option}={layers} should be a list of dotted paths, or null")
    repeated = next((path for i, path in enumerate(layers) if path in layers[:i]), None)
    if repeated is not None:
        raise UserError(f"{option} names {repeated!r} twice")
    return layers
