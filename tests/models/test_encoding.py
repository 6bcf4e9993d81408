"""Text to tensors, for the four families of tokenizers: spaces, shifts, masks and the query position."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from grace_bench import EditableModel
from grace_bench.data.requests import TaskName
from grace_bench.models.encoding import (
    IGNORED,
    EncodedBatch,
    encode_causal,
    encode_classification,
    encode_seq2seq,
)
from grace_bench.models.tokens import PromptTokenizer

# Long words first: the merges that build a word come before those of its parts.
WORDS = ("Kazakhstan", "capital", "France", "Astana", "Paris", "the", "of", "is", "Q:", "A:")
START = 0
"""T5 starts its decoder with its padding token."""


def chained(words: Sequence[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges that build each word from its left, their results added to the vocabulary."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        built = word[0]
        for character in word[1:]:
            merges[built, character] = None
            built += character
            vocabulary.setdefault(built, len(vocabulary))
    return list(merges)


@cache
def t5_tokenizer() -> Any:
    """Unigram over pieces that carry their space in front; the end token is appended."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), *"abcdefghijklmnopqrstuvwxyz:?."]
    tokenizer = Tokenizer(
        tokenizer_models.Unigram([(piece, -1.0 if len(piece) > 1 else -5.0) for piece in pieces], unk_id=2)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@cache
def bert_tokenizer() -> Any:
    """WordPiece, lower case, between [CLS] and [SEP]; it has neither a begin nor an end token."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(word.lower() for word in WORDS), "##s", ":", "q", "a", "?"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(tokenizer_models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@cache
def gpt2_tokenizer() -> Any:
    """Byte-level BPE that adds no special tokens and pads with its end token."""
    vocabulary = {"<|endoftext|>": 0}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges = chained([*(f"Ġ{word}" for word in WORDS), *WORDS, "ĊĊ"], vocabulary)
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, pad_token=end)


def build_llama_tokenizer(*, further_words: Sequence[str] = ()) -> Any:
    """BPE over characters and, failing them, bytes; a space and the begin token are put in front."""
    vocabulary = {piece: index for index, piece in enumerate(["<unk>", "<s>", "</s>"])}
    words = [*further_words, *(f"▁{word}" for word in WORDS), *WORDS]
    for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set("".join(words)) - {"▁"})]:
        vocabulary[piece] = len(vocabulary)
    merges = chained(words, vocabulary)
    tokenizer = Tokenizer(
        tokenizer_models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@cache
def llama_tokenizer() -> Any:
    return build_llama_tokenizer()


CAUSAL = pytest.mark.parametrize("tokenizer", [gpt2_tokenizer(), llama_tokenizer()], ids=["gpt2", "llama"])
SIDES = pytest.mark.parametrize("side", ["left", "right"])

# Words, line breaks, other scripts and spaces; no special tokens and nothing a tokenizer would normalise away.
text_parts = st.sampled_from([*WORDS, "Paris", "x", "é", "東京", "🙂", ".", "\n", "\n\n", " "])
texts = st.lists(text_parts, min_size=1, max_size=6).map(" ".join)
prompts_strategy = texts.filter(lambda text: bool(text.strip()))
targets_strategy = texts.filter(lambda text: bool(text.strip(" ")))
pairs = st.lists(st.tuples(prompts_strategy, targets_strategy), min_size=1, max_size=4)


def tokens(tokenizer: Any, ids: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def split(tokenizer: Any, prompt: str, target: str) -> tuple[list[int], list[int]]:
    (pair,) = PromptTokenizer(tokenizer).split([prompt], [target])
    return pair


def unpadded(batch: EncodedBatch, row: int) -> dict[str, Any]:
    """All that a row holds where it is not padding, positions counted from its first real token."""
    mask = batch.inputs["attention_mask"][row].bool()
    start = int(mask.nonzero()[0])
    found: dict[str, Any] = {
        "ids": batch.inputs["input_ids"][row][mask].tolist(),
        "query": int(batch.query[row]) - start,
        "target_ids": batch.target_ids[row],
    }
    if batch.labels is not None and batch.labels.dim() == 2 and batch.content is not None:
        labels, content = batch.labels[row], batch.content[row]
        if "decoder_input_ids" in batch.inputs:
            labelled = labels != IGNORED
            found["decoder_inputs"] = batch.inputs["decoder_input_ids"][row][labelled].tolist()
        else:
            labelled = mask
        found |= {"labels": labels[labelled].tolist(), "content": content[labelled].tolist()}
        assert bool((labels[~labelled] == IGNORED).all())
        assert not bool(content[~labelled].any())
    return found


# --- golden rows -----------------------------------------------------------------------------------------------------


@SIDES
def test_t5_reads_the_question_with_its_end_token_and_is_taught_the_answer_with_its_own(side: Any) -> None:
    tokenizer = t5_tokenizer()
    batch = encode_seq2seq(
        PromptTokenizer(tokenizer),
        ["the capital of France", "capital"],
        ["Paris", "Astana is"],
        side=side,
        decoder_start=START,
    )
    rows = batch.inputs["input_ids"]
    assert tokens(tokenizer, rows[0]) == ["▁the", "▁capital", "▁of", "▁France", "</s>"]
    padding = ["<pad>"] * 3
    short = ["▁capital", "</s>"]
    assert tokens(tokenizer, rows[1]) == ([*padding, *short] if side == "left" else [*short, *padding])
    assert batch.inputs["attention_mask"].tolist()[1] == ([0, 0, 0, 1, 1] if side == "left" else [1, 1, 0, 0, 0])
    assert batch.query.tolist() == ([4, 4] if side == "left" else [4, 1])
    assert batch.labels is not None
    assert batch.content is not None
    assert tokens(tokenizer, batch.labels[1]) == ["▁Astana", "▁is", "</s>"]
    assert tokens(tokenizer, batch.labels[0][:2]) == ["▁Paris", "</s>"]
    assert int(batch.labels[0][2]) == IGNORED
    assert tokens(tokenizer, batch.inputs["decoder_input_ids"][1]) == ["<pad>", "▁Astana", "▁is"]
    assert batch.content.tolist() == [[True, False, False], [True, True, False]]
    assert [tokens(tokenizer, ids) for ids in batch.target_ids] == [["▁Paris", "</s>"], ["▁Astana", "▁is", "</s>"]]


def test_t5_with_a_layer_in_the_decoder_is_queried_where_the_decoder_starts() -> None:
    batch = encode_seq2seq(
        PromptTokenizer(t5_tokenizer()), ["the capital", "is"], decoder_start=START, query_in_decoder=True
    )
    assert batch.query.tolist() == [0, 0]
    assert batch.inputs["decoder_input_ids"].tolist() == [[START], [START]]


@SIDES
def test_bert_reads_cls_to_sep_and_is_queried_at_sep(side: Any) -> None:
    tokenizer = bert_tokenizer()
    batch = encode_classification(PromptTokenizer(tokenizer), ["The capitals of FRANCE?", "Paris"], [3, 1], side=side)
    rows = batch.inputs["input_ids"]
    assert tokens(tokenizer, rows[0]) == ["[CLS]", "the", "capital", "##s", "of", "france", "?", "[SEP]"]
    short, padding = ["[CLS]", "paris", "[SEP]"], ["[PAD]"] * 5
    assert tokens(tokenizer, rows[1]) == ([*padding, *short] if side == "left" else [*short, *padding])
    assert [tokens(tokenizer, [row[q]]) for row, q in zip(rows, batch.query, strict=True)] == [["[SEP]"]] * 2
    assert batch.labels is not None
    assert batch.labels.tolist() == [3, 1]
    assert batch.target_ids == ((3,), (1,))


@SIDES
def test_gpt2_adds_nothing_in_front_and_the_logits_at_the_query_are_scored_on_the_answer(side: Any) -> None:
    tokenizer = gpt2_tokenizer()
    batch = encode_causal(
        PromptTokenizer(tokenizer), ["the capital of France is", "of"], ["Paris", "Astana is"], side=side
    )
    rows = batch.inputs["input_ids"]
    end = "<|endoftext|>"
    assert tokens(tokenizer, rows[0]) == ["the", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", end]
    short = ["of", "ĠAstana", "Ġis", end]
    assert tokens(tokenizer, rows[1]) == ([end] * 3 + short if side == "left" else short + [end] * 3)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [7, 4]
    assert batch.query.tolist() == [4, 3 if side == "left" else 0]
    assert batch.labels is not None
    assert batch.content is not None
    for row, (query, answer) in enumerate(zip(batch.query.tolist(), (["ĠParis"], ["ĠAstana", "Ġis"]), strict=True)):
        n = len(answer)
        assert tokens(tokenizer, batch.labels[row, query : query + n + 1]) == [*answer, end]
        assert int((batch.labels[row] != IGNORED).sum()) == n + 1
        assert batch.content[row].nonzero()[:, 0].tolist() == list(range(query, query + n))
    if side == "left":
        assert batch.inputs["position_ids"][1].tolist() == [0, 0, 0, 0, 1, 2, 3]


def test_llama_puts_its_begin_token_in_front_of_the_prompt_and_nothing_in_front_of_the_answer() -> None:
    tokenizer = llama_tokenizer()
    batch = encode_causal(PromptTokenizer(tokenizer), ["the capital of France is"], ["Paris"])
    row = ["<s>", "▁the", "▁capital", "▁of", "▁France", "▁is", "▁Paris", "</s>"]
    assert tokens(tokenizer, batch.inputs["input_ids"][0]) == row
    assert batch.query.tolist() == [5]
    assert batch.labels is not None
    assert batch.labels[0, :5].eq(IGNORED).all()
    assert tokens(tokenizer, batch.labels[0, 5:7]) == ["▁Paris", "</s>"]


def test_an_empty_prompt_is_asked_as_the_begin_token() -> None:
    for tokenizer, begin in ((gpt2_tokenizer(), "<|endoftext|>"), (llama_tokenizer(), "<s>")):
        batch = encode_causal(PromptTokenizer(tokenizer), [""])
        assert tokens(tokenizer, batch.inputs["input_ids"][0]) == [begin]
        assert batch.query.tolist() == [0]


# --- the seam of prompt and target -----------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize("prompt", ["the capital is", "the capital is ", "the capital is   "])
@pytest.mark.parametrize("target", ["Paris", " Paris", "  Paris"])
def test_spaces_at_the_seam_make_no_difference(tokenizer: Any, prompt: str, target: str) -> None:
    prompt_ids, target_ids = split(tokenizer, prompt, target)
    space = "Ġ" if tokenizer is gpt2_tokenizer() else "▁"
    assert tokens(tokenizer, prompt_ids)[-1] == f"{space}is"
    assert tokens(tokenizer, target_ids) == [f"{space}Paris"]


@CAUSAL
@pytest.mark.parametrize("prompt", ["capital is\n", "capital is\n "])
@pytest.mark.parametrize("target", ["Paris", " Paris"])
def test_after_a_line_break_an_answer_begins_without_a_space(tokenizer: Any, prompt: str, target: str) -> None:
    _, target_ids = split(tokenizer, prompt, target)
    assert tokens(tokenizer, target_ids) == ["Paris"]


@CAUSAL
@pytest.mark.parametrize("target", ["\nParis", " \nParis"])
def test_an_answer_that_begins_with_a_line_break_gets_no_space_before_it(tokenizer: Any, target: str) -> None:
    line_break = "Ċ" if tokenizer is gpt2_tokenizer() else "<0x0A>"
    assert tokens(tokenizer, split(tokenizer, "capital is", target)[1]) == [line_break, "Paris"]


@CAUSAL
def test_an_empty_answer_is_the_end_token_alone(tokenizer: Any) -> None:
    batch = encode_causal(PromptTokenizer(tokenizer), ["the capital is", "capital\n"], ["", "  "])
    assert batch.target_ids == ((tokenizer.eos_token_id,),) * 2
    assert batch.content is not None
    assert not batch.content.any()


def test_where_the_tokenizer_merges_across_the_seam_the_prompt_keeps_the_tokens_generation_starts_from() -> None:
    tokenizer = gpt2_tokenizer()
    assert tokens(tokenizer, tokenizer("is\n\n")["input_ids"]) == ["is", "ĊĊ"]
    assert tokens(tokenizer, tokenizer("is\n\nParis")["input_ids"]) == ["is", "Ċ", "Ċ", "Paris"]
    prompt_ids, target_ids = split(tokenizer, "is\n\n", "Paris")
    assert tokens(tokenizer, prompt_ids) == ["is", "ĊĊ"]
    assert tokens(tokenizer, target_ids) == ["Paris"]


def test_a_merged_seam_leaves_one_space_with_a_tokenizer_that_puts_spaces_in_front_itself() -> None:
    tokenizer = build_llama_tokenizer(further_words=["s▁P"])
    assert "s▁P" in tokens(tokenizer, tokenizer("x capitals Paris")["input_ids"])
    prompt_ids, target_ids = split(tokenizer, "x capitals", "Paris")
    assert tokens(tokenizer, prompt_ids)[-1] == "s"
    assert tokens(tokenizer, target_ids) == ["▁Paris"]


@CAUSAL
@given(prompt=prompts_strategy, target=targets_strategy)
def test_the_tokens_spell_the_prompt_and_the_target_with_at_most_one_space_between(
    tokenizer: Any, prompt: str, target: str
) -> None:
    prompt_ids, target_ids = split(tokenizer, prompt, target)
    stem, answer = prompt.rstrip(" "), target.lstrip(" ")
    spaceless = ("\n", "東", "京")
    seam = "" if stem.endswith(spaceless) or answer.startswith(spaceless) else " "
    spelt = tokenizer.decode([*prompt_ids, *target_ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert spelt == stem + seam + answer


@CAUSAL
@SIDES
@given(pairs=pairs)
def test_training_and_answering_read_the_same_prompt_and_query_the_same_token(
    tokenizer: Any, side: Any, pairs: list[tuple[str, str]]
) -> None:
    prompts, targets = zip(*pairs, strict=True)
    trained = encode_causal(PromptTokenizer(tokenizer), prompts, targets, side=side)
    asked = encode_causal(PromptTokenizer(tokenizer), prompts, side=side)
    for row in range(len(pairs)):
        read = asked.inputs["input_ids"][row][asked.inputs["attention_mask"][row].bool()].tolist()
        whole = trained.inputs["input_ids"][row][trained.inputs["attention_mask"][row].bool()].tolist()
        assert whole[: len(read)] == read
        assert unpadded_query(asked, row) == unpadded_query(trained, row) == len(read) - 1


def unpadded_query(batch: EncodedBatch, row: int) -> int:
    return int(batch.query[row]) - int(batch.inputs["attention_mask"][row].argmax())


# --- shifts, masks, end token ----------------------------------------------------------------------------------------


@CAUSAL
@SIDES
@given(pairs=pairs)
def test_causal_labels_are_the_next_token_from_the_query_to_one_end_token(
    tokenizer: Any, side: Any, pairs: list[tuple[str, str]]
) -> None:
    prompts, targets = zip(*pairs, strict=True)
    batch = encode_causal(PromptTokenizer(tokenizer), prompts, targets, side=side)
    assert batch.labels is not None
    assert batch.content is not None
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    for row in range(len(pairs)):
        where = (batch.labels[row] != IGNORED).nonzero()[:, 0].tolist()
        assert where == list(range(int(batch.query[row]), where[-1] + 1))
        assert batch.labels[row, where].tolist() == ids[row, [t + 1 for t in where]].tolist()
        assert mask[row, [t + 1 for t in where]].all()
        assert tuple(batch.labels[row, where].tolist()) == batch.target_ids[row]
        assert batch.target_ids[row].count(tokenizer.eos_token_id) == 1
        assert batch.target_ids[row][-1] == tokenizer.eos_token_id
        assert batch.content[row].nonzero()[:, 0].tolist() == where[:-1]


@given(targets=st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), min_size=1, max_size=4))
def test_seq2seq_labels_end_with_one_end_token_that_is_not_content(targets: list[str]) -> None:
    tokenizer = t5_tokenizer()
    batch = encode_seq2seq(PromptTokenizer(tokenizer), ["capital"] * len(targets), targets, decoder_start=START)
    assert batch.labels is not None
    assert batch.content is not None
    for row, target in enumerate(targets):
        labels = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        assert labels == tokenizer(target)["input_ids"]
        assert labels.count(tokenizer.eos_token_id) == 1
        given_tokens = batch.inputs["decoder_input_ids"][row].tolist()
        assert given_tokens[: len(labels)] == [START, *labels[:-1]]
        assert int(batch.content[row].sum()) == len(labels) - 1


@CAUSAL
def test_language_modelling_scores_no_end_token(tokenizer: Any) -> None:
    batch = encode_causal(PromptTokenizer(tokenizer), ["capital"], ["of France"], end_token=False)
    assert tokenizer.eos_token_id not in batch.target_ids[0]
    assert batch.labels is not None
    assert batch.content is not None
    assert torch.equal(batch.content, batch.labels != IGNORED)


# --- a row alone and in a batch --------------------------------------------------------------------------------------


@CAUSAL
@SIDES
@given(pairs=pairs, prefix_length=st.sampled_from([None, 1, 3]), max_length=st.sampled_from([None, 6]))
def test_a_causal_row_is_the_same_alone_and_in_a_batch(
    tokenizer: Any, side: Any, pairs: list[tuple[str, str]], prefix_length: int | None, max_length: int | None
) -> None:
    prompts, targets = ["", *(p for p, _ in pairs)], ["the capital of France", *(t for _, t in pairs)]

    def encode(prompts: Sequence[str], targets: Sequence[str]) -> EncodedBatch:
        return encode_causal(
            PromptTokenizer(tokenizer), prompts, targets, side=side, prefix_length=prefix_length, max_length=max_length
        )

    together = encode(prompts, targets)
    for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
        assert unpadded(together, row) == unpadded(encode([prompt], [target]), 0)
        assert unpadded(together.row(row), 0) == unpadded(together, row)


@SIDES
@given(questions=st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), min_size=2, max_size=4))
def test_a_seq2seq_and_a_classification_row_are_the_same_alone_and_in_a_batch(side: Any, questions: list[str]) -> None:
    def seq2seq(prompts: Sequence[str]) -> EncodedBatch:
        return encode_seq2seq(PromptTokenizer(t5_tokenizer()), prompts, prompts, side=side, decoder_start=START)

    def classification(prompts: Sequence[str]) -> EncodedBatch:
        return encode_classification(PromptTokenizer(bert_tokenizer()), prompts, [0] * len(prompts), side=side)

    encoders: list[Callable[[Sequence[str]], EncodedBatch]] = [seq2seq, classification]
    for encode in encoders:
        together = encode(questions)
        for row, question in enumerate(questions):
            assert unpadded(together, row) == unpadded(encode([question]), 0)


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_a_causal_prompt_that_is_too_long_loses_its_beginning_and_its_answer_stays() -> None:
    tokenizer = gpt2_tokenizer()
    batch = encode_causal(PromptTokenizer(tokenizer), ["the capital of France is"], ["Paris"], max_length=4)
    assert tokens(tokenizer, batch.inputs["input_ids"][0]) == ["ĠFrance", "Ġis", "ĠParis", "<|endoftext|>"]
    assert batch.query.tolist() == [1]
    asked = encode_causal(PromptTokenizer(tokenizer), ["the capital of France is"], max_length=2)
    assert tokens(tokenizer, asked.inputs["input_ids"][0]) == ["ĠFrance", "Ġis"]


@CAUSAL
@given(prompt=prompts_strategy, target=targets_strategy, max_length=st.integers(3, 8))
def test_no_causal_sequence_is_longer_than_its_limit_and_every_answer_ends(
    tokenizer: Any, prompt: str, target: str, max_length: int
) -> None:
    batch = encode_causal(PromptTokenizer(tokenizer), [prompt], [target], max_length=max_length)
    assert batch.inputs["input_ids"].shape[1] <= max_length
    assert batch.target_ids[0][-1] == tokenizer.eos_token_id
    assert 0 <= int(batch.query[0]) < max_length - 1
    uncut = encode_causal(PromptTokenizer(tokenizer), [prompt], [target]).target_ids[0]
    assert batch.target_ids[0][:-1] == uncut[:-1][: max_length - 2]


def test_encoder_inputs_that_are_too_long_keep_their_special_tokens() -> None:
    question = encode_seq2seq(
        PromptTokenizer(t5_tokenizer()), ["the capital of France"], max_length=3, decoder_start=START
    )
    assert tokens(t5_tokenizer(), question.inputs["input_ids"][0]) == ["▁the", "▁capital", "</s>"]
    text = encode_classification(PromptTokenizer(bert_tokenizer()), ["the capital of France"], max_length=4)
    assert tokens(bert_tokenizer(), text.inputs["input_ids"][0]) == ["[CLS]", "the", "capital", "[SEP]"]


def test_seq2seq_answers_that_are_too_long_are_cut_before_their_end_token() -> None:
    tokenizer = t5_tokenizer()
    for limit, expected in ((3, ["▁the", "▁capital", "</s>"]), (1, ["</s>"])):
        batch = encode_seq2seq(
            PromptTokenizer(tokenizer), ["is"], ["the capital of France"], max_target_length=limit, decoder_start=START
        )
        assert tokens(tokenizer, batch.target_ids[0]) == expected


# --- running text ----------------------------------------------------------------------------------------------------


@SIDES
def test_running_text_is_queried_at_the_end_of_its_prefix_and_scored_after_it(side: Any) -> None:
    tokenizer = gpt2_tokenizer()
    batch = encode_causal(
        PromptTokenizer(tokenizer),
        ["", ""],
        ["the capital of France is Paris", "capital of France"],
        side=side,
        prefix_length=2,
    )
    starts = [0, 3 if side == "left" else 0]
    assert batch.query.tolist() == [start + 1 for start in starts]
    assert [tokens(tokenizer, ids) for ids in batch.target_ids] == [
        ["Ġof", "ĠFrance", "Ġis", "ĠParis"],
        ["ĠFrance"],
    ]


def test_running_text_shorter_than_its_prefix_is_scored_on_its_last_token() -> None:
    tokenizer = gpt2_tokenizer()
    batch = encode_causal(PromptTokenizer(tokenizer), ["", ""], ["the capital of", "the"], prefix_length=8)
    assert [tokens(tokenizer, ids) for ids in batch.target_ids] == [["Ġof"], []]
    assert batch.query.tolist() == [1, 0]


def test_running_text_queried_at_its_last_token_is_scored_after_its_first() -> None:
    tokenizer = gpt2_tokenizer()
    batch = encode_causal(
        PromptTokenizer(tokenizer), ["", ""], ["the capital of France", "the capital"], prefix_length=None
    )
    assert batch.query.tolist() == [3, 1]
    assert [tokens(tokenizer, ids) for ids in batch.target_ids] == [["Ġcapital", "Ġof", "ĠFrance"], ["Ġcapital"]]


def test_running_text_that_is_too_long_loses_its_end() -> None:
    tokenizer = gpt2_tokenizer()
    batch = encode_causal(PromptTokenizer(tokenizer), [""], ["the capital of France"], prefix_length=1, max_length=3)
    assert tokens(tokenizer, batch.inputs["input_ids"][0]) == ["the", "Ġcapital", "Ġof"]


# --- against Hugging Face's own losses -------------------------------------------------------------------------------


@cache
def gpt2_model(task: TaskName) -> EditableModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(gpt2_tokenizer()), n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return EditableModel(
        GPT2LMHeadModel(config), layer="transformer.h.0.mlp.c_fc", task=task, tokenizer=gpt2_tokenizer()
    )


@cache
def t5_model() -> EditableModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=START,
    )
    layer = "encoder.block.0.layer.1.DenseReluDense.wo"
    return EditableModel(T5ForConditionalGeneration(config), layer=layer, task="qa", tokenizer=t5_tokenizer())


PROMPTS = ["the capital of France is", "Q: the capital\nA:", "capital"]
TARGETS = ["Paris", "Astana of Kazakhstan", "the\nParis"]


@SIDES
@torch.no_grad()
def test_the_loss_of_a_completion_is_hugging_faces(side: Any) -> None:
    model = gpt2_model("completion")
    batch = model.encode_batch(PROMPTS, TARGETS, side=side)
    ours = model.task.loss(model.logits(batch), batch)
    tokenizer = gpt2_tokenizer()
    total, count = 0.0, 0
    for prompt, target in zip(PROMPTS, TARGETS, strict=True):
        encoded = tokenizer(f"{prompt} {target}{tokenizer.eos_token}", return_offsets_mapping=True)
        ids = torch.tensor([encoded["input_ids"]])
        in_prompt = torch.tensor([[end <= len(prompt) for _, end in encoded["offset_mapping"]]])
        output = model.module(input_ids=ids, labels=ids.masked_fill(in_prompt, -100))
        n = int((~in_prompt).sum())
        total, count = total + float(output.loss) * n, count + n
    assert float(ours) == pytest.approx(total / count, abs=1e-6)


@SIDES
@torch.no_grad()
def test_the_loss_of_running_text_is_hugging_faces(side: Any) -> None:
    model = gpt2_model("language_modelling")
    passages = ["the capital of France is Paris and of Kazakhstan is Astana", "Q: is Paris the capital of France A: is"]
    batch = model.encode_batch(["", ""], passages, side=side)
    ours = model.task.loss(model.logits(batch), batch)
    total, count = 0.0, 0
    for passage in passages:
        ids = gpt2_tokenizer()(passage, return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : model.task.prefix_length] = -100
        n = ids.shape[1] - model.task.prefix_length
        total, count = total + float(model.module(input_ids=ids, labels=labels).loss) * n, count + n
    assert float(ours) == pytest.approx(total / count, abs=1e-6)


@torch.no_grad()
def test_the_loss_of_an_answer_is_hugging_faces() -> None:
    model, tokenizer = t5_model(), t5_tokenizer()
    questions, answers = ["the capital of France", "Q: is"], ["Paris", "the capital of Kazakhstan"]
    batch = model.encode_batch(questions, answers)
    ours = model.task.loss(model.logits(batch), batch)
    inputs = tokenizer(questions, padding=True, return_tensors="pt")
    targets = tokenizer(answers, padding=True, return_tensors="pt")
    labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, -100)
    output = model.module(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
    assert float(ours) == pytest.approx(float(output.loss), abs=1e-6)
    assert torch.equal(model.logits(batch).argmax(dim=-1), output.logits.argmax(dim=-1))


@torch.no_grad()
def test_the_loss_of_a_label_is_hugging_faces() -> None:
    torch.manual_seed(0)
    tokenizer = bert_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config.num_labels = 5
    module = BertForSequenceClassification(config)
    layer = "bert.encoder.layer.0.output.dense"
    model = EditableModel(module, layer=layer, task="classification", tokenizer=tokenizer)
    prompts, labels = ["the capital of France", "Paris"], [4, 2]
    batch = model.encode_batch(prompts, labels)
    ours = model.task.loss(model.logits(batch), batch)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    output = module(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=torch.tensor(labels))
    assert float(ours) == pytest.approx(float(output.loss), abs=1e-6)


@torch.no_grad()
@settings(max_examples=25)
@given(pairs=pairs)
def test_padding_on_either_side_gives_the_same_losses_and_the_same_queries(pairs: list[tuple[str, str]]) -> None:
    model = gpt2_model("completion")
    prompts, targets = zip(*[*pairs, (PROMPTS[0], TARGETS[1])], strict=True)
    losses, queries = [], []
    for side in ("left", "right"):
        batch = model.encode_batch(prompts, targets, side=side)
        losses.append(float(model.task.loss(model.logits(batch), batch)))
        queries.append(model.layer_call(batch).query)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert torch.allclose(queries[0], queries[1], atol=1e-5)


@torch.no_grad()
def test_a_query_is_the_same_whether_its_row_stands_alone_or_is_padded() -> None:
    for model, targets in ((gpt2_model("completion"), TARGETS), (t5_model(), TARGETS)):
        together = model.layer_call(model.encode_batch(PROMPTS, targets)).query
        for row, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
            alone = model.layer_call(model.encode_batch([prompt], [target])).query
            assert torch.allclose(alone[0], together[row], atol=1e-5)


# --- the subject ----------------------------------------------------------------------------------------------------


@CAUSAL
@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("the capital of France is", "France"),
        ("France is", "France"),
        ("the capital of France", "the capital of"),
        ("France of France is the capital of", "France"),
        ("the capital of Kazakhstanis", "Kazakhstan"),
    ],
)
def test_the_span_of_a_subject_is_that_of_its_last_occurrence(tokenizer: Any, prompt: str, subject: str) -> None:
    batch = encode_causal(PromptTokenizer(tokenizer), [prompt])
    ids = batch.inputs["input_ids"][0].tolist()
    first, last = PromptTokenizer(tokenizer).subject_span(prompt, subject)
    start = prompt.rindex(subject)
    end = start + len(subject)
    decoded = [tokenizer.decode(ids[:n], skip_special_tokens=True).strip() for n in range(len(ids) + 1)]
    # Before its first token there is none of the subject; after its last one there is all of it, and not earlier.
    assert decoded[first] == prompt[:start].strip()
    assert decoded[first + 1] != prompt[:start].strip()
    assert decoded[last + 1] == prompt[:end].strip()
    assert decoded[last] != prompt[:end].strip()


@pytest.mark.parametrize(("tokenizer", "place"), [(gpt2_tokenizer(), 2), (llama_tokenizer(), 3)], ids=["gpt2", "llama"])
def test_the_begin_token_counts_in_the_span_of_a_subject(tokenizer: Any, place: int) -> None:
    assert PromptTokenizer(tokenizer).subject_span("the capital of Paris", "of") == (place, place)
    assert PromptTokenizer(tokenizer).subject_span("the capital of Paris", "the capital of") == (place - 2, place)


@CAUSAL
def test_a_subject_that_is_not_in_the_prompt_has_no_span(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="substring not found"):
        PromptTokenizer(tokenizer).subject_span("the capital of France is", "Astana")


def test_rows_aligned_at_their_query_give_the_logits_that_they_gave_before(make_causal: Callable[..., Any]) -> None:
    model = make_causal("llama")
    batch = model.encode_batch(["the capital", "one two three four five", "in the end of it"], ["of", "six", "all"])
    batch = replace(batch, query=torch.tensor([1, 3, 0]))
    aligned = batch.aligned_at_query()
    assert aligned.query.tolist() == [3, 3, 3]
    with torch.no_grad():
        before, after = model.logits(batch), model.logits(aligned)
    for row, query in enumerate([1, 3, 0]):
        n_tokens = int(batch.inputs["attention_mask"][row].sum())
        start = 3 - query
        assert torch.allclose(after[row, start : start + n_tokens], before[row, :n_tokens], atol=1e-5)
        wanted = batch.labels[row, :n_tokens].tolist()
        assert aligned.labels[row, start : start + n_tokens].tolist() == wanted
        assert int((aligned.labels[row] != IGNORED).sum()) == sum(label != IGNORED for label in wanted)


def test_a_batch_at_its_labels_has_each_rows_own_and_their_positions() -> None:
    nothing = IGNORED
    labels = torch.tensor([[nothing, 5, 6, nothing], [7, nothing, nothing, 8], [nothing, nothing, 9, nothing]])
    batch = EncodedBatch(
        inputs={"input_ids": torch.ones(3, 4, dtype=torch.long)},
        query=torch.zeros(3, dtype=torch.long),
        labels=labels,
        content=torch.isin(labels, torch.tensor([5, 7, 8])),
    )
    scored, positions = batch.at_labels()
    assert positions.tolist() == [[1, 2], [0, 3], [2, 2]]
    assert scored.labels is not None
    assert scored.content is not None
    assert scored.labels.tolist() == [[5, 6], [7, 8], [9, nothing]]
    assert scored.content.tolist() == [[True, False], [True, True], [False, False]]
