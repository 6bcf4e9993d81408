"""The published settings: what each fixes for each editor, and what the command line may still change."""

import contextlib
import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from grace_bench.cli import main
from grace_bench.launch.compose import compose
from grace_bench.launch.run_config import RunConfig
from grace_bench.registry import EDITORS
from grace_bench.results.reading import find_result_files, read_result

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


# Editors without published settings on one paper each.
@pytest.mark.parametrize(
    ("paper", "editor"),
    [
        pytest.param(paper, editor, marks=() if editor in EDITS or turn % len(RUNS) == number else pytest.mark.slow)
        for number, paper in enumerate(RUNS)
        for turn, editor in enumerate(EDITORS.entries())
    ],
)
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


# --- protocols of causal models --------------------------------------------------------------------------------------

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no slices of public data sets beside the repository")

ALL_AT_THE_END = {"edit": "all", "score_after": "target"}
PROTOCOLS: dict[tuple[str, str], dict[str, Any]] = {
    ("wise", "zsre"): {
        "edits_at_once": 1,
        "max_edits": 1000,
        "protocol.main_score": "token_accuracy",
        "protocol.locality_score": "token_agreement",
        "stream": {
            "task": "completion",
            "target": "alt",
            "locality_question": "nq question: {}",
            "locality_target": "unedited",
        },
    },
    ("wise", "hallucination"): {
        "edits_at_once": 1,
        "max_edits": 1000,
        "protocol.main_score": "perplexity",
        "protocol.locality_score": "token_agreement",
        "stream": {},
    },
    ("alphaedit", "counterfact"): {
        "edits_at_once": 100,
        "max_edits": 2000,
        "protocol.main_score": "contrast",
        "protocol.locality_score": None,
        "scores": ["f1", "exact_match", "token_accuracy", "contrast", "fluency"],
        "stream": {"locality_target": "gold"},
    },
    ("alphaedit", "zsre"): {
        "edits_at_once": 100,
        "max_edits": 2000,
        "protocol.main_score": "token_accuracy",
        "protocol.locality_score": None,
        "scores": None,
        "stream": {
            "task": "completion",
            "target": "answers",
            "locality_question": "nq question: {}?",
            "locality_target": "gold",
        },
    },
    ("ultraedit", "zsre"): {
        "edits_at_once": 100,
        "max_edits": 20000,
        "protocol.main_score": "token_accuracy",
        "stream": {
            "task": "completion",
            "target": "answers",
            "locality_question": "nq question: {}?",
            "locality_target": "gold",
        },
    },
    ("ultraedit", "wikibigedit"): {
        "edits_at_once": 100,
        "max_edits": 20000,
        "protocol.main_score": "token_accuracy",
        "stream": {"locality_target": "gold"},
    },
    ("locft", "zsre"): {
        "edits_at_once": 1,
        "max_edits": 3000,
        "protocol.main_score": "exact_match",
        "protocol.stop": "sentence",
        "stream": {"task": "completion", "max_new_tokens": 32},
    },
    ("locft", "counterfact"): {
        "max_edits": 3000,
        "protocol.main_score": "exact_match",
        "protocol.stop": "sentence",
        "stream": {"max_new_tokens": 32},
    },
    ("locft", "wikibigedit"): {
        "max_edits": 3000,
        "protocol.main_score": "exact_match",
        "protocol.stop": "sentence",
        "stream": {"max_new_tokens": 32},
    },
    ("qaedit", "qaedit"): {
        "edits_at_once": 1,
        "max_edits": 1000,
        "protocol.main_score": "exact_match",
        "stream": {"context": "bare"},
    },
}
RUN_HERE = (("wise", "zsre"), ("alphaedit", "counterfact"))
"""Papers on streams whose runs are quick; `make test-slow` has the others."""
DEFAULT_STREAMS = {
    "wise": "zsre",
    "alphaedit": "counterfact",
    "ultraedit": "zsre",
    "locft": "zsre",
    "qaedit": "qaedit",
}
FILES = {
    "zsre": "zsre_mend.jsonl",
    "counterfact": "counterfact_edit.jsonl",
    "wikibigedit": "wikibigedit_locft.json",
    "hallucination": "wikibio_hallucination_edit.jsonl",
    "qaedit": "qaedit.json",
}

each_protocol = pytest.mark.parametrize(("paper", "stream"), PROTOCOLS)


@each_protocol
def test_a_papers_protocol_is_set_for_each_of_its_streams(paper: str, stream: str) -> None:
    expected = {**ALL_AT_THE_END, **PROTOCOLS[paper, stream]}
    settings = expected.pop("stream")
    config = compose([f"paper={paper}", f"stream={stream}", "stream.path=x", "editor=ft"])
    options = dict(config.options())
    assert {name: options[name] for name in expected} == expected
    assert options["eval_every"] == options["max_edits"], "beside before the first edit, evaluated once: at the end"
    assert {name: config.stream.settings[name] for name in settings} == settings
    assert config.tuning_budget is None, "what was tuned for the stream's own model is no part of it"


