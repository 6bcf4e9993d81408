"""Configuration: Hydra composes it, hydra-zen derives each part from a class's signature."""

import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import InstantiationException
from hydra_zen import builds, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from grace_bench.common.files import write_atomically
from grace_bench.common.options import check_choice, check_flag, check_text, check_whole
from grace_bench.common.text import on_one_line
from grace_bench.common.untrusted import refuse_references
from grace_bench.errors import UserError, reason_of
from grace_bench.registry import EDITORS, STREAMS, Registry

_GIVEN_BY_THE_RUN = ("model", "plugins", "evaluator")
_NOT_IN_THE_HASH = (
    "seed",
    "device",
    "device_map",
    "batch_tokens",
    "engine_memory_mb",
    "threads",
    "checkpoint_every",
    "strict",
    "out",
    "existing",
    "wandb",
)
_LEAST = {
    "seed": 0,
    "batch_size": 1,
    "batch_tokens": 1,
    "threads": 1,
    "checkpoint_every": 1,
    "engine_memory_mb": 0,
    "protocol.prefix_length": 1,
}
_CHOICES = {
    "split": ("edits", "validation"),
    "engine": ("exact", "plain"),
    "protocol.query": ("prefix", "last_token"),
    "existing": ("reuse", "resume", "rerun"),
    "wandb.mode": ("auto", "online", "offline", "disabled"),
}


def register_configs(overrides: Sequence[str]) -> None:
    """Puts a config for every registered stream and editor where Hydra finds it.

    Args:
        overrides: The command line's overrides, whose stream and editor names are checked first.

    Raises:
        UserError: If they name a stream or editor that does not exist.
    """
    store = ConfigStore.instance()
    groups: tuple[tuple[str, Registry[Any], bool], ...] = (("stream", STREAMS, False), ("editor", EDITORS, True))
    for group, registry, partial in groups:
        for override in overrides:
            key, _, value = override.partition("=")
            if key == group:
                for name in value.split(","):
                    registry.check(name)
        for name in registry.entries():
            try:
                cls = registry.get(name)
            except UserError as error:
                # Only those who ask for it need it.
                if f"{group}={name}" in overrides:
                    raise
                print(f"grace-bench: {on_one_line(str(error))}", file=sys.stderr)
                continue
            parameters = inspect.signature(cls).parameters
            node = builds(
                cls,
                populate_full_signature=True,
                zen_partial=partial,
                zen_exclude=[name for name in _GIVEN_BY_THE_RUN if name in parameters],
                # The run's seed is the editor's, unless the command line gives it another.
                **({"seed": "${seed}"} if partial and "seed" in parameters else {}),
            )
            store.store(group=group, name=name, node=node, provider="grace-bench")


def check_options(config: DictConfig) -> None:
    """Checks the run's own options, which YAML does not type.

    Raises:
        UserError: If one has a value it cannot have, naming it.
    """
    for name, least in _LEAST.items():
        value = OmegaConf.select(config, name)
        if (name, value) not in (("threads", "auto"), ("engine_memory_mb", None)):
            check_whole(name, value, least=least)
    for name, choices in _CHOICES.items():
        check_choice(name, OmegaConf.select(config, name), choices)
    # A configuration of before there was this one has none.
    check_flag("strict", config.get("strict", False))
    for name in ("out", "dtype", "device", "wandb.project"):
        check_text(name, OmegaConf.select(config, name))
    for name in ("model", "layer", "device_map", "tuning_budget", "wandb.group"):
        check_text(name, OmegaConf.select(config, name), optional=True)


def make_stream(config: DictConfig) -> Any:
    """Returns the stream that a run's configuration describes.

    Raises:
        UserError: If an option has a value it cannot have.
    """
    return _instantiate("stream", config.stream, STREAMS)


def make_editor(config: DictConfig) -> Any:
    """Returns what makes the editor that a run's configuration describes.

    Raises:
        UserError: If it describes anything else.
    """
    return _instantiate("editor", config.editor, EDITORS)


