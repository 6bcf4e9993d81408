"""The command line: what each command leaves behind and prints, and what it says to a mistake."""

import contextlib
import csv
import inspect
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import grace_bench.streams
from grace_bench.cli import main
from grace_bench.common.scores import PANEL
from grace_bench.launch.compose import compose
from grace_bench.launch.demo import demo_config, demo_pairs
from grace_bench.launch.run_config import hash_config
from grace_bench.launch.run_folder import folder_of, read_plain_config, write_config
from grace_bench.models.editable import EditableModel
from grace_bench.models.zoo import known_models
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.results.reading import read_result
from grace_bench.results.schema import RunResult
from helpers import Done, cli, read_lines, sends

SCRIPT = Path(sys.executable).with_name("grace-bench")
CHECKPOINTS = Path(next(iter(grace_bench.streams.__path__))) / "checkpoints"
SMALL = ("stream=toy", "max_edits=3", "eval_every=2", "max_upstream=40", "wandb.mode=disabled")
EDITED_BY = ("ft", "grace", "none")
RUN_FILES = {"config.yaml", "edits.jsonl", "metrics.jsonl", "predictions.parquet", "editor", "result.json"}


def process(*command: str | Path, cwd: Path) -> Done:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_folders(out: Path) -> list[Path]:
    return sorted(path.parent for path in out.rglob("result.json") if not path.parent.name.startswith("."))


def run_small(out: Path, *overrides: str) -> Path:
    """Runs on the toy stream and returns the run folder."""
    done = cli("run", *SMALL, f"out={out}", *overrides)
    assert done.code == 0, done.err
    return Path(done.out.splitlines()[-1])


def assert_one_line(done: Done, *says: str) -> None:
    assert done.code == 2
    assert done.err.startswith("grace-bench: ")
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    for text in says:
        assert text in done.err
    assert done.out == ""


@dataclass(frozen=True)
class Sweep:
    """Every editor on the toy stream with two seeds."""

    out: Path
    done: Done

    def folder(self, editor: str, seed: int) -> Path:
        (folder,) = (self.out / "toy" / "toy" / editor).glob(f"*-s{seed}")
        return folder

    def result(self, editor: str, seed: int) -> RunResult:
        return read_result(self.folder(editor, seed) / "result.json")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    out = tmp_path_factory.mktemp("sweep") / "runs"
    return Sweep(out, cli("run", "-m", *SMALL, f"out={out}", f"editor={','.join(EDITED_BY)}", "seed=0,1"))


each_run = pytest.mark.parametrize(("editor", "seed"), [(editor, seed) for editor in EDITED_BY for seed in (0, 1)])


# --- run -------------------------------------------------------------------------------------------------------------


def test_a_sweep_carries_out_every_combination_once(sweep: Sweep) -> None:
    assert sweep.done.code == 0, sweep.done.err
    runs = [(result.editor.name, result.seed) for result in map(_result, run_folders(sweep.out))]
    assert sorted(runs) == [(editor, seed) for editor in EDITED_BY for seed in (0, 1)]
    for folder in run_folders(sweep.out):
        assert str(folder) in sweep.done.out.splitlines()


@each_run
def test_a_run_folder_holds_what_is_promised_and_nothing_else(sweep: Sweep, editor: str, seed: int) -> None:
    folder = sweep.folder(editor, seed)
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    assert re.fullmatch(rf"[0-9a-f]{{8}}-s{seed}", folder.name)
    result = sweep.result(editor, seed)
    assert result.run_id == folder.relative_to(sweep.out).as_posix()
    assert result.status == "finished"
    assert result.schema_version == 1


def test_every_run_of_a_sweep_is_what_its_result_says(sweep: Sweep) -> None:
    done = cli("check", str(sweep.out))
    assert done.code == 0, done.out
    assert [line for line in done.out.splitlines() if line.startswith(str(sweep.out))] == [
        str(folder) for folder in run_folders(sweep.out)
    ]


@each_run
def test_the_result_says_what_the_lines_of_edits_say(sweep: Sweep, editor: str, seed: int) -> None:
    records, result = read_lines(sweep.folder(editor, seed) / "edits.jsonl"), sweep.result(editor, seed)
    edited = [record for record in records if record["edited"]]
    assert len(edited) == result.metrics["n_edits"] == 3
    assert len(records) == result.metrics["n_candidates"]
    assert [record["n_edits"] for record in edited] == [1, 2, 3]
    assert result.metrics["ES"] == fmean(record["score_after"] for record in edited)
    assert result.cost.edit_seconds == pytest.approx(sum(record["seconds"] for record in edited))
    keys = [record["n_keys"] for record in edited]
    assert result.metrics.get("n_keys") == keys[-1]
    assert (keys[-1] is None) == (editor != "grace")


@each_run
def test_every_line_of_metrics_is_the_mean_of_its_predictions(sweep: Sweep, editor: str, seed: int) -> None:
    folder, result = sweep.folder(editor, seed), sweep.result(editor, seed)
    measured = read_lines(folder / "metrics.jsonl")
    table = pd.read_parquet(folder / "predictions.parquet")
    assert [line["n_edits"] for line in measured] == [0, 2, 3] == sorted(set(table["n_edits"]))
    for line in measured:
        items = table[table["n_edits"] == line["n_edits"]]
        for name, stream in (("TRR", "upstream"), ("ERR", "edited"), ("Holdout", "holdout")):
            scores = items.loc[items["stream"] == stream, "score"].tolist()
            assert line.get(name) == (pytest.approx(fmean(scores)) if scores else None)
    assert {name: result.metrics[name] for name in measured[-1]} == measured[-1]
    assert result.before["TRR"] == measured[0]["TRR"]
    has_text = table.groupby("n_edits")["text"].apply(lambda texts: bool(texts.notna().all()))
    assert has_text.to_dict() == {0: True, 2: False, 3: True}
    edited = {record["id"] for record in read_lines(folder / "edits.jsonl") if record["edited"]}
    last = table[(table["n_edits"] == 3) & (table["stream"] == "edited")]
    assert sorted(last["request_id"]) == sorted(edited)
    assert table[table["n_edits"] == 0]["stream"].tolist() == ["upstream"] * 40


@each_run
def test_the_configuration_left_behind_is_that_of_the_result(sweep: Sweep, editor: str, seed: int) -> None:
    config = yaml.safe_load((sweep.folder(editor, seed) / "config.yaml").read_text(encoding="utf-8"))
    result = sweep.result(editor, seed)
    assert config["seed"] == result.seed == seed
    for name in ("max_edits", "eval_every", "max_upstream", "split", "tuning_budget"):
        assert config[name] == getattr(result.protocol, name)
    settings = {name: value for name, value in config["editor"].items() if not name.startswith("_")}
    assert settings == result.editor.model_dump(exclude={"name"})
    assert "${" not in str(config), "every reference is resolved"


