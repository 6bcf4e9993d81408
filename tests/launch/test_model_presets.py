"""Presets published for models: which one a model gets, what it gets without one, and that what is typed wins."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.launch import model_presets
from grace_bench.launch.compose import compose
from grace_bench.launch.model_presets import ANY_MODEL, choose, presets
from grace_bench.launch.run_config import RunConfig, hash_config
from grace_bench.launch.sweep import composed_runs
from grace_bench.models.architecture import ModelShape, corresponding, number_of
from grace_bench.registry import EDITORS
from helpers import each_value_once

LLAMA_2: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
}
LLAMA_3 = {**LLAMA_2, "intermediate_size": 14336, "max_position_embeddings": 8192}
LLAMA_3_1 = {**LLAMA_3, "max_position_embeddings": 131072}
MISTRAL = {**LLAMA_3, "model_type": "mistral", "max_position_embeddings": 32768}
QWEN = {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584}
GPT_J = {"model_type": "gptj", "n_layer": 28, "n_embd": 4096}
GPT2_XL = {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600}
SMOLLM = {"model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576}

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "published" / "hyperparameters.jsonl"
MODELS: dict[str, Any] = yaml.safe_load((Path(model_presets.__file__).parent / "published" / "models.yaml").read_text())

MakeFolder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """Makes a model's folder that holds nothing but its config.json."""

    def make(config: dict[str, Any], name: str = "model") -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return str(tmp_path / name)

    return make


def composed(*overrides: str) -> RunConfig:
    return compose(["stream=zsre", "stream.path=x", "preset=auto", *overrides])


