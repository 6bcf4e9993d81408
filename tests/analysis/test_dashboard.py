"""The dashboard: a specification that loads back, what is published after a login, and a sweep that runs."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

pytest.importorskip("wandb_workspaces")

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb_workspaces.reports.v2.internal import ReportViewspec
from wandb_workspaces.workspaces.internal import View

from grace_bench.analysis.dashboard import make_report, make_workspace, specification
from grace_bench.cli import main
from grace_bench.launch.compose import compose
from grace_bench.launch.run_folder import folder_of
from grace_bench.run.loggers import RunPlan
from grace_bench.run.loggers.wandb import WandbLogger

SCRIPT = Path(sys.executable).with_name("grace-bench")
TITLES = ["Leaderboard", "Learning curves", "ERR by age of the edit", "Cost against quality", "Codebook overlap"]


@pytest.fixture
def nobody(tmp_path: Path) -> dict[str, str]:
    """An environment in which nobody is logged in to W&B."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": str(tmp_path), "NETRC": str(tmp_path / "no-netrc"), "OMP_NUM_THREADS": "1"}


class WebApp(ThreadingHTTPServer):
    """What the W&B server says to someone who saves a workspace and a report."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.saved: list[dict[str, Any]] = []


class _Answers(BaseHTTPRequestHandler):
    server: WebApp

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        data: dict[str, Any] = {}
        if "upsertView" in query:
            self.server.saved.append(variables)
            names = ("name", "displayName", "description", "spec")
            view = {"id": f"view{len(self.server.saved)}", **{name: variables[name] for name in names}}
            view |= {"createdAt": "2024-01-01T00:00:00", "updatedAt": "2024-01-01T00:00:00"}
            view["project"] = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            data = {"upsertView": {"view": view, "inserted": True}}
        elif "viewer" in query:
            data = {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        elif "models" in query:
            node = {"id": "p", "name": "proj", "entityName": "me", "createdAt": "2024-01-01"}
            node |= {"isBenchmark": False, "user": None}
            page = {"endCursor": None, "hasNextPage": False}
            data = {"models": {"edges": [{"node": node, "cursor": "c"}], "pageInfo": page}}
        self._send(data)

    def _send(self, data: dict[str, Any]) -> None:
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web_app() -> Iterator[WebApp]:
    with WebApp() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def command(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env=env, timeout=60)


def without_ids(specified: Any) -> Any:
    """A specification without the random names that the library gives its parts."""
    if isinstance(specified, list):
        return [without_ids(part) for part in specified]
    if isinstance(specified, dict):
        return {key: without_ids(value) for key, value in specified.items() if key not in ("__id__", "id", "ref")}
    return specified


def test_without_a_login_the_specification_and_a_sweep_are_written_and_publishing_is_explained(
    nobody: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command("dashboard", "proj", "--group", "toy/toy", "--out", str(out), env=nobody)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert {path.name for path in out.iterdir()} == {"workspace.json", "report.json", "sweep.yaml"}
    assert "wandb login" in done.stdout.splitlines()[-1]
    workspace = json.loads((out / "workspace.json").read_text(encoding="utf-8"))
    assert [section["name"] for section in workspace["spec"]["section"]["panelBankConfig"]["sections"]] == TITLES
    assert workspace["project"] == "proj"
    assert "toy/toy" in json.dumps(workspace["spec"]["section"]["runSets"])
    again = command("dashboard", "proj", "--out", str(out), env=nobody)
    assert f"kept: {out / 'sweep.yaml'}" in again.stdout


def test_the_specification_loads_back_as_the_same_workspace() -> None:
    written = specification(make_workspace("proj", entity="me", group="toy/toy"))
    loaded = ws.Workspace._from_model(View.model_validate(json.loads(json.dumps(written))))
    assert specification(loaded) == written
    assert [section.name for section in loaded.sections] == TITLES
    curves = loaded.sections[1].panels
    assert [(panel.x, panel.groupby_aggfunc, panel.groupby_rangefunc) for panel in curves] == [
        (wr.Metric("n_edits"), "mean", "stddev")
    ] * 5


def test_the_specification_loads_back_as_the_same_report() -> None:
    written = specification(make_report("proj", entity="me", group="toy/toy"))
    loaded = wr.Report._from_model(ReportViewspec.model_validate(json.loads(json.dumps(written))))
    loaded.width = "fluid"
    assert without_ids(specification(loaded)) == without_ids(written)
    assert [block.text for block in loaded.blocks if isinstance(block, wr.H2)] == TITLES


def keys_of(stream: str, eps: float, seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What W&B can group a run of GRACE by."""
    config = compose([f"stream={stream}", "editor=grace", f"editor.eps_init={eps}", f"seed={seed}"])
    told: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **given: told.update(given) or MagicMock())
    plan = RunPlan(
        run_id=folder_of(config).relative_to(config.out).as_posix(),
        folder=folder,
        config={"seed": seed},
        stream=stream,
        model=stream,
        editor="grace",
        n_candidates=9,
        max_edits=9,
        higher_is_better=True,
    )
    WandbLogger(folder, mode="offline", group="sweep-0a1b2c3d").start(plan)
    return {"group": told["group"], "jobType": told["job_type"], **told["config"]}


