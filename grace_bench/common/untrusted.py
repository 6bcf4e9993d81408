"""Checks of untrusted input: settings may contain only plain values, and folders only their own files."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from grace_bench.common.files import readable
from grace_bench.errors import UserError, reason_of

_DEEPEST = 100


def refuse_references(path: Path) -> None:
    """Checks that a YAML file holds plain values: no interpolation, no alias, no deep nesting.

    OmegaConf resolves `${...}`, which reaches environment variables; aliases let a short file expand without bound.

    Args:
        path: The file.

    Raises:
        UserError: If it holds an alias or a `${...}`, or is nested too deeply; the message names the line.
        OSError: If it cannot be read.
        UnicodeDecodeError: If it is not UTF-8.
        yaml.YAMLError: If it is not YAML.
    """
    depth = 0
    for event in yaml.parse(readable(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        wrong = None
        if isinstance(event, yaml.AliasEvent):
            wrong = f"'*{event.anchor}' repeats another part"
        elif isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            wrong = f"'{event.value}' asks for a value from elsewhere"
        elif depth > _DEEPEST:
            wrong = f"is nested more than {_DEEPEST} deep"
        if wrong is not None:
            place = path if event.start_mark is None else f"{path}:{event.start_mark.line + 1}"
            raise UserError(f"{place}: {wrong}; settings of a file are values and nothing else")


def check_run_folder(folder: Path) -> None:
    """Checks that everything read from or written to a run folder lies inside it.

    Through a link, a resumed run would write, or a report would show, a file from elsewhere; a pipe would block either
    for ever. W&B reads settings from the working folder, and these name the server that receives the user's key. The
    folders inside `wandb/` are W&B's own and are never read here.

    Args:
        folder: The run folder, which may itself be a link and need not exist.

    Raises:
        UserError: If a link points outside the folder, something in it is neither a file nor a folder, or W&B would
            read settings from it.
    """
    settings = folder / "wandb" / "settings"
    if settings.exists():
        raise UserError(f"{settings}: would tell W&B where to send your key; no run leaves such a file: remove it")
    home = folder.resolve()
    for where, folders, files in os.walk(folder):
        for path in (Path(where, name) for name in (*folders, *files)):
            if path.is_symlink():
                try:
                    target = path.resolve()
                except RuntimeError as error:
                    raise UserError(f"{path}: is a link that leads to itself") from error
                if not target.is_relative_to(home):
                    raise UserError(f"{path}: is a link that leads out of the run folder; put what it points to there")
            elif not stat.S_ISDIR(mode := path.lstat().st_mode) and not stat.S_ISREG(mode):
                raise UserError(f"{path}: is neither a file nor a folder")
        if Path(where) == folder / "wandb":
            folders.clear()


def check_model_folder(path: str) -> None:
    """Checks that loading a model folder reads only this folder and runs no code from the hub.

    A pipe in it would block a reader for ever. transformers loads another model where it finds an adapter, and
    downloads and runs the kernels that `attn_implementation` and similar fields name; `trust_remote_code=False` covers
    neither.

    Args:
        path: The folder; a hub id is not checked.

    Raises:
        UserError: If the folder asks for either, or its index of weights names files elsewhere.
    """
    folder = Path(path)
    for file in folder.iterdir() if folder.is_dir() else ():
        try:
            readable(file)
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}") from error
    if (folder / "adapter_config.json").exists():
        raise UserError(f"model={path}: holds an adapter (adapter_config.json): merge it into its model and save that")
    for file in folder.glob("*.index.json"):
        places = _json(file).get("weight_map")
        for place in places.values() if isinstance(places, dict) else ():
            if Path(str(place)).name != place:
                raise UserError(f"{file}: names weights outside of its folder ({place})")
    if (folder / "config.json").is_file():
        _refuse_kernels(folder / "config.json", _json(folder / "config.json"))


def _refuse_kernels(file: Path, value: Any) -> None:
    for key, inner in value.items() if isinstance(value, dict) else ():
        if "_implementation" in str(key) and "/" in json.dumps(inner):
            raise UserError(f"{file}: field '{key}': asks for code from the hub ({json.dumps(inner)})")
        _refuse_kernels(file, inner)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(readable(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason_of(error)})") from error
    return content if isinstance(content, dict) else {}
