"""The record of an evaluation: collected from Avalanche's callbacks, handed to every logger of the run."""

from collections.abc import Mapping
from typing import Any

from grace_bench.common.scores import ITEM_SCORES
from grace_bench.data.avalanche import BaseLogger, EvaluationPlugin, MetricValue
from grace_bench.data.derived import edit_id
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.results.schema import EvaluationRecord
from grace_bench.run.loggers import RunLogger


class EvaluationRecorder(BaseLogger):
    """Collects metric values and predictions until `complete` makes the record of an evaluation from them.

    It registers itself with the evaluation plugin, ahead of the other loggers and in place of the recorder of an
    earlier run of the same editor.

    Args:
        evaluator: The evaluation plugin of the editor; None records no metrics and no predictions.

    Attributes:
        latest: The metrics of the most recent record; empty before the first.
    """

    def __init__(self, evaluator: EvaluationPlugin | None) -> None:
        super().__init__()
        self.latest: dict[str, float] = {}
        self._evaluator = evaluator
        self._metrics: dict[str, float] = {}
        self._predictions: list[dict[str, Any]] = []
        if evaluator is not None:
            others = [logger for logger in evaluator.loggers if not isinstance(logger, EvaluationRecorder)]
            evaluator.loggers = [self, *others]

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:  # noqa: D102
        self._metrics[name] = _number(value)

    def after_eval_exp(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Collects the predictions on one stream."""
        stream, no_scores = strategy.experience.origin_stream.name, dict.fromkeys(ITEM_SCORES)
        for request, item in zip(strategy.experience.requests, strategy.scores, strict=True):
            edit = edit_id(request)
            self._predictions.append(
                {
                    "n_edits": strategy.n_edits,
                    "stream": stream,
                    "request_id": edit,
                    "probe": request.id.removeprefix(edit).removeprefix("/"),
                    "score": item.score,
                    "entry": item.entry,
                    "distance": item.distance,
                    "text": item.text,
                    "n_tokens": item.n_tokens,
                    **no_scores,
                    **strategy.model.task.columns(item, stream=stream),
                }
            )

    def complete(self, n_edits: int, *, anew: bool = True) -> EvaluationRecord:
        """Returns the record of the evaluation that has just ended, after handing it to every `RunLogger`.

        Args:
            n_edits: Edits made before the evaluation.
            anew: Whether it measured everything; if not, the values of the record before complete it.
        """
        metrics = self._metrics if anew else {**self.latest, **self._metrics}
        record = EvaluationRecord(n_edits=n_edits, metrics=metrics, predictions=self._predictions)
        self.latest, self._metrics, self._predictions = metrics, {}, []
        for logger in self._evaluator.loggers if self._evaluator is not None else ():
            if isinstance(logger, RunLogger):
                logger.log_evaluation(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Returns the metric values since the last record, and the values of that record."""
        return {"metrics": dict(self._metrics), "latest": dict(self.latest)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, between two evaluations."""
        self._metrics = {name: _number(value) for name, value in state["metrics"].items()}
        self.latest = {name: _number(value) for name, value in state["latest"].items()}


def _number(value: Any) -> float:
    return value if isinstance(value, int) else float(value)
