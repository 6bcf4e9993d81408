"""The effect of the edits: on the edited requests, on other wordings of them, and on their consequences."""

from collections.abc import Iterable, Sequence

from grace_bench.data.avalanche import MetricValue
from grace_bench.data.derived import edit_id
from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import StreamScore
from grace_bench.models.tasks.base import ItemScore
from grace_bench.registry import register_metric


def share_answered(groups: Iterable[tuple[object, bool]]) -> float | None:
    """Returns the share of groups with at least one right answer; None if there are no groups.

    >>> share_answered([("a", False), ("b", False), ("a", True), ("a", False)])
    0.5

    Args:
        groups: For each answer its group, and whether it is right.
    """
    answered: dict[object, bool] = {}
    for group, is_right in groups:
        answered[group] = answered.get(group, False) or is_right
    return sum(answered.values()) / len(answered) if answered else None


@register_metric("ERR")
class EditRetention(StreamScore):
    """ERR: the main score on the requests edited so far (Hartvigsen et al. 2023, section 4.2)."""

    stream = "edited"
    caption = "the requests edited so far"
    order = 20
    always_has_column = True
    always_in_result = True
    ranks = 2
    shown_in = ("table", "latex", "report", "curves", "progress", "summary", "tuning", "dashboard")


@register_metric("Holdout")
class Holdout(StreamScore):
    """Holdout: the main score on other wordings of the facts edited so far; the wordings are never edited."""

    stream = "holdout"
    caption = "other wordings of the edited facts"
    order = 50
    chart_order = 30
    always_has_column = True
    shown_in = ("table", "report", "curves", "progress", "summary", "tuning", "dashboard")


@register_metric("Portability")
class Portability(StreamScore):
    """Portability: the main score on probes whose answers follow from the edits.

    `Portability/any` is the share of groups of probes of which at least one is answered rightly; absent without groups.
    """

    stream = "portability"
    caption = "what follows from the edits"
    order = 80
    shown_in = ("table", "report")

    def after_eval_exp(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the scores, and the share of groups that are answered."""
        values = super().after_eval_exp(strategy)
        share = None if values is None else share_answered(_grouped(strategy.experience.requests, strategy.scores))
        if values is not None and share is not None:
            values.append(self.value(strategy, share, "any"))
        return values


def _grouped(requests: Sequence[EditRequest], items: Sequence[ItemScore]) -> Iterable[tuple[object, bool]]:
    for request, item in zip(requests, items, strict=True):
        if request.group is not None:
            # Two edits may use one name for groups of their own.
            yield (edit_id(request), request.group), bool(item.correct)
