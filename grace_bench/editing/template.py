"""Avalanche's view of an editor: each training experience is an edit, each evaluation experience a scoring."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from grace_bench.data.avalanche import (
    BaseLogger,
    BasePlugin,
    BaseSGDPlugin,
    BaseTemplate,
    EvaluationPlugin,
    PluginMetric,
    SupervisedPlugin,
    TrainingPlugin,
    trigger_plugins,
)
from grace_bench.data.benchmark import BatchExperience, EditExperience, EvalExperience
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome, ProbedBatch
from grace_bench.editing.guard import failed_outcome
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.base import ItemScore
from grace_bench.results.schema import CapabilityScores, EditRecord

_EXPERIENCE_CALLBACKS = {
    f"{when}_{what}"
    for when in ("before", "after")
    for what in ("training", "training_exp", "eval", "eval_exp", "candidate")
}
_WITHOUT_CALLBACKS = {BasePlugin, BaseSGDPlugin, SupervisedPlugin, TrainingPlugin, PluginMetric, BaseLogger, object}
"""Avalanche's bases, whose callbacks do nothing."""


class EditingTemplate(BaseTemplate):
    """Avalanche's training and evaluation loops over edits, and the attributes that its plugins read.

    Args:
        model: The model to edit.
        plugins: Avalanche plugins with experience-level callbacks.
        evaluator: Avalanche's evaluation plugin, with metrics and loggers.

    Attributes:
        n_edits: Number of edits made so far, failed ones included.
        outcomes: The outcomes of the last training experience's edits, in the order of its requests.
        experience: The experience in progress.
        scores: The scores of the evaluation experience in progress.
        record: The record of the current candidate, during `after_candidate`.
        request: The request of that candidate, with all its fields.
        scored_after: What was scored right after that candidate's edit, by the name of its stream: `edited` for the
            request itself. Empty if it was not edited.
        capability: What the model can do that no stream asks, during an evaluation that measured it; else None.
        score_requests: Scores the requests of an evaluation experience. A run replaces it by a function that rescores
            only answers that may have changed.

    Raises:
        UserError: If a plugin needs a training loop that editing does not have.
    """

    edits_together: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False

    def __init__(
        self, *, model: EditableModel, plugins: Sequence[BasePlugin], evaluator: EvaluationPlugin | None
    ) -> None:
        everything = [*plugins, *([] if evaluator is None else [evaluator])]
        for plugin in everything:
            _refuse_sgd_plugin(plugin)
        super().__init__(model=model, device=model.device, plugins=everything)
        self.model: EditableModel = model
        self.evaluator = evaluator
        self.n_edits = 0
        self.outcomes: list[EditOutcome] = []
        self.scores: list[ItemScore] = []
        self.record: EditRecord | None = None
        self.request: EditRequest | None = None
        self.scored_after: Mapping[str, Sequence[ItemScore]] = {}
        self.capability: CapabilityScores | None = None
        self.score_requests: Callable[[Sequence[EditRequest]], list[ItemScore]] = model.score

    @property
    def outcome(self) -> EditOutcome:
        """The outcome of the last edit."""
        return self.outcomes[-1] if self.outcomes else EditOutcome()

    @property
    @abstractmethod
    def needs_locality(self) -> bool:
        """Whether the editor is shown the locality probes of the requests that it edits."""

    @abstractmethod
    def _attempt(self, batch: EditBatch) -> EditOutcome:
        """Makes an edit; if it fails, undoes it and raises `EditFailure`."""

    @abstractmethod
    def _finish_all(self) -> Sequence[EditOutcome]:
        """Finishes pending edits; raises `EditFailure` if one of them failed."""

    def observe_candidate(
        self, request: EditRequest, record: EditRecord, *, scored_after: Mapping[str, Sequence[ItemScore]] | None = None
    ) -> None:
        """Calls `after_candidate` of metric plugins and loggers with a candidate whose record is complete."""
        self.request, self.record, self.scored_after = request, record, scored_after or {}
        trigger_plugins(self, "after_candidate")
        self.request, self.record, self.scored_after = None, None, {}

    def _batch_of(
        self,
        prompts: Sequence[str],
        targets: Sequence[str | int],
        subjects: Sequence[str | None],
        localities: Sequence[Sequence[str]],
    ) -> EditBatch:
        parts: dict[str, Any] = {
            "prompts": tuple(prompts),
            "targets": tuple(targets),
            "subjects": tuple(subjects) if self.needs_subject else None,
            "encoded": self.model.encode_batch(prompts, targets),
        }
        return (
            ProbedBatch(**parts, locality=tuple(map(tuple, localities))) if self.needs_locality else EditBatch(**parts)
        )

    def _train_exp(self, experience: Any, eval_streams: Any, **kwargs: Any) -> None:
        visible = cast(EditExperience | BatchExperience, experience).for_editor(
            needs_subject=self.needs_subject, needs_locality=self.needs_locality
        )
        self.experience = visible
        if isinstance(visible, BatchExperience):
            prompts, targets = visible.prompts, visible.targets
            subjects = visible.subjects if self.needs_subject else (None,) * len(prompts)
            localities = visible.localities if self.needs_locality else ((),) * len(prompts)
        else:
            prompts, targets = (visible.prompt,), (visible.target,)
            subjects = (visible.subject if self.needs_subject else None,)
            localities = (visible.locality if self.needs_locality else (),)
        self.outcomes = self._edit_together(prompts, targets, subjects, localities)
        for prompt, target in zip(prompts, targets, strict=True):
            self._count_edit(prompt, target)

    def _count_edit(self, prompt: str, target: str | int) -> None:
        """Counts an edit, failed or not."""
        self.n_edits += 1

    def _edit_together(
        self,
        prompts: Sequence[str],
        targets: Sequence[str | int],
        subjects: Sequence[str | None],
        localities: Sequence[Sequence[str]],
    ) -> list[EditOutcome]:
        """Edits requests as one batch if the editor takes batches; one by one if it takes none or the batch fails."""
        is_one = len(prompts) == 1
        if is_one or self.edits_together:
            try:
                return [self._attempt(self._batch_of(prompts, targets, subjects, localities))] * len(prompts)
            except EditFailure as failure:
                if is_one:
                    return [failed_outcome(failure)]
        outcomes: list[EditOutcome] = []
        for prompt, target, subject, locality in zip(prompts, targets, subjects, localities, strict=True):
            outcomes += self._edit_together([prompt], [target], [subject], [locality])
        return outcomes

    def _eval_exp(self, **kwargs: Any) -> None:
        experience = cast(EvalExperience, self.experience)
        # Avalanche's own loops evaluate without asking whether edits are pending.
        self._finish_all()
        self.scores = self.score_requests(experience.requests)

    def _eval_cleanup(self) -> None:
        super()._eval_cleanup()
        self.scores = []


def _refuse_sgd_plugin(plugin: Any) -> None:
    """Raises `UserError` if a plugin, metric or logger needs callbacks of an SGD loop, which editing does not have."""
    if isinstance(plugin, EvaluationPlugin):
        for part in [*plugin.metrics, *plugin.loggers]:
            _refuse_sgd_plugin(part)
        return
    # Text and CSV loggers also print at the end of an epoch, but work without one.
    spare = {"after_training_epoch"} if isinstance(plugin, BaseLogger) else set()
    needed = sorted(_own_callbacks(type(plugin)) - _EXPERIENCE_CALLBACKS - spare)
    if needed:
        raise UserError(
            f"Avalanche plugin {type(plugin).__name__} needs an SGD training loop ({', '.join(needed)}), which editing "
            f"does not have; plugins that use experience-level callbacks work"
        )


def _own_callbacks(cls: type) -> set[str]:
    """Returns the names of the callbacks that a class or a base other than Avalanche's implements."""
    return {
        name
        for base in cls.__mro__
        if base not in _WITHOUT_CALLBACKS
        for name in vars(base)
        if name.startswith(("before_", "after_"))
    }
