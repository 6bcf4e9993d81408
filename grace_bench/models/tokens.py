"""The one place that knows a tokenizer's quirks.

These are the tokens that it adds around a text, the names of its special tokens, the space before a target, its chat
template, and how an answer ends and becomes text again.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Literal

from jinja2.exceptions import TemplateError

from grace_bench.common.options import check_choice, check_flag
from grace_bench.common.scores import STOPS, Stop
from grace_bench.errors import UserError

TargetSpace = Literal["auto", "always", "never"]
SpecialTokens = Literal["text", "parse"]
TARGET_SPACES: tuple[TargetSpace, ...] = ("auto", "always", "never")
SPECIAL_TOKENS: tuple[SpecialTokens, ...] = ("text", "parse")

# Scripts written without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, kana, Bopomofo and Han, with their
# punctuation and the full-width forms. Korean is written with spaces.
_SPACELESS = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
    "\u2e80-\u312f\u31a0-\u31ff\u3220-\u4dbf\u4e00-\u9fff\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
_FULL_STOP = "."
_PLACEHOLDER = "grace-bench-message"
# Templates may write the date; then the tokens of a prompt would depend on the day of the run. A macro hides the
# function that transformers gives them, which arguments cannot replace.
_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2025') | replace('%m', '01') | replace('%d', '01') "
    "| replace('%b', 'Jan') | replace('%B', 'January') | replace('%a', 'Wed') | replace('%A', 'Wednesday') "
    "| replace('%H', '00') | replace('%M', '00') | replace('%S', '00') }}{%- endmacro %}"
)


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """How prompts and targets are written as tokens, and where free answers end.

    Attributes:
        chat: Whether prompts go through the tokenizer's chat template, as a user's message.
        system: The system message before it; None for none.
        target_space: Whether a space is put between a prompt and its target. `auto` puts one except after white space,
            before white space, and beside a character of a script that is written without spaces.
        special_tokens: `text` if the names of special tokens in prompts and targets are ordinary text, `parse` if they
            stand for the tokens.
        stop: Where free answers end besides the end token: at a `newline`, or at the first full stop of a `sentence`
            too.

    Raises:
        UserError: If a field is not one of its choices, or there is a system message without a chat.
    """

    chat: bool = False
    system: str | None = None
    target_space: TargetSpace = "auto"
    special_tokens: SpecialTokens = "text"
    stop: Stop = "newline"

    def __post_init__(self) -> None:
        check_choice("protocol.stop", self.stop, STOPS)
        check_flag("chat", self.chat)
        check_choice("target_space", self.target_space, TARGET_SPACES)
        check_choice("protocol.special_tokens", self.special_tokens, SPECIAL_TOKENS)
        if self.system is not None and not self.chat:
            raise UserError(f"chat.system={self.system} needs chat=true")

    def changed(self) -> dict[str, Any]:
        """Returns the fields that do not have their default."""
        return {
            declared.name: value
            for declared in fields(self)
            if (value := getattr(self, declared.name)) != declared.default
        }


@dataclass(frozen=True)
class _Part:
    """A part of what is read as one text. In an `own` part, names of special tokens stand for the tokens."""

    text: str
    own: bool = False


@dataclass(frozen=True)
class _Written:
    """A prompt as it is written out: its parts, and which one is the user's text.

    Attributes:
        parts: The parts, in order.
        user: The index of the user's text among them; None if the chat template changed that text.
        is_rendered: Whether the text brings its own begin token, so that the tokenizer adds none.
    """

    parts: tuple[_Part, ...]
    user: int | None
    is_rendered: bool

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    def followed_by(self, text: str) -> "_Written":
        return _Written((*self.parts, _Part(text)), self.user, self.is_rendered)

    def until(self, index: int, end: int) -> "_Written":
        """Returns the text up to character `end` of part `index`."""
        part = self.parts[index]
        return _Written((*self.parts[:index], _Part(part.text[:end], part.own)), None, self.is_rendered)


class PromptTokenizer:
    """A tokenizer, used in one format.

    Args:
        tokenizer: A Hugging Face tokenizer.
        format: How prompts and targets are written.

    Raises:
        UserError: If the format needs a chat template, and the tokenizer has none that can be used.
    """

    def __init__(self, tokenizer: Any, format: TextFormat | None = None) -> None:
        self.tokenizer = tokenizer
        self.format = format or TextFormat()
        self._template = _ChatTemplate(tokenizer, self.format.system) if self.format.chat else None
        self._parses_all = self.format.special_tokens == "parse"
        self._as_text = _arguments_for_text(tokenizer)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named = {token: str(entry.content) for token, entry in added.items() if entry.special}
        named |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self._names = tuple(named.values())
        self.special_ids = frozenset(named)
        """The ids of all special tokens."""
        self._before, self._after = _added_around(tokenizer)

    # Prompts.

    def prompt_ids(self, prompts: Sequence[str], *, max_length: int | None = None) -> list[list[int]]:
        """Returns the token ids of prompts, without what the tokenizer adds at the end of a text.

        Args:
            prompts: B texts.
            max_length: Longest prompt; longer ones are cut as in `cut`.
        """
        rows = self._ids_of([self._prompt(prompt) for prompt in prompts])
        return [self.cut(prompt, ids, max_length) for prompt, ids in zip(prompts, rows, strict=True)]

    def text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of running text, which is never put into a chat; like those of prompts otherwise."""
        return self._ids_of([self._plain(text) for text in texts])

    def closed_ids(
        self, prompts: Sequence[str], *, max_length: int | None = None, questions: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Returns the token ids of complete inputs, with all special tokens that belong around them.

        Args:
            prompts: B texts.
            max_length: Longest input; longer ones are cut on the tokenizer's truncation side, prompts of a chat as in
                `cut`.
            questions: The end of each text that should survive a cut; None for the whole texts. What comes before it
                is cut first, at its start.
        """
        if self._template is not None:
            return self.prompt_ids(prompts, max_length=max_length)
        from_left = getattr(self.tokenizer, "truncation_side", "right") == "left"
        rows = []
        for prompt, question in zip(prompts, prompts if questions is None else questions, strict=True):
            written = self._plain(prompt)
            before = [] if written.is_rendered else self._before
            (ids,) = self._bare_ids([written])
            if max_length is not None:
                room = max(0, max_length - len(before) - len(self._after))
                at_start = from_left
                if len(ids) > room and prompt != question and prompt.endswith(question):
                    (own,) = self._bare_ids([self._plain(question)])
                    ids, at_start = (ids, True) if len(own) <= room else (own, from_left)
                ids = ids[max(0, len(ids) - room) :] if at_start else ids[:room]
            rows.append([*before, *ids, *self._after] or [self.begin_id])
        return rows

    def count(self, text: str) -> int:
        """Returns how many tokens a text has outside a chat, special ones included."""
        (ids,) = self._bare_ids([self._plain(text)])
        return len(self._before) + len(ids) + len(self._after)

    def count_prompt(self, prompt: str) -> int:
        """Returns how many tokens a prompt has, special ones and those of the chat template included."""
        return len(self.prompt_ids([prompt])[0]) if self._is_chat(prompt) else self.count(prompt)

    def cut(self, prompt: str, ids: list[int], max_length: int | None) -> list[int]:
        """Cuts the token ids of a prompt at its start, or in a chat at the start of the user's text.

        Raises:
            UserError: If the chat template alone is longer than that.
        """
        if max_length is None or len(ids) <= max_length:
            return ids
        first, last = self.cut_between(prompt)
        excess = len(ids) - max_length
        if excess > last - first:
            raise UserError(
                f"chat=true: the chat template takes {len(ids) - (last - first)} tokens beside the prompt, and there "
                f"is room for {max_length}"
            )
        return [*ids[:first], *ids[first + excess :]]

    def cut_between(self, prompt: str) -> tuple[int, int]:
        """Returns between which tokens a prompt is cut if it is too long: the user's text in a chat, else all."""
        written = self._prompt(prompt)
        if not self._is_chat(prompt) or written.user is None:
            return 0, len(self._ids_of([written])[0])
        ends = (written.until(written.user, 0), written.until(written.user, len(written.parts[written.user].text)))
        first, last = (len(ids) for ids in self._bare_ids(ends))
        return first, last

    def subject_span(self, prompt: str, subject: str) -> tuple[int, int]:
        """Returns the positions of the subject's first and last token in the tokens of an unpadded prompt.

        If the subject occurs several times, the last occurrence counts; in a chat, the last one in the user's text. The
        space before a subject belongs to its first token.

        Raises:
            ValueError: If it does not occur in the prompt.
        """
        written = self._prompt(prompt)
        index = len(written.parts) - 1 if written.user is None else written.user
        text = written.parts[index].text
        start = text.rindex(subject)
        before, until = written.until(index, len(text[:start].rstrip(" "))), written.until(index, start + len(subject))
        last = len(self._ids_of([until])[0]) - 1
        return min(self._count_before(before), last), last

    def _count_before(self, written: _Written) -> int:
        """How many tokens come before a text that follows, without the one that stands for an empty text."""
        (ids,) = self._bare_ids([written])
        return len(ids) + (0 if written.is_rendered else len(self._before))

    # Targets.

    def split(self, prompts: Sequence[str], targets: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Returns the token ids of prompts and of the targets that follow them, without an end token.

        A prompt and its target are tokenised together if that does not change the prompt's tokens. The space between
        them always belongs to the target, as byte-pair tokenizers expect.

        Args:
            prompts: B texts.
            targets: B texts.
        """
        written = [self._prompt(prompt) for prompt in prompts]
        texts = [self._continuation(*pair) for pair in zip(written, prompts, targets, strict=True)]
        both = zip(written, texts, strict=True)
        joint = self._ids_of([*written, *(prompt.followed_by(text) for prompt, text in both)])
        pairs = []
        for prompt_ids, whole, text in zip(joint[: len(written)], joint[len(written) :], texts, strict=True):
            if whole[: len(prompt_ids)] == prompt_ids and len(whole) > len(prompt_ids):
                pairs.append((prompt_ids, whole[len(prompt_ids) :]))
            else:
                # The tokenizer merged across the seam. Generation starts from the prompt alone, so its tokens stay.
                pairs.append((prompt_ids, self._continuing_ids(text, own=False)))
        return pairs

    def joined(self, prompt: str, target: str) -> str:
        """Returns a prompt and its target as one text outside a chat, with the space that belongs between them."""
        stem = self._stem(prompt)
        return stem + self._continuation(self._plain(stem), "", target)

    def answer_ids(self, targets: Sequence[str]) -> list[list[int]]:
        """Returns the token ids of answers that a decoder gives by themselves, without an end token."""
        return self._encoded(targets, own=False, name="text_target")

    def with_end(self, ids: Sequence[int], max_length: int | None = None, *, end_token: bool = True) -> list[int]:
        """Returns the ids of a target with the end token, if there is one; longer ones are cut before it."""
        end = [self.end_id] if end_token and self.end_id is not None else []
        room = None if max_length is None else max(0, max_length - len(end))
        return [*ids[:room], *end]

    # Answers.

    @cached_property
    def begin_id(self) -> int:
        """The token that stands for an empty prompt."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = (getattr(self.tokenizer, name, None) for name in names)
        return next((int(token) for token in ids if token is not None), 0)

    @cached_property
    def pad_id(self) -> int:
        """The token that fills up rows; every mask hides it."""
        token = getattr(self.tokenizer, "pad_token_id", None)
        return self.begin_id if token is None else int(token)

    @cached_property
    def end_id(self) -> int | None:
        """The token that follows a target.

        In a chat it is the one that the template writes after an answer. A tokenizer without an end token ends an
        answer as it ends any text (`[SEP]`), or else with a line break; None if it has neither.
        """
        if self._template is not None:
            closing = self._encoded([self._template.closing.lstrip()], own=True)[0]
            if closing and closing[0] in self.special_ids:
                return closing[0]
        if self.tokenizer.eos_token_id is not None:
            return int(self.tokenizer.eos_token_id)
        if self._after:
            return self._after[-1]
        separator = getattr(self.tokenizer, "sep_token_id", None)
        if separator is not None:
            return int(separator)
        (line_break,) = self._encoded(["\n"], own=False)
        return line_break[0] if len(line_break) == 1 and line_break[0] in self._newline_ids else None

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens at which a free answer stops: those that end it, and all that hold a line break or a full stop."""
        return list(dict.fromkeys((*self.end_ids, *self._newline_ids, *self._full_stop_ids)))

    @cached_property
    def end_ids(self) -> list[int]:
        """The tokens that end a text by themselves."""
        ends = (self.tokenizer.eos_token_id, self.end_id)
        return list(dict.fromkeys(int(token) for token in ends if token is not None))

    def answer(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Returns the text of generated ids, and the ids up to the first that stops.

        The text ends before the first line break, and with `stop="sentence"` before the first full stop.
        """
        end = next((i + 1 for i, token in enumerate(ids) if token in self._stops), len(ids))
        kept = list(ids[:end])
        text = self.decode(kept).partition("\n")[0]
        if self.format.stop == "sentence":
            text = text.partition(_FULL_STOP)[0]
        return text.strip(), kept

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def ends_in(self, ids: Iterable[int]) -> bool:
        """Returns whether one of the ids ends a text by itself."""
        return not set(self.end_ids).isdisjoint(ids)

    def has_line_break(self, ids: Iterable[int]) -> bool:
        """Returns whether some of the ids hold a line break."""
        return not self._newlines.isdisjoint(ids)

    def has_full_stop_inside(self, ids: Sequence[int]) -> bool:
        """Returns whether a free answer ends at a full stop before the last of the ids' characters."""
        return self.format.stop == "sentence" and _FULL_STOP in self.decode(ids).strip()[:-1]

    @cached_property
    def _newline_ids(self) -> tuple[int, ...]:
        return _ids_that_hold("\n", self.tokenizer)

    @cached_property
    def _full_stop_ids(self) -> tuple[int, ...]:
        return _ids_that_hold(_FULL_STOP, self.tokenizer) if self.format.stop == "sentence" else ()

    @cached_property
    def _newlines(self) -> frozenset[int]:
        return frozenset(self._newline_ids)

    @cached_property
    def _stops(self) -> frozenset[int]:
        return frozenset(self.stop_ids)

    # How a prompt is written.

    def _is_chat(self, prompt: str) -> bool:
        return self._template is not None and bool(prompt.strip())

    def _prompt(self, prompt: str) -> _Written:
        if self._template is None or not prompt.strip():
            return self._plain(self._stem(prompt))
        head, user, tail = self._template.parts(prompt)
        if not user:
            return _Written((_Part(self._stem(head), own=True),), None, is_rendered=True)
        return _Written((_Part(head, own=True), _Part(user), _Part(self._stem(tail), own=True)), 1, is_rendered=True)

    def _plain(self, text: str) -> _Written:
        begin = getattr(self.tokenizer, "bos_token", None)
        # A prompt that was put into a chat template by hand.
        if begin and text.startswith(begin):
            return _Written((_Part(begin, own=True), _Part(text[len(begin) :])), 1, is_rendered=True)
        return _Written((_Part(text),), 0, is_rendered=False)

    def _stem(self, text: str) -> str:
        return text if self.format.target_space == "never" else text.rstrip(" ")

    def _continuation(self, written: _Written, prompt: str, target: str) -> str:
        """A target as it follows a prompt, with the space between them."""
        if self.format.target_space == "never":
            return target
        text, stem = target.lstrip(" "), written.text
        if self.format.target_space == "always" and text:
            return f" {text}"
        if not text or text[0].isspace() or stem[-1:].isspace():
            return text
        if _SPACELESS.match(text[0]) or _SPACELESS.match(stem[-1:]):
            return text
        follows_space = True
        if self._template is not None and self._is_chat(prompt):
            follows_space = self._template.puts_space_before_answer(ends_in_special=stem.endswith(self._names))
        return f" {text}" if follows_space else text

    # From text to ids.

    def _ids_of(self, rows: Sequence[_Written]) -> list[list[int]]:
        """Token ids of texts that will be continued."""
        return [
            ([] if written.is_rendered else self._before) + ids or [self.begin_id]
            for written, ids in zip(rows, self._bare_ids(rows), strict=True)
        ]

    def _bare_ids(self, rows: Sequence[_Written]) -> list[list[int]]:
        """Token ids of texts, without those that the tokenizer adds around a text."""
        together: dict[bool, list[int]] = {False: [], True: []}
        found: dict[int, list[int]] = {}
        for index, written in enumerate(rows):
            own = any(part.own for part in written.parts)
            if own and not self._parses_all and any(self._names_special(p.text) for p in written.parts if not p.own):
                found[index] = self._piecewise_ids(written)
            else:
                together[own].append(index)
        for own, indices in together.items():
            found.update(zip(indices, self._encoded([rows[index].text for index in indices], own=own), strict=True))
        return [found[index] for index in range(len(rows))]

    def _piecewise_ids(self, written: _Written) -> list[int]:
        ids: list[int] = []
        for part in written.parts:
            if part.text:
                ids += self._continuing_ids(part.text, own=part.own) if ids else self._encoded([part.text], part.own)[0]
        return ids

    def _continuing_ids(self, text: str, *, own: bool) -> list[int]:
        """Token ids of a text that continues another."""
        # Some tokenizers put a space before the start of a text; a preceding line break prevents that.
        before, joint, alone = self._encoded(["\n", f"\n{text}", text], own=own)
        return joint[len(before) :] if before and joint[: len(before)] == before else alone

    def _names_special(self, text: str) -> bool:
        return any(name in text for name in self._names)

    def _encoded(self, texts: Sequence[str], own: bool, *, name: str = "text") -> list[list[int]]:
        if not texts:
            return []
        parses = own or self._parses_all
        rows = self.tokenizer(**{name: list(texts)}, add_special_tokens=False, **({} if parses else self._as_text))[
            "input_ids"
        ]
        return rows if parses else [self._spelt_out(row) for row in rows]

    def _spelt_out(self, ids: list[int]) -> list[int]:
        """Replaces special tokens by the tokens of their names' characters.

        The vocabulary of a unigram model holds them as pieces, which it finds in ordinary text.
        """
        if self.special_ids.isdisjoint(ids):
            return ids
        unknown = self.tokenizer.unk_token_id
        return [
            part
            for token in ids
            for part in (self._characters(token) if token in self.special_ids and token != unknown else [token])
        ]

    def _characters(self, token: int) -> list[int]:
        name = str(self.tokenizer.convert_ids_to_tokens(token))
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return [piece.id for character in name for piece in backend.model.tokenize(character)]
        ids = (self.tokenizer.convert_tokens_to_ids(character) for character in name)
        return [int(part) for part in ids if part is not None]


class _ChatTemplate:
    """The chat template of a tokenizer, with a system message or none.

    Raises:
        UserError: If there is no template, or it refuses the messages.
    """

    def __init__(self, tokenizer: Any, system: str | None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("chat=true needs a tokenizer with a chat template, and the model's has none")
        self._tokenizer = tokenizer
        self._system = system
        template = tokenizer.get_chat_template()
        self._source = _DATE + template if "strftime_now" in template else template
        self._parts: dict[str, tuple[str, str, str]] = {}
        rendered = self._render(_PLACEHOLDER)
        if _PLACEHOLDER not in rendered:
            raise UserError("chat=true: the tokenizer's chat template leaves the prompt out")
        if system is not None and system.strip() not in rendered:
            raise UserError("chat.system: the tokenizer's chat template leaves a system message out")
        self._head, _, self._tail = rendered.rpartition(_PLACEHOLDER)
        before, is_there, self.closing = self._with_answer()
        stem = rendered.rstrip(" ")
        self._space: bool | None = {stem: False, f"{stem} ": True}.get(before if is_there else "")
        """Whether a space precedes an answer; None if the template does not say."""

    def parts(self, prompt: str) -> tuple[str, str, str]:
        """Returns what the template puts before a prompt, the prompt, and what it puts after it.

        Where the template changes the prompt, beyond white space around it, the first is the whole and the others are
        empty.
        """
        if prompt not in self._parts:
            rendered = self._render(prompt)
            texts = (text for text in (prompt, prompt.strip()) if rendered == f"{self._head}{text}{self._tail}")
            user = next(texts, "")
            self._parts[prompt] = (self._head, user, self._tail) if user else (rendered, "", "")
        return self._parts[prompt]

    def puts_space_before_answer(self, *, ends_in_special: bool) -> bool:
        """Returns whether a space comes before an answer: where the template writes one, or after ordinary text."""
        return not ends_in_special if self._space is None else self._space

    def _with_answer(self) -> tuple[str, str, str]:
        """What the template writes before an answer, the answer, and what it writes after it; empty if it refuses."""
        try:
            return self._render(_PLACEHOLDER, answer=f"{_PLACEHOLDER}-answer").rpartition(f"{_PLACEHOLDER}-answer")
        except UserError:
            return "", "", ""

    def _render(self, prompt: str, *, answer: str | None = None) -> str:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        answers = [] if answer is None else [{"role": "assistant", "content": answer}]
        try:
            rendered = self._tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": prompt}, *answers],
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=answer is None,
            )
        except (TemplateError, ValueError, TypeError) as error:
            option = "chat=true" if self._system is None else f"chat.system={self._system}"
            raise UserError(f"{option}: the tokenizer's chat template fails ({error})") from error
        return str(rendered)


def _arguments_for_text(tokenizer: Any) -> dict[str, bool]:
    """The arguments with which a tokenizer reads the names of special tokens as text; none if it always does."""
    try:
        tokenizer("a", add_special_tokens=False, split_special_tokens=True)
    except (TypeError, ValueError):
        return {}
    return {"split_special_tokens": True}


def _added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer adds before and after every text."""
    for text in ("a", tokenizer.decode([len(tokenizer) // 2])):
        bare, closed = (tokenizer(text, add_special_tokens=added)["input_ids"] for added in (False, True))
        for start in range(len(closed) - len(bare) + 1) if bare else ():
            if closed[start : start + len(bare)] == bare:
                return list(closed[:start]), list(closed[start + len(bare) :])
    return [], []


@lru_cache(maxsize=16)
def _ids_that_hold(character: str, tokenizer: Any) -> tuple[int, ...]:
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if character in text)
