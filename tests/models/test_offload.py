"""Models whose weights lie on several devices: inputs, edits and fingerprints go where the weights are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grace_bench import load_edited
from grace_bench.common.state import copied
from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS
from helpers import each_pair_once, each_value_once

pytest.importorskip("accelerate")

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

LAYERS = {"gpt2": "transformer.h.0.mlp.c_fc", "llama": "model.layers.1.mlp.down_proj"}
PARTS = {
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f", "lm_head"],
    "llama": [
        "model.embed_tokens",
        "model.layers.0",
        "model.layers.1",
        "model.layers.2",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ],
}
# The output layer of GPT-2 shares the embedding's weight.
OFFLOADED = {
    "the edited block": {"gpt2": ["transformer.h.0"], "llama": ["model.layers.1"]},
    "another block": {"gpt2": ["transformer.h.1"], "llama": ["model.layers.0"]},
    "the embedding": {"gpt2": ["transformer.wte", "lm_head"], "llama": ["model.embed_tokens"]},
}
PROMPTS = ["what is the capital of Kazakhstan", "the river in Italy is", "what is the currency of Peru"]

each_family = pytest.mark.parametrize("family", list(LAYERS))
each_place = pytest.mark.parametrize("place", list(OFFLOADED))


@pytest.fixture
def folder(make_model: MakeModel, word_tokenizer: Any, tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a tiny random model of a few blocks."""

    def save(family: str) -> Path:
        path = tmp_path / family
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if family == "gpt2":
                module: Any = make_model("completion").module
            else:
                module = LlamaForCausalLM(
                    LlamaConfig(
                        hidden_size=64,
                        intermediate_size=96,
                        num_hidden_layers=3,
                        num_attention_heads=2,
                        vocab_size=len(word_tokenizer),
                        max_position_embeddings=48,
                        initializer_range=0.3,
                    )
                )
        module.save_pretrained(path)
        word_tokenizer.save_pretrained(path)
        return path

    return save


def load(path: Path, family: str) -> EditableModel:
    return EditableModel.from_pretrained(path, layer=LAYERS[family], task="completion", device="cpu")


def spread(family: str, place: str) -> dict[str, str]:
    """A device map with some parts on the disk."""
    return {part: "disk" if part in OFFLOADED[place][family] else "cpu" for part in PARTS[family]}


def offload(path: Path, family: str, place: str) -> EditableModel:
    model = EditableModel.from_pretrained(
        path, layer=LAYERS[family], task="completion", device_map=spread(family, place)
    )
    assert any(weight.is_meta for weight in model.module.parameters()), "nothing was offloaded"
    return model


def make(name: str, model: EditableModel) -> EditorStrategy:
    options: dict[str, Any] = {"eps_init": 0.5} if name == "grace" else {}
    editor: EditorStrategy = EDITORS.get(name)(model=model, n_iter=20, **options)
    return editor


@each_value_once("place, family", OFFLOADED, LAYERS)
@pytest.mark.parametrize(
    "name", ["grace", *(pytest.param(name, marks=pytest.mark.slow) for name in ("defer", "memory")), "lora"]
)
def test_an_offloaded_model_is_edited_and_answers_as_the_plain_one(
    name: str, family: str, place: str, folder: Callable[[str], Path]
) -> None:
    path = folder(family)
    answers, logits = [], []
    for model in (load(path, family), offload(path, family, place)):
        model.task.max_new_tokens = 4
        batch = model.encode_batch(PROMPTS, ["Astana", "Tiber", "Sol"])
        with torch.no_grad():
            before = model.logits(batch)
        with make(name, model) as editor:
            outcome = editor.edit_text(PROMPTS[0], "Astana")
            assert outcome.loss is not None
            assert outcome.loss_first is not None
            assert outcome.loss < outcome.loss_first
            with torch.no_grad():
                logits += [before, model.logits(batch)]
            answers.append(model.answer(PROMPTS))
            with editor.suspended(), torch.no_grad():
                assert torch.equal(model.logits(batch), before)
    assert answers[0] == answers[1]
    assert torch.allclose(logits[0], logits[2], atol=1e-5)
    assert torch.allclose(logits[1], logits[3], atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-2), "the edit changes something"


@each_place
@each_family
def test_a_fingerprint_is_that_of_the_weights_wherever_they_lie(
    family: str, place: str, folder: Callable[[str], Path]
) -> None:
    path = folder(family)
    plain, offloaded = load(path, family), offload(path, family, place)
    assert offloaded.fingerprint == plain.fingerprint
    assert any(weight.is_meta for weight in offloaded.module.parameters()), "reading them leaves them where they were"


