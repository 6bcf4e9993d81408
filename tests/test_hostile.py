"""What strangers may send: run folders, settings, models and texts that want to be obeyed."""

import ast
import base64
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import grace_bench.streams
from grace_bench.analysis.figures.drawing import file_name
from grace_bench.analysis.leaderboard import Leaderboard, render
from grace_bench.cli import main
from grace_bench.common.credentials import refuse_secrets
from grace_bench.common.terminal import progress_bars
from grace_bench.common.text import csv_text, latex_cells
from grace_bench.errors import UserError
from grace_bench.launch.run_folder import model_slug, record_failure
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, METRICS, STREAMS, Registry
from grace_bench.results.reading import read_predictions
from grace_bench.results.schema import PREDICTIONS, RunResult
from grace_bench.run.checkpoint import Checkpoints, digest
from grace_bench.run.loggers import RunPlan
from grace_bench.run.loggers.jsonl import PredictionsLogger
from grace_bench.run.loggers.wandb import WandbLogger, _remote_holds_secrets

SCRIPT = Path(sys.executable).with_name("grace-bench")
CHECKPOINTS = Path(next(iter(grace_bench.streams.__path__))) / "checkpoints"
SMALL = ("stream=toy", "editor=grace", "max_edits=3", "eval_every=2", "max_upstream=20", "wandb.mode=disabled")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("runs")
    assert main(["run", *SMALL, f"out={out}"]) == 0
    (result,) = out.rglob("result.json")
    return result.parent


@pytest.fixture
def sent(finished: Path, tmp_path: Path) -> Path:
    """A run folder as a stranger sends it to be resumed: under another name, with a configuration and no result."""
    folder = tmp_path / "sent"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives a command's one line of refusal."""

    def run(*arguments: str) -> str:
        assert main(arguments) == 2
        done = capsys.readouterr()
        assert done.err.startswith("grace-bench: ")
        assert done.err.count("\n") == 1
        return done.err

    return run


def change(path: Path, **settings: Any) -> None:
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        *parents, last = name.split("__")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


# --- settings of a stranger ------------------------------------------------------------------------------------------


def test_an_untouched_folder_is_resumed(sent: Path) -> None:
    assert main(["resume", str(sent)]) == 0
    assert (sent / "result.json").is_file()