@pytest.mark.parametrize("editor", ["ft", "grace"])
def test_the_editor_left_behind_answers_as_at_the_end_of_the_run(sweep: Sweep, editor: str) -> None:
    folder = sweep.folder(editor, 0)
    table = pd.read_parquet(folder / "predictions.parquet")
    last = table[(table["n_edits"] == 3) & (table["stream"] == "holdout")]
    asked = {request.id: request.prompt for request in STREAMS.get("toy")().load().holdout}
    model = EditableModel.from_pretrained("toy", task="classification")
    with EDITORS.get(editor).from_pretrained(folder / "editor", model=model), torch.no_grad():
        batch = model.encode_batch([asked[name] for name in last["request_id"]])
        answers = [("below", "above")[label] for label in model.logits(batch).argmax(dim=-1).tolist()]
    assert answers == last["text"].tolist()
    assert len(set(answers)) > 1, "some holdout points follow the edits and some do not"


def test_a_finished_run_is_reused_and_not_touched(sweep: Sweep) -> None:
    before = snapshot(sweep.out)
    times = {path: path.stat().st_mtime_ns for path in sweep.out.rglob("*") if path.is_file()}
    done = cli("run", *SMALL, f"out={sweep.out}", "editor=grace", "seed=1")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"finished before, reused: {sweep.folder('grace', 1)}\n"
    assert snapshot(sweep.out) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_unfinished_folder_is_refused_and_not_touched(tmp_path: Path) -> None:
    folder = run_small(tmp_path, "editor=none")
    (folder / "result.json").unlink()
    before = snapshot(tmp_path)
    assert_one_line(cli("run", *SMALL, f"out={tmp_path}", "editor=none"), str(folder), "unfinished", "existing=rerun")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_rerun_sets_the_old_folder_aside_whole(tmp_path: Path, finished: bool) -> None:
    folder = run_small(tmp_path, "editor=none")
    if not finished:
        (folder / "result.json").unlink()
    old = snapshot(folder)
    assert run_small(tmp_path, "editor=none", "existing=rerun") == folder
    (aside,) = (path for path in folder.parent.iterdir() if path != folder)
    assert snapshot(aside) == old
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    board = cli("leaderboard", str(tmp_path), "--format", "json")
    assert [row["n_runs"] for row in json.loads(board.out)] == [1], "what is set aside is no longer ranked"


def test_rerun_may_be_asked_again_at_once_and_loses_nothing(tmp_path: Path) -> None:
    for _ in range(4):
        folder = run_small(tmp_path, "editor=none", "existing=rerun")
    kept = [path for path in folder.parent.iterdir() if (path / "result.json").is_file()]
    assert len(kept) == 4


def test_a_rerun_that_cannot_start_leaves_the_finished_run_where_it_was(tmp_path: Path) -> None:
    run_small(tmp_path, "editor=none")
    before = snapshot(tmp_path)
    assert_one_line(
        cli("run", *SMALL, f"out={tmp_path}", "editor=none", "existing=rerun", "device=quux"), "device=quux"
    )
    assert snapshot(tmp_path) == before


def test_broken_requests_that_are_left_out_are_counted_in_the_last_line_and_in_the_result(tmp_path: Path) -> None:
    requests = tmp_path / "requests.jsonl"
    whole = [json.dumps({"id": str(i), "prompt": "The capital of", "target": f"place {i}"}) for i in range(3)]
    requests.write_text("\n".join([*whole, '{"id": "3", "prompt": "The capital of"}', "[not json"]), encoding="utf-8")
    given = ("run", "stream=jsonl", f"stream.path={requests}", "stream.task=language_modelling", "model=atlas-text")
    rest = ("editor=none", "wandb.mode=disabled", f"out={tmp_path / 'runs'}")
    refused = cli(*given, *rest)
    assert (refused.code, refused.err) == (2, f"grace-bench: {requests}:4: field 'target': is missing\n")
    done = cli(*given, "stream.on_error=skip", *rest)
    assert done.code == 0, done.err
    assert "2 records left out (broken)" in done.out
    (folder,) = run_folders(tmp_path / "runs")
    result = _result(folder)
    assert result.stream.left_out == {"broken": 2}
    assert result.stream.n_candidates == 3


def test_a_label_that_the_model_lacks_is_named_with_its_place_or_left_out_and_counted(tmp_path: Path) -> None:
    requests, runs = tmp_path / "requests.jsonl", tmp_path / "runs"
    points = [
        {"id": str(n), "prompt": f"({n}.0, 1.0)", "target": n % 2, "rephrases": [f"({n}.1, 1.0)"]} for n in range(6)
    ]
    points[2]["target"] = 25
    points[4]["locality"] = [{"prompt": "(0.5, 0.5)", "target": 2}]
    requests.write_text("".join(f"{json.dumps(point)}\n" for point in points), encoding="utf-8")
    upstream = tmp_path / "upstream.jsonl"
    upstream.write_text(json.dumps(points[0]), encoding="utf-8")
    stream = ("stream=jsonl", f"stream.path={requests}", f"stream.upstream_path={upstream}")
    given = ("run", *stream, "stream.task=classification", "model=toy", "layer=second")
    rest = ("editor=none", "wandb.mode=disabled", f"out={runs}")
    refused = cli(*given, *rest)
    says = f"{requests}:3: field 'target': label 25 is none of the model's 2 (0 to 1)"
    assert (refused.code, refused.err) == (2, f"grace-bench: {says}\n")
    assert not runs.exists()
    done = cli(*given, "stream.on_error=skip", *rest)
    assert done.code == 0, done.err
    assert "2 records left out (broken)" in done.out
    (folder,) = run_folders(runs)
    result = _result(folder)
    assert (result.stream.left_out, result.stream.n_candidates) == ({"broken": 2}, 4)
    assert {line["id"] for line in read_lines(folder / "edits.jsonl")} == {"0", "1", "3", "5"}
    # The run is still of these requests, for whoever reads them without the model.
    assert "finished before" in cli(*given, "stream.on_error=skip", *rest).out
    checked = cli("check", str(folder))
    assert checked.code == 0, checked.out


