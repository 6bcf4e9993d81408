"""Models whose weights bitsandbytes stores in 8 or 4 bits: loading, editing beside the weights, and what is refused."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.models import loading
from grace_bench.models.editable import EditableModel
from grace_bench.models.fingerprint import hash_weights
from grace_bench.registry import EDITORS

MakeRequests = Callable[[str], list[EditRequest]]

LAYER = "model.layers.1.mlp.down_proj"
PROMPTS = ["what is the capital of Kazakhstan", "the river in Italy is", "what is the currency of Peru"]
BITS = ["8bit", "4bit"]
needs_bitsandbytes = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("accelerate", "bitsandbytes")),
    reason="needs pip install 'grace-bench[quantized]'",
)
each_size = pytest.mark.parametrize("bits", BITS)


@pytest.fixture
def folder(word_tokenizer: Any, tmp_path: Path) -> Path:
    """A checkpoint of a tiny random Llama."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=3,
                num_attention_heads=2,
                vocab_size=len(word_tokenizer),
                max_position_embeddings=48,
                initializer_range=0.1,
            )
        )
    module.save_pretrained(tmp_path / "llama")
    word_tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def load(folder: Path, **options: Any) -> EditableModel:
    return EditableModel.from_pretrained(folder, layer=LAYER, task="completion", device="cpu", **options)


def logits_of(model: EditableModel, prompts: list[str] = PROMPTS) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.encode_batch(prompts)).clone()


@needs_bitsandbytes
@each_size
def test_a_model_is_quantised_while_it_loads(bits: Any, folder: Path, tmp_path: Path) -> None:
    model, plain = load(folder, load_in=bits), load(folder)
    weights = {part.weight.dtype for part in model.module.modules() if type(part).__name__.startswith("Linear")}
    assert torch.float32 in weights, "the head keeps its precision"
    assert weights - {torch.float32} == {torch.int8 if bits == "8bit" else torch.uint8}
    assert (model.dtype, model.layer_dtype) == (torch.float32, torch.float32)
    expected, found = logits_of(plain), logits_of(model)
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.5
    fingerprint = model.fingerprint
    assert fingerprint == hash_weights(load(folder, load_in=bits).module) != plain.fingerprint
    assert hash_weights(model.module) == fingerprint, "passes leave the weights as they are"
    assert torch.allclose(torch.cat([logits_of(model, [prompt])[:, 0] for prompt in PROMPTS]), found[:, 0], atol=1e-5)
    # What was saved in this form is loaded in it.
    model.module.save_pretrained(tmp_path / "quantised")
    model.tokenizer.save_pretrained(tmp_path / "quantised")
    again = load(tmp_path / "quantised")
    assert torch.equal(logits_of(again), found)
    assert again.fingerprint == fingerprint
    with pytest.raises(UserError, match=r"quantised already \(bitsandbytes\): leave load_in=4bit out"):
        load(tmp_path / "quantised", load_in="4bit")


@needs_bitsandbytes
@each_size
@pytest.mark.parametrize("name", EDITORS.entries())
def test_editors_that_change_no_weights_edit_it_and_others_say_in_a_line_why_not(
    name: str, bits: Any, folder: Path, make_requests: MakeRequests, make_editor: Callable[..., Any]
) -> None:
    model, request = load(folder, load_in=bits), make_requests("completion")[0]
    if "completion" not in EDITORS.get(name).supported_tasks:
        return
    untouched, fingerprint = logits_of(model), model.fingerprint
    if not EDITORS.get(name).freezes_weights or name == "wise":
        with pytest.raises(UserError, match=f"^layer={LAYER} has quantised weights, which editor '{name}' cannot"):
            EDITORS.get(name)(model=model)
        assert torch.equal(logits_of(model), untouched)
        return
    with make_editor(name, model) as editor:
        outcome = editor.edit_text(request.prompt, request.target, subject=request.subject)
        assert outcome.failed is None
        answered = model.answer([request.prompt])
        model.engine.forget()
        assert model.answer([request.prompt]) == answered
        editor.rollback()
        assert torch.equal(logits_of(model), untouched)
    assert hash_weights(model.module) == fingerprint


@needs_bitsandbytes
@each_size
def test_the_engine_edits_and_answers_as_a_plain_pass_does(
    bits: Any, folder: Path, make_requests: MakeRequests, make_editor: Callable[..., Any]
) -> None:
    requests = make_requests("completion")[:4]
    losses, scores, answers = [], [], []
    for engine in ("exact", "plain"):
        model = load(folder, load_in=bits, engine=engine)
        with make_editor("grace", model) as editor:
            outcomes = [editor.edit_text(request.prompt, request.target) for request in requests]
            assert [outcome.failed for outcome in outcomes] == [None] * len(requests)
            losses.append([outcome.loss for outcome in outcomes])
            # The second time from recordings.
            scores.append([[item.score for item in model.score(requests)] for _ in range(2)])
            answers.append(model.answer([request.prompt for request in requests]))
    assert [first for first, _ in scores] == [again for _, again in scores]
    # Where two ways of computing differ in the last bit, 8 bits may round an activation to another of 255 steps.
    assert losses[0] == pytest.approx(losses[1], abs=1e-3 if bits == "4bit" else 0.05)
    if bits == "4bit":
        assert answers[0] == answers[1]
        assert scores[0] == scores[1]


@pytest.mark.parametrize("package", ["accelerate", "bitsandbytes"])
def test_a_package_that_is_missing_is_named_with_its_extra(
    package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == package else find_spec("torch"))
    with pytest.raises(UserError, match=rf"^load_in=8bit needs {package}: pip install 'grace-bench\[quantized\]'$"):
        load(folder, load_in="8bit")


def test_what_is_no_quantisation_or_cannot_have_one_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^load_in=2bit is not known; did you mean '8bit'"):
        load(folder, load_in="2bit")
    with pytest.raises(UserError, match=r"^model=toy is no transformers model: .* not load_in=$"):
        EditableModel.from_pretrained("toy", task="classification", load_in="8bit")
