"""Batches of models whose answers would depend on padding."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
ENDS = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
PROMPTS = [
    "what is the capital of Kazakhstan",
    "Rome",
    "the river in Italy is",
    "what is the currency of Peru in France is the Euro",
]


def bart(size: int) -> nn.Module:
    return transformers.BartForCausalLM(
        transformers.BartConfig(vocab_size=size, max_position_embeddings=64, **BART, **ENDS)
    )


def roformer(size: int) -> nn.Module:
    config = transformers.RoFormerConfig(vocab_size=size, is_decoder=True, max_position_embeddings=64, **SIZES, **ENDS)
    return transformers.RoFormerForCausalLM(config)


def rwkv(size: int) -> nn.Module:
    return transformers.RwkvForCausalLM(
        transformers.RwkvConfig(vocab_size=size, hidden_size=32, num_hidden_layers=2, context_length=64, **ENDS)
    )


def fnet(size: int) -> nn.Module:
    config = transformers.FNetConfig(
        vocab_size=size, max_position_embeddings=64, num_labels=3, hidden_size=32, num_hidden_layers=2, pad_token_id=0
    )
    return transformers.FNetForSequenceClassification(config)


def roberta(size: int) -> nn.Module:
    """Numbers its tokens from the padding token's id on."""
    config = transformers.RobertaConfig(vocab_size=size, is_decoder=True, max_position_embeddings=64, **SIZES, **ENDS)
    return transformers.RobertaForCausalLM(config)


def gpt2(size: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS)
    )


CASES = [
    (bart, "completion", "model.decoder.layers.0.fc2"),
    (roformer, "completion", "roformer.encoder.layer.0.output.dense"),
    (rwkv, "completion", "rwkv.blocks.0.feed_forward.value"),
    (fnet, "classification", "fnet.encoder.layer.0.output.dense"),
    (gpt2, "completion", "transformer.h.0.mlp.c_fc"),
    (roberta, "completion", "roberta.encoder.layer.1.output.dense"),
]


def editable(build: Callable[[int], nn.Module], task: str, layer: str, tokenizer: Any) -> EditableModel:
    torch.manual_seed(1)
    module = build(len(tokenizer))
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.4)
    if task == "completion":
        module.generation_config = transformers.GenerationConfig(do_sample=False)  # type: ignore[assignment]
    return EditableModel(module, layer=layer, task=get_task(task, max_new_tokens=4), tokenizer=tokenizer)


def requests(task: str) -> list[EditRequest]:
    return [
        EditRequest(
            id=str(i),
            prompt=prompt,
            target=1 if task == "classification" else "Astana of Peru"[: 6 + 8 * (i % 2)],
            contrast=None if task == "classification" else ("Paris", "Lima of France"),
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(("build", "task", "layer"), CASES, ids=lambda given: getattr(given, "__name__", ""))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_answer_does_not_depend_on_the_batch(
    build: Callable[[int], nn.Module], task: str, layer: str, word_tokenizer: Any
) -> None:
    model = editable(build, task, layer, word_tokenizer)
    asked = requests(task)
    with torch.no_grad():
        together = model.score_batch(asked)
        alone = [model.score_batch([request])[0] for request in asked]
    assert [item.text for item in together] == [item.text for item in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-4)
        assert one.others == pytest.approx(other.others, abs=1e-4)
    assert torch.allclose(model.queries(PROMPTS), torch.cat([model.queries([p]) for p in PROMPTS]), atol=1e-4)
    assert bool(model.engine.notes) == (build not in (gpt2, roberta))


@pytest.mark.parametrize(("build", "task", "layer"), [CASES[0], CASES[3], CASES[5]], ids=["bart", "fnet", "roberta"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_codebook_finds_its_entries_in_every_batch(
    build: Callable[[int], nn.Module], task: str, layer: str, word_tokenizer: Any
) -> None:
    model = editable(build, task, layer, word_tokenizer)
    editor = EDITORS.get("grace")(model=model, n_iter=5, eps_init=1e-3, replacement="replace_last")
    for request in requests(task):
        editor.edit_text(request.prompt, request.target)
    with torch.no_grad():
        together = model.score_batch(requests(task))
    assert [item.entry for item in together] == [0, 1, 2, 3]
    assert all(item.distance == pytest.approx(0, abs=1e-4) for item in together)


@pytest.mark.parametrize("is_decoder", [True, False])
def test_an_encoder_is_not_taken_for_a_causal_model(is_decoder: bool, word_tokenizer: Any) -> None:
    def build(size: int) -> nn.Module:
        config = transformers.BertConfig(vocab_size=size, is_decoder=is_decoder, **SIZES, **ENDS)
        return transformers.BertLMHeadModel(config)

    model = editable(build, "completion", "bert.encoder.layer.0.output.dense", word_tokenizer)
    request = requests("completion")[0]
    if is_decoder:
        model.task.check_reading(model, request)
    else:
        with pytest.raises(UserError, match=r"is not causal: .* is_decoder=true"):
            model.task.check_reading(model, request)
