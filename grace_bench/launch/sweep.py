"""Many runs from one command: here, on a Ray cluster, or through Slurm.

Hydra's grammar says which runs, its launchers where. What a sweep adds: a run that fails keeps no other back, a run
whose process dies is submitted again, and the end says of every run what became of it.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import hydra
import psutil
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from grace_bench.common.credentials import without_secrets
from grace_bench.common.terminal import say
from grace_bench.errors import RunFailure, UserError, did_you_mean, reason_of
from grace_bench.launch.config import registered_name
from grace_bench.launch.jobs import (
    NOT_COMPOSED,
    compose,
    execute,
    execute_meta_training,
    folder_of,
    foresee,
    given_options,
    one_line,
    prepared,
    record_failure,
)
from grace_bench.registry import EDITORS

Say = Callable[[str], None]

_SUBMITIT = ("slurm", "hydra_plugins.hydra_submitit_launcher", "submitit")
_NEEDS = {
    "ray": ("ray", "hydra_plugins.hydra_ray_launcher", "ray"),
    "submitit_slurm": _SUBMITIT,
    "submitit_local": _SUBMITIT,
}
"""What Hydra's launchers need: the extra that installs it, and its modules."""
_NOT_IN_THE_NAME = ("out", "existing", "device", "device_map", "threads", "batch_tokens", "engine_memory_mb", "tuned")
_MAX_RETRIES = 3
"""How often Ray by default repeats a task whose process died."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        state: `done`, `reused` (it was finished before) or `failed`.
        reason: Why it failed, in one line.
        mistake: Whether it failed by a mistake of the user's.
    """

    state: Literal["done", "reused", "failed"]
    reason: str | None = None
    mistake: bool = False


@dataclass
class SweepRun:
    """One run of a sweep.

    Attributes:
        overrides: What it is composed of.
        config: The composed configuration.
        folder: Its run folder; None if the configuration asks for what cannot be.
        outcome: What became of it; None until it has been carried out.
    """

    overrides: list[str]
    config: DictConfig
    folder: Path | None = None
    outcome: Outcome | None = None

    @property
    def label(self) -> str:
        """The run folder, or what was asked for where there can be none."""
        return str(self.folder) if self.folder is not None else " ".join(self.overrides)


@dataclass(frozen=True)
class Job:
    """What a launcher carries out for every run, on this machine or another.

    Args:
        folder: The working folder of the command, in which relative paths are meant.
        command: What was typed; results note it.
        prepares: Whether an editor that needs it is meta-trained first.
    """

    folder: str = field(default_factory=os.getcwd)
    command: list[str] = field(default_factory=lambda: list(sys.argv))
    prepares: bool = False

    def __call__(self, config: DictConfig, *, again: bool = False) -> Outcome:
        """Carries out a run.

        Args:
            config: Its configuration.
            again: Whether this sweep has begun it before, in a process that died.
        """
        own = sys.argv
        try:
            if Path.cwd() != Path(self.folder):
                os.chdir(self.folder)
            # Slurm counts how often it has put a job back into its queue.
            if (again or int(os.environ.get("SLURM_RESTART_COUNT", "0"))) and _is_interrupted(folder_of(config)):
                config.existing = "resume"
            sys.argv = self.command
            if self.prepares and EDITORS.get(registered_name(config.editor)).needs_meta_training:
                execute_meta_training(config, say=say)
            execute(config, say=say)
        except (UserError, OmegaConfBaseException) as error:
            return _mistake(error)
        except RunFailure as error:
            return Outcome("failed", without_secrets(str(error)))
        except Exception as error:
            return Outcome("failed", without_secrets(f"{type(error).__name__}: {reason_of(error)}"))
        finally:
            sys.argv = own
        return Outcome("done")


def run(overrides: Sequence[str]) -> int:
    """Carries out what `grace-bench run` was given: one run, or a sweep after `-m` or with `sweep=`.

    Returns:
        0 when everything is done, 1 if runs of a sweep failed.

    Raises:
        UserError: If a run was asked for what cannot be; those of a sweep that can be are carried out first.
    """
    is_sweep, overrides = _is_sweep(overrides)
    given = given_options(overrides)
    if not is_sweep:
        launcher = given.get("hydra/launcher")
        if launcher is not None:
            raise UserError(f"hydra/launcher={launcher} launches sweeps: add -m")
        try:
            execute(compose(overrides), say=say)
        except OmegaConfBaseException as error:
            raise UserError(one_line(error)) from error
        return 0
    preset = given.get("sweep")
    tunes = preset == "tune"
    runs = carry_out(_parts(preset, overrides), job=Job(prepares=tunes), name=sweep_name(preset, overrides))
    if tunes:
        from grace_bench.launch.tuning import conclude

        conclude(runs, say=say)
    return _conclusion(runs)


