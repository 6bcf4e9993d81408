"""`grace-bench run` and `grace-bench plan`: one run, a sweep or a tuning, from the overrides of a command line."""

import os
import time
from collections.abc import Sequence

import psutil
from omegaconf.errors import OmegaConfBaseException

from grace_bench.common.scores import check_score, score_info
from grace_bench.common.terminal import progress_bars, say
from grace_bench.errors import UserError
from grace_bench.launch import tuning
from grace_bench.launch.arguments import run_arguments
from grace_bench.launch.compose import N_EDITS, compose, given_options, one_line
from grace_bench.launch.meta_training import meta_train_if_needed
from grace_bench.launch.plan import Forecast, plan_benchmark, print_forecast, print_sum
from grace_bench.launch.run_config import RunConfig
from grace_bench.launch.run_folder import run_or_reuse
from grace_bench.launch.sweep import composed_runs, exit_code, preset_parts, run_sweep, sweep_name
from grace_bench.launch.sweep_run import RunTask
from grace_bench.launch.typed import texts_of
from grace_bench.run.loggers.wandb import WandbLogger

_TUNING = "tune"
"""The preset that chooses hyperparameters; its runs come from search spaces."""


def run_command(overrides: Sequence[str]) -> int:
    """Carries out `grace-bench run`: one run, or a sweep with `-m` or `sweep=`.

    Returns:
        0 when everything is done, 1 if runs of a sweep failed.

    Raises:
        UserError: If an option has a value that it cannot have; the other runs of a sweep are carried out first.
        RunFailure: If a single run fails for a known reason.
    """
    is_sweep, overrides = _is_sweep(overrides)
    given = given_options(overrides)
    if not is_sweep:
        launcher = given.get("hydra/launcher")
        if launcher is not None:
            raise UserError(f"hydra/launcher={launcher} launches sweeps: add -m")
        try:
            run_or_reuse(compose(overrides), say=say)
        except OmegaConfBaseException as error:
            raise UserError(one_line(error)) from error
        return 0
    preset = given.get("sweep")
    score, overrides = _tuning_score(preset, overrides)
    task = RunTask(prepare=meta_train_if_needed if preset == _TUNING else None)
    runs = run_sweep(_parts(preset, overrides), task=task, name=sweep_name(preset, overrides))
    if preset == _TUNING:
        tuning.conclude(runs, score=score, say=say)
    return exit_code(runs)


def plan_command(overrides: Sequence[str]) -> None:
    """Carries out `grace-bench plan`: prints a forecast of each run that overrides describe, and the sum of several.

    Raises:
        UserError: If they do not compose, or an option has a value that it cannot have.
    """
    forecasts: list[Forecast] = []
    for config in _configurations(overrides):
        # The first run of a sweep starts the process, the others go on in it.
        started = time.time() if forecasts else psutil.Process().create_time()
        forecasts.append(_forecast(config, started=started))
        print_forecast(forecasts[-1])
    if len(forecasts) > 1:
        print_sum(forecasts)


def _forecast(config: RunConfig, *, started: float) -> Forecast:
    """Forecasts a run whose process would have started at a time, as `time.time()` gives it."""
    stream, arguments = run_arguments(config)
    is_off = "disabled" in (config.wandb.mode, os.environ.get("WANDB_MODE"))
    with progress_bars() as progress:
        return plan_benchmark(
            stream,
            **arguments,
            # Nothing of a plan goes to a server.
            loggers=lambda folder: () if is_off else (WandbLogger(folder, mode="offline"),),
            started=started,
            progress=progress,
        )


def _configurations(overrides: Sequence[str]) -> list[RunConfig]:
    """The configurations of a run, or of the runs of a sweep."""
    is_sweep, overrides = _is_sweep(overrides)
    if not is_sweep:
        return [compose(overrides)]
    configs = []
    preset = given_options(overrides).get("sweep")
    _, overrides = _tuning_score(preset, overrides)
    for sweep_run in composed_runs(_parts(preset, overrides), "plan"):
        if sweep_run.outcome is not None or sweep_run.config is None:
            reason = sweep_run.outcome.reason if sweep_run.outcome is not None else "has no configuration"
            raise UserError(f"{sweep_run.label}: {reason}")
        configs.append(sweep_run.config)
    return configs


def _is_sweep(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether several runs were asked for, and the overrides without the flags that say so."""
    flags = ("-m", "--multirun")
    # Figure 4 of the paper is a sweep, and may be asked for like the paper's settings all the same.
    names = {"paper=figure4": "sweep=figure4"}
    kept = [names.get(override, override) for override in overrides if override not in flags]
    given = given_options(kept)
    is_sweep = "sweep" in given or len(texts_of(given.get(N_EDITS, ""))) > 1
    return is_sweep or any(override in flags for override in overrides), kept


def _tuning_score(preset: str | None, overrides: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The score by which a tuning chooses, None for the main score, and the overrides without it.

    Raises:
        UserError: If there is no such score, or the trials would not record it.
    """
    given = given_options(overrides)
    score = given.get("score")
    if preset != _TUNING or score is None:
        return None, overrides
    check_score("score", score)
    if score_info(score).is_optional and "scores" not in given:
        raise UserError(
            f"score={score} is only computed if it is asked for: add scores=[{score}] and the others wanted"
        )
    return score, [override for override in overrides if not override.startswith("score=")]


def _parts(preset: str | None, overrides: Sequence[str]) -> list[list[str]]:
    """The multiruns that were asked for, each as its overrides."""
    return tuning.searches(overrides) if preset == _TUNING else preset_parts(preset, overrides)
