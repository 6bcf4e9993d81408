"""One number for a table to rank by."""

from collections.abc import Mapping, Sequence
from typing import Any

from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import EditMetric
from grace_bench.registry import METRICS, register_metric


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """Returns the mean of the values, or None if one is missing.

    >>> mean_of_all([0.5, 1.0]), mean_of_all([0.5, None])
    (0.75, None)
    """
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


@register_metric("Avg")
class Average(EditMetric):
    """Avg: the mean of TRR and ERR; absent for perplexity, which has no common scale."""

    averages = ("TRR", "ERR")
    log_averages = ("ERR", "ARR", "TRR")
    higher_is_better = "main_score"
    caption = "the mean of TRR and ERR"
    order = 30
    always_has_column = True
    always_in_result = True
    ranks = 1
    latex_column = "Avg."
    shown_in = ("table", "latex")

    def __init__(self) -> None:
        super().__init__()
        self._means: dict[str, float] = {}

    def before_eval(self, strategy: EditorStrategy) -> None:
        """Forgets the previous evaluation."""
        self._means = {}

    def after_eval_exp(self, strategy: EditorStrategy) -> None:
        """Stores the main score of the stream."""
        if strategy.scores and strategy.model.task.higher_is_better:
            means = strategy.model.task.aggregate(strategy.scores)
            self._means |= {strategy.experience.origin_stream.name: means[""]} if "" in means else {}

    def after_eval(self, strategy: EditorStrategy) -> MetricValue | None:
        """Emits the mean if every part is known."""
        value = self.result()
        return None if value is None else self.value(strategy, value)

    def result(self) -> float | None:
        return mean_of_all([self._means.get(METRICS.attribute(name, "stream")) for name in self.averages])

    def reset(self) -> None:
        self._means = {}

    def state_dict(self) -> dict[str, Any]:
        return {"means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._means = dict(state["means"])