def _is_sweep(overrides: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether several runs were asked for, and the overrides that are left."""
    flags = ("-m", "--multirun")
    # What the paper shows in its Figure 4 is a sweep, and may be asked for as a paper's setting all the same.
    names = {"paper=figure4": "sweep=figure4"}
    kept = [names.get(override, override) for override in overrides if override not in flags]
    return any(override in flags for override in overrides) or "sweep" in given_options(kept), kept


def plan(overrides: Sequence[str]) -> None:
    """Foresees what the runs that overrides describe will take, prints each and the sum of several.

    Raises:
        UserError: If they do not compose, or a run asks for what cannot be.
    """
    from grace_bench.launch.plan import Forecast, print_forecast, print_sum

    forecasts: list[Forecast] = []
    for config in _configurations(overrides):
        # The first run of a sweep starts the process, the others go on in it.
        started = time.time() if forecasts else psutil.Process().create_time()
        forecasts.append(foresee(config, started=started))
        print_forecast(forecasts[-1])
    if len(forecasts) > 1:
        print_sum(forecasts)


def _configurations(overrides: Sequence[str]) -> list[DictConfig]:
    """The configurations of a run, or of the runs of a sweep."""
    is_sweep, overrides = _is_sweep(overrides)
    if not is_sweep:
        return [compose(overrides)]
    with _composing(_parts(given_options(overrides).get("sweep"), overrides), "plan") as (_, _, runs):
        pass
    for sweep_run in runs:
        if sweep_run.outcome is not None:
            raise UserError(f"{sweep_run.label}: {sweep_run.outcome.reason}")
    return [sweep_run.config for sweep_run in runs]


def _parts(preset: str | None, overrides: Sequence[str]) -> list[list[str]]:
    """The sweeps that were asked for, each as the overrides of a multirun."""
    if preset != "tune":
        return preset_parts(preset, overrides)
    from grace_bench.launch.tuning import searches

    return searches(overrides)


def preset_parts(preset: str | None, overrides: Sequence[str]) -> list[list[str]]:
    """Returns the sweeps that a preset stands for, each as the overrides of a multirun; what is given wins.

    Raises:
        UserError: If there is no such preset.
    """
    rest = [override for override in overrides if not override.startswith("sweep=")]
    if preset is None:
        return [rest]
    folder = Path(str(files("grace_bench.launch.conf"))) / "sweep"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if preset not in known:
        raise UserError(f"no sweep {preset!r}{did_you_mean(preset, known)} (there are: {', '.join(known)})")
    given = given_options(rest)
    parts: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{preset}.yaml"), resolve=False)
    return [[*(f"{key}={value}" for key, value in part.items() if key not in given), *rest] for part in parts]


def sweep_name(preset: str | None, overrides: Iterable[str]) -> str:
    """Returns the name of a sweep: the same for the same runs, wherever and however often they are carried out."""
    kept = sorted(
        override
        for override in overrides
        if override.partition("=")[0] not in _NOT_IN_THE_NAME and not override.startswith(("hydra", "wandb."))
    )
    return f"{preset or 'sweep'}-{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}"


def carry_out(parts: Sequence[Sequence[str]], *, job: Job, name: str, say: Say = say) -> list[SweepRun]:
    """Carries out sweeps as one and says of every run what became of it.

    Args:
        parts: The overrides of each multirun; a run that several ask for is carried out once.
        job: What is done for a run.
        name: Of the sweep; W&B's group unless the overrides name another.
        say: Takes lines for the user.

    Raises:
        UserError: If the overrides do not compose.
    """
    with _composing(parts, name) as (loader, multirun, runs):
        for sweep_run in runs:
            if sweep_run.outcome is None and _is_finished(sweep_run):
                outcome = job(sweep_run.config)
                sweep_run.outcome = Outcome("reused") if outcome.state == "done" else outcome
        waiting = [sweep_run for sweep_run in runs if sweep_run.outcome is None]
        for sweep_run in waiting:
            if sweep_run.config.existing == "resume":
                say(f"{_standing(sweep_run)}  {sweep_run.label}")
        if waiting:
            launch = _launch_on_ray if "ray" in multirun.hydra.launcher else _launch
            launch(multirun, loader, waiting, job)
    outcomes = [sweep_run.outcome or Outcome("failed", "never carried out") for sweep_run in runs]
    for sweep_run, outcome in zip(runs, outcomes, strict=True):
        say(f"{outcome.state:6}  {sweep_run.label}" + (f": {outcome.reason}" if outcome.reason else ""))
    counts = Counter(outcome.state for outcome in outcomes)
    say(f"{name}: {len(runs)} runs, " + ", ".join(f"{counts[state]} {state}" for state in ("done", "reused", "failed")))
    return runs


@contextmanager
def _composing(parts: Sequence[Sequence[str]], name: str) -> Iterator[tuple[ConfigLoader, DictConfig, list[SweepRun]]]:
    """Gives Hydra's loader, the first multirun and all runs, each once; what Hydra complains of is one line.

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
    launcher = given.get("hydra/launcher")
    extra, *modules = _NEEDS.get(launcher or "", ("",))
    if not all(_is_installed(module) for module in modules):
        raise UserError(f'hydra/launcher={launcher} is not installed: pip install "grace-bench[{extra}]"')
    if given.get("wandb.group", "null") == "null":
        part = [override for override in part if not override.startswith("wandb.group=")] + [f"wandb.group={name}"]
    # Hydra wants to be told that the arguments of Ray's own functions, which it does not list, are no slips.
    return [
        f"++{override}" if override.startswith(("hydra.launcher.ray.init.", "hydra.launcher.ray.remote.")) else override
        for override in prepared(part)
    ]


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _runs(multirun: DictConfig, loader: ConfigLoader) -> Iterable[SweepRun]:
    """Yields the runs that Hydra's own sweeper would launch for a multirun."""
    parser = OverridesParser.create(config_loader=loader)
    overrides = parser.parse_overrides(list(multirun.hydra.overrides.task))
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    for chosen in batch:
        config = loader.load_sweep_config(multirun, chosen)
        with open_dict(config):
            del config["hydra"]
        sweep_run = SweepRun(chosen, config)
        try:
            sweep_run.folder = folder_of(config)
        except (UserError, OmegaConfBaseException) as error:
            sweep_run.outcome = _mistake(error)
        yield sweep_run


def _unique(runs: Iterable[SweepRun]) -> list[SweepRun]:
    found: dict[str, SweepRun] = {}
    for sweep_run in runs:
        found.setdefault(sweep_run.label, sweep_run)
    return list(found.values())


def _is_finished(sweep_run: SweepRun) -> bool:
    assert sweep_run.folder is not None
    return sweep_run.config.existing != "rerun" and (sweep_run.folder / "result.json").is_file()


def _is_interrupted(folder: Path) -> bool:
    return folder.exists() and not (folder / "result.json").is_file()


def _standing(sweep_run: SweepRun) -> str:
    """What `existing=resume` does with a run that is not finished."""
    assert sweep_run.folder is not None
    if (sweep_run.folder / "error.json").is_file():
        return "retry "
    return "resume" if _is_interrupted(sweep_run.folder) else "start "


def _launch(multirun: DictConfig, loader: ConfigLoader, runs: Sequence[SweepRun], job: Job) -> None:
    """Hands runs to Hydra's launcher."""
    context = HydraContext(config_loader=loader, callbacks=Callbacks(multirun))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=job, config=multirun)
    try:
        for sweep_run, done in zip(runs, launcher.launch([run.overrides for run in runs], 0), strict=True):
            sweep_run.outcome = done.return_value
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        # The launcher gives up at the first process that it loses; what the others have made so far stands on disk.
        for sweep_run in runs:
            _look_up(sweep_run, f"no result yet ({reason_of(error)})")


