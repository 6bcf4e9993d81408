"""Retention: upstream data, inputs that were right before, and inputs beside the edits."""

from collections.abc import Mapping, Sequence

from grace_bench.evaluation.metric import StreamScore
from grace_bench.models.tasks.base import ItemScore, Task
from grace_bench.registry import register_metric


@register_metric("TRR")
class TestRetention(StreamScore):
    """TRR: the main score on upstream data (Hartvigsen et al. 2023, section 4.2)."""

    __test__ = False
    stream = "upstream"
    caption = "upstream: what the model knew before"
    order = 10
    always_has_column = True
    always_in_result = True
    shown_in = ("table", "latex", "report", "curves", "progress", "summary", "tuning", "dashboard")


@register_metric("ARR")
class AccurateRetention(StreamScore):
    """ARR: the main score on what was right about the edited inputs (Hartvigsen et al. 2023, section 4.2)."""

    stream = "accurate"
    caption = "what was right about the edited inputs"
    order = 60
    latex_instead_of = "Avg"
    shown_in = ("table", "latex", "report", "summary", "tuning")


@register_metric("Locality")
class Locality(StreamScore):
    """Locality: the main score on inputs beside the edits, whose answers must not change."""

    stream = "locality"
    caption = "neighbouring inputs"
    order = 70
    shown_in = ("table", "report", "summary")

    @staticmethod
    def measure(items: Sequence[ItemScore], task: Task) -> Mapping[str, float]:
        """Returns the means with the main score that a run may have for locality alone."""
        return task.aggregate(items, stream="locality")