def registered_name(node: DictConfig) -> str:
    """Returns the registered name of the class that a stream's or editor's configuration makes.

    Raises:
        UserError: If it makes none of them.
    """
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    for registry in (STREAMS, EDITORS):
        name = _name_of(target, registry)
        if name is not None:
            return name
    raise UserError(f"_target_={target} is no registered stream or editor")


def hash_config(config: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a resolved configuration, without what does not change the answers.

    It is the same for all seeds: an editor's seed that is the run's counts as none of its own.
    """
    kept = {key: value for key, value in config.items() if key not in _NOT_IN_THE_HASH}
    editor = config.get("editor")
    if isinstance(editor, Mapping) and "seed" in editor:
        own = editor["seed"] != config.get("seed")
        kept["editor"] = {**editor, "seed": [editor["seed"]] if own else 0}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def config_hash(config: DictConfig) -> str:
    """Returns eight hex digits of `hash_config`, as they stand in the name of a run folder."""
    return hash_config(plain_config(config))[:8]


def plain_config(config: DictConfig) -> dict[str, Any]:
    """Returns the configuration resolved, as plain values."""
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return plain


def flat_settings(config: DictConfig) -> list[str]:
    """Returns every setting as `option=value`."""

    def leaves(path: str, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from leaves(f"{path}.{key}" if path else str(key), inner)
        elif isinstance(value, list):
            for inner in value:
                yield from leaves(path, inner)
        else:
            yield f"{path}={'null' if value is None else value}"

    return list(leaves("", OmegaConf.to_container(config, resolve=True)))


def write_config(config: DictConfig, path: Path) -> None:
    """Writes the resolved configuration as YAML."""
    write_atomically(path, OmegaConf.to_yaml(config, resolve=True))


def read_config(path: Path) -> DictConfig:
    """Reads what `write_config` wrote.

    Raises:
        UserError: If it is missing or is no configuration of a run.
    """
    try:
        refuse_references(path)
        config = OmegaConf.load(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (RecursionError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a configuration ({reason_of(error)})") from error
    missing = next((name for name in ("stream", "editor", "seed", "out") if name not in config), None)
    if not isinstance(config, DictConfig) or missing is not None:
        raise UserError(f"{path}: field '{missing}': is missing")
    return config


def _instantiate(group: str, node: Any, registry: Registry[Any]) -> Any:
    """Makes what a node describes: an object of a registered class, from plain values.

    Hydra calls whatever a node names, at any depth, and the node may have been written by a stranger.
    """
    if not isinstance(node, DictConfig):
        raise UserError(f"{group}={node} should be the settings of a {group}")
    plain: Any = OmegaConf.to_container(node, resolve=True)
    if _name_of(plain.pop("_target_", None), registry) is None:
        raise UserError(f"{group}._target_={node.get('_target_')} is no registered {group}")
    # An editor waits for its model.
    if bool(plain.pop("_partial_", False)) != (registry is EDITORS):
        raise UserError(f"{group}._partial_={node.get('_partial_')}: is no setting")
    _refuse_directives(group, plain)
    try:
        return instantiate(node)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def _name_of(target: Any, registry: Registry[Any]) -> str | None:
    """The name that a dotted path is registered under; nothing is imported that is not registered."""
    for entry in registry.entries().values():
        if entry.origin == "grace_bench":
            path = f"{entry.module}.{entry.class_name}"
        else:
            # Its entry point may name another module than the one that defines it.
            try:
                cls = registry.get(entry.name)
            except UserError:
                continue
            path = f"{cls.__module__}.{cls.__qualname__}"
        if path == target:
            return entry.name
    return None


def _refuse_directives(place: str, value: Any) -> None:
    """Raises if settings hold, at any depth, a key that Hydra would act on; each of those begins with `_`."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if str(key).startswith("_"):
                raise UserError(f"{place}.{key}: is no setting")
            _refuse_directives(f"{place}.{key}", inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_directives(place, inner)