@each_family
def test_an_editor_saved_on_a_plain_model_is_loaded_on_an_offloaded_one(
    family: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    path = folder(family)
    plain, offloaded = load(path, family), offload(path, family, "the edited block")
    with make("grace", plain) as editor:
        editor.edit_text(PROMPTS[0], "Astana")
        editor.save_pretrained(tmp_path / "saved")
        expected = plain.answer(PROMPTS)
    with EDITORS.get("grace").from_pretrained(tmp_path / "saved", model=offloaded):
        assert offloaded.answer(PROMPTS) == expected


@each_family
def test_inputs_and_editors_go_to_the_device_of_what_is_offloaded(family: str, folder: Callable[[str], Path]) -> None:
    path = folder(family)
    for place in OFFLOADED:
        model = offload(path, family, place)
        assert (model.device.type, model.layer_device.type) == ("cpu", "cpu")
        assert (model.dtype, model.layer_dtype) == (torch.float32, torch.float32)


@each_value_once("name, family", ["ft", "ft_ewc", "ft_retrain", "mend", "rome"], LAYERS)
def test_an_editor_that_rewrites_an_offloaded_layer_does_what_it_does_to_the_plain_one(
    name: str, family: str, folder: Callable[[str], Path], make_editor: Callable[..., EditorStrategy], tmp_path: Path
) -> None:
    path = folder(family)
    files = {file: file.read_bytes() for file in path.iterdir()}
    found = []
    for model in (load(path, family), offload(path, family, "the edited block")):
        parts = {key for key, tensor in model.module.state_dict().items() if tensor.is_meta}
        batch = model.encode_batch(PROMPTS, ["Astana", "Tiber", "Sol"])
        with torch.no_grad():
            before = model.logits(batch)
        with make_editor(name, model) as editor:
            editor.edit_text(PROMPTS[0], "Astana", subject="Kazakhstan")
            state = copied(editor.state_dict())
            with torch.no_grad():
                found.append([before, model.logits(batch)])
                with editor.suspended():
                    assert torch.equal(model.logits(batch), before)
                editor.rollback()
                assert torch.equal(model.logits(batch), before)
                editor.load_state_dict(state)
                assert torch.equal(model.logits(batch), found[-1][1])
        with torch.no_grad():
            assert torch.equal(model.logits(batch), before)
        assert {key for key, tensor in model.module.state_dict().items() if tensor.is_meta} == parts
    (before_plain, plain), (before_offloaded, offloaded) = found
    assert torch.equal(before_plain, before_offloaded)
    # Behind cached keys and values, products with weights in memory are computed another way and round differently, by
    # how much depends on the processor; an engine may move values by 1e-3.
    assert torch.allclose(plain, offloaded, rtol=0, atol=1e-3 if name == "rome" else 0)
    assert not torch.allclose(before_plain, plain, atol=1e-2)
    assert {file: file.read_bytes() for file in path.iterdir()} == files, "a checkpoint is only read"


@each_family
@pytest.mark.parametrize("place", ["another block", "the embedding"])
def test_weights_are_rewritten_where_only_other_layers_are_offloaded(
    family: str, place: str, folder: Callable[[str], Path]
) -> None:
    path = folder(family)
    answers = []
    for model in (load(path, family), offload(path, family, place)):
        with EDITORS.get("ft")(model=model, n_iter=20) as editor:
            editor.edit_text(PROMPTS[0], "Astana")
            answers.append(model.answer(PROMPTS))
    assert answers[0] == answers[1]


def test_a_map_that_transformers_makes_is_taken_by_name(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    model = EditableModel.from_pretrained(path, layer=LAYERS["llama"], task="completion", device_map="auto")
    assert model.answer(PROMPTS) == load(path, "llama").answer(PROMPTS)


def test_a_model_spread_by_the_user_is_edited_as_it_is(
    folder: Callable[[str], Path], word_tokenizer: Any, tmp_path: Path
) -> None:
    path = folder("llama")
    module = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        device_map=spread("llama", "the edited block"),
        offload_folder=str(tmp_path / "offload"),
    )
    model = EditableModel(module, layer=LAYERS["llama"], task="completion", tokenizer=word_tokenizer)
    with make("grace", model) as editor:
        outcome = editor.edit_text(PROMPTS[0], "Astana")
        assert (outcome.op, outcome.n_keys) == ("add", 1)
        assert model.score([EditRequest(id="1", prompt=PROMPTS[0], target="Astana")])[0].entry == 0


def test_a_device_and_a_device_map_exclude_each_other(folder: Callable[[str], Path]) -> None:
    path = folder("llama")
    with pytest.raises(UserError, match=r"device=cpu .*device_map=auto") as caught:
        EditableModel.from_pretrained(path, layer=LAYERS["llama"], task="completion", device="cpu", device_map="auto")
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_is_no_transformers_model_takes_no_device_map() -> None:
    with pytest.raises(UserError, match="device_map"):
        EditableModel.from_pretrained("toy", task="classification", device_map="auto")


def test_the_run_has_options_for_large_models() -> None:
    config = compose(["stream=toy", "device_map=auto", "batch_tokens=512"])
    assert (config.device_map, config.batch_tokens) == ("auto", 512)


@each_pair_once("edited, family, place", [("ft", None), ("ft", "bfloat16"), ("grace", None)], LAYERS, OFFLOADED)
def test_an_offloaded_model_is_exported_whole(
    edited: tuple[str, str | None], family: str, place: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (name, dtype), exported = edited, []
    path = folder(family)
    for how, model in (("plain", load(path, family)), ("offloaded", offload(path, family, place))):
        editor = make(name, model)
        editor.edit_text(PROMPTS[0], "Astana")
        export = editor.export(tmp_path / how, dtype=dtype)
        exported.append(load_file((export.folder if name == "ft" else export.folder / "model") / "model.safetensors"))
        assert torch.is_tensor(load_edited(tmp_path / how, device="cpu")(torch.tensor([[5, 6, 7]])).logits)
    # Weights that are shared and offloaded may be written twice.
    assert exported[0].keys() <= exported[1].keys()
    for weight, found in exported[0].items():
        assert torch.allclose(found.float(), exported[1][weight].float(), atol=1e-5)
        assert found.dtype == exported[1][weight].dtype
