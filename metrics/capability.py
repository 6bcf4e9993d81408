"""Capability: what the edited model can still do that no stream asks, by tasks of lm-evaluation-harness."""

from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import LastValueMetric
from grace_bench.registry import register_metric


@register_metric("Capability")
class Capability(LastValueMetric):
    """Capability: the mean score on the tasks of `capability.tasks`, by lm-evaluation-harness.

    `Capability/TASK` is the first metric that a task declares. A task whose metric is better when it is lower, as
    perplexity, has only that value and does not count in the mean.
    """

    higher_is_better = True
    caption = "what no stream asks, by lm-evaluation-harness"
    order = 90
    shown_in = ("table", "latex", "report", "curves", "progress", "summary", "tuning")

    def after_eval(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the mean and the score of every task, if they were measured."""
        if strategy.capability is None:
            return None
        self._last = strategy.capability.mean
        own = [] if self._last is None else [self.value(strategy, self._last)]
        return [*own, *(self.value(strategy, score, task) for task, score in strategy.capability.scores.items())]


@register_metric("CapabilityDrop")
class CapabilityDrop(LastValueMetric):
    """CapabilityDrop: how far the mean score on the tasks of `capability.tasks` has fallen since before the first edit.

    `CapabilityDrop/stderr` is its standard error, from the paired differences of each document's score.
    """

    higher_is_better = False
    column = "Drop"
    caption = "how far Capability has fallen"
    order = 91
    shown_in = ("table", "summary")
    part_columns = ("stderr",)

    def after_eval(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the drop and its error, if they were measured."""
        measured = strategy.capability
        if measured is None or measured.drop is None:
            return None
        self._last = measured.drop
        error = [] if measured.drop_stderr is None else [self.value(strategy, measured.drop_stderr, "stderr")]
        return [self.value(strategy, measured.drop), *error]