@pytest.mark.parametrize(
    ("config", "editor", "layer"),
    [
        (LLAMA_2, "grace", "model.layers.27.mlp.down_proj"),
        (LLAMA_3, "ft", "model.layers.21.mlp.down_proj"),
        (LLAMA_3, "rome", "model.layers.5.mlp.down_proj"),
        (MISTRAL, "ft", "model.layers.21.mlp.down_proj"),
        (QWEN, "ft", "model.layers.27.mlp.down_proj"),
        (QWEN, "grace", "model.layers.18.mlp.down_proj"),
        (GPT_J, "grace", "transformer.h.25.mlp.fc_out"),
        (GPT_J, "rome", "transformer.h.5.mlp.fc_out"),
        (GPT2_XL, "rome", "transformer.h.17.mlp.c_proj"),
        (LLAMA_2, "r_rome", "model.layers.5.mlp.down_proj"),
        (GPT2_XL, "emmet", "transformer.h.17.mlp.c_proj"),
        (GPT2_XL, "grace", "transformer.h.35.mlp.c_fc"),
        # Editors whose settings name no layer act where the repository's other editors do.
        (GPT_J, "defer", "transformer.h.25.mlp.fc_out"),
        (QWEN, "lora", "model.layers.27.mlp.down_proj"),
    ],
)
def test_a_model_is_recognised_by_its_size_and_edited_where_it_was_published(
    config: dict[str, Any], editor: str, layer: str, folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run = composed(f"editor={editor}", f"model={folder(config)}")
    assert run.layer == layer
    assert run.tuning_budget == "published"
    assert capsys.readouterr().err == ""


def test_hyperparameters_are_those_of_the_source_under_the_names_of_the_editor(folder: MakeFolder) -> None:
    settings = composed("editor=grace", f"model={folder(QWEN)}").editor.settings
    assert {name: settings[name] for name in ("n_iter", "eps_init", "lr", "replacement")} == {
        "n_iter": 50,
        "eps_init": 1.0,
        "lr": 1.0,
        "replacement": "replace_last",
    }
    settings = composed("editor=rome", f"model={folder(LLAMA_3)}").editor.settings
    assert (settings["n_iter"], settings["weight_decay"], settings["kl_weight"]) == (25, 0.001, 0.0625)
    settings = composed("editor=emmet", f"model={folder(GPT2_XL)}").editor.settings
    assert (settings["moment_weight"], settings["ridge"], settings["softness"]) == (10000, 0, 0.1)
    settings = composed("editor=ft", f"model={folder(MISTRAL)}").editor.settings
    assert (settings["objective"], settings["norm_constraint"], settings["n_iter"]) == ("last_token", 5e-5, 25)
    settings = composed("editor=ultraedit", f"model={folder(GPT_J)}").editor.settings
    assert (settings["lr"], settings["batch_size"], settings["tokens"]) == (1e-6, 10, "ans")
    assert composed("editor=ft_bf", f"model={folder(LLAMA_3)}").layer == "model.layers.22.mlp.down_proj"


@pytest.mark.parametrize(
    ("config", "editor", "layer", "numbers"),
    [
        (GPT_J, "mend", "transformer.h.{}.mlp.fc_out", range(18, 27)),
        (GPT_J, "memit", "transformer.h.{}.mlp.fc_out", range(3, 9)),
        (LLAMA_3, "memit", "model.layers.{}.mlp.down_proj", range(4, 9)),
        (GPT2_XL, "alphaedit", "transformer.h.{}.mlp.c_proj", range(13, 18)),
        (GPT_J, "ultraedit", "transformer.h.{}.mlp.fc_out", range(18, 27)),
    ],
)
def test_an_editor_of_several_layers_gets_them_all(
    config: dict[str, Any], editor: str, layer: str, numbers: range, folder: MakeFolder
) -> None:
    run = composed(f"editor={editor}", f"model={folder(config)}")
    layers = [layer.format(number) for number in numbers]
    assert (run.editor.settings["layers"], run.layer) == (layers, layers[-1])


def test_an_editor_that_acts_beside_its_layer_keeps_its_own_default_for_the_others(folder: MakeFolder) -> None:
    run = composed("editor=melo", f"model={folder(GPT2_XL)}")
    settings = run.editor.settings
    assert (run.layer, settings["layers"]) == ("transformer.h.35.mlp.c_fc", None)
    assert (settings["n_blocks"], settings["rank_per_block"], settings["init_radius"]) == (350, 2, 0.5)


def test_a_paper_runs_its_editor_with_the_settings_of_its_authors(folder: MakeFolder) -> None:
    """Of two sources for Llama 3, one has 1 for `l2`."""
    run = compose(["paper=alphaedit", "stream.path=x", "editor=alphaedit", f"model={folder(LLAMA_3)}"])
    settings = {"threshold": 0.02, "threshold_unit": "absolute", "l2": 10, "lr": 0.1, "n_iter": 25, "clamp": 0.75}
    assert {name: run.editor.settings[name] for name in settings} == settings
    assert run.tuning_budget == "published"


def test_second_moments_are_used_where_the_source_uses_them(folder: MakeFolder) -> None:
    """ROME's authors use them on GPT-2, those of R-ROME do not."""
    model = folder(GPT2_XL)
    used = {name: choose(name, model).options["second_moments"] for name in ("rome", "r_rome")}
    assert used == {"rome": True, "r_rome": False}


def test_models_that_differ_only_inside_their_blocks_or_in_length_are_told_apart(folder: MakeFolder) -> None:
    budgets = [
        composed("editor=lora", f"model={folder(config)}").editor.settings["n_iter"]
        for config in (LLAMA_2, LLAMA_3, LLAMA_3_1)
    ]
    assert budgets == [70, 70, 50]
    # GRACE's settings are there for Llama 2, not for Llama 3.
    assert composed("editor=grace", f"model={folder(LLAMA_3)}").tuning_budget == "published for llama-2-7b"


def test_the_papers_authors_come_before_others(folder: MakeFolder) -> None:
    model = folder(GPT2_XL)
    assert choose("ft", model, paper="wise").layer == "transformer.h.0.mlp.c_proj"
    assert choose("ft", model, paper="alphaedit").layer == "transformer.h.1.mlp.c_proj"


def test_a_model_without_a_preset_gets_the_layer_at_the_same_relative_depth_and_a_line(
    folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder(SMOLLM, "smollm")
    run = composed("editor=ft", f"model={model}")
    # 21 of 28 blocks, in a model of the same type.
    assert run.layer == "model.layers.22.mlp.down_proj"
    assert run.tuning_budget == "published for llama-3.2-3b"
    (line,) = capsys.readouterr().err.splitlines()
    for text in ("ft", model, run.layer, "model.layers.21.mlp.down_proj", "llama-3.2-3b", "zjunlp/EasyEdit@"):
        assert text in line


def test_relative_depth_crosses_architectures() -> None:
    llama = ModelShape(model_type="llama", n_layers=32, hidden_size=4096)
    for n_layers, number in ((30, 25), (12, 10), (2, 1), (1, 0)):
        gpt2 = ModelShape(model_type="gpt2", n_layers=n_layers, hidden_size=64)
        found = corresponding("model.layers.27.mlp.down_proj", llama, gpt2)
        assert found == f"transformer.h.{number}.mlp.c_proj"
    gptj = ModelShape(model_type="gptj", n_layers=28, hidden_size=4096)
    assert corresponding("model.layers.16.mlp.gate_proj", llama, gptj) == "transformer.h.14.mlp.fc_in"


WITHOUT_PRESET: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2}),
    ("qwen2", {"num_key_value_heads": 2}),
    ("mistral", {"num_key_value_heads": 2}),
    ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}),
    ("phi3", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ("gpt2", {}),
    ("gptj", {"rotary_dim": 4}),
    ("gpt_neox", {}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    ("falcon", {}),
    ("phi", {}),
    # No table names the layers of these.
    ("mamba", {}),
    ("mpt", {"n_heads": 4}),
    ("lfm2", {"num_key_value_heads": 2, "full_attn_idxs": [1]}),
]


@each_value_once("of_kind, editor", WITHOUT_PRESET, ["grace", "none"])
def test_the_layer_chosen_for_a_model_without_a_preset_is_one_that_it_has(
    of_kind: tuple[str, dict[str, Any]], editor: str, folder: MakeFolder
) -> None:
    kind, settings = of_kind
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
    config: Any = transformers.AutoConfig.for_model(kind, **{**sizes, "intermediate_size": 64, **settings})
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config)
    content = {**config.to_dict(), "architectures": [type(module).__name__]}
    run = composed(f"editor={editor}", f"model={folder(json.loads(json.dumps(content, default=str)))}")
    assert run.layer is not None
    assert run.layer in dict(module.named_modules())
    assert 0 <= number_of(run.layer) < 3


