"""Paths and texts on the command line: plain text works as it is typed, and keeps every character."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import hash_config
from grace_bench.launch.run_folder import read_plain_config, write_config
from grace_bench.launch.sweep import composed_runs
from grace_bench.launch.typed import quote_plain_text, refuse_several, texts_of
from grace_bench.models.zoo import resolve_model
from grace_bench.registry import STREAMS

PLAIN = [
    "правки.jsonl",
    "run=1.jsonl",
    "50%.jsonl",
    "#1",
    "a # b",
    "R&D",
    "me@home",
    "edits (1).jsonl",
    "it's",
    "'a' and b",
    '"a" or b',
    "[draft] a",
    "a[1]",
    "{a} b",
    "$HOME",
    "a: b",
    "a = b",
    "a;b!c^d`e",
    "<a>",
    "~a",
    "*",
    "back\\slash",
    "end\\",
    "中文",
    "e\u0301",
    "😀",
    " spaced ",
    "two\nlines",
    "tab\tin",
    "unknown(1)",
    "007",
    "2024-01-01",
]
STRUCTURED = [
    "grace,ft",
    "[3,5]",
    "{a:1}",
    "'quoted = text'",
    '"quoted # text"',
    "choice(grace,ft)",
    "range(3)",
    "${seed}",
    "${oc.env:HOME,x}",
    "null",
    "1e-3",
    "true",
    "a\\=b",
]


def told_by(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        action()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def texts_in(text: str) -> list[str]:
    """The arguments of the options that hold text, all with the same value."""
    options = ("stream.path", "stream.upstream_path", "out", "tuning_budget", "wandb.group")
    return ["stream=jsonl", "editor=none", "model=toy", *(f"{option}={text}" for option in options)]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_reaches_the_configuration_and_its_file_as_it_was_typed(text: str, tmp_path: Path) -> None:
    config = compose(texts_in(text))
    settings = config.stream.settings
    held = [settings["path"], settings["upstream_path"], config.out, config.tuning_budget, config.wandb.group]
    assert held == [text] * 5
    write_config(config, tmp_path / "config.yaml")
    again = read_plain_config(tmp_path / "config.yaml")
    assert again == config.plain()
    assert hash_config(again) == hash_config(config.plain())


@pytest.mark.parametrize("value", STRUCTURED)
def test_what_has_a_meaning_for_hydra_is_left_as_it_is(value: str) -> None:
    assert quote_plain_text(f"option={value}") == f"option={value}"


def test_in_a_sweep_commas_separate_texts_that_hydra_could_not_read() -> None:
    paths = ["/data/правки.jsonl", "/data/run=1.jsonl", "/data/plain.jsonl", "/data/a,b#.jsonl"]
    typed = f"stream.path={','.join(paths[:3])},'{paths[3]}'"
    runs = composed_runs([["stream=jsonl", "editor=none", "model=toy", typed]], "sweep")
    assert [run.config.stream.settings["path"] for run in runs if run.config is not None] == paths


def test_an_interpolation_stays_one_beside_other_characters() -> None:
    assert compose(["editor=none", "seed=7", "out=правки/${seed}"]).out == "правки/7"


@pytest.mark.parametrize("text", ["/data/a,b.jsonl", "/data/it's, mine.jsonl", "{a}", "[б]", "'a' and 'b'", "range(=)"])
def test_what_cannot_be_read_as_one_text_says_how_to_quote_it(text: str) -> None:
    told = told_by(lambda: compose(["stream=jsonl", f"out={text}"]))
    assert told.startswith(f"out={text}: ")
    command, _, _ = told.partition("or type ")[2].rpartition(" for one text")
    (argument,) = shlex.split(command)
    assert compose(["stream=jsonl", "stream.path=x", "model=toy", argument]).out == text


@pytest.mark.parametrize("value", ["2024", "1e5", "true", "[draft]"])
def test_a_number_or_list_where_text_belongs_says_how_to_quote_it(value: str) -> None:
    assert "'out=\"...\"'" in told_by(lambda: compose([f"out={value}"]))
    assert compose([f'out="{value}"']).out == value


def test_a_sweep_without_its_flag_is_told_of_it() -> None:
    assert "add -m" in told_by(lambda: compose(["editor=grace,ft"]))
    refuse_several("editor.prefix_lengths=[3,5]")


def test_the_home_folder_is_not_made_in_the_working_folder() -> None:
    assert "$HOME" in told_by(lambda: compose(["out=~/runs"]))


def test_bytes_that_are_no_text_are_refused() -> None:
    assert "is not UTF-8" in told_by(lambda: compose(["out=/data/\udcff"]))


def test_typed_values_lose_their_quotes_where_names_are_looked_up(tmp_path: Path) -> None:
    assert texts_of("""/data/a=b,'/data/a,b',"c" """) == ["/data/a=b", "/data/a,b", "c"]
    folder = shutil.copytree(resolve_model("toy").path, tmp_path / "a, b")
    assert compose(["stream=toy", f'model="{folder}"']).model == str(folder)


def test_presets_are_read_from_a_folder_of_any_name(tmp_path: Path) -> None:
    for name in ("мои=1", "a, b"):
        preset = tmp_path / name / "toy" / "grace.yaml"
        preset.parent.mkdir(parents=True)
        preset.write_text("editor: {n_iter: 3}\ntuning_budget: by hand\n")
    for typed in (f"{tmp_path}/мои=1", f"'{tmp_path}/a, b'"):
        config = compose(["stream=toy", "editor=grace", f"tuned={typed}"])
        assert (config.editor.settings["n_iter"], config.tuning_budget) == (3, "by hand")


def test_a_run_whose_paths_hold_any_character_is_planned_run_swept_resumed_checked_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "правки = 1 #2 & (a) [b] {c} 'd' 50% @ $ 中文 😀"
    folder.mkdir()
    data = STREAMS.get("toy")().load()
    for name, requests in (("ред=1", data.edits[:6]), ("до #1", data.upstream[:4])):
        (folder / f"{name}.jsonl").write_text("".join(f"{request.model_dump_json()}\n" for request in requests))
    shutil.copytree(resolve_model("toy").path, folder / "модель=1")
    arguments = [
        "stream=jsonl",
        "stream.task=classification",
        f"stream.path={folder}/ред=1.jsonl",
        f"stream.upstream_path={folder}/до #1.jsonl",
        f"model={folder}/модель=1",
        "layer=second",
        "max_edits=2",
        "tuning_budget=по 10 проб = мало",
        f"out={folder}/runs",
    ]
    assert main(["plan", *arguments, "editor=none"]) == 0
    assert main(["run", *arguments, "editor=none"]) == 0
    assert main(["run", "-m", *arguments, "editor=none,grace"]) == 0
    capsys.readouterr()
    runs = sorted(path.parent for path in folder.rglob("result.json"))
    assert len(runs) == 2, "the run of the sweep is the run that was there"
    for run in runs:
        plain = read_plain_config(run / "config.yaml")
        typed = dict(argument.split("=", 1) for argument in arguments)
        held = {name: plain[name] for name in ("model", "tuning_budget", "out")}
        held |= {f"stream.{name}": plain["stream"][name] for name in ("path", "upstream_path")}
        assert held == {name: typed[name] for name in held}
        assert json.loads((run / "result.json").read_bytes())["run_id"] == str(run.relative_to(folder / "runs"))
    assert main(["resume", *map(str, runs)]) == 0
    assert main(["check", str(folder / "runs")]) == 0
    assert main(["leaderboard", str(folder / "runs"), "--compare", "none,grace"]) == 0
