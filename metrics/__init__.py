"""Metrics, one module a family. `docs/add-a-metric.md` shows how to write one."""

from typing import TYPE_CHECKING, Any

from grace_bench.registry import METRICS, register_metric

if TYPE_CHECKING:
    from grace_bench.evaluation.metric import EditMetric, StreamMetric, StreamScore

_CONTRACT = ("EditMetric", "StreamMetric", "StreamScore")

__all__ = ["EditMetric", "StreamMetric", "StreamScore", "register_metric"]


def __getattr__(name: str) -> Any:
    if name in _CONTRACT:
        from grace_bench.evaluation import metric

        return getattr(metric, name)
    return METRICS.by_class_name(name)
