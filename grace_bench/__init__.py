"""A harness in which lifelong model editors are compared."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace_bench.benchmarking import RunSettings, run_benchmark
    from grace_bench.models import EditableModel
    from grace_bench.runner import Schedule
    from grace_bench.types import EditRequest

__all__ = ["EditRequest", "EditableModel", "RunSettings", "Schedule", "run_benchmark"]

_HOMES = {
    "EditRequest": "types",
    "EditableModel": "models",
    "RunSettings": "benchmarking",
    "Schedule": "runner",
    "run_benchmark": "benchmarking",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for, so that `grace-bench --help` does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'grace_bench' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"grace_bench.{_HOMES[name]}"), name)
