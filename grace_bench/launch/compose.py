"""From overrides, as typed on the command line, to the configuration of a run; Hydra composes it."""

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from hydra_zen import builds
from hydra_zen.errors import HydraZenException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grace_bench.common.text import on_one_line
from grace_bench.common.wandb_account import check_project
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.launch.model_presets import GROUP, KEY, fill_in, preset_node
from grace_bench.launch.presets import register_presets
from grace_bench.launch.run_config import SHORT, RunConfig, default_options
from grace_bench.launch.typed import quote_plain_text, refuse_several, texts_of
from grace_bench.models.zoo import resolve_model
from grace_bench.registry import EDITORS, STREAMS, Registry

NOT_COMPOSED = (HydraException, OmegaConfBaseException, OverflowError, RecursionError)
"""What Hydra and the libraries beneath it raise for overrides that are no settings."""

N_EDITS = "n_edits"
"""How papers name `max_edits`; several values are a sweep by themselves."""
_NEVER = 1_000_000_000
# The last edit is evaluated in any case.
OmegaConf.register_new_resolver("at_the_end", lambda n_edits: _NEVER if n_edits is None else n_edits, replace=True)

_GIVEN_BY_THE_RUN = ("model", "plugins", "evaluator")
_COMPONENTS: tuple[tuple[str, Registry[Any]], ...] = (("stream", STREAMS), ("editor", EDITORS))
_stored: dict[tuple[str, str], type] = {}
"""The class whose config Hydra's store holds, by group and name. Deriving all configs takes a fifth of a second."""
CONFIG_FOLDER = Path(str(files("grace_bench.launch.conf")))
"""The configuration files that ship with the package."""


def compose(overrides: Sequence[str]) -> RunConfig:
    """Returns the configuration that overrides give.

    Raises:
        UserError: If they do not compose, or an option has a value that it cannot have.
    """
    for override in overrides:
        refuse_several(override)
    overrides = prepare_overrides(overrides)
    try:
        with hydra.initialize_config_module(config_module="grace_bench.launch.conf", version_base="1.3"):
            return resolved(hydra.compose("run", overrides), note=note)
    except NOT_COMPOSED as error:
        raise UserError(one_line(error)) from error


def resolved(config: DictConfig, *, note: Callable[[str], None] | None = None) -> RunConfig:
    """Returns what Hydra composed as a frozen, checked configuration.

    Args:
        config: What Hydra composed; the values of its preset are added to it.
        note: Takes a line on what was published for another model than the run's.

    Raises:
        UserError: If an option has a value that it cannot have.
        OmegaConfBaseException: If a reference leads nowhere.
    """
    said = fill_in(config)
    if said is not None and note is not None:
        note(said)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    plain.pop(KEY, None)
    run_config = RunConfig.from_plain(plain)
    # Not for a run that is read from its folder: W&B only shows it.
    check_project("wandb.project", run_config.wandb.project)
    return run_config


def prepare_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides as Hydra takes them, and registers the configs they ask for with Hydra.

    Raises:
        UserError: If they name a stream, editor, paper or preset that does not exist, or a value cannot be read.
    """
    overrides = _with_consequences(register_presets([quote_plain_text(override) for override in overrides]))
    _register_configs(overrides)
    return [_written_out(override) for override in overrides]


def _written_out(override: str) -> str:
    """An override with the full name of an option that was typed by its short one."""
    name, _, value = override.partition("=")
    if name == N_EDITS:
        return f"max_edits={value}"
    return f"{SHORT[name]}={value}" if name in SHORT and not value.startswith("{") else override


def given_options(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the options that overrides give, with their values as typed.

    Raises:
        UserError: If one is not of the form `option=value`.
    """
    given: dict[str, str] = {}
    for override in overrides:
        if override.startswith("-"):
            raise UserError(f"run has no option {override} (settings are given as option=value, a sweep as -m)")
        name, _, given[name] = override.partition("=")
        if not name or name.startswith(("~", "+")) or "=" not in override:
            raise UserError(f"{override!r} should be option=value")
    return given


def default_component(group: str) -> str:
    """Returns the stream or editor of a run that names none, from the defaults in `conf/run.yaml`."""
    (name,) = (entry[group] for entry in OmegaConf.load(CONFIG_FOLDER / "run.yaml").defaults if group in entry)
    return str(name)


def note(text: str) -> None:
    """Prints a line on standard error about a setting that nobody typed."""
    print(f"grace-bench: {on_one_line(text)}", file=sys.stderr)


