"""A run as the command line makes it: from a composed configuration to a run folder."""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import hydra
import psutil
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
from grace_bench.errors import UserError, did_you_mean
from grace_bench.loggers.progress import ProgressLogger
from grace_bench.loggers.wandb import WandbLogger
from grace_bench.results import RunResult, read_result
from grace_bench.runner import Schedule
from grace_bench.terminal import progress_bars
from grace_bench.zoo import known_models, resolve_model

if TYPE_CHECKING:
    from grace_bench.planning import Forecast

Say = Callable[[str], None]


def run_hydra(overrides: Sequence[str], *, carry_out: Callable[[DictConfig], object] | None = None) -> None:
    """Composes one configuration, or several after `-m`, and carries out each.

    Args:
        overrides: The command line's.
        carry_out: What is done with each; it is run by default.

    Raises:
        UserError: If the overrides do not compose, or a run was asked for what cannot be.
    """
    overrides = _checked(overrides)
    register_configs(overrides)
    # Hydra otherwise prints its own errors over several lines and exits with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[UserError] = []
    process = os.getpid()
    arguments = sys.argv

    def job(config: DictConfig) -> None:
        # Hydra has read its own by now; results note what was typed.
        sys.argv = arguments
        try:
            if carry_out is None:
                execute(config, say=print)
            else:
                carry_out(config)
        except (UserError, OmegaConfBaseException) as error:
            if os.getpid() != process:
                raise
            # Hydra would write a line of its own first.
            failures.append(error if isinstance(error, UserError) else UserError(_one_line(error)))

    sys.argv = ["grace-bench", *overrides]
    try:
        hydra.main(version_base="1.3", config_path="pkg://grace_bench.conf", config_name="run")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error
    finally:
        sys.argv = arguments
    if failures:
        others = f" (and {len(failures) - 1} more of the runs)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{others}")


def plan_hydra(overrides: Sequence[str]) -> None:
    """Foresees what the runs that overrides describe will take, prints each and the sum of several.

    Raises:
        UserError: As `run_hydra` does.
    """
    from grace_bench.planning import Forecast, print_forecast, print_sum

    forecasts: list[Forecast] = []

    def job(config: DictConfig) -> None:
        # The first run of a sweep starts the process, the others go on in it.
        started = time.time() if forecasts else psutil.Process().create_time()
        forecasts.append(plan(config, started=started))
        print_forecast(forecasts[-1])

    with TemporaryDirectory(prefix="grace-bench-plan-") as folder:
        # Hydra leaves a record of a sweep; plans are made one after the other, whatever carries out the runs.
        kept = [override for override in overrides if not override.startswith("hydra/launcher=")]
        run_hydra([*kept, f"hydra.sweep.dir={folder}"], carry_out=job)
    if len(forecasts) > 1:
        print_sum(forecasts)


def plan(config: DictConfig, *, started: float) -> "Forecast":
    """Foresees what a run will take.

    Args:
        config: The composed configuration.
        started: When the run's process would have started, as `time.time()` gives it.

    Raises:
        UserError: If the configuration asks for what cannot be.
    """
    from grace_bench.planning import plan_benchmark

    stream, asked = _asked(config)
    off = "disabled" in (config.wandb.mode, os.environ.get("WANDB_MODE"))
    with progress_bars() as progress:
        return plan_benchmark(
            stream,
            **asked,
            # Nothing of a plan goes to a server.
            loggers=lambda folder: () if off else (WandbLogger(folder, mode="offline"),),
            started=started,
            progress=progress,
        )


def compose(overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration that overrides give.

    Raises:
        UserError: If they do not compose.
    """
    overrides = _checked(overrides)
    register_configs(overrides)
    try:
        with hydra.initialize_config_module(config_module="grace_bench.conf", version_base="1.3"):
            return hydra.compose("run", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from error


def execute(config: DictConfig, *, say: Say, console: Console | None = None) -> RunResult:
    """Carries out one run in its folder, or reuses the finished one.

    Args:
        config: The composed configuration.
        say: Takes lines for the user.
        console: Where progress is shown; standard error by default.

    Raises:
        UserError: If the folder holds an unfinished run, or the configuration asks for what cannot be.
    """
    stream, asked = _asked(config)
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
    stream, asked = _asked(config)
    with progress_bars() as progress:
        figures = meta_train(stream, **asked, progress=progress)
    for name, value in figures.items():
        say(f"{name} {value:.4g}")


def folder_of(config: DictConfig) -> Path:
    """Returns the folder of the run that a configuration describes.

    Raises:
        UserError: If the configuration asks for what cannot be.
    """
    stream, asked = _asked(config)
    slug = model_slug(asked["model"], list(known_models()))
    name = registered_name(config.editor)
    return Path(config.out) / stream.registered_name / slug / name / f"{config_hash(config)}-s{config.seed}"


def _asked(config: DictConfig) -> tuple[Any, dict[str, Any]]:
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
        stamp = f".{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}"
        names = (stamp if n == 1 else f"{stamp}-{n}" for n in count(1))
        aside = next(path for path in map(folder.with_name, names) if not path.exists())
        folder.rename(aside)
        return None, aside
    if (folder / "result.json").is_file():
        return read_result(folder / "result.json"), None
    raise UserError(f"{folder}: holds an unfinished run; existing=rerun sets it aside and starts anew")


def _checked(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides, with what follows from them for the tuned and the published settings.

    Tuned settings hold for a model they were chosen on only, a published layer for the published model only, and
    either's budget where nothing of them is set by hand.
    """
    given: dict[str, str] = {}
    flags = [override for override in overrides if override in ("-m", "--multirun")]
    overrides = [override for override in overrides if override not in flags]
    for override in overrides:
        if override.startswith("-"):
            raise UserError(f"run has no option {override} (settings are given as option=value, a sweep as -m)")
        name, _, given[name] = override.partition("=")
        if not name or name.startswith(("~", "+")) or "=" not in override:
            raise UserError(f"{override!r} should be option=value")
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
    # Hydra reads flags in front only.
    return [*flags[:1], *overrides, *added]


def _one_line(error: Exception) -> str:
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
