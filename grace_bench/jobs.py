"""A run as the command line makes it: from a composed configuration to a run folder."""

import json
import platform
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from grace_bench.benchmark import fingerprint_requests
from grace_bench.benchmarking import RunSettings, meta_train, model_slug, run_benchmark
from grace_bench.config import (
    check_options,
    config_hash,
    make_editor,
    make_stream,
    register_configs,
    registered_name,
    write_config,
)
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.files import set_aside, write_atomically
from grace_bench.loggers.progress import ProgressLogger
from grace_bench.loggers.wandb import WandbLogger
from grace_bench.presets import take_presets
from grace_bench.results import RunResult, read_result
from grace_bench.runner import Schedule
from grace_bench.terminal import progress_bars
from grace_bench.zoo import known_models, resolve_model

Say = Callable[[str], None]


def compose(overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration that overrides give.

    Raises:
        UserError: If they do not compose.
    """
    overrides = prepared(overrides)
    try:
        with hydra.initialize_config_module(config_module="grace_bench.conf", version_base="1.3"):
            return hydra.compose("run", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error


def prepared(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides as Hydra takes them, and puts the configs they ask for where Hydra finds them.

    Raises:
        UserError: If they name what does not exist.
    """
    overrides = _checked(take_presets(overrides))
    register_configs(overrides)
    return overrides


def execute(config: DictConfig, *, say: Say, console: Console | None = None) -> RunResult:
    """Carries out one run in its folder, or reuses the finished one.

    Args:
        config: The composed configuration.
        say: Takes lines for the user.
        console: Where progress is shown; standard error by default.

    Raises:
        UserError: If the folder holds an unfinished run, or the configuration asks for what cannot be.
    """
    stream, asked = asked_of(config)
    folder = folder_of(config)
    finished, aside = _existing(folder, config.existing)
    if finished is not None:
        if finished.stream.fingerprint != fingerprint_requests(stream.load()):
            raise UserError(f"{folder}: was made from other requests; existing=rerun sets it aside and starts anew")
        say(f"finished before, reused: {folder}")
        return finished
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder / "config.yaml")
        (folder / "error.json").unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"out={config.out}: {error.strerror or error}") from error
    try:
        result = _run_in(folder, config, stream, asked, console)
    except UserError:
        # A mistake found before the first candidate leaves nothing to go on from, so it may be put right and run again.
        edits = folder / "edits.jsonl"
        if not edits.exists() or not edits.stat().st_size:
            shutil.rmtree(folder)
            if aside is not None:
                aside.rename(folder)
        raise
    except Exception as error:
        record_failure(folder, error)
        raise
    say(summary(result, folder))
    return result


def execute_meta_training(config: DictConfig, *, say: Say) -> None:
    """Meta-trains the editor of a configuration, on the stream's requests for training, and says how it went.

    Args:
        config: The composed configuration, the same as for a run.
        say: Takes lines for the user.

    Raises:
        UserError: If the editor needs no meta-training, or the configuration asks for what cannot be.
    """
    stream, asked = asked_of(config)
    with progress_bars() as progress:
        figures = meta_train(stream, **asked, progress=progress)
    for name, value in figures.items():
        say(f"{name} {value:.4g}")


def folder_of(config: DictConfig) -> Path:
    """Returns the folder of the run that a configuration describes.

    Raises:
        UserError: If the configuration asks for what cannot be.
    """
    stream, asked = asked_of(config)
    slug = model_slug(asked["model"], list(known_models()))
    name = registered_name(config.editor)
    return Path(config.out) / stream.registered_name / slug / name / f"{config_hash(config)}-s{config.seed}"


def asked_of(config: DictConfig) -> tuple[Any, dict[str, Any]]:
    """Returns the stream, and what a configuration asks of any work on it."""
    check_options(config)
    stream, editor = make_stream(config), make_editor(config)
    model = config.model or stream.default_model
    if model is None:
        raise UserError(f"stream '{stream.registered_name}' has no model of its own: name one with model=")
    names = ("layer", "dtype", "device", "device_map")
    return stream, {
        "model": str(model),
        "editor": editor,
        "settings": _settings(config),
        **{name: config[name] for name in names},
    }