def test_in_a_sweep_a_mistake_in_one_run_does_not_keep_the_others_back(tmp_path: Path) -> None:
    done = cli("run", "-m", *SMALL, f"out={tmp_path}", "editor=none", "layer=first,frist,second")
    assert done.code == 2
    said = [line for line in done.err.splitlines() if line.startswith("grace-bench:")]
    assert said == [done.err.splitlines()[-1]]
    assert "layer='frist' is not in the model; did you mean 'first'?" in said[0]
    assert {_result(folder).model.layer for folder in run_folders(tmp_path)} == {"first", "second"}


def _result(folder: Path) -> RunResult:
    return read_result(folder / "result.json")


# --- configuration ---------------------------------------------------------------------------------------------------

BASE = ("stream=toy", "editor=grace")


@pytest.fixture(scope="module")
def base_hash() -> str:
    return compose(BASE).digits


TUNED = sorted(
    path.name.removesuffix(".yaml")
    for path in (files("grace_bench.launch.conf") / "tuned").iterdir()
    if "_" in path.name
)


# One editor of each stream.
SHOWN = {name.partition("_")[0]: name for name in TUNED}.values()

each_tuned = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHOWN else pytest.mark.slow) for name in TUNED]
)


def tuned_preset(name: str) -> dict[str, Any]:
    text = (files("grace_bench.launch.conf") / "tuned" / f"{name}.yaml").read_text(encoding="utf-8")
    preset: dict[str, Any] = yaml.safe_load(text)
    return preset


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_preset_is_of_options_that_its_editor_has(name: str) -> None:
    stream, _, editor = name.partition("_")
    assert STREAMS.get(stream)
    assert {*tuned_preset(name)["editor"]} <= {*inspect.signature(EDITORS.get(editor)).parameters}
    assert tuned_preset(name)["tuning_budget"]


@each_tuned
def test_a_tuned_preset_holds_for_its_stream_and_editor(name: str) -> None:
    stream, _, editor = name.partition("_")
    preset = tuned_preset(name)
    config = compose([f"stream={stream}", f"editor={editor}"])
    assert {option: config.editor.settings[option] for option in preset["editor"]} == preset["editor"]
    assert config.tuning_budget == preset["tuning_budget"]


@each_tuned
def test_the_command_line_wins_over_a_tuned_preset(name: str) -> None:
    stream, _, editor = name.partition("_")
    preset = tuned_preset(name)
    numbers = {key: value for key, value in preset["editor"].items() if isinstance(value, int | float)}
    option, value = next((key, value) for key, value in numbers.items() if not isinstance(value, bool))
    config = compose([f"stream={stream}", f"editor.{option}={value * 3}", f"editor={editor}", "tuning_budget=mine"])
    assert config.editor.settings[option] == value * 3
    assert config.tuning_budget == "mine"
    others = {key: value for key, value in preset["editor"].items() if key != option}
    assert {key: config.editor.settings[key] for key in others} == others


@pytest.mark.parametrize("override", ["tuned=none", "model=some/model"])
def test_without_its_tuned_preset_an_editor_has_its_own_defaults(override: str) -> None:
    config = compose([*BASE, override])
    assert config.tuning_budget is None
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(EDITORS.get("grace")).parameters.items()
        if name in config.editor.settings
    }
    assert {"eps_init", "replacement"} <= defaults.keys()
    assert {name: config.editor.settings[name] for name in defaults} == defaults


def test_a_tuned_preset_and_an_override_reach_the_editor_of_a_run(tmp_path: Path) -> None:
    folder = run_small(tmp_path, "editor=grace", "editor.eps_init=0.25", "max_edits=1")
    settings = json.loads((folder / "editor" / "editor.json").read_text(encoding="utf-8"))["settings"]
    assert settings["eps_init"] == 0.25
    assert settings["replacement"] == "replace_last"


@pytest.mark.parametrize(
    "override",
    ["seed=7", "device=cpu", "threads=2", "out=elsewhere", "existing=rerun", "wandb.mode=offline", "wandb.group=mine"],
)
def test_the_folder_does_not_tell_apart_what_does_not_change_the_answers(base_hash: str, override: str) -> None:
    assert compose([*BASE, override]).digits == base_hash


@pytest.mark.parametrize(
    "override",
    [
        "editor.eps_init=0.51",
        "editor.n_iter=99",
        "editor.seed=7",
        "model=some/model",
        "layer=first",
        "split=validation",
        "max_edits=9",
        "eval_every=9",
        "max_upstream=null",
        "protocol.query=last_token",
        "dtype=bfloat16",
    ],
)
def test_the_folder_tells_apart_what_may_change_the_answers(base_hash: str, override: str) -> None:
    assert compose([*BASE, override]).digits != base_hash


@pytest.mark.parametrize("given", [["seed=3"], ["seed=3", "editor.seed=0"], ["editor.seed=3"]], ids="-".join)
def test_the_configuration_that_a_run_leaves_behind_has_the_hash_of_its_folder(
    tmp_path: Path, given: list[str]
) -> None:
    config = compose([*BASE, *given])
    write_config(config, tmp_path / "config.yaml")
    assert hash_config(read_plain_config(tmp_path / "config.yaml")) == hash_config(config.plain())


def test_a_seed_of_the_editors_own_is_told_apart_from_the_runs(base_hash: str) -> None:
    hashes = [compose([*BASE, *given]).digits for given in (["editor.seed=1"], ["seed=1", "editor.seed=0"])]
    assert len({base_hash, *hashes}) == 3


