"""Weights & Biases as a view of a run: an offline run holds all of it, and nothing about it can hurt the run."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from grace_bench.analysis.dashboard import make_report, make_workspace, specification
from grace_bench.launch.compose import compose
from grace_bench.launch.run_folder import run_or_reuse
from grace_bench.results.schema import EditRecord, RunResult

BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records_of(path: Path) -> Iterator[Any]:
    """The records of a `.wandb` file: LevelDB's log format after a header of seven bytes."""
    # W&B's own process writes the file, and is done with it for sure only when it has ended.
    wandb.teardown()
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def items_of(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def run_toy(out: Path, *overrides: str, editor: str = "grace") -> tuple[RunResult, Path, list[str]]:
    said: list[str] = []
    config = compose(
        ["stream=toy", f"editor={editor}", "max_edits=4", "eval_every=2", "max_upstream=20", f"out={out}", *overrides]
    )
    result = run_or_reuse(config, say=said.append)
    (file,) = out.rglob("result.json")
    return result, file.parent, said


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path, list[Any]]:
    out = tmp_path_factory.mktemp("offline")
    result, folder, _ = run_toy(out, "wandb.mode=offline", "editor.n_iter=20")
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    return result, folder, list(records_of(file))


def test_the_offline_run_holds_the_config_project_and_group(offline: Any) -> None:
    result, _, records = offline
    (run,) = [record.run for record in records if record.HasField("run")]
    config = items_of(run.config.update)
    for record in records:
        config |= items_of(record.config.update)
    assert config["seed"] == 0
    assert config["max_edits"] == 4
    assert config["editor"]["n_iter"] == 20
    assert config["stream"]
    assert run.project == "grace-bench"
    assert run.run_group == "toy/toy"
    assert run.display_name == result.run_id
    assert f"{config['row']}-s0" == result.run_id


def test_the_offline_run_holds_every_metric_against_n_edits(offline: Any) -> None:
    result, folder, records = offline
    history = [items_of(record.history.item) for record in records if record.HasField("history")]
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        measured = json.loads(line)
        logged: dict[str, Any] = {}
        for row in history:
            if row.get("n_edits") == measured["n_edits"]:
                logged |= row
        assert {name: logged.get(name) for name in measured} == measured
    clocks = [row["n_edits"] for row in history if "n_edits" in row]
    assert clocks == sorted(clocks)
    defined = [record.metric for record in records if record.HasField("metric")]
    assert any(metric.glob_name == "*" and metric.step_metric == "n_edits" for metric in defined)
    last = {name: value for row in history for name, value in row.items()}
    assert last["TRR"] == result.metrics["TRR"]
    assert last["ERR"] == result.metrics["ERR"]


def test_the_offline_run_holds_the_table_of_edits(offline: Any) -> None:
    _, folder, records = offline
    history = [items_of(record.history.item) for record in records if record.HasField("history")]
    (table,) = [row for row in history if row.get("edits._type") == "table-file"]
    (files,) = (folder / "wandb").glob("offline-run-*/files")
    written = json.loads((files / table["edits.path"]).read_text(encoding="utf-8"))
    assert written["columns"] == [name for name in EditRecord.model_fields if name != "scores_after"]
    rows = [dict(zip(written["columns"], row, strict=True)) for row in written["data"]]
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{name: value for name, value in edit.items() if name != "scores_after"} for edit in edits]


def test_the_offline_run_holds_the_run_folder_as_an_artifact_without_wandb_itself(offline: Any) -> None:
    _, folder, records = offline
    artifacts = [record.artifact for record in records if record.HasField("artifact")]
    artifacts += [
        record.request.log_artifact.artifact
        for record in records
        if record.HasField("request") and record.request.HasField("log_artifact")
    ]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "run"]
    held = {entry.path for entry in artifact.manifest.contents}
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert held == {path for path in on_disk if not path.startswith("wandb/")}
    assert {"config.yaml", "edits.jsonl", "metrics.jsonl", "predictions.parquet", "result.json"} <= held


