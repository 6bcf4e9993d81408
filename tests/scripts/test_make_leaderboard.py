"""The script that makes leaderboard/: what it runs in which order, what it adds, and what it refuses."""

import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from grace_bench.launch.check import Checker
from grace_bench.launch.compose import compose
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.reading import find_result_files, read_result
from helpers import cli, module_at

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "make_leaderboard.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return module_at(SCRIPT)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    options = ("stream=toy", "editor=none", "max_edits=3", "eval_every=3", "wandb.mode=disabled")
    assert cli("run", *options, f"out={out}").code == 0
    (file,) = find_result_files([out])
    return file.parent


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["make_leaderboard.py", *map(str, arguments)])
    return int(script.main())


def listed(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> list[dict[str, str]]:
    assert call(script, monkeypatch, "--list", *arguments) == 0
    lines = [line.removeprefix("grace-bench run ") for line in capsys.readouterr().out.splitlines()]
    return [dict(option.split("=", 1) for option in line.split()) for line in lines]


def test_every_editor_is_run_where_it_works_with_one_seed_before_two(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = listed(script, monkeypatch, capsys)
    assert {run["stream"] for run in runs} == {"atlas-facts", "atlas-qa", "atlas-drift", "atlas-text"}
    facts = [run for run in runs if run["stream"] == "atlas-facts"]
    assert sorted({run["editor"] for run in facts}) == sorted(EDITORS.entries())
    assert len(facts) == 2 * 3 * len(EDITORS.entries())
    assert sum("edits_at_once" in run for run in facts) == len(facts) // 2
    assert [run["seed"] for run in runs] == sorted(run["seed"] for run in runs)
    assert runs[0]["editor"] == "none"
    assert {(run["max_edits"], run["eval_every"]) for run in runs} == {("300", "300")}
    assert set(script.CHEAPEST_FIRST) <= set(EDITORS.entries())
    for run in runs:
        assert STREAMS.get(run["stream"]).task in EDITORS.get(run["editor"]).supported_tasks


def test_settings_are_those_chosen_on_the_stream_for_every_editor_that_can_be_tuned(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = listed(script, monkeypatch, capsys, "--seeds", "0")
    pairs = {(run["editor"], run["stream"]) for run in runs}
    untuned = {
        (editor, stream)
        for editor, stream in pairs
        if compose([f"editor={editor}", f"stream={stream}"]).tuning_budget is None
    }
    # Nothing to choose, or chosen by whoever trained the networks (docs/editors.md).
    assert {pair for pair in untuned if not EDITORS.get(pair[0]).is_reference} == {
        ("serac", "atlas-facts"),
        ("serac", "atlas-qa"),
        ("malmen", "atlas-qa"),
        ("rledit", "atlas-qa"),
    }
    # The stream's own layer is none that these can edit.
    rome, memit = (compose([f"editor={editor}", "stream=atlas-text"]) for editor in ("rome", "memit"))
    layers = [rome.layer, *memit.editor.node["layers"]]
    assert all(str(layer).endswith(".mlp.c_proj") for layer in layers)


def test_filters_leave_the_rest_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    only = ("--streams", "atlas-qa", "--editors", "grace", "none", "--seeds", "1", "--edits", "20")
    runs = listed(script, monkeypatch, capsys, *only)
    assert [(run["editor"], run["seed"], run["max_edits"]) for run in runs] == [
        ("none", "1", "20"),
        ("grace", "1", "20"),
    ]
    assert call(script, monkeypatch, "--editors", "gracee") == 2
    assert "did you mean" in capsys.readouterr().err


def test_a_real_model_is_edited_where_model_and_files_are(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    only = ("--streams", "counterfact", "--model", tmp_path, "--data", tmp_path)
    assert listed(script, monkeypatch, capsys, *only) == []
    (tmp_path / "counterfact_edit.jsonl").touch()
    runs = listed(script, monkeypatch, capsys, *only)
    assert {(run["seed"], run["max_edits"], run["max_upstream"]) for run in runs} == {("0", "200", "100")}
    assert {run["stream.path"] for run in runs} == {str(tmp_path / "counterfact_edit.jsonl")}
    assert not {run["editor"] for run in runs if EDITORS.get(run["editor"]).needs_meta_training}
    assert {"editor.text", "editor.layers"} <= set(next(run for run in runs if run["editor"] == "memit"))


def test_made_runs_are_reduced_and_their_cost_is_written(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # One process is enough, and a checkout in work is not refused here.
    monkeypatch.setattr(script, "side_by_side", lambda function, items, jobs: [function(item) for item in items])
    monkeypatch.setattr(script, "has_changed_code", lambda result: False)
    only = ("--streams", "atlas-drift", "--editors", "none", "grace", "--seeds", "0", "--edits", "2", "--out", "board")
    assert call(script, monkeypatch, *only) == 0
    results = [read_result(file) for file in find_result_files([tmp_path / "board"])]
    assert {result.editor.name for result in results} == {"none", "grace"}
    assert all(result.is_reduced for result in results)
    readme = (tmp_path / "board" / "README.md").read_text(encoding="utf-8")
    assert "| atlas-drift | 2 by edit=errors | grace, none (seed 0) | 2 |" in readme
    assert cli("check", tmp_path / "board").code == 0
    monkeypatch.setattr(script, "has_changed_code", lambda result: True)
    # Again: what the leaderboard has is not made again, and for another leaderboard finished runs are reused.
    assert call(script, monkeypatch, *only) == 0
    assert call(script, monkeypatch, *only, "--out", "another") == 1
    assert "uncommitted changes" in capsys.readouterr().err


def test_what_may_not_be_added_is_refused(script: ModuleType, run: Path, tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        result = read_result(folder / "result.json")
        state = {"git": {"commit": "0" * 40, "modified": False}}
        clean = result.model_copy(update={"environment": {**result.environment, **state}})
        return str(script.refusal(folder, clean, Checker()))

    assert refusal(run) == "None"
    for number, (name, change, reason) in enumerate(
        [
            ("error.json", None, "failed"),
            ("metrics.jsonl", ("TRR", "RTR"), "check: metrics.jsonl differs"),
            ("result.json", ('"finished"', '"finished" '), "None"),
            ("result.json", ('"split": "edits"', '"split": "validation"'), "protocol.split is validation"),
            ("result.json", ('"seed": 0', '"seed": 1'), "check: result.json differs"),
        ]
    ):
        folder = Path(shutil.copytree(run, tmp_path / str(number)))
        text = (folder / name).read_text() if change else "{}"
        (folder / name).write_text(text.replace(*change) if change else text)
        assert reason in refusal(folder)
    result = read_result(run / "result.json")
    dirty = result.model_copy(update={"environment": {"git": {"commit": "0" * 40, "modified": True}}})
    assert "uncommitted" in script.refusal(run, dirty, Checker())


def test_the_folder_is_packaged_and_small() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "grace_bench.leaderboard" in setuptools["packages"]
    assert setuptools["package-dir"]["grace_bench.leaderboard"] == "leaderboard"
    folder = ROOT / "leaderboard"
    packaged = {
        path for pattern in setuptools["package-data"]["grace_bench.leaderboard"] for path in folder.glob(pattern)
    }
    runs = {path.parent for path in folder.rglob("result.json")}
    items = {pq.read_schema(run / "predictions.parquet").metadata[b"items"].decode() for run in runs}
    used = {folder / "items" / f"{digest}.parquet" for digest in items}
    assert packaged == {path for run in runs for path in run.iterdir()} | used
    assert all(read_result(run / "result.json").is_reduced for run in runs)
    assert sum(path.stat().st_size for path in packaged) < 20e6