def _look_up(sweep_run: SweepRun, otherwise: str) -> None:
    assert sweep_run.folder is not None
    if (sweep_run.folder / "result.json").is_file():
        sweep_run.outcome = Outcome("done")
    elif (sweep_run.folder / "error.json").is_file():
        recorded = json.loads((sweep_run.folder / "error.json").read_text(encoding="utf-8"))
        sweep_run.outcome = Outcome("failed", f"{recorded['error']}: {recorded['reason']}")
    else:
        sweep_run.outcome = Outcome("failed", otherwise)


def _launch_on_ray(multirun: DictConfig, loader: ConfigLoader, runs: Sequence[SweepRun], job: Job) -> None:
    """Carries runs out on Ray, each a task, as Hydra's launcher for Ray is configured.

    The launcher itself waits for its tasks in their order: the first whose process dies for good ends it, and of those
    behind it nothing more is heard. Nor can a task see that Ray repeats it. So tasks are submitted and repeated here.

    Raises:
        UserError: If there is no such cluster, or a local one lacks what a run needs.
    """
    import ray
    from ray.exceptions import LocalRayletDiedError, RayError, RayTaskError

    settings: Any = OmegaConf.to_container(multirun.hydra.launcher.ray, resolve=True)
    init, remote = settings["init"], settings["remote"]
    if init.get("address") is None and "RAY_ADDRESS" not in os.environ:
        # Runs leave their results on disk; Ray would set aside a third of the memory for its own store of objects.
        init = {"object_store_memory": 100_000_000, "include_dashboard": False, **init, "address": "local"}
        # Nor is anybody told of it who was not asked for.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    retries = remote.pop("max_retries", _MAX_RETRIES)
    try:
        try:
            task = ray.remote(**{"num_cpus": 1, **remote, "max_retries": 0})(_on_ray)
            ray.init(**{"logging_level": "warning", **init})
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"hydra.launcher.ray: {reason_of(error)}") from error
        if init.get("address") == "local":
            _check_resources(remote, ray.cluster_resources())

        def submit(sweep_run: SweepRun, attempt: int) -> Any:
            plain: Any = OmegaConf.to_container(sweep_run.config, resolve=False)
            return task.remote(job, plain, attempt > 0)

        under_way = {submit(sweep_run, 0): (sweep_run, 0) for sweep_run in runs}
        while under_way:
            (ended,), _ = ray.wait(list(under_way), num_returns=1)
            sweep_run, attempt = under_way.pop(ended)
            try:
                sweep_run.outcome = ray.get(ended)
            except RayTaskError as error:
                sweep_run.outcome = Outcome("failed", reason_of(error.cause))
            except RayError as error:
                # Without Ray on this machine nothing can be submitted any more.
                if attempt < retries and not isinstance(error, LocalRayletDiedError):
                    say(f"lost, begun again: {sweep_run.label}")
                    under_way[submit(sweep_run, attempt + 1)] = (sweep_run, attempt + 1)
                    continue
                assert sweep_run.folder is not None
                record_failure(sweep_run.folder, error)
                sweep_run.outcome = Outcome("failed", f"its process died {attempt + 1} times ({type(error).__name__})")
    finally:
        ray.shutdown()


