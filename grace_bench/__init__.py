"""A harness in which lifelong model editors are compared."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grace_bench.data.requests import EditRequest
    from grace_bench.editing.deployment import load_edited
    from grace_bench.models.editable import EditableModel
    from grace_bench.run.run_benchmark import run_benchmark
    from grace_bench.run.settings import RunSettings, Schedule

__all__ = ["EditRequest", "EditableModel", "RunSettings", "Schedule", "load_edited", "run_benchmark"]

_HOMES = {
    "EditRequest": "data.requests",
    "EditableModel": "models.editable",
    "RunSettings": "run.settings",
    "Schedule": "run.settings",
    "load_edited": "editing.deployment",
    "run_benchmark": "run.run_benchmark",
}


def __getattr__(name: str) -> Any:
    # Imported at first use, so that `grace-bench --help` does not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'grace_bench' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"grace_bench.{_HOMES[name]}"), name)
