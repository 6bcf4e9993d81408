"""The user's own presets: `STREAM/EDITOR.yaml` in a folder, as `sweep=tune` writes them."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore

from grace_bench.common.untrusted import refuse_references
from grace_bench.errors import UserError
from grace_bench.launch.run_config import SHORT
from grace_bench.launch.typed import texts_of

_GROUP = "own"
_SETTINGS = ("chat", "editor", "layer", "model", "target_space", "tuning_budget")


def register_presets(overrides: Sequence[str]) -> list[str]:
    """Registers the presets of `tuned=FOLDER` with Hydra, and returns the overrides with `tuned=none` in its place.

    A run whose stream and editor have no preset there keeps the defaults of both.

    Raises:
        UserError: If the folder holds no preset, or one cannot be read.
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
        files = sorted(Path(value).glob("*/*.yaml"))
        if not files:
            raise UserError(f"{override}: is no folder with a preset STREAM/EDITOR.yaml in it")
        for path in files:
            node = _read(path)
            store.store(group=_GROUP, name=f"{path.parent.name}_{path.stem}", node=node, package="_global_")
        taken.append("tuned=none")
    return taken


def _is_path(value: str) -> bool:
    return "/" in value or value.endswith((".yaml", ".yml")) or Path(value).is_dir()


def _read(path: Path) -> dict[str, object]:
    try:
        refuse_references(path)
        node = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(node, dict) or not all(isinstance(key, str) for key in node):
        raise UserError(f"{path}: should be settings, as option: value")
    for key in node:
        if key not in _SETTINGS:
            raise UserError(f"{path}: has '{key}', which no preset has (there are: {', '.join(_SETTINGS)})")
    for short, name in SHORT.items():
        group, _, option = name.partition(".")
        if short in node and not isinstance(node[short], dict):
            node[group] = {option: node[short]}
    return node
