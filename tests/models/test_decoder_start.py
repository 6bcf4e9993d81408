"""The token with which a decoder starts: where it is looked up, and that training and generation agree on it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, T5GemmaConfig, T5GemmaForConditionalGeneration

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

LAYER = "model.encoder.layers.0.fc2"
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}


def bart(**options: Any) -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sides = {f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")}
    given = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "decoder_start_token_id": None, **options}
    model = BartForConditionalGeneration(
        BartConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=40, init_std=0.5, **sides, **given)
    )
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    return model


def wrapped(module: nn.Module, tokenizer: Any) -> EditableModel:
    return EditableModel(module, layer=LAYER, task="qa", tokenizer=tokenizer, engine="plain")


def started(model: EditableModel) -> set[int]:
    """The tokens with which the decoder starts, in training and in free generation."""
    seen = [int(model.encode_batch(["Peru"], ["Lima"]).inputs["decoder_input_ids"][0, 0])]

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = kwargs.get("input_ids", args[0] if args else None)
        if len(seen) == 1:
            seen.append(int(given[0, 0]))

    handle = model.module.get_decoder().register_forward_pre_hook(note, with_kwargs=True)  # type: ignore[operator]
    model.answer(["Peru"])
    handle.remove()
    return set(seen)


def test_generation_settings_come_before_the_configuration_and_both_before_a_begin_token(word_tokenizer: Any) -> None:
    module = bart()
    own = module.generation_config
    assert started(wrapped(module, word_tokenizer)) == {word_tokenizer.bos_token_id}
    module.config.bos_token_id = 8
    assert started(wrapped(module, word_tokenizer)) == {8}
    own.bos_token_id = 7
    assert started(wrapped(module, word_tokenizer)) == {7}
    module.config.decoder_start_token_id = 6
    assert started(wrapped(module, word_tokenizer)) == {6}
    own.decoder_start_token_id = 5
    assert started(wrapped(module, word_tokenizer)) == {5}
    assert module.generation_config is own


def test_a_decoder_with_a_configuration_of_its_own_may_name_it(word_tokenizer: Any) -> None:
    side = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
    config = T5GemmaConfig(encoder=side, decoder={**side, "bos_token_id": 7}, vocab_size=40)
    module = T5GemmaForConditionalGeneration(config)
    layer = "model.encoder.layers.0.mlp.down_proj"
    model = EditableModel(module, layer=layer, task="qa", tokenizer=word_tokenizer, engine="plain")
    assert started(model) == {7}


def test_a_loaded_model_keeps_the_start_token_and_no_other_setting(tmp_path: Path, word_tokenizer: Any) -> None:
    module = bart()
    module.generation_config.update(decoder_start_token_id=5, forced_bos_token_id=9, do_sample=True, top_k=3)
    module.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    model = EditableModel.from_pretrained(tmp_path, layer=LAYER, task="qa", device="cpu", engine="plain")
    assert started(model) == {5}
    settings = model.module.generation_config
    assert settings.forced_bos_token_id is None
    assert not settings.do_sample


def test_answers_are_greedy_and_unforced_whatever_the_modules_own_settings(word_tokenizer: Any) -> None:
    module = bart(decoder_start_token_id=5)
    greedy = wrapped(module, word_tokenizer).answer(["the capital of Peru"])
    module.generation_config.update(forced_bos_token_id=9, forced_eos_token_id=9, do_sample=True, temperature=50.0)
    for _ in range(3):
        assert wrapped(module, word_tokenizer).answer(["the capital of Peru"]) == greedy


def test_a_model_that_names_no_start_token_is_refused_in_one_line(word_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(UserError, match="names no token for its decoder to start with") as refused:
        wrapped(bart(), tokenizer).encode_batch(["Peru"])
    assert "\n" not in str(refused.value)
