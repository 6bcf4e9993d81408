"""One number for a table to rank by."""

from collections.abc import Mapping
from typing import Any

from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import EditMetric
from grace_bench.registry import register_metric


@register_metric("Avg")
class Average(EditMetric):
    """Avg: the mean of TRR and ERR; absent for perplexity, which has no common scale."""

    def __init__(self) -> None:
        super().__init__()
        self._means: dict[str, float] = {}

    def before_eval(self, strategy: EditorStrategy) -> None:
        """Forgets the evaluation before."""
        self._means = {}

    def after_eval_exp(self, strategy: EditorStrategy) -> None:
        """Keeps the main score of the two streams."""
        if strategy.scores and strategy.model.task.higher_is_better:
            self._means[strategy.experience.origin_stream.name] = strategy.model.task.aggregate(strategy.scores)[""]

    def after_eval(self, strategy: EditorStrategy) -> MetricValue | None:
        """Emits the mean where both are known."""
        value = self.result()
        return None if value is None else self.value(strategy, value)

    def result(self) -> float | None:
        if "upstream" not in self._means or "edited" not in self._means:
            return None
        return (self._means["upstream"] + self._means["edited"]) / 2

    def reset(self) -> None:
        self._means = {}

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means = dict(state["means"])
