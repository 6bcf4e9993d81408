"""The published settings: what each fixes for each editor, and what the command line may still change."""

import contextlib
import io
from importlib.resources import files
from typing import Any

import pytest

from grace_bench.cli import main
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import RunConfig
from grace_bench.registry import EDITORS

# Hartvigsen et al. 2023 and the configuration of the official code.
RUNS: dict[str, dict[str, Any]] = {
    "zsre": {
        "model": "t5-small-nq",
        "layer": "encoder.block.4.layer.1.DenseReluDense.wo",
        "max_edits": 1000,
        "eval_every": 50,
        "max_upstream": None,
    },
    "scotus": {
        "model": "scotus-bert",
        "layer": "bert.encoder.layer.10.output.dense",
        "max_edits": None,
        "eval_every": 50,
        "max_upstream": None,
    },
    "hallucination": {
        "model": "gpt2-xl-grace",
        "layer": "transformer.h.35.mlp.c_fc",
        "max_edits": None,
        "eval_every": 50,
        "max_upstream": None,
    },
}
EDITS: dict[str, dict[str, Any]] = {
    "grace": {
        "eps_init": 1.0,
        "n_iter": 100,
        "lr": 1.0,
        "value_init": "cold",
        "replacement": "replace_prompt",
        "distance": "euclidean",
    },
    "ft": {"n_iter": 100, "lr": 0.01},
    "ft_ewc": {"n_iter": 100, "lr": 0.01, "ewc_lambda": 0.1, "n_samples": 10},
    "ft_retrain": {"n_iter": 100, "lr": 0.01, "retrain_every": 50},
    "defer": {"n_iter": 100, "lr": 0.1, "threshold": 0.5},
    "memory": {"n_iter": 100, "lr": 0.1, "n_slots": 100},
}

each_paper = pytest.mark.parametrize("paper", RUNS)


def chosen(config: RunConfig) -> tuple[str, str]:
    return config.stream.name, config.editor.name


@each_paper
@pytest.mark.parametrize("editor", list(EDITORS.entries()))
def test_a_paper_fixes_what_it_published_for_each_editor(paper: str, editor: str) -> None:
    config = compose([f"paper={paper}", f"editor={editor}"])
    assert chosen(config) == (paper, editor)
    assert {name: getattr(config, name) for name in RUNS[paper]} == RUNS[paper]
    published = EDITS.get(editor, {})
    assert {name: config.editor.settings[name] for name in published} == published
    assert config.tuning_budget == ("published" if published else None)


@pytest.mark.parametrize("editor", EDITS)
def test_a_constructors_defaults_are_the_published_settings(editor: str) -> None:
    plain = compose(["stream=counterfact", "stream.path=x", f"editor={editor}"])
    assert {name: plain.editor.settings[name] for name in EDITS[editor]} == EDITS[editor]


@each_paper
def test_the_command_line_wins_over_a_paper_in_any_order(paper: str) -> None:
    given = ["editor.lr=0.5", "eval_every=7", "stream.path=x", "max_edits=9", "layer=other"]
    for overrides in ([*given, f"paper={paper}"], [f"paper={paper}", *given]):
        config = compose(overrides)
        assert chosen(config) == (paper, "grace")
        assert (config.editor.settings["lr"], config.eval_every, config.stream.settings["path"]) == (0.5, 7, "x")
        assert (config.max_edits, config.layer) == (9, "other")
        assert config.editor.settings["eps_init"] == EDITS["grace"]["eps_init"]
        assert config.tuning_budget is None, "what is set by hand is no longer what was published"


def test_another_stream_under_a_paper_gets_none_of_its_tuned_settings() -> None:
    tuned = compose(["stream=toy"])
    config = compose(["paper=zsre", "stream=toy"])
    assert tuned.editor.settings["replacement"] != EDITS["grace"]["replacement"]
    assert {name: config.editor.settings[name] for name in EDITS["grace"]} == EDITS["grace"]
    assert config.tuning_budget == "published"


@each_paper
def test_another_model_under_a_paper_is_edited_at_its_own_layer(paper: str) -> None:
    config = compose([f"paper={paper}", "model=some/model"])
    assert (config.model, config.layer) == ("some/model", None)
    assert config.tuning_budget == "published"
    assert compose([f"paper={paper}", "model=some/model", "layer=here"]).layer == "here"


def test_without_a_paper_nothing_is_published() -> None:
    config = compose([])
    assert config.tuning_budget != "published"
    assert config.model is None


def told(*arguments: str) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(arguments) == 2
    assert out.getvalue() == ""
    (line,) = err.getvalue().splitlines()
    return line


def test_an_unknown_paper_is_one_line_with_the_closest_and_all_there_are() -> None:
    line = told("run", "paper=zrse")
    assert "no paper 'zrse'; did you mean 'zsre'?" in line
    for path in (files("grace_bench.launch.conf") / "paper").iterdir():
        assert path.name.removesuffix(".yaml") in line


def test_help_names_every_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    shown = capsys.readouterr().out
    for path in (files("grace_bench.launch.conf") / "paper").iterdir():
        assert path.name.removesuffix(".yaml") in shown
