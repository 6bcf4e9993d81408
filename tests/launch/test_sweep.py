"""Sweeps: which runs a command stands for, where they are carried out, and what becomes of one that dies."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from grace_bench.editors.ft import FineTune
from grace_bench.errors import EditFailure, UserError
from grace_bench.launch.compose import compose, prepare_overrides
from grace_bench.launch.sweep import composed_runs, preset_parts, sweep_name
from grace_bench.launch.sweep_run import RunTask
from grace_bench.results.reading import read_result
from helpers import Done, cli

SCRIPT = Path(sys.executable).with_name("grace-bench")
SMALL = ("stream=toy", "max_edits=3", "eval_every=2", "max_upstream=10", "wandb.mode=disabled")
# Long enough that one is still going on when its process is found.
EIGHT = (*SMALL, "editor=grace", "editor.n_iter=100", "seed=0,1,2,3,4,5,6,7")
RAY = (
    "hydra/launcher=ray",
    "hydra.launcher.ray.init.num_cpus=2",
    "hydra.launcher.ray.init.include_dashboard=false",
    "hydra.launcher.ray.init.object_store_memory=80000000",
)
needs_ray = pytest.mark.skipif(
    not (find_spec("ray") and find_spec("hydra_plugins")), reason='needs pip install "grace-bench[ray]"'
)
needs_submitit = pytest.mark.skipif(not find_spec("submitit"), reason='needs pip install "grace-bench[slurm]"')


@pytest.fixture(autouse=True)
def _ray_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives its workers niceness 15: beside other tests they would hardly be given any time."""
    monkeypatch.setenv("RAY_worker_niceness", "0")


def run_folders(out: Path) -> dict[str, Path]:
    """Finished runs by their ids; what was set aside does not count."""
    folders = (path.parent for path in out.rglob("result.json") if not path.parent.name.startswith("."))
    return {folder.relative_to(out).as_posix(): folder for folder in folders}


