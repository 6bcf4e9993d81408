"""Tokenizers: every kind that transformers loads, none that it invents, and the missing package by its name."""

import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AlbertConfig,
    BertConfig,
    ByT5Tokenizer,
    CanineConfig,
    CanineTokenizer,
    DebertaV2Config,
    DebertaV2Tokenizer,
    GPT2Config,
    M2M100Config,
    MarianConfig,
    MBart50Tokenizer,
    MBartConfig,
    MPNetConfig,
    T5Config,
    XGLMConfig,
    XLMConfig,
    XLMRobertaConfig,
)

from grace_bench.common.untrusted import check_model_folder
from grace_bench.errors import UserError
from grace_bench.models.tokenizers import load_tokenizer
from grace_bench.models.zoo import resolve_model

PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -2.0), ("▁ca", -3.0)]
MADE: dict[str, tuple[Any, Callable[[], Any]]] = {
    "ByT5": (T5Config(), ByT5Tokenizer),
    "CANINE": (CanineConfig(), CanineTokenizer),
    "DeBERTa-v2": (DebertaV2Config(), lambda: DebertaV2Tokenizer(vocab=PIECES)),
    "mBART-50": (MBartConfig(), lambda: MBart50Tokenizer(vocab=PIECES)),
}
# What a SentencePiece model starts with: a field of one piece.
SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
needs_sentencepiece = pytest.mark.skipif(find_spec("sentencepiece") is None, reason="sentencepiece is not installed")
lacks_sentencepiece = pytest.mark.skipif(find_spec("sentencepiece") is not None, reason="sentencepiece is installed")


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(folder))
    told = str(refused.value)
    assert told.startswith(f"model={folder}: ")
    assert "\n" not in told
    return told


@pytest.mark.parametrize("name", MADE)
def test_a_saved_tokenizer_is_loaded_whatever_its_files_are_called(name: str, tmp_path: Path) -> None:
    config, make = MADE[name]
    config.save_pretrained(tmp_path)
    made = make()
    made.save_pretrained(tmp_path)
    check_model_folder(str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    assert type(loaded) is type(made)
    assert loaded("a ca")["input_ids"] == made("a ca")["input_ids"]
    assert loaded.pad_token_id is not None


@pytest.mark.parametrize("settings", [False, True], ids=["configuration only", "with settings"])
@pytest.mark.parametrize(
    "config",
    [
        *(AlbertConfig, BertConfig, DebertaV2Config, GPT2Config, M2M100Config),
        *(MarianConfig, MBartConfig, MPNetConfig, T5Config, XLMConfig),
    ],
)
def test_a_folder_for_which_transformers_invents_a_vocabulary_is_refused(
    config: Any, settings: bool, tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path)
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512}))
    assert "the folder holds no tokenizer" in refusal(tmp_path)


def test_even_characters_need_their_settings(tmp_path: Path) -> None:
    CanineConfig().save_pretrained(tmp_path)
    assert "the folder holds no tokenizer" in refusal(tmp_path)


@pytest.mark.parametrize(("config", "file"), [(DebertaV2Config, "vocab.json"), (XGLMConfig, "sentencepiece.bpe.model")])
def test_a_vocabulary_that_the_class_does_not_read_is_not_a_tokenizer(config: Any, file: str, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"{}")
    assert "the folder holds no tokenizer" in refusal(tmp_path)


@lacks_sentencepiece
@pytest.mark.parametrize(
    ("config", "files"),
    [
        (DebertaV2Config, ["spm.model"]),
        (MBartConfig, ["sentencepiece.bpe.model"]),
        (XLMRobertaConfig, ["sentencepiece.bpe.model"]),
        (T5Config, ["spiece.model"]),
        (MarianConfig, ["source.spm", "target.spm", "vocab.json"]),
    ],
)
def test_where_sentencepiece_is_missing_the_line_names_it(config: Any, files: list[str], tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    for name in files:
        (tmp_path / name).write_bytes(b"{}" if name.endswith(".json") else SENTENCEPIECE)
    if config is MarianConfig:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "MarianTokenizer"}))
    assert "its tokenizer needs sentencepiece: pip install sentencepiece" in refusal(tmp_path)


@pytest.mark.skipif(find_spec("sacremoses") is not None, reason="sacremoses is installed")
def test_another_missing_package_is_named_too(tmp_path: Path) -> None:
    XLMConfig().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    assert "its tokenizer needs sacremoses: pip install sacremoses" in refusal(tmp_path)


@needs_sentencepiece
def test_vocabularies_of_sentencepiece_are_loaded(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
    from transformers import MarianTokenizer

    trained = io.BytesIO()
    texts = ["the capital of Kazakhstan is Astana", "the river of Italy is the Tiber"] * 20
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=trained, vocab_size=28, minloglevel=2)
    source = tmp_path / "made.spm"
    source.write_bytes(trained.getvalue())
    pieces = SentencePieceProcessor(model_file=str(source))
    vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
    (tmp_path / "made.json").write_text(json.dumps({**vocabulary, "<pad>": len(vocabulary)}))
    marian, deberta = tmp_path / "marian", tmp_path / "deberta"
    MarianConfig().save_pretrained(marian)
    made = MarianTokenizer(source_spm=str(source), target_spm=str(source), vocab=str(tmp_path / "made.json"))
    made.save_pretrained(marian)
    DebertaV2Config().save_pretrained(deberta)
    (deberta / "spm.model").write_bytes(trained.getvalue())
    check_model_folder(str(marian))
    assert load_tokenizer(str(marian))("the capital")["input_ids"] == made("the capital")["input_ids"]
    assert len(load_tokenizer(str(deberta))) >= 28


def test_the_hash_of_a_folder_covers_every_file_of_a_vocabulary(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    seen = {resolve_model(str(tmp_path)).content_hash()}
    for name in ("sentencepiece.bpe.model", "source.spm", "target.spm", "vocab.txt", "merges.txt", "bpe.codes"):
        (tmp_path / name).write_text(name)
        seen.add(resolve_model(str(tmp_path)).content_hash())
    assert len(seen) == 7
