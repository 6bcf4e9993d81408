"""What a tokenizer is asked for: special tokens as text, chats, the space before a target, the end of an answer."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grace_bench.errors import UserError
from grace_bench.models.encoding import encode_causal
from grace_bench.models.tokens import PromptTokenizer, TextFormat

TURNS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}\n{{ m.content | trim }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}"
)
WORDS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + WORDS


def bytes_of(*, template: str | None = None, adds_begin: bool = True, end: bool = True) -> Any:
    """Byte-level tokens, each a character of ASCII, with names of special tokens."""
    names = ["<|begin|>", "<|end|>", "<|turn|>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {name: index for index, name in enumerate(names)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    ends: dict[str, Any] = {"eos_token": "<|end|>"} if end else {}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", pad_token="<|turn|>", **ends)
    made.add_special_tokens({"additional_special_tokens": names[2:] if end else names[1:]})
    made.chat_template = template
    return made


def pieces_of() -> Any:
    """As T5's: `</s>` is a piece of its vocabulary, and ends every text."""
    vocabulary = [(piece, -1.0) for piece in ("<pad>", "</s>", "<unk>", "▁", "▁a", "b", "s", "/", "S", "o", "P")]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def words_of(*, closes: bool = True) -> Any:
    """As BERT's: it has no end token."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "well", "is", "dry"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special: dict[str, Any] = {"sep_token": "[SEP]"} if closes else {}
    if closes:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", **special)


def read(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


# Names of special tokens.


@pytest.mark.parametrize("text", ["a turn ends with <|end|>", "<|end|> alone", "<|user|> <|begin|><|end|>"])
def test_the_names_of_special_tokens_are_text_in_prompts_and_targets(text: str) -> None:
    tokenizer = bytes_of()
    tokens = PromptTokenizer(tokenizer)
    prompt, target = tokens.split([text], [text])[0]
    assert prompt[0] == tokenizer.bos_token_id
    assert tokens.special_ids.isdisjoint((*prompt[1:], *target))
    assert read(tokenizer, prompt[1:]) == text
    assert tokens.answer(tokens.with_end(target))[0] == text
    assert tokens.count(text) == len(prompt)


def test_the_names_of_special_tokens_stand_for_the_tokens_if_asked() -> None:
    tokens = PromptTokenizer(bytes_of(), TextFormat(special_tokens="parse"))
    ((prompt, target),) = tokens.split(["<|user|>x<|end|>"], ["<|end|>"])
    assert (prompt[:2], prompt[-1]) == ([0, 3], 1), "an end that the text spells is not cut off"
    assert target[-1] == 1


def test_an_end_token_that_a_text_spells_is_no_end_where_the_vocabulary_holds_it_as_a_piece() -> None:
    tokenizer = pieces_of()
    tokens = PromptTokenizer(tokenizer)
    assert tokenizer("a </s>", split_special_tokens=True)["input_ids"] == [4, 3, 1, 1]
    for ids in (*tokens.prompt_ids(["a </s>"]), *tokens.text_ids(["a </s>"]), *tokens.answer_ids(["a </s>"])):
        assert 1 not in ids
        assert tokenizer.convert_ids_to_tokens(ids)[2:] == ["<unk>", "/", "s", "<unk>"]
    (closed,) = tokens.closed_ids(["a </s>"])
    assert (closed[-1], closed.count(1)) == (1, 1), "the one that the tokenizer adds"


@pytest.mark.parametrize("format", [TextFormat(), TextFormat(special_tokens="parse")])
@pytest.mark.parametrize("adds_begin", [True, False])
def test_a_prompt_that_begins_with_the_begin_token_is_not_given_another(format: TextFormat, adds_begin: bool) -> None:
    tokenizer = bytes_of(adds_begin=adds_begin)
    tokens = PromptTokenizer(tokenizer, format)
    (ids,) = tokens.prompt_ids(["<|begin|>user: is it dry?\nassistant:"])
    assert (ids[0], ids.count(0)) == (0, 1)
    assert read(tokenizer, ids[1:]) == "user: is it dry?\nassistant:"
    assert tokens.split(["<|begin|>user:"], ["x"])[0][0] == tokens.prompt_ids(["<|begin|>user:"])[0]


# The space before a target.


@pytest.mark.parametrize(
    ("prompt", "target", "auto", "always", "never"),
    [
        ("The well is", "dry", " dry", " dry", "dry"),
        ("The well is ", "dry", " dry", " dry", "dry"),
        ("The well is", " dry", " dry", " dry", " dry"),
        ("The well:\n", "dry", "dry", " dry", "dry"),
        ("The well:\t", "dry", "dry", " dry", "dry"),
        ("The well:", "\ndry", "\ndry", " \ndry", "\ndry"),
        ("法国的首都是", "巴黎", "巴黎", " 巴黎", "巴黎"),
        ("首都：", "Paris", "Paris", " Paris", "Paris"),
        ("It is called", "東京", "東京", " 東京", "東京"),
        ("เมืองหลวงคือ", "ปารีส", "ปารีส", " ปารีส", "ปารีส"),
        ("수도는", "파리", " 파리", " 파리", "파리"),
        ("Столица —", "Париж", " Париж", " Париж", "Париж"),
    ],
)
def test_the_space_before_a_target(prompt: str, target: str, auto: str, always: str, never: str) -> None:
    tokenizer = bytes_of(adds_begin=False)
    for space, expected in (("auto", auto), ("always", always), ("never", never)):
        tokens = PromptTokenizer(tokenizer, TextFormat(target_space=space))  # type: ignore[arg-type]
        ((prompt_ids, target_ids),) = tokens.split([prompt], [target])
        assert read(tokenizer, target_ids) == expected, space
        assert read(tokenizer, prompt_ids) == (prompt if space == "never" else prompt.rstrip(" "))
        assert tokens.prompt_ids([prompt]) == [prompt_ids], "a free answer starts where the target does"


# Chats.


@pytest.mark.parametrize("system", [None, "You are brief."])
@pytest.mark.parametrize("template", [TURNS, WORDS])
@pytest.mark.parametrize("adds_begin", [True, False])
def test_a_chat_is_what_the_tokenizers_template_makes_of_it(
    template: str, system: str | None, adds_begin: bool
) -> None:
    tokenizer = bytes_of(template=template, adds_begin=adds_begin)
    tokens = PromptTokenizer(tokenizer, TextFormat(chat=True, system=system))
    messages = [{"role": "user", "content": "The well is"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokens.prompt_ids(["The well is"]) == [expected]
    assert tokens.closed_ids(["The well is"]) == [expected]
    assert tokens.count_prompt("The well is") == len(expected)
    assert tokens.text_ids(["The well is"]) == PromptTokenizer(tokenizer).text_ids(["The well is"])


@pytest.mark.parametrize(("template", "answer", "end"), [(TURNS, "dry", "<|turn|>"), (WORDS, " dry", "<|end|>")])
def test_an_answer_follows_and_ends_as_the_template_writes_it(template: str, answer: str, end: str) -> None:
    tokenizer = bytes_of(template=template)
    tokens = PromptTokenizer(tokenizer, TextFormat(chat=True))
    ((prompt, target),) = tokens.split(["The well is"], ["dry"])
    assert read(tokenizer, target) == answer
    assert tokens.end_id == tokenizer.convert_tokens_to_ids(end)
    assert {tokens.end_id, tokenizer.eos_token_id} <= set(tokens.stop_ids)
    messages = [{"role": "user", "content": "The well is"}, {"role": "assistant", "content": "dry"}]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(prompt) + len(target) + 1] == [*prompt, *tokens.with_end(target)]


@pytest.mark.parametrize("template", [TURNS, WORDS])
def test_names_of_special_tokens_in_a_users_text_are_text_and_the_templates_own_are_not(template: str) -> None:
    tokenizer = bytes_of(template=template)
    tokens = PromptTokenizer(tokenizer, TextFormat(chat=True))
    (plain,) = tokens.prompt_ids(["ends with x."])
    (named,) = tokens.prompt_ids(["ends with <|end|>."])
    special = [[token for token in ids if token in tokens.special_ids] for ids in (plain, named)]
    assert special[0] == special[1]
    assert read(tokenizer, named) == read(tokenizer, plain).replace("x.", "<|end|>.")


@pytest.mark.parametrize("system", [None, "The well knows the well."])
@pytest.mark.parametrize("template", [TURNS, WORDS])
def test_the_subject_of_a_chat_is_found_in_the_users_text(template: str, system: str | None) -> None:
    tokenizer = bytes_of(template=template)
    tokens = PromptTokenizer(tokenizer, TextFormat(chat=True, system=system))
    prompt = " Is the well beside the well dry? "
    (ids,) = tokens.prompt_ids([prompt])
    first, last = tokens.subject_span(prompt, "well")
    assert read(tokenizer, ids[: last + 1]).endswith("Is the well beside the well")
    assert read(tokenizer, ids[:first]).endswith("Is the well beside the")
    assert read(tokenizer, ids[first : last + 1]).strip() == "well"
    with pytest.raises(ValueError, match="substring not found"):
        tokens.subject_span(prompt, "assistant")


def test_a_long_prompt_of_a_chat_is_cut_at_its_start_and_the_template_is_kept() -> None:
    tokenizer = bytes_of(template=TURNS)
    tokens = PromptTokenizer(tokenizer, TextFormat(chat=True))
    (whole,) = tokens.prompt_ids(["0123456789"])
    batch = encode_causal(tokens, ["0123456789"], ["dry"], max_length=len(whole), max_prompt_length=len(whole) - 4)
    ids = batch.inputs["input_ids"][0].tolist()
    assert read(tokenizer, ids).startswith("<|user|>\n456789<|turn|>\n<|assistant|>\n")
    with pytest.raises(UserError, match="chat template takes 6 tokens"):
        tokens.prompt_ids(["0123456789"], max_length=4)


@pytest.mark.parametrize(
    ("template", "system", "says"),
    [
        (None, None, "chat=true needs a tokenizer with a chat template"),
        (REFUSES_SYSTEM, "Hi.", "chat.system=Hi.: the tokenizer's chat template fails \\(no system role\\)"),
        (WORDS.replace("messages", "messages[-1:]"), "Hi.", "chat.system: .* leaves a system message out"),
        ("{{ messages | nothing }}", None, "chat=true: the tokenizer's chat template fails"),
    ],
)
def test_a_chat_that_the_tokenizer_cannot_have_is_refused(template: str | None, system: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        PromptTokenizer(bytes_of(template=template), TextFormat(chat=True, system=system))


def test_a_template_that_writes_the_date_gives_the_same_tokens_every_day() -> None:
    tokenizer = bytes_of(template="{{ strftime_now('%Y-%m-%d') }}" + WORDS)
    (ids,) = PromptTokenizer(tokenizer, TextFormat(chat=True)).prompt_ids(["x"])
    assert read(tokenizer, ids).startswith("2025-01-01")


def test_a_system_message_needs_a_chat() -> None:
    with pytest.raises(UserError, match=r"chat\.system=Hi\. needs chat=true"):
        TextFormat(system="Hi.")


# The end of an answer.


def test_a_tokenizer_without_an_end_token_ends_answers_as_it_ends_texts() -> None:
    tokenizer = words_of()
    tokens = PromptTokenizer(tokenizer)
    batch = encode_causal(tokens, ["The well is"], ["dry"])
    assert tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0].tolist()) == [
        *("[CLS]", "the", "well", "is", "dry", "[SEP]")
    ]
    assert int(batch.query[0]) == 3
    assert tokens.stop_ids == [3]


def test_a_tokenizer_with_no_token_for_an_end_ends_answers_with_a_line_break_or_not_at_all() -> None:
    tokenizer = bytes_of(end=False)
    tokens = PromptTokenizer(tokenizer)
    assert read(tokenizer, tokens.with_end([])) == "\n"
    tokens = PromptTokenizer(words_of(closes=False))
    assert (tokens.end_id, tokens.with_end([7]), tokens.stop_ids) == (None, [7], [])


@pytest.mark.parametrize("max_length", [1, 2, 3, 7])
def test_complete_inputs_are_cut_as_the_tokenizer_cuts_them(max_length: int) -> None:
    for tokenizer in (words_of(), pieces_of(), bytes_of()):
        for side in ("right", "left"):
            tokenizer.truncation_side = side
            if max_length < len(tokenizer("")["input_ids"]):
                continue
            expected = tokenizer("a the well is dry", truncation=True, max_length=max_length)["input_ids"]
            assert PromptTokenizer(tokenizer).closed_ids(["a the well is dry"], max_length=max_length) == [expected]


@pytest.mark.parametrize(
    ("generated", "by_line", "by_sentence"),
    [
        ("Paris. It is", "Paris. It is", "Paris"),
        ("Paris", "Paris", "Paris"),
        ("one\ntwo. three", "one", "one"),
        (" a. b\nc", "a. b", "a"),
        # As the papers have it: the point of a number or of an abbreviation is a full stop too.
        ("3.5 m", "3.5 m", "3"),
    ],
)
def test_a_free_answer_ends_at_a_line_break_or_at_the_first_full_stop(
    generated: str, by_line: str, by_sentence: str
) -> None:
    tokenizer = bytes_of()
    ids = tokenizer(generated, add_special_tokens=False)["input_ids"]
    for stop, expected in (("newline", by_line), ("sentence", by_sentence)):
        tokens = PromptTokenizer(tokenizer, TextFormat(stop=stop))  # type: ignore[arg-type]
        text, kept = tokens.answer(ids)
        assert text == expected
        assert read(tokenizer, kept).strip().startswith(expected)
        stops = {read(tokenizer, [token]) for token in tokens.stop_ids}
        assert "\n" in stops
        assert ("." in stops) == (stop == "sentence")


def test_a_full_stop_within_a_target_ends_its_free_answer_early_and_one_at_its_end_does_not() -> None:
    tokenizer = bytes_of()
    inside = {
        text: PromptTokenizer(tokenizer, TextFormat(stop="sentence")).has_full_stop_inside(
            tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        for text in ("Paris.", "Paris", "U.S.", "St. Kitts")
    }
    assert inside == {"Paris.": False, "Paris": False, "U.S.": True, "St. Kitts": True}
    ids = tokenizer("U.S.", add_special_tokens=False)["input_ids"]
    assert not PromptTokenizer(tokenizer).has_full_stop_inside(ids)


def test_another_place_to_stop_is_refused() -> None:
    with pytest.raises(UserError, match=r"protocol\.stop"):
        TextFormat(stop="paragraph")  # type: ignore[arg-type]
