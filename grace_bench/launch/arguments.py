"""What a configuration asks of `run_benchmark` and the other functions that open a stream with a model."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from grace_bench.errors import UserError
from grace_bench.launch.run_config import RunConfig, make_editor, make_stream, setting_name
from grace_bench.registry import STREAMS
from grace_bench.run.settings import CapabilitySettings, RunSettings, Schedule


def run_arguments(config: RunConfig) -> tuple[Any, dict[str, Any]]:
    """Returns the stream of a configuration, and the keyword arguments for `run_benchmark`, `meta_train` and planning.

    Raises:
        UserError: If an option of stream or run has a value that it cannot have, or no model is named for the stream.
    """
    settings, stream = run_settings(config), make_stream(config)
    model = config.model or stream.default_model
    if model is None:
        raise UserError(f"stream '{stream.registered_name}' has no model of its own: name one with model=")
    return stream, {
        "model": str(model),
        "editor": make_editor(config),
        "settings": settings,
        **{name: getattr(config, name) for name in ("layer", "dtype", "device", "device_map", "load_in")},
    }


def run_settings(config: RunConfig) -> RunSettings:
    """Returns the settings of a run: every field takes the option that declares it, wherever that is nested."""
    values = {setting_name(name): value for name, value in config.options()}
    schedule = Schedule(**{declared.name: values[declared.name] for declared in fields(Schedule)})
    made = ("schedule", "capability")
    names = [declared.name for declared in fields(RunSettings) if declared.name not in made]
    return RunSettings(
        schedule=schedule, capability=_capability_settings(config), **{name: values[name] for name in names}
    )


def _capability_settings(config: RunConfig) -> CapabilitySettings | None:
    asked = config.capability
    if asked.tasks is None:
        return None
    own = STREAMS.get(config.stream.name).capability_tasks
    if asked.include_path is not None and not Path(asked.include_path).is_dir():
        raise UserError(f"capability.include_path={asked.include_path}: no such folder")
    folders = tuple(Path(folder) for folder in (asked.include_path, own) if folder is not None)
    return CapabilitySettings(tasks=asked.tasks, every=asked.every, limit=asked.limit, folders=folders)
