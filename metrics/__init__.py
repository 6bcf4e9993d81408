"""Metric plugins, one module a family. Write one with `EditMetric` and `@register_metric`."""

from typing import TYPE_CHECKING, Any

from grace_bench.registry import METRICS, register_metric

if TYPE_CHECKING:
    from grace_bench.evaluation.metric import EditMetric, StreamScore

__all__ = ["EditMetric", "StreamScore", "register_metric"]


def __getattr__(name: str) -> Any:
    if name in ("EditMetric", "StreamScore"):
        from grace_bench.evaluation import metric

        return getattr(metric, name)
    return METRICS.by_class_name(name)