def _on_ray(job: Job, config: dict[str, Any], again: bool) -> Outcome:
    return job(OmegaConf.create(config), again=again)


def _check_resources(remote: dict[str, Any], available: dict[str, float]) -> None:
    for option, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        # Ray would wait for ever.
        if remote.get(option, 0) > available.get(resource, 0):
            raise UserError(
                f"hydra.launcher.ray.remote.{option}={remote[option]}: there are {available.get(resource, 0):g} here"
            )


def _mistake(error: UserError | OmegaConfBaseException) -> Outcome:
    return Outcome("failed", str(error) if isinstance(error, UserError) else one_line(error), mistake=True)


def _conclusion(runs: Sequence[SweepRun]) -> int:
    """Returns the exit code of a sweep.

    Raises:
        UserError: If all that failed did so by a mistake of the user's.
    """
    failed = [run.outcome for run in runs if run.outcome is not None and run.outcome.state == "failed"]
    if not failed:
        return 0
    if not all(outcome.mistake for outcome in failed):
        print(f"grace-bench: {len(failed)} of {len(runs)} runs failed", file=sys.stderr)
        return 1
    others = f" (and {len(failed) - 1} more of the runs)" if len(failed) > 1 else ""
    raise UserError(f"{failed[0].reason}{others}")