def test_seeds_of_one_configuration_share_the_hash(sweep: Sweep) -> None:
    for editor in EDITED_BY:
        assert sweep.folder(editor, 0).name.removesuffix("-s0") == sweep.folder(editor, 1).name.removesuffix("-s1")


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and model folders, each with something wrong."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty").mkdir()
    (root / "plain.txt").write_text("not what was asked for\n", encoding="utf-8")
    good = '{"id": "a", "prompt": "p", "target": "t"}\n'
    (root / "field.jsonl").write_text(good + '{"id": "b", "prompt": "p", "targt": "t"}\n', encoding="utf-8")
    (root / "syntax.jsonl").write_text(good + "\n" + '{"id": "b",\n', encoding="utf-8")
    (root / "no-subject.jsonl").write_text(good, encoding="utf-8")
    for name in ("toy", "atlas-qa"):
        weights = (CHECKPOINTS / name / "model.safetensors").read_bytes()
        for damage, content in (("short", weights[:-64]), ("garbage", b"garbage")):
            folder = root / f"{name}-{damage}"
            shutil.copytree(CHECKPOINTS / name, folder)
            (folder / "model.safetensors").write_bytes(content)
    tensors = load_file(CHECKPOINTS / "toy" / "model.safetensors")
    shutil.copytree(CHECKPOINTS / "toy", root / "toy-reshaped")
    save_file({name: tensor[:1].clone() for name, tensor in tensors.items()}, root / "toy-reshaped/model.safetensors")
    shutil.copytree(CHECKPOINTS / "toy", root / "toy-config")
    (root / "toy-config" / "config.json").write_text("{", encoding="utf-8")
    shutil.copytree(CHECKPOINTS / "atlas-qa", root / "atlas-qa-wordless", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(CHECKPOINTS / "atlas-text", root / "causal")
    own = json.loads((root / "causal" / "config.json").read_text(encoding="utf-8"))
    unmarked = {name: value for name, value in own.items() if not name.startswith("grace_bench")}
    (root / "causal" / "config.json").write_text(json.dumps(unmarked), encoding="utf-8")
    return root


RUN_MISTAKES = {
    "unknown-editor": (["editor=grcae"], ["no editor 'grcae'; did you mean 'grace'?"]),
    "unknown-editor-of-several": (["-m", "editor=ft,grcae"], ["no editor 'grcae'; did you mean 'grace'?"]),
    "unknown-stream": (["stream=tyo"], ["no stream 'tyo'; did you mean 'toy'?"]),
    "unknown-option": (["max_edit=3"], ["no option max_edit"]),
    "unknown-editor-option": (["editor.eps_ini=1"], ["no option editor.eps_ini"]),
    "unknown-stream-option": (["stream.path=x"], ["no option stream.path"]),
    "unknown-group": (["papr=zsre"], ["no option papr"]),
    "unknown-paper": (["paper=zzz"], ["no paper 'zzz'"]),
    "unknown-tuned": (["tuned=toy_grce"], ["'toy_grce'", "did you mean 'toy_grace'?"]),
    "no-value": (["max_edits"], ["'max_edits' should be option=value"]),
    "no-name": (["=3"], ["'=3' should be option=value"]),
    "dashes": (["--seed=3"], ["no option --seed=3"]),
    "a-list-without-sweep": (["seed=0,1"], ["seed=0,1"]),
    "no-syntax": (["max_edits=[1"], []),
    "reference-to-nothing": (["max_edits=${nothing}"], ["max_edits", "nothing"]),
    "number-that-is-text": (["editor.eps_init=abc"], ["editor.eps_init", "'abc'"]),
    "whole-number-with-a-fraction": (["editor.n_iter=1.5"], ["editor.n_iter", "'1.5'"]),
    "number-that-is-null": (["editor.lr=null"], ["editor.lr"]),
    "editor-seed-that-is-text": (["editor.seed=foo"], ["editor.seed"]),
    "seed-that-is-text": (["seed=abc"], ["seed=abc should be a whole number"]),
    "layer-that-is-a-number": (["layer=3"], ["layer"]),
    "out-that-is-null": (["out=null"], ["out"]),
    "out-that-is-too-long": ([f"out={'a' * 300}"], ["out=aaa", "File name too long"]),
    "negative-seed": (["seed=-1"], ["seed=-1 should be", "at least 0"]),
    "no-edits": (["max_edits=0"], ["max_edits=0 should be", "at least 1"]),
    "no-threads": (["threads=0"], ["threads=0"]),
    "no-prefix": (["protocol.prefix_length=0"], ["protocol.prefix_length=0"]),
    "negative-radius": (["editor.eps_init=-1"], ["editor.eps_init=-1"]),
    "radius-that-is-no-number": (["editor.eps_init=nan"], ["editor.eps_init=nan"]),
    "no-steps": (["editor.n_iter=0"], ["editor.n_iter=0"]),
    "negative-rate": (["editor.lr=-1"], ["editor.lr=-1"]),
    "fine-tuning-without-steps": (["editor=ft", "editor.n_iter=0"], ["editor.n_iter=0"]),
    "bad-replacement": (["editor.replacement=replace_lst"], ["did you mean 'replace_last'?"]),
    "bad-split": (["split=edit"], ["split=edit", "did you mean 'edits'?"]),
    "bad-existing": (["existing=rerunn"], ["existing=rerunn", "did you mean 'rerun'?"]),
    "project-that-wandb-refuses": (["wandb.project=my/project"], ["wandb.project=my/project", "holds /"]),
    "comma-without-a-sweep": (["out=a,b"], ["out=a,b", "add -m", """'out="a,b"'"""]),
    "bad-wandb-mode": (["wandb.mode=ofline"], ["wandb.mode=ofline", "did you mean 'offline'?"]),
    "bad-query": (["protocol.query=last"], ["protocol.query=last"]),
    "bad-dtype": (["dtype=float3"], ["did you mean 'float32'?"]),
    "bad-device": (["seed=99", "device=quux"], ["device=quux"]),
    "bad-layer": (["layer=secnd"], ["layer='secnd' is not in the model; did you mean 'second'?"]),
    "layer-that-is-a-parameter": (["layer=second.weight"], ["name its module, 'second'"]),
    "stream-without-its-file": (["stream=jsonl"], ["stream.path="]),
    "missing-requests": (
        ["stream=jsonl", "stream.path=BROKEN/none.jsonl", "model=toy"],
        ["BROKEN/none.jsonl: no such file"],
    ),
    "folder-of-requests": (
        ["stream=jsonl", "stream.path=BROKEN/empty", "model=toy"],
        ["BROKEN/empty: the folder holds no"],
    ),
    "requests-with-a-bad-field": (
        ["stream=jsonl", "stream.path=BROKEN/field.jsonl", "model=toy"],
        ["BROKEN/field.jsonl:2: field 'targ"],
    ),
    "requests-with-bad-syntax": (
        ["stream=jsonl", "stream.path=BROKEN/syntax.jsonl", "model=toy"],
        ["BROKEN/syntax.jsonl:3: is not JSON"],
    ),
    "stream-without-a-model": (["stream=jsonl", "stream.path=BROKEN/field.jsonl"], ["name one with model="]),
    "missing-model": (["model=BROKEN/none"], ["model=BROKEN/none: no such folder"]),
    "empty-model": (["model=BROKEN/empty"], ["model=BROKEN/empty: the folder holds no config.json"]),
    "model-with-a-broken-config": (["model=BROKEN/toy-config"], ["BROKEN/toy-config/config.json"]),
    "model-cut-short": (["model=BROKEN/toy-short"], ["BROKEN/toy-short"]),
    "model-of-garbage": (["model=BROKEN/toy-garbage"], ["BROKEN/toy-garbage"]),
    "model-of-other-shapes": (["model=BROKEN/toy-reshaped"], ["BROKEN/toy-reshaped"]),
    "hf-model-cut-short": (["stream=atlas-qa", "model=BROKEN/atlas-qa-short"], ["model=BROKEN/atlas-qa-short"]),
    "hf-model-of-garbage": (["stream=atlas-qa", "model=BROKEN/atlas-qa-garbage"], ["model=BROKEN/atlas-qa-garbage"]),
    "hf-model-without-tokenizer": (["stream=atlas-qa", "model=BROKEN/atlas-qa-wordless"], ["BROKEN/atlas-qa-wordless"]),
    "editor-that-is-not-meta-trained": (["stream=toy", "editor=mend"], ["'mend' has not been meta-trained"]),
    "editor-of-other-tasks": (["stream=atlas-qa", "editor=rome"], ["'rome' does not work on qa", "completion"]),
    "editor-that-needs-subjects": (
        [
            "stream=jsonl",
            "stream.path=BROKEN/no-subject.jsonl",
            "stream.task=completion",
            "model=atlas-text",
            "layer=transformer.h.1.mlp.c_fc",
            "editor=rome",
        ],
        ["'subject'", "'rome' needs one"],
    ),
    "model-of-another-kind": (["stream=atlas-qa", "model=toy"], ["toy"]),
    "task-of-another-kind-of-model": (
        ["stream=jsonl", "stream.path=BROKEN/no-subject.jsonl", "stream.task=qa", "model=BROKEN/causal"],
        ["model=BROKEN/causal: GPT2LMHeadModel is a causal language model", "stream.task=completion"],
    ),
}


@pytest.mark.parametrize(("overrides", "says"), RUN_MISTAKES.values(), ids=RUN_MISTAKES)
def test_a_mistake_in_a_run_is_one_line_and_leaves_everything_as_it_was(
    sweep: Sweep, broken: Path, tmp_path: Path, overrides: Sequence[str], says: Sequence[str]
) -> None:
    out = shutil.copytree(sweep.out, tmp_path / "runs")
    before = snapshot(out), snapshot(broken)
    given = [override.replace("BROKEN", str(broken)) for override in overrides]
    done = cli("run", *SMALL, f"out={out}", *given)
    assert_one_line(done, *(text.replace("BROKEN", str(broken)) for text in says))
    assert (snapshot(out), snapshot(broken)) == before


def test_an_output_folder_that_cannot_be_made_is_one_line(broken: Path) -> None:
    out = broken / "plain.txt"
    assert_one_line(cli("run", *SMALL, f"out={out}", "editor=none"), f"out={out}")
    assert_one_line(cli("demo", "--edits", "1", "--out", str(out)), f"out={out}")
    assert out.read_text(encoding="utf-8") == "not what was asked for\n"


COMMAND_MISTAKES = {
    "unknown-command": (["rn"], ["'rn'"]),
    "unknown-flag": (["--vers"], ["--vers"]),
    "demo-of-nothing": (["demo", "--edits", "0"], ["--edits", "0 is not a positive whole number"]),
    "demo-of-words": (["demo", "--edits", "ten"], ["--edits", "ten"]),
    "list-of-what": (["list", "editor"], ["'editor'", "editors"]),
    "show-without-id": (["show", "BROKEN"], ["required: id"]),
    "show-of-no-folder": (["show", "BROKEN/none", "x"], ["BROKEN/none/edits.jsonl: No such file"]),
    "leaderboard-of-nothing": (["leaderboard"], ["runs"]),
    "leaderboard-of-no-folder": (["leaderboard", "BROKEN/none"], ["BROKEN/none: no such file or folder"]),
    "leaderboard-of-an-empty-folder": (["leaderboard", "BROKEN/empty"], ["BROKEN/empty: holds no finished run"]),
    "leaderboard-of-a-text": (["leaderboard", "BROKEN/plain.txt"], ["BROKEN/plain.txt: ", "JSON"]),
    "leaderboard-as-what": (["leaderboard", "BROKEN", "--format", "html"], ["'html'", "latex"]),
    "meta-train-of-one-that-needs-none": (["meta-train", "editor=grace"], ["'grace' needs no meta-training"]),
    "meta-train-without-requests": (
        ["meta-train", "stream=toy", "editor=mend"],
        ["'toy' has no requests for training"],
    ),
    "meta-train-with-a-flag": (["meta-train", "-m", "editor=mend"], ["has no option -m"]),
    "moments-with-a-flag": (["moments", "-m", "model=atlas-text", "text=model"], ["moments has no option -m"]),
    "moments-of-no-model": (["moments", "text=model"], ["model="]),
    "moments-of-no-text": (["moments", "model=atlas-text"], ["text=train", "stream="]),
    "moments-of-an-editor-without": (
        ["moments", "stream=atlas-text", "editor=ft"],
        ["editor 'ft' uses no second moments"],
    ),
    "moments-of-no-file": (
        ["moments", "model=atlas-text", "text=BROKEN/none.txt"],
        ["BROKEN/none.txt: cannot be read"],
    ),
    "moments-of-an-unknown-layer": (
        ["moments", "model=atlas-text", "layers=[transformer.h.1.mlp.c_fx]", "text=BROKEN/plain.txt"],
        ["transformer.h.1.mlp.c_fx", "did you mean"],
    ),
    "moments-of-no-layers": (["moments", "model=atlas-text", "layers=[]", "text=model"], ["layers=[]"]),
    "moments-with-an-editors-own-option": (
        ["moments", "model=atlas-text", "text=model", "editor.clamp=1"],
        ["editor.clamp", "editor="],
    ),
    "moments-of-a-broken-archive": (
        ["moments", "model=atlas-text", "editor.moments_path=BROKEN/plain.txt"],
        ["BROKEN/plain.txt: is not an .npz archive"],
    ),
    "moments-of-a-stream-that-trains-nothing": (
        [
            "moments",
            "stream=jsonl",
            "stream.path=BROKEN/no-subject.jsonl",
            "stream.task=completion",
            "model=atlas-text",
        ],
        ["text=FILE", "text=model"],
    ),
    "moments-of-questions": (["moments", "stream=atlas-qa"], ["running text", "qa"]),
    "pretrain-unknown": (["pretrain", "tyo", "--out", "BROKEN/new"], ["did you mean 'toy'?"]),
    "pretrain-without-model": (["pretrain", "jsonl", "--out", "BROKEN/new"], ["'jsonl' has no model of its own"]),
    "pretrain-nothing": (["pretrain", "--out", "BROKEN/new"], ["stream"]),
    "pretrain-with-an-option-of-runs": (
        ["pretrain", "toy", "max_edits=3", "--out", "BROKEN/new"],
        ["pretrain has no option max_edits=3", "stream.NAME="],
    ),
    "pretrain-with-an-option-the-stream-lacks": (
        ["pretrain", "toy", "--out", "BROKEN/new", "stream.path=x"],
        ["no option stream.path"],
    ),
    "pretrain-from-no-folder": (
        ["pretrain", "toy", "model=BROKEN/none", "--out", "BROKEN/new"],
        ["model=BROKEN/none: no such folder"],
    ),
    "pretrain-from-a-model-that-is-not-needed": (
        ["pretrain", "toy", "model=BROKEN/atlas-qa-wordless", "--out", "BROKEN/new"],
        ["'toy' trains its model from nothing", "model=BROKEN/atlas-qa-wordless"],
    ),
    "pretrain-into-a-file": (["pretrain", "toy", "--out", "BROKEN/plain.txt"], ["BROKEN/plain.txt"]),
    "pretrain-with-a-seed-of-words": (["pretrain", "toy", "--seed", "x", "--out", "BROKEN/new"], ["--seed", "'x'"]),
}


@pytest.mark.parametrize(("arguments", "says"), COMMAND_MISTAKES.values(), ids=COMMAND_MISTAKES)
def test_a_mistake_in_any_command_is_one_line_and_leaves_everything_as_it_was(
    broken: Path, arguments: Sequence[str], says: Sequence[str]
) -> None:
    before, entries = snapshot(broken), set(broken.iterdir())
    done = cli(*(argument.replace("BROKEN", str(broken)) for argument in arguments))
    try:
        assert_one_line(done, *(text.replace("BROKEN", str(broken)) for text in says))
        assert set(broken.iterdir()) == entries
        assert snapshot(broken) == before
    finally:
        if (broken / "new").is_dir():
            shutil.rmtree(broken / "new")


# --- leaderboard, show, list -----------------------------------------------------------------------------------------


def test_the_leaderboard_reads_the_runs_back(sweep: Sweep) -> None:
    done = cli("leaderboard", str(sweep.out), "--format", "json")
    assert (done.code, done.err) == (0, "")
    rows = json.loads(done.out)
    assert {row["editor"] for row in rows} == set(EDITED_BY)
    for row in rows:
        results = [sweep.result(row["editor"], seed) for seed in (0, 1)]
        assert row["seeds"] == [0, 1]
        for name in ("TRR", "ERR", "Avg", "ES", "Holdout", "n_edits"):
            values = [value for result in results if (value := result.metrics[name]) is not None]
            assert len(values) == 2
            assert row[f"{name}_mean"] == pytest.approx(fmean(values))
            assert row[f"{name}_std"] == pytest.approx(stdev(values))
    assert [row["Avg_mean"] for row in rows] == sorted((row["Avg_mean"] for row in rows), reverse=True)


@pytest.mark.parametrize("arguments", [[], ["--by", "stream"]], ids=["plain", "by-stream"])
@pytest.mark.parametrize("fmt", ["table", "markdown", "csv", "latex"])
def test_every_format_shows_every_editor_with_its_figures(sweep: Sweep, fmt: str, arguments: list[str]) -> None:
    done = cli("leaderboard", str(sweep.out), "--format", fmt, *arguments)
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    for editor in EDITED_BY:
        trr = fmean(float(sweep.result(editor, seed).metrics["TRR"] or 0) for seed in (0, 1))
        if fmt == "csv":
            (row,) = (row for row in csv.DictReader(io.StringIO(done.out)) if row["editor"] == editor)
            assert float(row["TRR_mean"]) == pytest.approx(trr)
        else:
            (line,) = (line for line in done.out.splitlines() if editor in re.findall(r"[a-z]+", line)[:1])
            assert f"{trr:.3f}" in line


@pytest.mark.parametrize("editor", ["ft", "grace"])
def test_show_tells_of_an_edited_request_before_after_and_now(sweep: Sweep, editor: str) -> None:
    folder = sweep.folder(editor, 0)
    record = next(record for record in read_lines(folder / "edits.jsonl") if record["edited"])
    table = pd.read_parquet(folder / "predictions.parquet")
    at_the_end = (table["n_edits"] == 3) & (table["stream"] == "edited") & (table["request_id"] == record["id"])
    (now,) = table[at_the_end].to_dict("records")
    done = cli("show", str(folder), record["id"])
    assert (done.code, done.err) == (0, "")
    told = [" ".join(line.split()) for line in done.out.splitlines()]
    assert told[0] == f"{record['id']}, candidate {record['index']}"
    assert f"prompt {record['prompt']}" in told
    assert f"wanted {record['target']}" in told
    assert f"before {record['before_text']} {record['score_before']:.3f}" in told
    assert f"after its edit {record['after_text']} {record['score_after']:.3f}" in told
    assert f"after 3 edits {now['text']} {now['score']:.3f}" in told
    assert f"steps {record['steps']}" in told[-1]
    assert (f"op {record['op']}" in told[-1]) == (editor == "grace")


def test_show_tells_of_a_request_that_needed_no_edit(sweep: Sweep) -> None:
    folder = sweep.folder("ft", 1)
    (record, *_) = (record for record in read_lines(folder / "edits.jsonl") if not record["edited"])
    done = cli("show", str(folder), record["id"])
    assert (done.code, done.err) == (0, "")
    told = [" ".join(line.split()) for line in done.out.splitlines()]
    assert f"before {record['before_text']} {record['score_before']:.3f}" in told
    assert told[-1].startswith("Not edited:")
    assert "after" not in " ".join(told[:-1])


def test_show_of_an_unknown_id_names_the_closest(sweep: Sweep) -> None:
    folder = sweep.folder("ft", 0)
    known = read_lines(folder / "edits.jsonl")[0]["id"]
    assert_one_line(cli("show", str(folder), f"{known}x"), f"no candidate '{known}x'", f"did you mean '{known}'?")


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("edits.jsonl", b'{"index": 0}\n', "edits.jsonl:1: field 'id'"),
        ("edits.jsonl", b"\xff\xfe\n", "edits.jsonl: "),
        ("predictions.parquet", b"PAR1 no more", "predictions.parquet: cannot be read as Parquet"),
    ],
)
def test_show_names_the_file_that_is_damaged(
    sweep: Sweep, tmp_path: Path, file: str, content: bytes, says: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(sweep.folder("none", 0), folder)
    known = read_lines(folder / "edits.jsonl")[0]["id"]
    (folder / file).write_bytes(content)
    assert_one_line(cli("show", str(folder), known), str(folder), says)


KINDS = {
    "editors": lambda: list(EDITORS.entries()),
    "streams": lambda: list(STREAMS.entries()),
    "models": lambda: list(known_models()),
    "metrics": lambda: list(METRICS.entries()),
    "scores": lambda: [info.name for info in PANEL],
}


@pytest.mark.parametrize("kind", KINDS)
def test_list_names_everything_registered_with_a_line_on_each(kind: str) -> None:
    done = cli("list", kind)
    assert (done.code, done.err) == (0, "")
    title, *rows = done.out.splitlines()
    assert title.strip() == kind
    described = dict(row.split(maxsplit=1) for row in rows if row and not row.startswith(" "))
    assert list(described) == KINDS[kind]()
    assert all(len(text.strip()) > 10 for text in described.values())
    whole = cli("list").out
    assert done.out in whole


# --- meta-train ------------------------------------------------------------------------------------------------------


def test_an_editor_is_meta_trained_once_and_then_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))
    options = ["stream=atlas-drift", "editor=mend", "editor.n_steps=3"]
    trained = cli("meta-train", *options)
    assert trained.code == 0, trained.err
    figures = dict(line.split() for line in trained.out.splitlines())
    assert figures["n_steps"] == "3"
    assert {"edit_loss_last", "locality_kl_last"} <= figures.keys()
    (kept,) = (tmp_path / "cache" / "mend").iterdir()
    before = kept.stat().st_mtime_ns
    assert cli("meta-train", *options).out == trained.out
    assert kept.stat().st_mtime_ns == before
    done = cli("run", *options, "max_edits=2", "max_upstream=10", f"out={tmp_path / 'runs'}", "wandb.mode=disabled")
    assert done.code == 0, done.err
    (folder,) = run_folders(tmp_path / "runs")
    assert _result(folder).metrics["n_edits"] == 2


