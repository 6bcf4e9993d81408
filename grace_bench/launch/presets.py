"""The user's own presets: `STREAM/EDITOR.yaml` in a folder, as `sweep=tune` writes them, or one file for any stream."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore

from grace_bench.common.untrusted import refuse_references
from grace_bench.errors import UserError
from grace_bench.launch.run_config import SHORT
from grace_bench.launch.typed import texts_of
from grace_bench.registry import EDITORS, STREAMS

_GROUP = "own"
_ENDINGS = (".yaml", ".yml")
_SETTINGS = ("chat", "editor", "layer", "model", "target_space", "tuning_budget")
_SETTINGS_OF_A_FILE = (*_SETTINGS, "device_map", "dtype", "edits_at_once")


def register_presets(overrides: Sequence[str]) -> list[str]:
    """Registers the presets of `tuned=FOLDER` or `tuned=FILE` with Hydra, and returns the overrides without them.

    `tuned=none` takes their place, and `editor=` is added where a file names the editor and nothing else does. A run
    whose stream and editor have no preset in the folder keeps the defaults of both; a file holds for every stream.

    Raises:
        UserError: If the folder holds no preset, one cannot be read, or a file is for another editor.
    """
    store = ConfigStore.instance()
    # An earlier command in the same process may have registered others.
    store.repo.pop(_GROUP, None)
    taken = []
    for override in overrides:
        name, _, typed = override.partition("=")
        value = ",".join(texts_of(typed))
        if name != "tuned" or not _is_path(value):
            taken.append(override)
            continue
        taken.append("tuned=none")
        if Path(value).is_file() or (value.endswith(_ENDINGS) and not Path(value).is_dir()):
            editor, node = _read_for_any_stream(Path(value))
            taken += _naming(editor, overrides, value)
            for stream in STREAMS.entries():
                store.store(group=_GROUP, name=f"{stream}_{editor}", node=node, package="_global_")
            continue
        files = sorted(Path(value).glob("*/*.yaml"))
        if not files:
            raise UserError(f"{override}: is no folder with a preset STREAM/EDITOR.yaml in it")
        for path in files:
            node = _read(path, _SETTINGS)
            store.store(group=_GROUP, name=f"{path.parent.name}_{path.stem}", node=node, package="_global_")
    return taken


def _read_for_any_stream(path: Path) -> tuple[str, dict[str, Any]]:
    """The editor that a file is for, and its settings."""
    node = _read(path, _SETTINGS_OF_A_FILE)
    options = node.get("editor")
    editor = options.pop("name", None) if isinstance(options, dict) else None
    if not isinstance(editor, str):
        raise UserError(f"{path}: field 'editor.name': should be the editor that the settings are for")
    EDITORS.check(editor)
    return editor, node


def _naming(editor: str, overrides: Sequence[str], path: str) -> list[str]:
    """The override that names a file's editor, if none does."""
    asked = [name for text in overrides if text.startswith("editor=") for name in texts_of(text.partition("=")[2])]
    other = next((name for name in asked if name != editor), None)
    if other is not None:
        raise UserError(f"tuned={path}: has settings of editor {editor}, not of {other}")
    return [] if asked else [f"editor={editor}"]


def _is_path(value: str) -> bool:
    return "/" in value or value.endswith(_ENDINGS) or Path(value).is_dir()


def _read(path: Path, settings: Sequence[str]) -> dict[str, Any]:
    try:
        refuse_references(path)
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        raise UserError(f"{path}: should be settings, as option: value")
    for key in node:
        if key not in settings:
            raise UserError(f"{path}: has '{key}', which no preset has (there are: {', '.join(settings)})")
    for short, name in SHORT.items():
        group, _, option = name.partition(".")
        if short in node and not isinstance(node[short], dict):
            node[group] = {option: node[short]}
    return node