def test_runs_of_other_streams_or_settings_are_never_averaged_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = make_workspace("proj", entity="me", group=None)
    (runsets,) = {
        tuple(runset.groupby)
        for block in make_report("proj", entity="me", group=None).blocks
        if isinstance(block, wr.PanelGrid)
        for runset in block.runsets
    }
    names = {"Group": "group", "JobType": "jobType"}
    keys = [names.get(key.name, key.name) for key in workspace.runset_settings.groupby]
    assert keys == [key.rpartition(".")[2] for key in runsets]
    shown: Counter[tuple[Any, ...]] = Counter()
    for stream, eps, seed in product(["toy", "atlas-drift"], [0.1, 1.0], [0, 1]):
        run = keys_of(stream, eps, seed, tmp_path, monkeypatch)
        shown[tuple(run[key] for key in keys)] += 1
    assert list(shown.values()) == [2] * 4, "only seeds share a line"
    assert all(getattr(panel, "groupby", None) is None for section in workspace.sections for panel in section.panels)


def test_with_a_login_workspace_and_report_are_published(
    nobody: dict[str, str], tmp_path: Path, web_app: WebApp
) -> None:
    env = {**nobody, "WANDB_BASE_URL": f"http://127.0.0.1:{web_app.server_port}", "WANDB_API_KEY": "k" * 40}
    done = command("dashboard", "proj", "--out", str(tmp_path / "out"), env=env)
    assert done.returncode == 0, done.stderr
    first, second = web_app.saved
    assert (first["type"], second["type"]) == ("project-view", "runs")
    assert first["entityName"] == second["entityName"] == "me"
    for saved in (first, second):
        assert all(title in saved["spec"] for title in TITLES)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[-2:]] == ["workspace", "report"]
    assert "k" * 40 not in done.stdout + done.stderr


def test_a_wrong_key_is_one_line_and_the_sweep_is_not_lost(nobody: dict[str, str], tmp_path: Path) -> None:
    env = {**nobody, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "short"}
    done = command("dashboard", "proj", "--out", str(tmp_path / "out"), env=env)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("grace-bench: W&B")]
    assert "Traceback" not in done.stderr


def test_a_missing_wandb_workspaces_is_one_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "proj", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.strip().endswith('pip install "grace-bench[dashboard]"')
    assert not (tmp_path / "out").exists()


def test_every_run_of_the_sweep_is_one_that_grace_bench_takes(nobody: dict[str, str], tmp_path: Path) -> None:
    command("dashboard", "my proj", "--entity", "me", "--out", str(tmp_path), env=nobody)
    sweep = yaml.safe_load((tmp_path / "sweep.yaml").read_text(encoding="utf-8"))
    assert (sweep["project"], sweep["entity"], sweep["method"]) == ("my proj", "me", "grid")
    values = {name: node.get("values", [node.get("value")]) for name, node in sweep["parameters"].items()}
    folders = set()
    for chosen in product(*values.values()):
        arguments = {name: {"value": value} for name, value in zip(values, chosen, strict=True)}
        # What `wandb agent` makes of the file's command.
        flags = create_sweep_command_args({"args": arguments})
        typed = [part for part in create_sweep_command(sweep["command"]) if part not in ("${env}", "/usr/bin/env")]
        assert typed == ["grace-bench", "run", "${args_no_hyphens}"]
        folders.add(folder_of(compose(flags["args_no_hyphens"])))
    assert len(folders) == 12
