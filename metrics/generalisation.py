"""What the edits achieved: on the edited requests, on other wordings of them, and on what follows from them."""

from grace_bench.evaluation.metric import StreamScore
from grace_bench.registry import register_metric


@register_metric("ERR")
class EditRetention(StreamScore):
    """ERR: the main score on the requests edited so far (Hartvigsen et al. 2023, section 4.2)."""

    stream = "edited"


@register_metric("Holdout")
class Holdout(StreamScore):
    """Holdout: the main score on other wordings of the facts edited so far, never edited themselves."""

    stream = "holdout"


@register_metric("Portability")
class Portability(StreamScore):
    """Portability: the main score on probes whose answers follow from the edits."""

    stream = "portability"
