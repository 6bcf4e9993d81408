"""Limits of length: a text of the longest length runs, and where a table ends there, one token more does not."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from grace_bench.models.editable import EditableModel
from grace_bench.models.limits import longest_input, longest_target

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 40}
SEQ2SEQ = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "vocab_size": 40,
    "pad_token_id": 1,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40, "n_positions": 5}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}


def made(cls: str, config: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, cls)(getattr(transformers, config)(**options))
    return model.eval()


def classifier(name: str, **options: Any) -> nn.Module:
    given = {**SIZES, "max_position_embeddings": 24, **options}
    return made(f"{name}ForSequenceClassification", f"{name}Config", **given)


def causal(name: str, **options: Any) -> nn.Module:
    return made(f"{name}ForCausalLM", f"{name}Config", **{**SIZES, "max_position_embeddings": 24, **options})


def seq2seq(name: str, **options: Any) -> nn.Module:
    given = {**SEQ2SEQ, "max_position_embeddings": 12, **options}
    return made(f"{name}ForConditionalGeneration", f"{name}Config", **given)


def led(longest: int, longest_target: int) -> nn.Module:
    limits = {"max_encoder_position_embeddings": longest, "max_decoder_position_embeddings": longest_target}
    return made("LEDForConditionalGeneration", "LEDConfig", **SEQ2SEQ, **limits, attention_window=8)


def roberta_to_bert() -> nn.Module:
    encoder, decoder = (
        transformers.RobertaConfig(**SIZES, max_position_embeddings=24),
        transformers.BertConfig(**SIZES, max_position_embeddings=12),
    )
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(config).eval()


def gemma_with_images() -> nn.Module:
    text = {**SIZES, **GROUPED, "max_position_embeddings": 24, "layer_types": ["full_attention"]}
    images = {**SIZES, "image_size": 28, "patch_size": 14}
    return made("Gemma3ForConditionalGeneration", "Gemma3Config", text_config=text, vision_config=images)


Make = Callable[[], nn.Module]
WITH_A_TABLE: dict[str, tuple[Make, int]] = {
    **{
        name: (lambda name=name: classifier(name), 24)
        for name in ("Bert", "Electra", "DebertaV2", "Nystromformer", "Canine", "RoFormer")
    },
    **{
        name: (lambda name=name: classifier(name, pad_token_id=1), 22)
        for name in ("Roberta", "XLMRobertaXL", "RobertaPreLayerNorm", "MPNet", "Camembert", "Data2VecText", "IBert")
    },
    "another padding token": (lambda: classifier("Roberta", pad_token_id=3), 20),
    "Longformer": (lambda: classifier("Longformer", attention_window=8, pad_token_id=1), 22),
    "BigBird": (lambda: classifier("BigBird", block_size=2, max_position_embeddings=51), 50),
    "DistilBert": (
        lambda: made(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **{"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "vocab_size": 40},
            max_position_embeddings=24,
        ),
        24,
    ),
    "OPT": (lambda: causal("OPT", ffn_dim=16, word_embed_proj_dim=16), 24),
    "BioGpt": (lambda: causal("BioGpt"), 24),
    "GPT2": (lambda: made("GPT2LMHeadModel", "GPT2Config", **GPT2, n_positions=24), 24),
    "Mpt": (
        lambda: made("MptForCausalLM", "MptConfig", d_model=16, n_layers=1, n_heads=2, vocab_size=40, max_seq_len=24),
        24,
    ),
}
WITHOUT_A_TABLE: dict[str, tuple[Make, int | None]] = {
    "Llama": (lambda: causal("Llama"), 24),
    "Falcon": (lambda: causal("Falcon"), 24),
    "Gemma3 with images": (gemma_with_images, 24),
    "Bloom": (
        lambda: made("BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=1, n_head=2, vocab_size=40),
        None,
    ),
    "Bloom that states one": (
        lambda: made(
            "BloomForCausalLM", "BloomConfig", hidden_size=16, n_layer=1, n_head=2, vocab_size=40, seq_length=24
        ),
        24,
    ),
    "XLNet": (
        lambda: made(
            "XLNetForSequenceClassification", "XLNetConfig", d_model=16, n_layer=1, n_head=2, d_inner=16, vocab_size=40
        ),
        None,
    ),
}
ENCODER_DECODERS: dict[str, tuple[Make, int | None, int | None, bool]] = {
    **{
        name: (lambda name=name: seq2seq(name), 12, 12, True)
        for name in ("Bart", "MBart", "Pegasus", "Blenderbot", "PLBart")
    },
    "Marian": (lambda: made("MarianMTModel", "MarianConfig", **SEQ2SEQ, max_position_embeddings=12), 12, 12, True),
    "LED": (lambda: led(26, 12), 24, 12, True),
    "RoBERTa and BERT": (roberta_to_bert, 22, 12, True),
    "ProphetNet": (
        lambda: made(
            "ProphetNetForConditionalGeneration",
            "ProphetNetConfig",
            **{"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 40},
            **{f"num_{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")},
            max_position_embeddings=12,
        ),
        11,
        10,
        False,
    ),
    "M2M100": (lambda: seq2seq("M2M100"), 12, 12, False),
    "T5": (lambda: made("T5ForConditionalGeneration", "T5Config", **T5), None, None, False),
    "LongT5": (lambda: made("LongT5ForConditionalGeneration", "LongT5Config", **T5), None, None, False),
    "T5Gemma": (
        lambda: made(
            "T5GemmaForConditionalGeneration",
            "T5GemmaConfig",
            encoder={**SIZES, **GROUPED, "max_position_embeddings": 24},
            decoder={**SIZES, **GROUPED, "max_position_embeddings": 12},
            vocab_size=40,
        ),
        24,
        12,
        False,
    ),
}


@torch.no_grad()
def runs(model: nn.Module, length: int, target_length: int | None = None) -> bool:
    ids = torch.randint(5, 40, (1, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if target_length is not None:
        inputs["decoder_input_ids"] = torch.randint(5, 40, (1, target_length))
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False  # type: ignore[assignment]
    try:
        model(**inputs)
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", WITH_A_TABLE)
def test_the_longest_input_fills_the_table_of_positions(name: str) -> None:
    make, longest = WITH_A_TABLE[name]
    model = make()
    assert longest_input(model, None) == longest
    assert longest_target(model) is None
    assert runs(model, longest)
    assert not runs(model, longest + 1)


@pytest.mark.parametrize("name", WITHOUT_A_TABLE)
def test_without_a_table_the_configuration_sets_the_limit(name: str) -> None:
    make, longest = WITHOUT_A_TABLE[name]
    model = make()
    assert longest_input(model, None) == longest
    assert runs(model, longest or 100)


@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_the_encoder_bounds_inputs_and_the_decoder_targets(name: str) -> None:
    make, longest, target, has_tables = ENCODER_DECODERS[name]
    model = make()
    assert (longest_input(model, None), longest_target(model)) == (longest, target)
    assert runs(model, longest or 100, target or 100)
    if has_tables:
        assert longest is not None
        assert target is not None
        assert not runs(model, longest + 1, target)
        assert not runs(model, longest, target + 1)


@pytest.mark.parametrize(("stated", "longest"), [(6, 6), (100, 24), (int(1e30), 24), (0, 24)])
def test_a_tokenizer_may_set_a_lower_limit(stated: int, longest: int) -> None:
    tokenizer = type("Tokenizer", (), {"model_max_length": stated})
    assert longest_input(causal("Llama"), tokenizer) == longest


def test_a_classifier_that_feeds_its_text_to_both_sides_obeys_both() -> None:
    assert longest_input(classifier("Bart", **SEQ2SEQ, max_position_embeddings=12), None) == 12


def test_long_questions_and_answers_are_cut_to_what_each_side_reads(word_tokenizer: Any) -> None:
    module = led(16, 6)
    layer = "led.encoder.layers.0.fc2"
    model = EditableModel(module, layer=layer, task="qa", tokenizer=word_tokenizer)
    text = "the capital of " * 20 + "Peru"
    batch = model.encode_batch([text], [text])
    assert batch.inputs["input_ids"].shape[1] == 16
    assert len(batch.target_ids[0]) == 6
    assert batch.target_ids[0][-1] == word_tokenizer.eos_token_id
    assert model.labelled_logits(batch)[0].isfinite().all()
    assert isinstance(model.answer([text])[0], str)


def test_a_completion_ends_where_the_positions_do(word_tokenizer: Any) -> None:
    module = made("GPT2LMHeadModel", "GPT2Config", **GPT2, n_positions=8)
    model = EditableModel(module, layer="transformer.h.0.mlp.c_fc", task="completion", tokenizer=word_tokenizer)
    assert model.task.max_new_tokens > 8
    (_, ids), *_ = model.task.generate(model, ["the capital of Peru"])  # type: ignore[attr-defined]
    assert len(ids) <= 7
