"""Many runs from one command: here, on a Ray cluster, or through Slurm.

Hydra's grammar decides which runs, Hydra's launchers where. A sweep adds that a run that fails does not stop the
others, that a run whose process dies is submitted again, and that the outcome of every run is reported at the end.
"""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from grace_bench.common.terminal import say
from grace_bench.errors import UserError, did_you_mean
from grace_bench.launch.compose import (
    CONFIG_FOLDER,
    NOT_COMPOSED,
    given_options,
    note,
    one_line,
    prepare_overrides,
    resolved,
)
from grace_bench.launch.launchers import check_launcher, launch
from grace_bench.launch.run_config import OPTIONS
from grace_bench.launch.run_folder import folder_of
from grace_bench.launch.sweep_run import Outcome, RunTask, SweepRun, is_interrupted

Say = Callable[[str], None]


def preset_parts(preset: str | None, overrides: Sequence[str]) -> list[list[str]]:
    """Returns the sweeps that a preset stands for, each as the overrides of a multirun; what is given wins.

    Raises:
        UserError: If there is no such preset.
    """
    rest = [override for override in overrides if not override.startswith("sweep=")]
    if preset is None:
        return [rest]
    folder = CONFIG_FOLDER / "sweep"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if preset not in known:
        raise UserError(f"no sweep {preset!r}{did_you_mean(preset, known)} (there are: {', '.join(known)})")
    given = given_options(rest)
    parts: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{preset}.yaml"), resolve=False)
    return [[*(f"{key}={value}" for key, value in part.items() if key not in given), *rest] for part in parts]


def sweep_name(preset: str | None, overrides: Iterable[str]) -> str:
    """Returns the name of a sweep: the same for the same runs, wherever and however often they are carried out."""
    kept = sorted(override for override in overrides if _is_named(override.partition("=")[0]))
    return f"{preset or 'sweep'}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}"


def _is_named(option: str) -> bool:
    """Whether an option tells sweeps apart; not the launcher, nor the place of the user's own presets."""
    if option in OPTIONS:
        return OPTIONS[option].in_sweep_name
    return not option.startswith(("hydra", "wandb.")) and option != "tuned"


def run_sweep(parts: Sequence[Sequence[str]], *, task: RunTask, name: str, say: Say = say) -> list[SweepRun]:
    """Carries out several multiruns as one sweep and reports the outcome of every run.

    Args:
        parts: The overrides of each multirun; a run that several ask for is carried out once.
        task: What is done for a run.
        name: The name of the sweep; W&B's group unless the overrides name another.
        say: Takes lines for the user.

    Raises:
        UserError: If the overrides do not compose.
    """
    with _composed(parts, name) as (loader, multirun, runs):
        for sweep_run in runs:
            if sweep_run.outcome is None and sweep_run.is_finished:
                assert sweep_run.config is not None
                outcome = task(sweep_run.config)
                sweep_run.outcome = Outcome("reused") if outcome.state == "done" else outcome
        pending = [sweep_run for sweep_run in runs if sweep_run.outcome is None]
        for sweep_run in pending:
            if sweep_run.config is not None and sweep_run.config.existing == "resume":
                say(f"{_resumption(sweep_run)}  {sweep_run.label}")
        if pending:
            launch(multirun, loader, pending, task)
    outcomes = [sweep_run.outcome or Outcome("failed", "never carried out") for sweep_run in runs]
    for sweep_run, outcome in zip(runs, outcomes, strict=True):
        say(f"{outcome.state:6}  {sweep_run.label}" + (f": {outcome.reason}" if outcome.reason else ""))
    counts = Counter(outcome.state for outcome in outcomes)
    say(f"{name}: {len(runs)} runs, " + ", ".join(f"{counts[state]} {state}" for state in ("done", "reused", "failed")))
    return runs