@pytest.mark.parametrize(
    ("stream", "editor"), [("atlas-qa", "mend"), *(("atlas-facts", name) for name in ("mend", "malmen", "rledit"))]
)
def test_the_networks_that_ship_are_found_without_a_cache(
    stream: str, editor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))
    done = cli("meta-train", f"stream={stream}", f"editor={editor}")
    assert done.code == 0, done.err
    assert not (tmp_path / "cache").exists()


# --- demo, pretrain --------------------------------------------------------------------------------------------------


def run_demo(out: Path, editors: set[str]) -> Done:
    """Runs the demo where one of its runs was interrupted, and checks what it leaves and prints."""
    interrupted = folder_of(demo_config("atlas-facts", "none", out=str(out), n_edits=1))
    interrupted.mkdir(parents=True)
    done = cli("demo", "--edits", "1", "--out", str(out))
    assert done.code == 0, done.err
    assert (interrupted / "result.json").is_file()
    results = {(r.stream.name, r.editor.name): r for r in map(_result, run_folders(out))}
    assert results.keys() == {("atlas-facts", name) for name in editors}
    for (_, name), result in results.items():
        # A table wider than the terminal goes on below, with a row of further columns.
        row = next(line for line in done.out.splitlines() if line.split()[:1] == [name])
        assert f"{result.metrics['TRR']:.3f}" in row
        assert f"{result.metrics['ERR']:.3f}" in row
        assert result.metrics["n_edits"] == 1
        assert result.metrics["TRR"] == result.before["TRR"] or name != "none"
    return done