def _settings(config: DictConfig) -> RunSettings:
    return RunSettings(
        seed=config.seed,
        schedule=Schedule(max_edits=config.max_edits, eval_every=config.eval_every, max_upstream=config.max_upstream),
        split=config.split,
        query=config.protocol.query,
        prefix_length=config.protocol.prefix_length,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        engine=config.engine,
        engine_memory_mb=config.engine_memory_mb,
        threads=config.threads,
        tuning_budget=config.tuning_budget,
    )


def _run_in(folder: Path, config: DictConfig, stream: Any, asked: dict[str, Any], console: Console | None) -> RunResult:
    plain: Any = OmegaConf.to_container(config, resolve=True)
    with progress_bars(console) as progress:
        return run_benchmark(
            stream,
            **asked,
            folder=folder,
            run_id=folder.relative_to(config.out).as_posix(),
            config=plain,
            loggers=[
                ProgressLogger(console),
                WandbLogger(folder, mode=config.wandb.mode, project=config.wandb.project, group=config.wandb.group),
            ],
            progress=progress,
        )


def summary(result: RunResult, folder: Path) -> str:
    """Returns a finished run in a few words."""
    shown = ("TRR", "ERR", "ES", "Holdout", "ARR", "Locality", "n_edits", "n_keys")
    parts = []
    for name in shown:
        value = result.metrics.get(name)
        if value is not None:
            parts.append(f"{name} {value:.0f}" if name.startswith("n_") else f"{name} {value:.3f}")
    if result.metrics.get("TRR") is None:
        parts.append("TRR none (no upstream data)")
    for reason, number in result.stream.left_out.items():
        parts.append(f"{number} {'record' if number == 1 else 'records'} left out ({reason})")
    return f"{result.editor.name} on {result.stream.name}: {', '.join(parts)}\n{folder}"


def _existing(folder: Path, existing: str) -> tuple[RunResult | None, Path | None]:
    """Returns the finished run that is reused, and where the one to be made again was set aside."""
    if not folder.exists():
        return None, None
    if existing == "rerun":
        return None, set_aside(folder)
    if (folder / "result.json").is_file():
        return read_result(folder / "result.json"), None
    raise UserError(f"{folder}: holds an unfinished run; existing=rerun sets it aside and starts anew")


def _checked(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides, with what follows from them for the tuned and the published settings.

    Tuned settings hold for a model they were chosen on only, a published layer for the published model only, and
    either's budget where nothing of them is set by hand.
    """
    given = given_options(overrides)
    presets = Path(str(files("grace_bench.conf")))
    for group in ("paper", "tuned"):
        known = sorted(path.stem for path in (presets / group).glob("*.yaml"))
        for name in given.get(group, "none").split(","):
            if name not in known:
                raise UserError(f"no {group} {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})")
    models = [] if given.get("model", "null") == "null" else given["model"].split(",")
    foreign = any(resolve_model(model).stream is None for model in models)
    added = ["tuned=none"] if foreign and "tuned" not in given else []
    papers = [OmegaConf.load(presets / "paper" / f"{name}.yaml") for name in given.get("paper", "none").split(",")]
    if models and "layer" not in given and any("layer" in paper for paper in papers):
        added.append("layer=null")
    # What is set by hand was not chosen by the tuning.
    if "tuning_budget" not in given and any(name == "layer" or name.startswith("editor.") for name in given):
        added.append("tuning_budget=null")
    return [*overrides, *added]


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


def record_failure(folder: Path, error: BaseException) -> None:
    """Writes what a run died of into its folder as `error.json`, by which it is known as failed."""
    with suppress(OSError):
        record = {
            "error": type(error).__name__,
            "reason": reason_of(error),
            "host": platform.node(),
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_atomically(folder / "error.json", json.dumps(record, indent=1))


def one_line(error: Exception) -> str:
    """Returns what Hydra or OmegaConf say over several lines as one."""
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown:
        return f"there is no option {unknown[1]}"
    # Hydra says which override, OmegaConf beneath it what is wrong with it.
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), None)
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "See https"))]
    text = " ".join(kept) or type(error).__name__
    return f"{key}: {text}" if key and key not in text else text
