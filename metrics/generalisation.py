"""The effect of the edits: on the edited requests, on other wordings of them, and on their consequences."""

from grace_bench.evaluation.metric import StreamScore
from grace_bench.registry import register_metric


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
    """Portability: the main score on probes whose answers follow from the edits."""

    stream = "portability"
    caption = "what follows from the edits"
    order = 80
    shown_in = ("table", "report")
