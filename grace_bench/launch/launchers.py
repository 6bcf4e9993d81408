"""Where the runs of a sweep are carried out: in this process, through Slurm, or on Ray."""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from grace_bench.common.terminal import say
from grace_bench.errors import UserError, reason_of
from grace_bench.launch.run_config import RunConfig
from grace_bench.launch.run_folder import record_failure
from grace_bench.launch.sweep_run import Outcome, RunTask, SweepRun

_SUBMITIT = ("slurm", "hydra_plugins.hydra_submitit_launcher", "submitit")
_NEEDS = {
    "ray": ("ray", "hydra_plugins.hydra_ray_launcher", "ray"),
    "submitit_slurm": _SUBMITIT,
    "submitit_local": _SUBMITIT,
}
"""What Hydra's launchers need: the extra that installs them, and the modules."""
_MAX_RETRIES = 3
"""How often Ray repeats a task whose process died, by Ray's own default."""


def check_launcher(name: str | None) -> None:
    """Makes sure that a launcher is installed.

    Raises:
        UserError: If it is not, with the command that installs it.
    """
    extra, *modules = _NEEDS.get(name or "", ("",))
    if not all(_is_installed(module) for module in modules):
        raise UserError(f'hydra/launcher={name} is not installed: pip install "grace-bench[{extra}]"')


def launch(multirun: DictConfig, loader: ConfigLoader, runs: Sequence[SweepRun], task: RunTask) -> None:
    """Carries out runs with the launcher that Hydra's configuration names, and records their outcomes.

    Raises:
        UserError: If Ray is asked for a cluster that does not exist, or a local one lacks what a run needs.
    """
    if "ray" in multirun.hydra.launcher:
        _launch_on_ray(multirun, runs, task)
    else:
        _launch_by_hydra(multirun, loader, runs, task)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _launch_by_hydra(multirun: DictConfig, loader: ConfigLoader, runs: Sequence[SweepRun], task: RunTask) -> None:
    """Hands runs to one of Hydra's launchers."""
    context = HydraContext(config_loader=loader, callbacks=Callbacks(multirun))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=multirun)
    try:
        for sweep_run, done in zip(runs, launcher.launch([run.overrides for run in runs], 0), strict=True):
            sweep_run.outcome = done.return_value
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        # The launcher gives up at the first process that it loses; the finished runs are on disk.
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


def _launch_on_ray(multirun: DictConfig, runs: Sequence[SweepRun], task: RunTask) -> None:
    """Carries out runs on Ray, each as a task, configured as for Hydra's launcher for Ray.

    That launcher waits for its tasks in order: the first whose process dies for good ends it, and the outcomes of the
    later ones are lost. Nor can a task tell that Ray repeats it. So tasks are submitted and repeated here.

    Raises:
        UserError: If there is no such cluster, or a local one lacks what a run needs.
    """
    import ray
    from ray.exceptions import LocalRayletDiedError, RayError, RayTaskError

    settings: Any = OmegaConf.to_container(multirun.hydra.launcher.ray, resolve=True)
    init, remote = settings["init"], settings["remote"]
    if init.get("address") is None and "RAY_ADDRESS" not in os.environ:
        # Runs leave their results on disk; Ray would reserve a third of the memory for its own object store.
        init = {"object_store_memory": 100_000_000, "include_dashboard": False, **init, "address": "local"}
        # Ray reports usage to its makers unless told otherwise.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    retries = remote.pop("max_retries", _MAX_RETRIES)
    try:
        try:
            remote_task = ray.remote(**{"num_cpus": 1, **remote, "max_retries": 0})(_on_ray)
            ray.init(**{"logging_level": "warning", **init})
        except (ConnectionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"hydra.launcher.ray: {reason_of(error)}") from error
        if init.get("address") == "local":
            _check_resources(remote, ray.cluster_resources())

        def submit(sweep_run: SweepRun, attempt: int) -> Any:
            assert sweep_run.config is not None
            return remote_task.remote(task, sweep_run.config, attempt > 0)

        under_way = {submit(sweep_run, 0): (sweep_run, 0) for sweep_run in runs}
        while under_way:
            (ended,), _ = ray.wait(list(under_way), num_returns=1)
            sweep_run, attempt = under_way.pop(ended)
            try:
                sweep_run.outcome = ray.get(ended)
            except RayTaskError as error:
                sweep_run.outcome = Outcome("failed", reason_of(error.cause))
            except RayError as error:
                # Once Ray on this machine has died, nothing can be submitted.
                if attempt < retries and not isinstance(error, LocalRayletDiedError):
                    say(f"lost, begun again: {sweep_run.label}")
                    under_way[submit(sweep_run, attempt + 1)] = (sweep_run, attempt + 1)
                    continue
                assert sweep_run.folder is not None
                record_failure(sweep_run.folder, error)
                sweep_run.outcome = Outcome("failed", f"its process died {attempt + 1} times ({type(error).__name__})")
    finally:
        ray.shutdown()


def _on_ray(task: RunTask, config: RunConfig, again: bool) -> Outcome:
    return task(config, again=again)


def _check_resources(remote: dict[str, Any], available: dict[str, float]) -> None:
    for option, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU")):
        # Ray would wait forever.
        if remote.get(option, 0) > available.get(resource, 0):
            raise UserError(
                f"hydra.launcher.ray.remote.{option}={remote[option]}: there are {available.get(resource, 0):g} here"
            )