def answers(folder: Path) -> dict[str, Any]:
    """All that a run found out, without what it cost and when."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "result": {name: result[name] for name in ("run_id", "status", "seed", "before", "metrics")},
        "edits": [{name: value for name, value in edit.items() if name != "seconds"} for edit in edits],
        **{
            name: (folder / name).read_bytes()
            for name in ("metrics.jsonl", "predictions.parquet", "editor/editor.json", "editor/editor.safetensors")
        },
    }


def assert_same_runs(out: Path, expected: Path, *, n: int) -> None:
    """Two folders hold as many runs, which found out the same."""
    ours, theirs = run_folders(out), run_folders(expected)
    assert len(ours) == n
    assert {name: answers(folder) for name, folder in ours.items()} == {
        name: answers(folder) for name, folder in theirs.items()
    }


def busy_workers(command: psutil.Process) -> list[psutil.Process]:
    """The processes of a local Ray cluster that carry out a run; idle ones and agents have other titles."""
    found = []
    for process in command.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith("ray::_on_ray"):
                found.append(process)
    return found


@pytest.mark.slow
@needs_ray
def test_a_sweep_on_ray_ends_with_the_results_of_a_serial_one(tmp_path: Path) -> None:
    given = (*SMALL, "editor=grace", "seed=0,1,2")
    done = cli("run", "-m", *given, *RAY, f"out={tmp_path / 'ray'}")
    assert done.code == 0, done.err
    assert cli("run", "-m", *given, f"out={tmp_path / 'serial'}").code == 0
    assert_same_runs(tmp_path / "ray", tmp_path / "serial", n=3)


@pytest.mark.slow
@needs_ray
def test_eight_runs_on_ray_of_which_one_is_killed_end_with_the_eight_results_of_a_serial_sweep(tmp_path: Path) -> None:
    out = tmp_path / "runs"
    command = [str(SCRIPT), "run", "-m", *EIGHT, *RAY, f"out={out}"]
    # What Ray and the runs say goes to a file: a pipe that nobody reads would stop them.
    with (tmp_path / "out.txt").open("w") as told:
        running = subprocess.Popen(command, cwd=tmp_path, stdout=told, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 180
            while not (begun := list(out.rglob("edits.jsonl"))) or not (
                busy := busy_workers(psutil.Process(running.pid))
            ):
                assert running.poll() is None, (tmp_path / "out.txt").read_text()
                assert time.monotonic() < deadline, "no run was begun"
                time.sleep(0.02)
            busy[0].send_signal(signal.SIGKILL)
            assert len(begun) < 8
            code = running.wait(timeout=300)
        finally:
            # The cluster ends with the command that started it.
            if running.poll() is None:
                running.send_signal(signal.SIGINT)
                running.wait(timeout=60)
    told_text = (tmp_path / "out.txt").read_text()
    assert code == 0, told_text
    assert "lost, begun again" in told_text
    assert "8 runs, 8 done, 0 reused, 0 failed" in told_text

    serial = cli("run", "-m", *EIGHT, f"out={tmp_path / 'serial'}")
    assert serial.code == 0, serial.err
    assert_same_runs(out, tmp_path / "serial", n=8)
    for folder in run_folders(out).values():
        noted = json.loads((folder / "result.json").read_text(encoding="utf-8"))["environment"]
        assert "hydra/launcher=ray" in json.dumps(noted), "what was typed is noted on the other machine too"


@needs_submitit
def test_a_sweep_through_submitit_ends_with_the_results_of_a_serial_one(tmp_path: Path) -> None:
    given = (*SMALL, "editor=ft", "seed=1")
    done = cli("run", "-m", *given, "hydra/launcher=submitit_local", f"out={tmp_path / 'submitit'}")
    assert done.code == 0, done.err
    assert cli("run", "-m", *given, f"out={tmp_path / 'serial'}").code == 0
    assert_same_runs(tmp_path / "submitit", tmp_path / "serial", n=1)


@needs_submitit
def test_the_slurm_launcher_takes_its_settings(tmp_path: Path) -> None:
    settings = {"partition": "gpu", "gpus_per_node": 1, "array_parallelism": 8, "timeout_min": 240}
    overrides = prepare_overrides(
        ["hydra/launcher=submitit_slurm", *(f"hydra.launcher.{name}={value}" for name, value in settings.items())]
    )
    with initialize_config_module("grace_bench.launch.conf", version_base="1.3"):
        config = GlobalHydra.instance().config_loader().load_configuration("run", overrides, run_mode=RunMode.MULTIRUN)
    assert {name: config.hydra.launcher[name] for name in settings} == settings
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")


def test_a_run_that_slurm_put_back_into_its_queue_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (*SMALL, "editor=ft", f"out={tmp_path}")
    assert cli("run", *given).code == 0
    (folder,) = run_folders(tmp_path).values()
    finished = answers(folder)
    (folder / "result.json").unlink()
    assert RunTask()(compose(given)).state == "failed"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert RunTask()(compose(given)).state == "done"
    assert answers(folder) == finished


@pytest.mark.parametrize(
    ("launcher", "extra", "module"),
    [
        ("ray", "ray", "hydra_plugins.hydra_ray_launcher"),
        ("submitit_slurm", "slurm", "hydra_plugins.hydra_submitit_launcher"),
        ("submitit_local", "slurm", "submitit"),
    ],
)
def test_a_launcher_that_is_not_installed_says_what_installs_it(
    launcher: str, extra: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Python's own way of saying that there is no such module.
    monkeypatch.setitem(sys.modules, module, None)
    assert cli("run", "-m", f"hydra/launcher={launcher}", "seed=0,1") == Done(
        2, "", f'grace-bench: hydra/launcher={launcher} is not installed: pip install "grace-bench[{extra}]"\n'
    )


@needs_ray
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("hydra.launcher.ray.init.adress=x", "adress"),
        ("hydra.launcher.ray.remote.num_gpu=1", "num_gpu"),
        pytest.param(
            *("hydra.launcher.ray.remote.num_gpus=64", "remote.num_gpus=64: there are 0 here"), marks=pytest.mark.slow
        ),
    ],
)
def test_a_mistake_in_what_ray_is_given_is_one_line(given: str, says: str, tmp_path: Path) -> None:
    done = cli("run", "-m", *SMALL, *RAY, given, "editor=none", f"out={tmp_path / 'runs'}")
    assert (done.code, done.out) == (2, "")
    line = done.err.splitlines()[-1]
    assert line.startswith("grace-bench: hydra.launcher.ray")
    assert says in line
    assert not (tmp_path / "runs").exists()


# --- what a sweep says and leaves ------------------------------------------------------------------------------------


def test_a_run_that_breaks_keeps_no_other_back_and_leaves_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FineTune.edit

    def edit(self: FineTune, *args: Any, **kwargs: Any) -> Any:
        if self.n_iter == 3:
            raise MemoryError("all of it is taken")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(FineTune, "edit", edit)
    given = (*SMALL, "editor=ft", "editor.n_iter=2,3,4", f"out={tmp_path}")
    done = cli("run", "-m", *given)
    assert done.code == 1
    assert done.err.splitlines()[-1] == "grace-bench: 1 of 3 runs failed"
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["done", "failed", "done"]
    assert lines[-3].endswith(": MemoryError: all of it is taken")
    assert lines[-1].endswith(": 3 runs, 2 done, 0 reused, 1 failed")
    (broken,) = tmp_path.rglob("error.json")
    record = json.loads(broken.read_text(encoding="utf-8"))
    assert (record["error"], record["reason"]) == ("MemoryError", "all of it is taken")
    assert "in edit" in record["traceback"]

    monkeypatch.setattr(FineTune, "edit", whole)
    again = cli("run", "-m", *given, "existing=rerun")
    assert again.code == 0, again.err
    assert not (broken.parent / "error.json").exists()
    assert len(run_folders(tmp_path)) == 3


def test_a_run_that_fails_for_a_known_reason_exits_with_one_alone_and_in_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FineTune.edit

    def edit(self: FineTune, *args: Any, **kwargs: Any) -> Any:
        if self.n_iter == 3:
            raise EditFailure("it cannot be made")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(FineTune, "edit", edit)
    given = (*SMALL, "editor=ft", "strict=true", f"out={tmp_path}")
    alone = cli("run", *given, "editor.n_iter=3")
    assert alone.code == 1
    last = alone.err.splitlines()[-1]
    assert last.startswith("grace-bench: strict=true: edit 1 ")
    assert "it cannot be made" in last
    sweep = cli("run", "-m", *given, "editor.n_iter=2,3", "existing=rerun")
    assert sweep.code == 1
    assert sweep.err.splitlines()[-1] == "grace-bench: 1 of 2 runs failed"
    assert [line.split()[0] for line in sweep.out.splitlines()[-3:-1]] == ["done", "failed"]
    (broken,) = (path.parent for path in tmp_path.rglob("error.json") if not path.parent.name.startswith("."))
    assert cli("resume", str(broken)).code == 1


def test_a_sweep_done_again_reuses_every_run_and_leaves_nothing_beside_them(tmp_path: Path) -> None:
    given = ("run", "-m", *SMALL, "editor=none", "seed=0,1", f"out={tmp_path}")
    assert cli(*given).code == 0
    again = cli(*given)
    assert again.code == 0
    assert again.out.splitlines()[-1].endswith(": 2 runs, 0 done, 2 reused, 0 failed")
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_runs_of_a_sweep_have_one_group_and_keep_it_when_it_is_done_again(tmp_path: Path) -> None:
    given = [*SMALL, "editor=none", "seed=0,1"]
    assert cli("run", "-m", *given, f"out={tmp_path}").code == 0
    groups = {read_result(folder / "result.json").run_id: _group(folder) for folder in run_folders(tmp_path).values()}
    assert len(groups) == 2
    assert set(groups.values()) == {sweep_name(None, given)}
    assert (
        sweep_name(None, [*reversed(given), "existing=rerun", "out=elsewhere", "hydra/launcher=ray"]) in groups.values()
    )
    assert sweep_name(None, [*given, "max_edits=9"]) not in groups.values()


def test_a_group_that_is_given_stays(tmp_path: Path) -> None:
    assert cli("run", "-m", *SMALL, "editor=none", "seed=0,1", "wandb.group=mine", f"out={tmp_path}").code == 0
    assert {_group(folder) for folder in run_folders(tmp_path).values()} == {"mine"}


def _group(folder: Path) -> str:
    import yaml

    group: str = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["wandb"]["group"]
    return group


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sweep=ablation"], "no sweep 'ablation'; did you mean 'ablations'?"),
        (["hydra/launcher=ray"], "hydra/launcher=ray launches sweeps: add -m"),
        (["-m", "hydra/sweeper=optuna", "seed=0,1"], "hydra/sweeper"),
        (["-m", "editor=ft,none", "editor.lr=1,2"], "no option editor.lr"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_line_before_any_run(arguments: Sequence[str], says: str, tmp_path: Path) -> None:
    done = cli("run", *arguments, *SMALL, f"out={tmp_path / 'runs'}")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("grace-bench: ")
    assert done.err.count("\n") == 1
    assert says in done.err
    assert not (tmp_path / "runs").exists()


# --- presets ---------------------------------------------------------------------------------------------------------


def test_the_preset_of_figure_4_is_every_radius_at_every_block() -> None:
    runs = composed_runs(preset_parts("figure4", ["sweep=figure4", "stream.path=nowhere"]), "figure4")
    configs = [run.config for run in runs]
    assert len({(config.layer, config.editor.settings["eps_init"]) for config in configs if config is not None}) == 16
    assert {(config.stream.name, config.model, config.editor.name) for config in configs if config is not None} == {
        ("zsre", "t5-small-nq", "grace")
    }


@pytest.mark.slow
@pytest.mark.parametrize("asked", [("sweep=figure4",), ("-m", "paper=figure4")], ids=" ".join)
def test_figure_4_is_every_radius_at_every_block_on_the_zsre_setting(asked: tuple[str, ...], tmp_path: Path) -> None:
    done = cli("run", *asked, "stream.path=nowhere", f"out={tmp_path / 'runs'}")
    assert done.code == 2
    failed = [line for line in done.out.splitlines() if line.startswith("failed")]
    assert len(failed) == 16
    assert all("zsre/t5-small-nq/grace" in line and "nowhere" in line for line in failed)
    assert done.err.endswith("(and 15 more of the runs)\n")
    assert not list(tmp_path.rglob("result.json"))


def test_the_ablations_change_one_choice_of_the_published_setting_at_a_time() -> None:
    published = compose(["paper=zsre", "editor=grace"])
    seen = set()
    for part in preset_parts("ablations", ["sweep=ablations"]):
        (swept,) = [item for item in part if "," in item]
        name, _, values = swept.partition("=")
        seen.add(name)
        rest = [item for item in part if item != swept]
        configs = [compose([*rest, f"{name}={value}"]) for value in values.split(",")]
        for config in configs:
            settings = config.editor.settings
            changed = {key for key, value in published.editor.settings.items() if settings[key] != value}
            assert changed <= {name.removeprefix("editor.")}
            assert (config.layer == published.layer) or name == "layer"
        assert any(config.editor == published.editor and config.layer == published.layer for config in configs)
    assert seen == {"editor.eps_init", "layer", "editor.replacement", "editor.value_init"}


def test_what_is_given_wins_over_a_preset(tmp_path: Path) -> None:
    given = ["paper=none", *SMALL, "layer=second", "editor.eps_init=0.5", f"out={tmp_path}", "editor.n_iter=2"]
    done = cli("run", "sweep=ablations", *given)
    assert done.code == 0, done.err
    results = [read_result(folder / "result.json") for folder in run_folders(tmp_path).values()]
    # Replacements and initial values remain; the setting that both lists hold is run once.
    assert len(results) == 4
    assert {result.editor.eps_init for result in results} == {0.5}


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"there are: ablations, figure4, tune"):
        preset_parts("zzz", ["sweep=zzz"])