def test_the_demo_says_where_the_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {name: EDITORS.get(name) for name in ("grace", "none")}
    monkeypatch.setattr(EDITORS, "classes", lambda: registered)
    out = tmp_path / "demo"
    done = run_demo(out, set(registered))
    assert f"Run folders: {out}" in done.out
    assert f"grace-bench leaderboard {out}" in done.out
    assert cli("leaderboard", str(out)).out.rstrip() in done.out


def test_the_demo_is_of_every_editor() -> None:
    assert {editor for _, editor in demo_pairs()} == set(EDITORS.entries())
    assert {stream for stream, _ in demo_pairs()} == {"atlas-facts"}


@pytest.mark.slow
def test_the_demo_runs_every_editor(tmp_path: Path) -> None:
    run_demo(tmp_path / "demo", set(EDITORS.entries()))


def test_pretraining_makes_a_model_that_a_run_takes_and_reaches_the_shipped_figures(tmp_path: Path) -> None:
    made = tmp_path / "again"
    done = cli("pretrain", "toy", "--out", str(made))
    assert done.code == 0, done.err
    shipped = json.loads((CHECKPOINTS / "toy" / "figures.json").read_text(encoding="utf-8"))
    assert json.loads((made / "figures.json").read_text(encoding="utf-8")) == pytest.approx(shipped, abs=0.01)
    for name, value in shipped.items():
        (line,) = (line for line in done.out.splitlines() if line.startswith(f"{name} "))
        assert float(line.split()[1]) == pytest.approx(value, abs=0.01)
    assert f"model={made}" in done.out.splitlines()[-1]
    assert "\x1b" not in done.out + done.err

    run = cli("run", *SMALL, f"out={tmp_path / 'runs'}", f"model={made}", "editor=grace")
    assert run.code == 0, run.err
    (folder,) = run_folders(tmp_path / "runs")
    assert re.fullmatch(r"again-[0-9a-f]{8}", folder.parent.parent.name)
    result = _result(folder)
    assert result.before["TRR"] == shipped["upstream_accuracy"]
    assert (result.model.name, result.model.path) == ("again", str(made))
    assert result.model.layer == "second"