def one_line(error: Exception) -> str:
    """Returns a message that Hydra or OmegaConf spread over several lines as one."""
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown:
        return f"there is no option {unknown[1]}"
    if isinstance(error, RecursionError):
        return "the settings are nested too deeply"
    # Hydra names the override, OmegaConf beneath it the mistake.
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), None)
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "See https"))]
    text = " ".join(kept) or type(error).__name__
    key = error.override if isinstance(error, OverrideParseException) else key
    return f"{key}: {text}" if key and key not in text else text


def _register_configs(overrides: Sequence[str]) -> None:
    """Registers the run's options, and a config for every stream and editor that can be imported, with Hydra.

    A stream or editor that cannot be imported concerns only those who ask for it.

    Raises:
        UserError: If the overrides name a stream or editor that does not exist or cannot be imported.
    """
    store, given = ConfigStore.instance(), given_options(overrides)
    store.store(name="options", node=default_options(), provider="grace-bench")
    for group, registry in _COMPONENTS:
        asked = _names_of(group, given)
        for name in asked:
            registry.check(name)
        for name in registry.entries():
            try:
                cls = registry.get(name)
                if _stored.get((group, name)) is not cls:
                    store.store(group=group, name=name, node=_node_of(registry, name), provider="grace-bench")
                    _stored[group, name] = cls
            except UserError:
                if name in asked:
                    raise
    for paper in _names_of("paper", given) or ["none"]:
        for editor in _names_of("editor", given) or [default_component("editor")]:
            node = preset_node(editor, paper)
            store.store(group=GROUP, name=f"auto_{paper}_{editor}", node=node, package="_global_")


def _choices(group: str) -> list[str]:
    """The configuration files of a group, by name."""
    return sorted(path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml"))


def _names_of(group: str, given: Mapping[str, str]) -> list[str]:
    return texts_of(given[group]) if group in given else []


def _node_of(registry: Registry[Any], name: str) -> Any:
    """The config of a stream or editor, derived from the constructor's signature.

    Raises:
        UserError: If the class cannot be imported, or options of its constructor have values that no file can hold.
    """
    cls, is_editor = registry.get(name), registry is EDITORS
    parameters = inspect.signature(cls).parameters
    try:
        return builds(
            cls,
            populate_full_signature=True,
            zen_partial=is_editor,
            zen_exclude=[parameter for parameter in _GIVEN_BY_THE_RUN if parameter in parameters],
            # The editor takes the run's seed unless the command line gives it another.
            **({"seed": "${seed}"} if is_editor and "seed" in parameters else {}),
        )
    except (HydraZenException, ImportError, TypeError) as error:
        raise UserError(
            f"{registry.kind} {name!r} ({cls.__module__}.{cls.__qualname__}) cannot be configured: {reason_of(error)}; "
            f"define the class in a module, with options of plain values"
        ) from error


def _with_consequences(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides, with what follows from them for the tuned and the published settings.

    Tuned settings hold only for the model they were chosen on, a published layer only for the published model, and the
    tuning budget of either only where nothing of them is set by hand.
    """
    given = given_options(overrides)
    for group in ("paper", "tuned", "preset"):
        known = _choices(group)
        for name in _names_of(group, given):
            if name not in known:
                raise UserError(f"no {group} {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})")
    if N_EDITS in given:
        _check_n_edits(given)
    models = [] if given.get("model", "null") == "null" else texts_of(given["model"])
    is_other_model = any(resolve_model(model).stream is None for model in models)
    added = ["tuned=none"] if is_other_model and "tuned" not in given else []
    papers = [OmegaConf.load(CONFIG_FOLDER / "paper" / f"{name}.yaml") for name in _names_of("paper", given)]
    if models and "layer" not in given and any("layer" in paper for paper in papers):
        added.append("layer=null")
    # A value set by hand was not chosen by the tuning.
    if "tuning_budget" not in given and any(name == "layer" or name.startswith("editor.") for name in given):
        added.append("tuning_budget=null")
    return [*overrides, *added]


def _check_n_edits(given: Mapping[str, str]) -> None:
    value = given[N_EDITS]
    if given.get("paper", "none") == "none":
        raise UserError(f"{N_EDITS}={value} belongs to a paper, as paper=wise; type max_edits={value} without one")
    if "max_edits" in given:
        raise UserError(f"{N_EDITS}={value} and max_edits={given['max_edits']} say the same: give one of them")