@pytest.mark.parametrize("group", ["stream", "editor"])
@pytest.mark.parametrize(
    "place", ["itself", "inside", "in a list", "another part of the package", "instead", "in half"]
)
def test_a_configuration_builds_registered_names_and_nothing_else(
    group: str, place: str, sent: Path, refused: Callable[..., str]
) -> None:
    mark = sent.parent / "called"
    call = {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": [str(mark)]}]}
    config = yaml.safe_load((sent / "config.yaml").read_text(encoding="utf-8"))
    match place:
        case "itself":
            config[group] = call
        case "inside":
            config[group]["seed"] = call
        case "in a list":
            config[group]["seed"] = [[call]]
        case "another part of the package":
            config[group]["_target_"] = "grace_bench.common.files.set_aside"
        case "in half":
            config[group]["_partial_"] = not config[group]["_partial_"]
        case "instead":
            config[group] = f"os.mkdir {mark}"
    (sent / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert group in refused("resume", str(sent))
    assert not mark.exists()
    assert [path.name for path in sent.iterdir()] == ["config.yaml"]


def test_no_module_is_imported_that_a_configuration_names(
    sent: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (sent / "unknown_module.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(sent)
    change(sent / "config.yaml", stream___target_="unknown_module.Toy")
    assert "unknown_module" in refused("resume", str(sent))
    assert "unknown_module" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:GRACE_BENCH_TEST_WORD}",
        "a ${oc.env:GRACE_BENCH_TEST_WORD} b",
        "${oc.decode:'${oc.env:GRACE_BENCH_TEST_WORD}'}",
        "${seed}",
    ],
)
def test_a_configuration_cannot_ask_for_the_environment(
    text: str, sent: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRACE_BENCH_TEST_WORD", "unheard-of")
    change(sent / "config.yaml", wandb__project=text)
    line = refused("resume", str(sent))
    assert f"{sent / 'config.yaml'}:" in line
    assert "unheard-of" not in line
    assert [path.name for path in sent.iterdir()] == ["config.yaml"]


def test_a_short_configuration_cannot_become_a_long_one(sent: Path, refused: Callable[..., str]) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    with (sent / "config.yaml").open("a", encoding="utf-8") as file:
        file.write("\n".join(["l0: &l0 [x]", *levels]))
    assert "repeats another part" in refused("resume", str(sent))


@pytest.mark.parametrize(
    "preset",
    [
        "editor: {_target_: pathlib.Path.touch}",
        "editor: {eps_init: {_target_: pathlib.Path, _args_: [x]}}",
        "editor: {eps_init: '${oc.env:HOME}'}",
        "layer: !!python/object/apply:os.getcwd []",
    ],
)
def test_presets_of_a_stranger_hold_values_only(preset: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "presets" / "toy").mkdir(parents=True)
    (tmp_path / "presets" / "toy" / "grace.yaml").write_text(preset, encoding="utf-8")
    refused("run", *SMALL, f"tuned={tmp_path / 'presets'}", f"out={tmp_path / 'runs'}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "override", ["editor._target_=os.system", "stream._target_=pathlib.Path", "+editor._args_=[x]"]
)
def test_nor_does_the_command_line_name_what_is_built(
    override: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    refused("run", *SMALL, f"out={tmp_path / 'runs'}", override)
    assert not (tmp_path / "runs").exists()


# --- run folders of a stranger ---------------------------------------------------------------------------------------


@pytest.fixture
def treasure(tmp_path: Path) -> Path:
    """A folder with a file that nobody may touch or read out."""
    folder = tmp_path / "treasure"
    folder.mkdir()
    (folder / "file").write_text("mine alone", encoding="utf-8")
    return folder


FILES = (
    "edits.jsonl",
    ".edits.jsonl.partial",
    "predictions.parquet",
    "error.json",
    ".owner.json",
    ".lock",
    "result.json",
)
FOLDERS = ("checkpoint", "checkpoint/predictions", "editor", "wandb")


@pytest.mark.parametrize(
    ("existing", "name"),
    [
        *(("resume", name) for name in (*FILES, *FOLDERS, "editor/editor.json", "wandb/run-id", "wandb/latest-run")),
        ("rerun", "checkpoint"),
        ("rerun", "edits.jsonl"),
    ],
)
def test_nothing_is_written_through_a_link_out_of_a_run_folder(
    existing: str, name: str, finished: Path, sent: Path, treasure: Path, refused: Callable[..., str]
) -> None:
    (sent / name).parent.mkdir(exist_ok=True, parents=True)
    (sent / name).symlink_to(treasure if name in FOLDERS else treasure / "file")
    if existing == "resume":
        line = refused("resume", str(sent))
    else:
        # Where the same run would be made.
        out = sent.parent / "runs"
        (out / "toy" / "toy" / "grace").mkdir(parents=True)
        sent.rename(out / "toy" / "toy" / "grace" / finished.name)
        line = refused("run", *SMALL, f"out={out}", "existing=rerun")
    assert f"{name}: is a link that leads out of the run folder" in line
    assert {path.name: path.read_text(encoding="utf-8") for path in treasure.iterdir()} == {"file": "mine alone"}


def test_a_resumed_run_is_written_into_its_folder_whatever_its_configuration_says(sent: Path) -> None:
    elsewhere = sent.parent / "elsewhere"
    change(sent / "config.yaml", out=str(elsewhere), wandb__project="../../x", wandb__group="../../x", existing="rerun")
    assert main(["resume", str(sent)]) == 0
    assert {path.name for path in sent.parent.iterdir()} == {"sent"}
    assert json.loads((sent / "result.json").read_text(encoding="utf-8"))["run_id"].startswith("toy/toy/grace/")


def test_a_run_folder_does_not_say_where_the_key_for_wandb_is_sent(
    sent: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (sent / "wandb").mkdir()
    (sent / "wandb" / "settings").write_text("[default]\nbase_url = http://localhost:9\n", encoding="utf-8")
    monkeypatch.chdir(sent)
    assert "wandb/settings: would tell W&B" in refused("resume", ".")


@pytest.mark.parametrize("kept", ["../../../x", "a/b", "x" * 100, "a\nb", ""])
def test_a_run_id_for_wandb_is_an_id(
    kept: str, sent: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (sent / "wandb").mkdir()
    (sent / "wandb" / "run-id").write_text(kept, encoding="utf-8")
    logger = WandbLogger(sent, mode="offline")
    logger.start(RunPlan(run_id="r", folder=sent, config={}, stream="s", model="m", editor="e", n_candidates=1,
                         max_edits=1, higher_is_better=True))  # fmt: skip
    logger.finish(None)
    assert "W&B is off for this run" in capsys.readouterr().err
    assert {path.name for path in sent.rglob("*")} == {"config.yaml", "wandb", "run-id"}


class Unpickled:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def test_a_parquet_file_unpickles_nothing(sent: Path, refused: Callable[..., str]) -> None:
    mark = sent / "mark"
    extension = {"ARROW:extension:name": "arrow.py_extension_type",
                 "ARROW:extension:metadata": pickle.dumps(Unpickled(mark))}  # fmt: skip
    fields = [field.with_metadata(extension) if field.name == "text" else field for field in PREDICTIONS]
    table = pa.Table.from_pylist([dict.fromkeys(PREDICTIONS.names)], schema=pa.schema(fields))
    pq.write_table(table, sent / "predictions.parquet")
    written = pq.read_metadata(sent / "predictions.parquet").metadata[b"ARROW:schema"]
    assert b"arrow.py_extension_type" in base64.b64decode(written)
    assert len(read_predictions(sent / "predictions.parquet", columns=["text"])) == 1
    refused("run", "stream=scotus", f"stream.path={sent / 'predictions.parquet'}", "model=toy", f"out={sent / 'runs'}")
    assert not mark.exists()


def test_links_that_stay_in_a_run_folder_do_no_harm(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "edits.jsonl").rename(folder / "lines")
    (folder / "edits.jsonl").symlink_to("lines")
    (tmp_path / "elsewhere").symlink_to(folder)
    assert main(["report", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "page")]) == 0
    assert main(["resume", str(tmp_path / "elsewhere")]) == 0


def test_a_report_shows_no_file_from_elsewhere(
    finished: Path, treasure: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(treasure / "file")
    assert "leads out of the run folder" in refused("report", str(folder), "--out", str(tmp_path / "page"))
    assert not (tmp_path / "page").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are of POSIX")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("result.json", ("resume", "{run}")),
        ("edits.jsonl", ("resume", "{run}")),
        ("config.yaml", ("report", "{run}", "--out", "{run}/page")),
    ],
)
def test_a_pipe_in_a_run_folder_keeps_nobody_waiting(
    name: str, command: tuple[str, ...], finished: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / name).unlink()
    os.mkfifo(run / name)
    assert f"{name}: is neither a file nor a folder" in refused(*(word.replace("{run}", str(run)) for word in command))


@pytest.mark.parametrize("kind", ["files", "run_files"])
@pytest.mark.parametrize("elsewhere", ["../../treasure/file", "/{}/treasure/file", "checkpoint/../../treasure/file"])
def test_a_checkpoint_names_files_of_its_own_and_of_its_run_only(
    kind: str, elsewhere: str, sent: Path, treasure: Path
) -> None:
    checkpoints = Checkpoints(sent, identity={})
    checkpoints.save({"n": 1}, n_edits=0)
    assert checkpoints.load().state == {"n": 1}
    manifest = sent / "checkpoint" / "000001" / "manifest.json"
    content = json.loads(manifest.read_bytes())
    found = digest(b"mine alone")
    content[kind][elsewhere.format(sent.parent)] = found if kind == "files" else {"size": 10, "sha256": found}
    del content["digest"]
    content["digest"] = digest(json.dumps(content, sort_keys=True).encode())
    manifest.write_text(json.dumps(content), encoding="utf-8")
    loaded = checkpoints.load()
    assert loaded.state is None
    assert loaded.dropped == ["checkpoint 000001 (manifest.json is not whole)"]


def test_predictions_of_another_kind_are_refused_when_they_are_joined(sent: Path) -> None:
    logger = PredictionsLogger(sent)
    (file,) = logger.files
    logger.start(RunPlan(run_id="r", folder=sent, config={}, stream="s", model="m", editor="e", n_candidates=1,
                         max_edits=1, higher_is_better=True))  # fmt: skip
    buffer = pa.BufferOutputStream()
    table = pa.table({"score": ["none"]})
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    for content in (buffer.getvalue().to_pybytes(), b"no stream at all"):
        file.path.write_bytes(content)
        with pytest.raises(UserError, match=r"predictions\.arrows: holds no predictions"):
            logger.finish(RunResult.model_construct())
    assert not (sent / "predictions.parquet").exists()


def test_a_saved_editor_is_of_the_class_that_was_asked_for(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "editor", tmp_path / "editor")
    header = json.loads((tmp_path / "editor" / "editor.json").read_text(encoding="utf-8"))
    model = EditableModel.from_pretrained("toy", task="classification")
    for change_of_header in ({"editor": "os.system"}, {"settings": {**header["settings"], "plugins": ["x"]}}):
        (tmp_path / "editor" / "editor.json").write_text(json.dumps({**header, **change_of_header}), encoding="utf-8")
        with pytest.raises(UserError):
            EDITORS.get("grace").from_pretrained(tmp_path / "editor", model=model)


# --- models of a stranger --------------------------------------------------------------------------------------------


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model folder with code in it that leaves a mark when it is run."""
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / "atlas-drift", folder)
    mark = f"from pathlib import Path\nPath({str(tmp_path / 'mark')!r}).touch()\n"
    classes = "import transformers\nclass C(transformers.PretrainedConfig):\n    model_type = 'own'\nclass M: pass\n"
    for name in ("code.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(mark + classes, encoding="utf-8")
    return folder


def adjust(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **entries}), encoding="utf-8")


OWN = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M", "AutoTokenizer": ["code.M", "code.M"]}


def with_code(folder: Path) -> None:
    adjust(folder / "config.json", auto_map=OWN, model_type="own")


def with_kernel(folder: Path) -> None:
    adjust(folder / "config.json", text_config={"attn_implementation": "someone/kernel:main"})


def with_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "/"}', encoding="utf-8"
    )


def with_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "../model.safetensors"}}', encoding="utf-8"
    )


@pytest.mark.parametrize("change_of", [with_code, with_kernel, with_adapter, with_pickle, with_weights_elsewhere])
def test_a_model_folder_that_wants_more_than_its_weights_read_is_refused(
    change_of: Callable[[Path], None], model_folder: Path
) -> None:
    change_of(model_folder)
    with pytest.raises(UserError) as caught:
        EditableModel.from_pretrained(model_folder, task="classification")
    assert str(model_folder) in str(caught.value)
    assert not (model_folder.parent / "mark").exists()


def test_code_beside_a_known_model_is_left_alone(model_folder: Path) -> None:
    adjust(model_folder / "config.json", auto_map=OWN)
    adjust(model_folder / "tokenizer_config.json", auto_map=OWN)
    model = EditableModel.from_pretrained(model_folder, task="classification")
    assert type(model.module).__module__.startswith("transformers.")
    assert not (model_folder.parent / "mark").exists()


def calls() -> Iterator[tuple[Path, ast.Call]]:
    """Every call in the source of the package."""
    for package in ("grace_bench", "grace_bench.streams", "grace_bench.editors", "grace_bench.metrics"):
        for path in Path(str(files(package))).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield path, node


def test_nothing_in_the_package_unpickles_evaluates_or_trusts_code() -> None:
    seen = 0
    for path, call in calls():
        name = ast.unparse(call.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        place = f"{path}:{call.lineno}"
        seen += 1
        for option, safe in (("trust_remote_code", "False"), ("allow_pickle", "False"), ("shell", "False")):
            assert given.get(option, safe) == safe, place
        assert name not in {
            "eval",
            "exec",
            "os.system",
            "torch.load",
            "yaml.load",
            "__import__",
            "pandas.read_pickle",
        }, place
        assert not name.startswith(("pickle.", "dill.", "joblib.", "marshal.", "shelve.")), place
        if name.endswith(".from_pretrained") and name.partition(".")[0] in {"transformers", "getattr(transformers"}:
            assert given.get("trust_remote_code") == "False", place
    assert seen > 1000


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = ("../../x", "/x", "..", "a/b", "a\\b", "a\0b", "a\nb", "x" * 300, "\u202ea", "", ".hidden", "a b", "$(x)")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("registry", [STREAMS, EDITORS, METRICS], ids=lambda registry: registry.kind)
def test_no_name_that_a_path_would_obey_is_registered(name: str, registry: Registry[Any]) -> None:
    known = next(iter(registry.entries()))
    with pytest.raises(ValueError, match="a name has at most 64"):
        registry.register(name)(registry.get(known))
    with pytest.raises(UserError):
        registry.get(name)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_run_folder_stays_where_it_belongs_whatever_the_model_is_called(name: str) -> None:
    slug = model_slug(name, ["toy"])
    assert re.fullmatch(r"[a-z0-9.-]{1,120}", slug)
    assert not slug.startswith((".", "-"))
    assert model_slug(name, ["toy"]) != model_slug(f"{name}x", ["toy"])
    file = file_name("curves", name, name + "x")
    assert re.fullmatch(r"[a-z0-9.-]{1,200}", file)
    assert not file.startswith(".")


# --- texts that want to be obeyed ------------------------------------------------------------------------------------

# Clears a screen, names a window, writes to the clipboard, links, reverses, rings, overwrites; also as a C1 character.
OBEYED = "\x1b[2J\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b]8;;http://x\x1b\\\u202e\x9b31m\r\x07\x08\u2028"
SHOWN = r"\x1b[2J\x1b]0;title\x07\x1b]52;c;aGk=\x07\x1b]8;;http://x\x1b\\u202e\x9b31m\r\x07\x08\u2028"
MARKUP = "[red]x[/red][link=http://x]y[/link][/]"


def harmless(text: str) -> bool:
    """Whether nothing in printed lines steers a terminal."""
    return all(unicodedata.category(c) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} for c in text.replace("\n", ""))


@pytest.fixture(scope="module")
def obeyed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose every text wants to be obeyed."""
    folder = tmp_path_factory.mktemp("obeyed") / "run"
    shutil.copytree(finished, folder)
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for part, field in (("stream", "name"), ("model", "name"), ("editor", "name"), ("protocol", "tuning_budget")):
        result[part][field] = f"=cmd|'{OBEYED}{MARKUP}"
    result["run_id"] = OBEYED
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    lines = []
    for line in (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        named = ("prompt", "target", "before_text", "after_text")
        texts = {name: OBEYED + MARKUP for name in named if record[name] is not None}
        lines.append(json.dumps({**record, **texts, "id": f"{record['id']}{OBEYED}"}))
    (folder / "edits.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("fmt", ["table", "markdown", "csv", "json", "latex"])
def test_a_leaderboard_shows_texts_and_obeys_none(fmt: str, obeyed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(obeyed), "--format", fmt]) == 0
    out = capsys.readouterr().out
    assert harmless(out)
    assert "title" in out


def test_a_request_is_shown_and_not_obeyed(obeyed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((obeyed / "edits.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert main(["show", str(obeyed), record["id"]]) == 0
    out = capsys.readouterr().out
    assert harmless(out)
    assert SHOWN + MARKUP in re.sub(r"\s*\n\s*", "", out)


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "{run}", f"x{OBEYED}\n{MARKUP}"),
        ("leaderboard", f"{{run}}/{OBEYED}\n{MARKUP}"),
        ("resume", f"{{run}}/{OBEYED}\n"),
        ("report", "{run}/..", "--out", f"{{run}}/result.json/{OBEYED}\n"),
        ("run", f"stream={OBEYED}\n{MARKUP}"),
        ("run", f"{OBEYED}\n=1"),
        ("run", "stream=jsonl", f"stream.path={OBEYED}\n{MARKUP}", "model=toy", "out={run}/../x"),
        (f"{OBEYED}\n",),
    ],
    ids=lambda arguments: arguments[0] if arguments[0].isalpha() else "no command",
)
def test_a_mistake_is_one_line_that_steers_nothing(
    arguments: tuple[str, ...], obeyed: Path, refused: Callable[..., str]
) -> None:
    line = refused(*(argument.replace("{run}", str(obeyed)) for argument in arguments))
    assert harmless(line)


def test_what_a_run_failed_of_is_shown_and_not_obeyed(sent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sent / "error.json").write_text(json.dumps({"error": OBEYED, "reason": f"a\n{OBEYED}"}), encoding="utf-8")
    assert main(["resume", str(sent)]) == 0
    out = capsys.readouterr().out
    assert harmless(out)
    assert f"after it failed ({SHOWN}: a {SHOWN})" in out


def test_a_long_step_is_named_letter_by_letter() -> None:
    file = io.StringIO()
    with progress_bars(Console(file=file, width=300, force_terminal=False)) as progress:
        progress(f"reading {OBEYED}{MARKUP}", 1, 1)
    assert harmless(file.getvalue())
    assert f"reading {SHOWN}{MARKUP}" in file.getvalue()


def test_a_traceback_is_shown_and_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    hook = sys.excepthook
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["grace-bench", "list", "metrics"])
            assert main() == 0
        error = RuntimeError(f"a\n{OBEYED}")
        sys.excepthook(RuntimeError, error, None)
    finally:
        sys.excepthook = hook
    err = capsys.readouterr().err
    assert harmless(err)
    assert f"RuntimeError: a\n{SHOWN}\n" in err


def test_a_spreadsheet_computes_no_text_and_pandas_reads_every_number(obeyed: Path, finished: Path) -> None:
    for folder, has_formula in ((obeyed, True), (finished, False)):
        text = str(render(Leaderboard.read([folder]), "csv"))
        frame = pd.read_csv(io.StringIO(text))
        assert (frame["editor"][0] == f"'=cmd|'{SHOWN}{MARKUP}") is has_formula
        for name in frame.columns:
            assert not str(frame[name][0]).startswith(tuple("=+@")), name
    numbers = csv_text(
        [{"n": -0.1, "text": "-0.1", "e": 1e-9, "none": None, "tab": "\t=x", "wide": "＝x", "in": "a=b"}]
    )
    assert numbers.splitlines()[1] == "-0.1,'-0.1,1e-09,,\\t=x,'＝x,a=b"


@pytest.mark.parametrize("name", ["[2cm]x", "*x"])
def test_a_name_is_no_argument_of_the_latex_command_before_it(name: str) -> None:
    assert latex_cells([(name, False), ("[1]", False)]) == rf"{{}}{name} & [1] \\"


# --- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "0123456789fakefakefakefakefake0123456789",
    "HF_TOKEN": "hf_fakefakefakefakefakefakefakefake01",
    "HUGGING_FACE_HUB_TOKEN": "hf_fakefakefakefakefakefakefakefake02",
    "AWS_SECRET_ACCESS_KEY": "fake+aws/03",
    "DATABASE_PASSWORD": "fake-password-04",
    "SOME_SERVICE_SECRET": "fake-secret-05",
    "OPENAI_APIKEY": "fake-key-06",
    "PGPASSWORD": "fake-password-10",
    "GITHUBTOKEN": "fake-token-11",
    "GITHUB_PAT": "fake-token-12",
    "DB_PASS": "fake-password-13",
    "MYSQL_PWD": "fake-password-14",
    "GOOGLE_CREDENTIALS": "{fake: credentials-15}",
}
PROXY = "http://someone:fake-proxy-07@127.0.0.1:9"
IN_REMOTE = "fake-remote-08"


def leaking(content: bytes) -> list[str]:
    texts = {**SECRETS, "proxy": "fake-proxy-07", "remote": IN_REMOTE, "uncommitted": "fake-file-09"}
    return [name for name, secret in texts.items() if secret.encode() in content]


@pytest.mark.slow
def test_no_secret_of_the_environment_reaches_anything_that_a_run_leaves(tmp_path: Path) -> None:
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    if shutil.which("git"):
        (work / "file").write_text("committed", encoding="utf-8")
        for command in (
            ["init", "-q"],
            ["remote", "add", "origin", f"https://{IN_REMOTE}:x-oauth-basic@localhost/x.git"],
            ["add", "."],
            ["commit", "-qm", "x"],
        ):
            subprocess.run([*git, *command], cwd=work, check=True)
        (work / "file").write_text("fake-file-09", encoding="utf-8")
    known = {path for path in work.rglob("*") if path.is_file()}
    # A W&B of another test's would be found by its port.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [SCRIPT, "run", *SMALL[:-1], "out=runs", "wandb.mode=offline"],
        cwd=work,
        env={
            **inherited,
            **SECRETS,
            "HTTPS_PROXY": PROXY,
            "HOME": str(home),
            "WANDB_SAVE_CODE": "1",
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    left = [path for folder in (work, home) for path in folder.rglob("*") if path.is_file() and path not in known]
    assert {"config.yaml", "result.json"} <= {path.name for path in left}
    assert any(path.suffix == ".wandb" for path in left), done.stderr.decode()
    for path in left:
        assert leaking(path.read_bytes()) == [], path
    assert leaking(done.stdout + done.stderr) == []


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize(
    ("remote", "is_hidden"),
    [
        ("https://host/x.git", False),
        ("git@host:x.git", False),
        ("https://token:x-oauth-basic@host/x.git", True),
        ("https://hf_fakefakefakefakefakefakefakefake01@host/x", True),
    ],
)
def test_a_repository_whose_address_holds_a_token_is_not_told_of(
    remote: str, is_hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not _remote_holds_secrets()
    for command in (["init", "-q"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", "-c", "init.defaultBranch=main", *command], check=True)
    assert _remote_holds_secrets() is is_hidden


@pytest.fixture
def with_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, secret in {**SECRETS, "HTTPS_PROXY": PROXY}.items():
        monkeypatch.setenv(name, secret)


@pytest.mark.usefixtures("with_secrets")
@pytest.mark.parametrize(
    "override",
    [
        f"stream.path=/x/{SECRETS['WANDB_API_KEY']}",
        f"wandb.project={SECRETS['DATABASE_PASSWORD']}",
        "wandb.api_key=not-in-the-environment",
        "hydra.launcher.ray.init._redis_password=fake-one",
        "hydra.launcher.ray.init.runtime_env={env_vars:{WANDB_API_KEY:fake-one}}",
        "hydra.launcher.ray.init.runtime_env.env_vars.HF_TOKEN=fake-one",
        "hydra.launcher.setup=['export HF_TOKEN=fake-one']",
        "hydra.launcher.setup=['export PGPASSWORD=fake-one']",
        "hydra.launcher.ray.init.address=ray://someone:fake-one@host:1",
        "model=hf_fakefakefakefakefakefakefakefake99",
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(
    override: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused("run", *SMALL, f"out={tmp_path / 'runs'}", override)
    assert "which the run's files would show" in line
    assert override.partition("=")[0] in line or "the value of" in line
    assert leaking(line.encode()) == []
    assert not {"fake-one", "not-in-the-environment", "hf_fake"} & set(re.split(r"[ =:@'{}]", line))
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("with_secrets")
@pytest.mark.parametrize(
    "setting",
    ["editor.mask_token=<mask>", "stream.max_target_tokens=20", "hydra.launcher.setup=['export HF_TOKEN=$HF_TOKEN']",
     "wandb.api_key=null", "layer=model.layers.3.self_attn.k_proj", "model=https://host/x"],
)  # fmt: skip
def test_what_only_looks_like_a_secret_is_let_through(setting: str) -> None:
    refuse_secrets("the command", [setting])


def test_where_a_secret_lies_and_where_one_stands_are_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key.json").touch()
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    monkeypatch.setenv("WORK_PWD", str(tmp_path))
    monkeypatch.setenv("OLDPWD", "/nowhere/at/all")
    for setting in (f"out={tmp_path}/runs", f"stream.path={tmp_path / 'key.json'}", "out=/nowhere/at/all/runs"):
        refuse_secrets("the command", [setting])


@pytest.mark.usefixtures("with_secrets")
def test_a_secret_that_a_configuration_asks_for_is_not_written_down(
    sent: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    line = refused("run", *SMALL, f"out={tmp_path / 'runs'}", "wandb.group=${oc.env:SOME_SERVICE_SECRET}")
    assert "the value of SOME_SERVICE_SECRET" in line
    assert leaking(line.encode()) == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("with_secrets")
def test_what_a_run_dies_of_tells_no_secret(sent: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise RuntimeError(f"401 for {SECRETS['HF_TOKEN']} by {PROXY}, {' '.join(SECRETS.values())}")
    except RuntimeError as error:
        record_failure(sent, error)
    content = (sent / "error.json").read_bytes()
    assert leaking(content) == []
    assert "401 for *** by http://***@127.0.0.1:9" in json.loads(content)["reason"]
    assert main(["run", *SMALL, "model=nobody/nothing", f"out={sent.parent / 'runs'}"]) == 2
    done = capsys.readouterr()
    assert leaking((done.out + done.err).encode()) == []