def test_pretraining_takes_a_streams_options_and_a_model_in_any_order(tmp_path: Path, broken: Path) -> None:
    decisions = tmp_path / "decisions.jsonl"
    records = [{"text": f"case {n} on {'cats' if n % 2 else 'dogs'}", "label": n % 2, "term": 1950} for n in range(8)]
    records.append({"text": "case 9 on cats", "label": 0, "term": 2000})
    decisions.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    made = tmp_path / "made"
    base = CHECKPOINTS / "atlas-drift"
    done = cli("pretrain", "scotus", f"stream.path={decisions}", "--out", str(made), f"model={base}", "--seed", "1")
    assert done.code == 0, done.err
    *figures, last = done.out.splitlines()
    assert all(re.fullmatch(r"\w+ [01]\.\d{4}", line) for line in figures)
    command = last.partition(": grace-bench ")[2].split()
    assert command == ["run", "stream=scotus", f"stream.path={decisions}", f"model={made}"]
    run = cli(*command, "editor=grace", "editor.n_iter=2", f"out={tmp_path / 'runs'}", "wandb.mode=disabled")
    assert run.code == 0, run.err
    (folder,) = run_folders(tmp_path / "runs")
    noted = json.loads((made / "config.json").read_text(encoding="utf-8"))
    assert noted["grace_bench_stream"] == "scotus"
    assert _result(folder).model.layer == noted["grace_bench_layer"]


