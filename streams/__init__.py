"""Edit streams, one module per stream. Write your own with `EditStream`, `StreamData` and `@register_stream`."""

from typing import Any

from grace_bench.data.requests import EditRequest, Probe
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.registry import STREAMS, register_stream

__all__ = ["EditRequest", "EditStream", "Probe", "StreamData", "StreamMetadata", "register_stream"]


def __getattr__(name: str) -> Any:
    return STREAMS.by_class_name(name)
