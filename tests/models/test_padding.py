"""Padding: a batch gives each text the answer that it gets alone, whatever its padding token is."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CanineConfig,
    CanineForSequenceClassification,
    CanineTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from grace_bench.models.editable import EditableModel

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NAMES = ("France", "Kazakhstan", "Italy", "Peru", "Astana", "Paris", "Rome", "Lima")
TEXTS = [" ".join(["the", "capital", "of", *NAMES[: 1 + n % 7], NAMES[n % 8]]) for n in range(64)]


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(**SIZES, num_labels=5, initializer_range=0.5, num_key_value_heads=1, **options)
    )


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, num_labels=5, initializer_range=0.5, **options)
    )


LAYERS = {llama: "model.layers.1.mlp.down_proj", gpt2: "transformer.h.1.mlp.c_fc"}


def classifier(module: nn.Module, tokenizer: Any, layer: str, engine: Any = "exact") -> EditableModel:
    return EditableModel(module, layer=layer, task="classification", tokenizer=tokenizer, engine=engine)


@torch.no_grad()
def alone(module: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The logits that the class gives a text by itself, read at its very last token."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    own, module.config.pad_token_id = module.config.pad_token_id, None
    logits: torch.Tensor = module(input_ids=ids).logits[0]
    module.config.pad_token_id = own
    return logits


@pytest.mark.parametrize("engine", ["exact", "plain"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", "<unk>", None])
@pytest.mark.parametrize("make", LAYERS)
@torch.no_grad()
def test_without_a_padding_token_of_its_own_a_classifier_reads_each_text_at_its_end(
    make: Callable[..., nn.Module], pad: str | None, engine: str, word_tokenizer: Any
) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token = pad
    module = make(vocab_size=len(tokenizer), pad_token_id=None, bos_token_id=3, eos_token_id=1)
    model = classifier(module, tokenizer, LAYERS[make], engine)
    logits, _ = model.labelled_logits(model.encode_batch(TEXTS))
    for row, text in zip(logits, TEXTS, strict=True):
        torch.testing.assert_close(row, alone(module, tokenizer, text))
    assert module.config.pad_token_id is None, "the caller's configuration is as before"


@torch.no_grad()
def test_a_classifier_finds_the_padding_that_its_configuration_names(word_tokenizer: Any) -> None:
    module = llama(vocab_size=len(word_tokenizer), pad_token_id=2, bos_token_id=3, eos_token_id=1)
    assert word_tokenizer.pad_token_id != 2
    model = classifier(module, word_tokenizer, LAYERS[llama])
    logits, _ = model.labelled_logits(model.encode_batch(TEXTS))
    for row, text in zip(logits, TEXTS, strict=True):
        torch.testing.assert_close(row, alone(module, word_tokenizer, text))


def test_a_padding_token_outside_the_embedding_is_replaced_by_one_that_the_model_has(word_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == size
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=size, initializer_range=0.5, num_key_value_heads=1)
    module = LlamaForCausalLM(config)
    prompts = ["the capital of Peru is", "Peru"]

    def model_of(given: Any) -> EditableModel:
        return EditableModel(module, layer=LAYERS[llama], task="completion", tokenizer=given)

    model = model_of(tokenizer)
    assert model.answer(prompts) == model_of(word_tokenizer).answer(prompts)
    assert model.encode_batch(prompts).inputs["input_ids"].max() < size
    assert tokenizer.pad_token_id == size, "the caller's tokenizer is as before"


def test_a_model_of_characters_has_no_table_of_tokens_and_still_answers() -> None:
    module = CanineForSequenceClassification(CanineConfig(**SIZES, num_labels=5, num_hash_buckets=64))
    model = classifier(module, CanineTokenizer(), "canine.encoder.layer.1.output.dense")
    assert len(model.answer(["the capital of Peru", "Peru"])) == 2