def test_a_model_whose_layers_are_unknown_is_one_line_that_asks_for_a_layer(folder: MakeFolder) -> None:
    model = folder({"model_type": "unheard-of", "num_hidden_layers": 3, "hidden_size": 8})
    with pytest.raises(UserError, match=r"no layer of a unheard-of is known .*name one with layer="):
        composed("editor=ft", f"model={model}")
    assert composed("editor=ft", f"model={model}", "layer=here").layer == "here"


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_typed_wins_over_a_preset(order: int, folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["editor=grace", f"model={folder(QWEN)}", "layer=mine", "editor.lr=0.25"][::order]
    run = composed(*given)
    assert (run.layer, run.editor.settings["lr"], run.editor.settings["n_iter"]) == ("mine", 0.25, 50)
    assert run.tuning_budget is None, "what is set by hand is no longer what was published"
    off = composed(*given[:2] if order == 1 else given[2:], "preset=none")
    assert (off.layer, off.editor.settings["n_iter"], off.tuning_budget) == (None, 100, None)
    assert capsys.readouterr().err == ""


def test_no_line_is_about_a_layer_that_was_typed(folder: MakeFolder, capsys: pytest.CaptureFixture[str]) -> None:
    composed("editor=none", f"model={folder(GPT_J)}", "layer=mine")
    assert capsys.readouterr().err == ""
    composed("editor=ft", f"model={folder(SMOLLM)}", "layer=mine")
    assert "layer=" not in capsys.readouterr().err


def test_without_paper_or_preset_nothing_is_taken(folder: MakeFolder) -> None:
    given = ["stream=zsre", "stream.path=x", "editor=grace", f"model={folder(QWEN)}"]
    plain = compose(given)
    assert (plain.layer, plain.editor.settings["n_iter"]) == (None, 100)
    assert hash_config(plain.plain()) == hash_config(compose([*given, "preset=none"]).plain())
    assert "preset" not in plain.plain()
    assert "preset" not in composed("editor=grace", f"model={folder(QWEN)}").plain()


def test_each_run_of_a_sweep_takes_the_preset_of_its_editor_and_model(
    folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ",".join((folder(GPT_J, "gptj"), folder(SMOLLM, "smollm")))
    given = ["paper=locft", "stream.path=x", "editor=ft,grace", f"model={models}", "seed=0,1"]
    runs = [run.config for run in composed_runs([given], "sweep")]
    layers = {(run.editor.name, str(run.model).rpartition("/")[2], run.layer) for run in runs if run is not None}
    assert len(runs) == 8
    assert layers == {
        ("ft", "gptj", "transformer.h.21.mlp.fc_out"),
        ("ft", "smollm", "model.layers.22.mlp.down_proj"),
        ("grace", "gptj", "transformer.h.25.mlp.fc_out"),
        ("grace", "smollm", "model.layers.29.mlp.down_proj"),
    }
    assert len(capsys.readouterr().err.splitlines()) == 2, "one line for all seeds"


def test_ones_own_tuned_settings_win_over_a_preset(folder: MakeFolder, tmp_path: Path) -> None:
    own = tmp_path / "own" / "zsre"
    own.mkdir(parents=True)
    (own / "grace.yaml").write_text("editor:\n  lr: 0.125\ntuning_budget: mine\n", encoding="utf-8")
    run = compose(["paper=wise", "stream.path=x", "editor=grace", f"model={folder(QWEN)}", f"tuned={own.parent}"])
    assert (run.editor.settings["lr"], run.editor.settings["n_iter"], run.tuning_budget) == (0.125, 50, "mine")


def test_a_model_of_which_no_configuration_is_at_hand_keeps_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = composed("editor=ft", "model=nobody/nothing")
    assert (run.layer, run.editor.settings["lr"], run.tuning_budget) == (None, 0.01, None)


def test_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "stream=toy", "preset=atuo"]) == 2
    assert "no preset 'atuo'; did you mean 'auto'? (there are: auto, none)" in capsys.readouterr().err


