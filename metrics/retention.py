"""What the model still knows: retention on upstream data, on what was right, and beside the edits."""

from grace_bench.evaluation.metric import StreamScore
from grace_bench.registry import register_metric


@register_metric("TRR")
class TestRetention(StreamScore):
    """TRR: the main score on upstream data (Hartvigsen et al. 2023, section 4.2)."""

    __test__ = False
    stream = "upstream"


@register_metric("ARR")
class AccurateRetention(StreamScore):
    """ARR: the main score on what was right about the edited inputs (Hartvigsen et al. 2023, section 4.2)."""

    stream = "accurate"


@register_metric("Locality")
class Locality(StreamScore):
    """Locality: the main score on probes beside the edits, whose answers must not change."""

    stream = "locality"