def composed_runs(parts: Sequence[Sequence[str]], name: str) -> list[SweepRun]:
    """Returns the runs of several multiruns, each once, without carrying them out.

    Raises:
        UserError: If the overrides do not compose.
    """
    with _composed(parts, name) as (_, _, runs):
        return runs


def exit_code(runs: Sequence[SweepRun]) -> int:
    """Returns the exit code of a sweep: 0 if every run is done or reused, 1 if some failed.

    Raises:
        UserError: If every failure is a mistake of the user's.
    """
    failed = [run.outcome for run in runs if run.outcome is not None and run.outcome.state == "failed"]
    if not failed:
        return 0
    if not all(outcome.is_mistake for outcome in failed):
        print(f"grace-bench: {len(failed)} of {len(runs)} runs failed", file=sys.stderr)
        return 1
    others = f" (and {len(failed) - 1} more of the runs)" if len(failed) > 1 else ""
    raise UserError(f"{failed[0].reason}{others}")


@contextmanager
def _composed(parts: Sequence[Sequence[str]], name: str) -> Iterator[tuple[ConfigLoader, DictConfig, list[SweepRun]]]:
    """Yields Hydra's loader, the first multirun, and all runs, each once; an error of Hydra's becomes one line.

    Raises:
        UserError: If the parts do not compose.
    """
    # Hydra otherwise wraps its errors in several lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    overrides = [_multirun_overrides(part, name) for part in parts]
    try:
        with hydra.initialize_config_module("grace_bench.launch.conf", job_name="grace-bench", version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            multiruns = [loader.load_configuration("run", part, run_mode=RunMode.MULTIRUN) for part in overrides]
            yield loader, multiruns[0], _unique(run for multirun in multiruns for run in _runs(multirun, loader))
    except NOT_COMPOSED as error:
        raise UserError(one_line(error)) from error


def _multirun_overrides(part: Sequence[str], name: str) -> list[str]:
    given = given_options(part)
    if "hydra/sweeper" in given:
        raise UserError("hydra/sweeper: sweeps are made of comma-separated values, by Hydra's own sweeper")
    check_launcher(given.get("hydra/launcher"))
    if given.get("wandb.group", "null") == "null":
        part = [override for override in part if not override.startswith("wandb.group=")] + [f"wandb.group={name}"]
    # Hydra does not list the arguments of Ray's own functions, and refuses them unless they are marked as additions.
    return [
        f"++{override}" if override.startswith(("hydra.launcher.ray.init.", "hydra.launcher.ray.remote.")) else override
        for override in prepare_overrides(part)
    ]


def _runs(multirun: DictConfig, loader: ConfigLoader) -> Iterable[SweepRun]:
    """Yields the runs that Hydra's own sweeper would launch for a multirun."""
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides(list(multirun.hydra.overrides.task))
    noted: set[str] = set()

    def told(text: str) -> None:
        if text not in noted:
            noted.add(text)
            note(text)

    (batch,) = BasicSweeper.split_arguments(overrides, None)
    for chosen in batch:
        composed = loader.load_sweep_config(multirun, chosen)
        with open_dict(composed):
            del composed["hydra"]
        sweep_run = SweepRun(chosen)
        try:
            sweep_run.config = resolved(composed, note=told)
            sweep_run.folder = folder_of(sweep_run.config)
        except (UserError, OmegaConfBaseException) as error:
            sweep_run.outcome = Outcome.of_mistake(error)
        yield sweep_run


def _unique(runs: Iterable[SweepRun]) -> list[SweepRun]:
    found: dict[str, SweepRun] = {}
    for sweep_run in runs:
        found.setdefault(sweep_run.label, sweep_run)
    return list(found.values())


def _resumption(sweep_run: SweepRun) -> str:
    """What `existing=resume` does with a run that is not finished."""
    assert sweep_run.folder is not None
    if (sweep_run.folder / "error.json").is_file():
        return "retry "
    return "resume" if is_interrupted(sweep_run.folder) else "start "