@pytest.mark.parametrize("paper", DEFAULT_STREAMS)
def test_a_paper_has_a_stream_of_its_own(paper: str) -> None:
    assert compose([f"paper={paper}", "stream.path=x"]) == compose(
        [f"paper={paper}", f"stream={DEFAULT_STREAMS[paper]}", "stream.path=x"]
    )


@pytest.mark.parametrize(
    ("paper", "stream"),
    [
        pytest.param(paper, stream, marks=() if DEFAULT_STREAMS[paper] == stream else pytest.mark.slow)
        for paper, stream in PROTOCOLS
    ],
)
def test_what_is_typed_wins_over_a_protocol_in_any_order(paper: str, stream: str) -> None:
    given = [
        f"stream={stream}",
        "stream.path=x",
        "edit=errors",
        "edits_at_once=7",
        "max_edits=3",
        "protocol.main_score=f1",
    ]
    for overrides in ([f"paper={paper}", *given], [*given, f"paper={paper}"]):
        options = dict(compose(overrides).options())
        assert (options["edit"], options["edits_at_once"], options["max_edits"]) == ("errors", 7, 3)
        assert (options["protocol.main_score"], options["eval_every"]) == ("f1", 3)
    settings = PROTOCOLS[paper, stream]["stream"]
    if "locality_target" in settings:
        typed = compose([f"paper={paper}", f"stream={stream}", "stream.path=x", "stream.locality_target=unedited"])
        assert typed.stream.settings["locality_target"] == "unedited"


def test_the_whole_stream_is_evaluated_at_its_end() -> None:
    config = compose(["paper=wise", "stream.path=x", "max_edits=null"])
    assert config.max_edits is None
    assert isinstance(config.eval_every, int)
    assert config.eval_every > 1_000_000


def test_n_edits_is_how_papers_name_max_edits() -> None:
    for overrides in (["paper=wise", "n_edits=10"], ["n_edits=10", "paper=wise"]):
        assert compose([*overrides, "stream.path=x"]) == compose(["paper=wise", "max_edits=10", "stream.path=x"])
    assert "n_edits=5 belongs to a paper" in told("run", "stream=toy", "n_edits=5")
    assert "give one of them" in told("run", "paper=wise", "n_edits=5", "max_edits=5")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random GPT-2 of three blocks, with a token for every byte."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pieces = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = GPT2LMHeadModel(
            GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=len(pieces), n_positions=2048, eos_token_id=0)
        )
    module.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)  # type: ignore[assignment]
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def first_records(stream: str, folder: Path, n: int = 6) -> Path:
    """A file of the first records of a stream's data."""
    source = DATA / FILES[stream]
    path = folder / source.name
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".json":
        path.write_text(json.dumps(json.loads(text)[:n]), encoding="utf-8")
    else:
        path.write_text("".join(text.splitlines(keepends=True)[:n]), encoding="utf-8")
    return path


@needs_data
@pytest.mark.parametrize(
    ("paper", "stream"),
    # Two papers on the streams of their own.
    [
        pytest.param(paper, stream, marks=() if (paper, stream) in RUN_HERE else pytest.mark.slow)
        for paper, stream in PROTOCOLS
    ],
)
def test_a_paper_runs_on_a_local_folder_and_its_result_names_the_protocol(
    paper: str, stream: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = first_records(stream, tmp_path)
    out = tmp_path / "runs"
    command = ["run", f"paper={paper}", f"stream={stream}", f"stream.path={path}", "editor=ft", f"model={model}"]
    assert main([*command, "editor.n_iter=2", "max_edits=3", f"out={out}"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("grace-bench: ")]
    assert len(lines) == 1
    assert "layer=transformer.h." in lines[0]
    (file,) = find_result_files([out])
    result = read_result(file)
    assert result.metrics["n_edits"] == 3
    assert result.model.layer in lines[0]
    assert result.protocol.edit == "all"
    assert result.protocol.main_score == PROTOCOLS[paper, stream]["protocol.main_score"]
    assert result.protocol.max_edits == result.protocol.eval_every == 3
    assert {"ERR", "ES", "Locality"} <= set(result.metrics)
    assert [json.loads(line)["n_edits"] for line in (file.parent / "metrics.jsonl").read_text().splitlines()] == [0, 3]


@needs_data
def test_wise_sweeps_the_number_of_edits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = first_records("zsre", tmp_path)
    command = ["run", "paper=wise", f"stream.path={path}", "editor=ft", f"model={model}", "editor.n_iter=2"]
    assert main([*command, "n_edits=1,2", f"out={tmp_path / 'runs'}"]) == 0
    captured = capsys.readouterr()
    assert "2 runs, 2 done" in captured.out
    assert captured.err.count("is published for editor ft") == 1, "the same line for all runs of a sweep"
    results = [read_result(file) for file in find_result_files([tmp_path / "runs"])]
    assert sorted(result.metrics["n_edits"] or 0 for result in results) == [1, 2]
    assert {result.protocol.max_edits for result in results} == {1, 2}