# --- what is seen while it runs --------------------------------------------------------------------------------------

PROGRESS = re.compile(
    r"(?P<editor>\w+) on toy: (?P<done>\d)/3, (?P<edits>\d) edits(, ES (?P<es>[01]\.\d{3}))?(, (?P<keys>\d) keys)?"
    r", TRR [01]\.\d{3}(, ERR [01]\.\d{3}, Holdout [01]\.\d{3})?(?P<left>, about \d+ s left)?"
)


def test_progress_in_a_pipe_is_a_readable_line_an_evaluation(sweep: Sweep) -> None:
    assert not set("\x1b\r\b") & set(sweep.done.out + sweep.done.err)
    told = [PROGRESS.fullmatch(line) for line in sweep.done.err.splitlines()]
    assert None not in told, sweep.done.err
    lines_told = [line.groupdict() for line in told if line is not None]
    assert len(lines_told) == 3 * len(run_folders(sweep.out))
    assert [int(line["edits"]) for line in lines_told] == [0, 2, 3] * len(run_folders(sweep.out))
    for line in lines_told:
        assert line["done"] == line["edits"], "with max_edits given, progress is counted in edits"
        assert (line["es"] is None) == (line["edits"] == "0")
        assert (line["keys"] is not None) == (line["editor"] == "grace")
        assert (line["left"] is not None) == (0 < int(line["done"]) < 3)


def test_a_finished_run_ends_in_its_figures_and_its_folder(tmp_path: Path) -> None:
    done = cli("run", *SMALL, f"out={tmp_path}", "editor=grace", "max_edits=1")
    figures, folder = done.out.splitlines()
    result = _result(Path(folder))
    assert figures.startswith("grace on toy: ")
    told = dict(part.rsplit(" ", 1) for part in figures.removeprefix("grace on toy: ").split(", "))
    for name in ("TRR", "ERR", "ES", "Holdout", "n_edits", "n_keys"):
        value = result.metrics[name]
        assert value is not None
        assert math.isclose(float(told[name]), value, abs_tol=5e-4)


@contextlib.contextmanager
def stderr_in(path: Path) -> Iterator[None]:
    """Sends what is written to standard error to a file, also by its descriptor, as a signal handler does."""
    before = os.dup(2)
    with path.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)):
                yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def is_old(folder: Path, pattern: str, *, seconds: float) -> bool:
    """Whether a file that fits a pattern was written so long ago."""
    return any(time.time() - path.stat().st_mtime > seconds for path in folder.glob(pattern))


def test_a_second_interrupt_stops_at_once_with_130_and_the_run_is_then_unfinished(tmp_path: Path) -> None:
    # So many steps that the first edit is still going on when the interrupts arrive.
    arguments = ["run", *SMALL, f"out={tmp_path / 'runs'}", "editor=grace", "editor.n_iter=10000000"]
    err, out = tmp_path / "err", io.StringIO()
    with (
        stderr_in(err),
        # The first edit begins right after the first checkpoint; before it, one interrupt would be enough.
        sends(signal.SIGINT, when=lambda: is_old(tmp_path / "runs", "*/*/*/*/checkpoint/000001", seconds=3)),
        sends(signal.SIGINT, when=lambda: "grace-bench: stopping after" in err.read_text()),
        contextlib.redirect_stdout(out),
    ):
        assert main(arguments) == 130
    first, waiting, last = err.read_text().splitlines()
    assert first.startswith("grace on toy: 0/3, 0 edits"), first
    assert waiting.startswith("grace-bench: stopping after the current edit or evaluation"), waiting
    assert (out.getvalue(), last) == ("", "grace-bench: interrupted")
    (folder,) = (tmp_path / "runs" / "toy" / "toy" / "grace").iterdir()
    assert not (folder / "result.json").exists()
    ways = f"`grace-bench resume {folder}`", "existing=resume", "existing=rerun"
    assert_one_line(cli(*arguments), "holds an unfinished run", *ways)


# --- as a process ----------------------------------------------------------------------------------------------------

HEAVY = {"torch", "avalanche", "transformers", "datasets", "wandb", "hydra", "pandas", "pyarrow"}


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"], ["leaderboard", "--help"]])
def test_help_and_list_import_nothing_that_is_slow_to_import(tmp_path: Path, arguments: list[str]) -> None:
    done = process(sys.executable, "-X", "importtime", SCRIPT, *arguments, cwd=tmp_path)
    assert done.code == 0
    assert done.out.strip()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.err.splitlines()}
    assert "argparse" in imported
    assert not imported & HEAVY


def test_help_names_every_command() -> None:
    done = process(SCRIPT, "--help", cwd=Path.cwd())
    for command in ("demo", "run", "list", "show", "leaderboard", "verify", "pretrain", "meta-train"):
        assert re.search(rf"^    {command}\b", done.out, re.MULTILINE)


def test_the_module_is_the_script(tmp_path: Path) -> None:
    script = process(SCRIPT, "list", cwd=tmp_path)
    module = process(sys.executable, "-m", "grace_bench", "list", cwd=tmp_path)
    assert script == module == Done(0, cli("list").out, "")


@pytest.mark.parametrize("arguments", [["show", "nowhere", "x"], ["nonsense"]])
def test_a_mistake_exits_with_two_and_one_line(tmp_path: Path, arguments: list[str]) -> None:
    assert_one_line(process(SCRIPT, *arguments, cwd=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["list"], ["run", "--help"]])
def test_a_reader_that_goes_away_is_no_failure(tmp_path: Path, arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        done = subprocess.run(
            [str(SCRIPT), *arguments], cwd=tmp_path, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistake_shows_where_it_was_found_if_the_environment_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for asked in (False, True):
        monkeypatch.setenv("GRACE_BENCH_TRACEBACK", "1" if asked else "0")
        assert main(["run", "editor=grce"]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("grace-bench: no editor 'grce'")
        assert (len(lines) > 1) == asked == any("registry.py" in line for line in lines)
