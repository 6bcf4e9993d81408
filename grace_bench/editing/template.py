"""Avalanche's view of an editor: each training experience is an edit, each evaluation experience a scoring."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
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
from grace_bench.data.benchmark import EditExperience, EvalExperience
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.guard import failed_outcome
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.base import ItemScore
from grace_bench.results.schema import EditRecord

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
        outcome: The outcome of the last edit.
        experience: The experience in progress.
        scores: The scores of the evaluation experience in progress.
        record: The record of the current candidate, during `after_candidate`.
        request: The request of that candidate, with all its fields.
        score_requests: Scores the requests of an evaluation experience. A run replaces it by a function that rescores
            only answers that may have changed.

    Raises:
        UserError: If a plugin needs a training loop that editing does not have.
    """

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
        self.outcome = EditOutcome()
        self.scores: list[ItemScore] = []
        self.record: EditRecord | None = None
        self.request: EditRequest | None = None
        self.score_requests: Callable[[Sequence[EditRequest]], list[ItemScore]] = model.score

    @abstractmethod
    def _attempt(self, batch: EditBatch) -> EditOutcome:
        """Makes an edit; if it fails, undoes it and raises `EditFailure`."""

    @abstractmethod
    def _finish_all(self) -> Sequence[EditOutcome]:
        """Finishes pending edits; raises `EditFailure` if one of them failed."""

    def observe_candidate(self, request: EditRequest, record: EditRecord) -> None:
        """Calls `after_candidate` of metric plugins and loggers with a candidate whose record is complete."""
        self.request, self.record = request, record
        trigger_plugins(self, "after_candidate")
        self.request = self.record = None

    def _batch_of_one(self, prompt: str, target: str | int, subject: str | None) -> EditBatch:
        return EditBatch(
            prompts=(prompt,),
            targets=(target,),
            subjects=(subject,) if self.needs_subject else None,
            encoded=self.model.encode_batch([prompt], [target]),
        )

    def _train_exp(self, experience: Any, eval_streams: Any, **kwargs: Any) -> None:
        visible = cast(EditExperience, experience).for_editor(needs_subject=self.needs_subject)
        self.experience = visible
        subject = visible.subject if self.needs_subject else None
        batch = self._batch_of_one(visible.prompt, visible.target, subject)
        try:
            self.outcome = self._attempt(batch)
        except EditFailure as failure:
            self.outcome = failed_outcome(failure)
        self.n_edits += 1

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