def test_every_entry_names_its_source_and_only_options_that_its_editor_has() -> None:
    registered = EDITORS.entries()
    for preset in presets():
        repository, _, place = preset.source.partition("@")
        assert repository.count("/") == 1
        assert ":" in place
        assert all(number_of(layer) >= 0 for layer in preset.layers)
        if preset.editor in registered:
            parameters = inspect.signature(EDITORS.get(preset.editor)).parameters
            assert set(preset.options) <= set(parameters)
        assert preset.model != ANY_MODEL or not preset.layers


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_folder_of_a_models_configuration_gets_every_preset_of_the_model(
    name: str, folder: MakeFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    known = MODELS[name]
    sizes = {key: known[key] for key in ("hidden_size", "intermediate_size") if key in known}
    length = {"max_position_embeddings": known["max_length"]} if "max_length" in known else {}
    config = {"model_type": known["model_type"][0], "num_hidden_layers": known["n_layers"], **sizes, **length}
    # Only its name tells Qwen 2 from Qwen 2.5.
    model = folder(config, name if name.startswith("qwen2") else "of-my-own")
    for editor in {preset.editor for preset in presets() if preset.model == name} & EDITORS.entries().keys():
        chosen = choose(editor, model)
        assert (chosen.budget, chosen.note, chosen.no_layer) == ("published", "", "")
        sources = [preset for preset in presets() if (preset.editor, preset.model) == (editor, name)]
        assert any(all(chosen.options.get(key) == value for key, value in preset.options.items()) for preset in sources)
        if any(preset.layers for preset in sources):
            assert number_of(chosen.layer or "") in {number_of(preset.layers[-1]) for preset in sources}
            assert chosen.layer_note == ""


@pytest.mark.skipif(not PUBLISHED.is_file(), reason=f"the published settings are not at {PUBLISHED}")
def test_no_published_setting_is_missing() -> None:
    rows = [json.loads(line) for line in PUBLISHED.read_text(encoding="utf-8").splitlines()]
    assert {row["source"] for row in rows} <= {preset.source for preset in presets()}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"options": {"n_itr": 3}},
            "presets.jsonl:2: field 'options.n_itr': editor 'grace' has no such option; did you",
        ),
        ({"layers": ["transformer.h.48.mlp.c_fc"]}, "presets.jsonl:2: field 'layers': gpt2-xl has 48 blocks, and no"),
        ({"layers": ["lm_head"]}, "presets.jsonl:2: field 'layers': gpt2-xl has 48 blocks, and no lm_head"),
        ({"model": "gpt2-xxl"}, "presets.jsonl:2: field 'model': no model 'gpt2-xxl'; did you mean 'gpt2-xl'?"),
        ({"model": "any", "layers": ["h.1"]}, "presets.jsonl:2: field 'layers': settings for any model name no layer"),
        ({"sauce": "x"}, "presets.jsonl:2: is no preset"),
    ],
)
def test_a_preset_that_cannot_hold_is_named(
    entry: dict[str, Any], says: str, folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(str(model_presets._FOLDER), tmp_path / "published")
    whole = {"editor": "grace", "model": "gpt2-xl", "layers": ["transformer.h.2.mlp.c_fc"], "source": "a/b@c:d"}
    lines = [json.dumps(whole), json.dumps({**whole, **entry})]
    (tmp_path / "published" / "presets.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(model_presets, "_FOLDER", tmp_path / "published")
    presets.cache_clear()
    try:
        with pytest.raises(UserError) as caught:
            composed("editor=grace", f"model={folder(GPT2_XL)}")
    finally:
        presets.cache_clear()
    assert str(caught.value).startswith(says)


def test_a_layer_that_the_model_lacks_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["run", "stream=toy", "editor=ft", "layer=nowhere.7", f"out={tmp_path}", "wandb.mode=disabled"]
    assert main(given) == 2
    assert "layer='nowhere.7' is not in the model" in capsys.readouterr().err


def test_list_presets_shows_editor_model_layers_and_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "presets"]) == 0
    lines = capsys.readouterr().out.splitlines()

    def line(*texts: str) -> str:
        return next(line for line in lines if all(text in line for text in texts))

    shown = line("rome", "gpt2-xl", "transformer.h.17.mlp.c_proj", "kmeng01/memit@80426fd:hparams/ROME/gpt2-xl.json")
    assert "no editor" not in shown
    shown = line("memit", "llama-3-8b", "model.layers.{4,5,6,7,8}.mlp.down_proj", "jianghoucheng/AlphaEdit@")
    assert "no editor" not in shown
    assert line("moment_weight=15000", "fact_token=subject_last")
    assert "no editor 'simie' yet" in line("simie ", "llama-2-7b", "zjunlp/EasyEdit@")
    assert line("norm_constraint=0.0005")
    for preset in presets():
        assert any(preset.source in line and preset.editor in line for line in lines)