def test_the_offline_run_holds_err_by_the_age_of_the_edit(offline: Any) -> None:
    result, folder, records = offline
    history = [items_of(record.history.item) for record in records if record.HasField("history")]
    logged = {row["age"]: row["ERR_by_age"] for row in history if "age" in row}
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    age = {line["id"]: result.metrics["n_edits"] - line["n_edits"] for line in edits if line["edited"]}
    table = pd.read_parquet(folder / "predictions.parquet").query("stream == 'edited' and n_edits == 4")
    # Four edits are fewer than ten tenths, so every age stands for itself.
    assert logged == {age[row.request_id]: row.score for row in table.itertuples()}
    assert len(logged) == 4
    assert sum(logged.values()) / 4 == pytest.approx(result.metrics["ERR"])
    defined = [record.metric for record in records if record.HasField("metric")]
    assert any(metric.name == "ERR_by_age" and metric.step_metric == "age" for metric in defined)


def test_the_offline_run_holds_the_last_metrics_and_the_costs_in_its_summary(offline: Any) -> None:
    result, _, records = offline
    summary: dict[str, Any] = {}
    for record in records:
        summary |= items_of(record.summary.update)
    assert {f"final/{name}": value for name, value in result.metrics.items()}.items() <= summary.items()
    assert {f"cost/{name}": value for name, value in result.cost.model_dump().items()}.items() <= summary.items()


def test_every_panel_of_the_dashboard_shows_what_a_run_logs(offline: Any) -> None:
    _, _, records = offline
    logged: set[str] = set()
    for record in records:
        logged |= {*items_of(record.history.item), *items_of(record.summary.update)}
    for make in (make_workspace, make_report):
        shown = set(metrics_of(specification(make("project", entity="", group=None))))
        assert {"TRR", "ERR", "Holdout", "ES", "n_keys", "n_edits", "age", "ERR_by_age", "final/Avg"} <= shown
        assert shown <= logged


def metrics_of(specified: Any) -> Iterator[str]:
    """Names that panels and tables show, wherever they stand in a specification."""
    if isinstance(specified, list):
        for part in specified:
            yield from metrics_of(part)
    if isinstance(specified, dict):
        for key, value in specified.items():
            if key == "metrics":
                yield from value
            elif key in ("xAxis", "yAxis") and value != "_step":
                yield value.removeprefix("summary:")
            elif key == "columnPinned":
                yield from (name.removeprefix("summary:") for name in value if name.startswith("summary:"))
            else:
                yield from metrics_of(value)


def test_the_offline_run_ends_well(offline: Any) -> None:
    _, _, records = offline
    (end,) = [record.exit for record in records if record.HasField("exit")]
    assert end.exit_code == 0


def test_disabled_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    _, folder, _ = run_toy(tmp_path, "wandb.mode=disabled", editor="none")
    assert not (folder / "wandb").exists()


def test_auto_obeys_wandbs_own_switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    _, folder, _ = run_toy(tmp_path, "wandb.mode=auto", editor="none")
    assert not (folder / "wandb").exists()


def test_auto_is_offline_where_nobody_is_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    _, folder, _ = run_toy(tmp_path / "runs", "wandb.mode=auto", editor="none")
    assert list((folder / "wandb").glob("offline-run-*"))


def unhurt(result: RunResult, folder: Path, err: str) -> None:
    assert err.count("W&B is off for this run") == 1
    assert "Traceback" not in err
    assert result.metrics["n_edits"] == 4
    assert {"result.json", "edits.jsonl", "metrics.jsonl", "predictions.parquet"} <= {p.name for p in folder.iterdir()}


def test_a_missing_wandb_does_not_hurt_the_run_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    result, folder, _ = run_toy(tmp_path, "wandb.mode=offline", editor="none")
    unhurt(result, folder, capsys.readouterr().err)


def test_a_wandb_that_cannot_start_does_not_hurt_the_run_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "no number")
    result, folder, _ = run_toy(tmp_path, "wandb.mode=offline", editor="none")
    unhurt(result, folder, capsys.readouterr().err)


def test_a_wandb_that_fails_halfway_does_not_hurt_the_run_nor_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(wandb.Run, "log", broken)
        result, folder, _ = run_toy(tmp_path / "first", "wandb.mode=offline", editor="none")
    unhurt(result, folder, capsys.readouterr().err)
    _, folder, _ = run_toy(tmp_path / "second", "wandb.mode=offline", editor="none")
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    assert any(record.HasField("history") for record in records_of(file))
