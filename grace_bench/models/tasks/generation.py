"""Tasks whose answers are generated freely and compared as text: question answering and completion."""

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from grace_bench.data.requests import DerivedRequest, EditRequest, Unedited
from grace_bench.errors import UserError, reason_of
from grace_bench.models import encoding
from grace_bench.models.encoding import EncodedBatch, PaddingSide, least
from grace_bench.models.network import Network
from grace_bench.models.tasks.base import Answerability, ItemScore, Task, check_causal, notes_of, token_losses
from grace_bench.models.tasks.continuing import fluencies, generated_rows, labelled_tokens, predicted_tokens
from grace_bench.models.tasks.text_scores import agreement, contains, exact_match, reference_f1, token_f1
from grace_bench.models.tasks.token_scores import contrast, token_accuracy, token_agreement
from grace_bench.models.tokens import PromptTokenizer

_LINES = "more than one line"
_SENTENCES = "more than one sentence"
_SPECIAL = "the text of a special token"
_CHARACTERS = "characters that the tokenizer cannot give back"
_ENDLESS = "the tokenizer has no end token"


@dataclass(frozen=True)
class _Accepted:
    """The accepted answers to a request.

    Attributes:
        texts: The answers, cut like targets in training, and what the tokenizer gives back of them.
        unanswerable: Why no free answer can equal one of them; None if one can.
        only_given_back: Whether a free answer can only equal what the tokenizer gives back.
    """

    texts: tuple[str, ...]
    unanswerable: str | None
    only_given_back: bool


@dataclass(frozen=True)
class _Read:
    """An answer that a model reads after a prompt.

    Attributes:
        predicted: The most likely token at each of its positions, after the tokens before, without the end token.
        wanted: Its own tokens there.
        loss: Their mean negative log-likelihood; NaN unless it was asked for.
    """

    predicted: list[int]
    wanted: list[int]
    loss: float


class GenerationTask(Task):
    """Free answers, scored by the token F1 of SQuAD."""

    main_score = "f1"
    generates = True
    panel = (
        "f1",
        "exact_match",
        "contains",
        "token_accuracy",
        "reference_f1",
        "contrast",
        "agreement",
        "token_agreement",
        "gold",
        "fluency",
    )
    takes_chat = True
    _generation_side: ClassVar[PaddingSide]

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._known: dict[tuple[Any, ...], _Accepted] = {}

    def score_batch(self, model: Network, requests: Sequence[EditRequest]) -> list[ItemScore]:  # noqa: D102
        prompts, targets = [request.prompt for request in requests], [str(request.target) for request in requests]
        generated = self._generate(model, prompts)
        target_ids = self.encode(model, prompts, targets).target_ids
        panels: list[dict[str, float]] = []
        accepted_answers = self._accepted(model, requests)
        for i, (request, accepted, (text, ids, _)) in enumerate(
            zip(requests, accepted_answers, generated, strict=True)
        ):
            panels.append(self._of_text(request, text, accepted.texts))
            panels[-1]["reference_f1"] = reference_f1(ids, target_ids[i])
        for others in (
            self._token_scores(model, requests),
            fluencies(self, model, prompts) if "fluency" in self.scores else (),
        ):
            for panel, more in zip(panels, others, strict=False):
                panel |= more
        return [
            self.item(request, self._ordered(panel), text=text, correct=panel["exact_match"] == 1.0, **note)
            for request, panel, (text, _, note) in zip(requests, panels, generated, strict=True)
        ]

    def _of_text(self, request: EditRequest, text: str, accepted: Sequence[str]) -> dict[str, float]:
        """The scores of a free answer."""
        how: dict[str, Any] = {"normalise": self.normalise}
        scores = {
            "f1": token_f1(text, accepted, **how),
            "exact_match": exact_match(text, accepted, **how),
        }
        # A model may have had nothing to say to a probe, which every other answer contains.
        if any(answer.strip() for answer in accepted):
            scores["contains"] = contains(text, accepted, **how)
        if isinstance(request, DerivedRequest) and request.is_locality:
            if request.unedited is not None and request.unedited.text is not None:
                scores["agreement"] = agreement(text, request.unedited.text, **how)
            gold = request.gold if request.target_from_model else accepted
            if gold:
                scores["gold"] = exact_match(text, gold, **how)
        return scores

    def _ordered(self, panel: Mapping[str, float]) -> dict[str, float]:
        """The scores that the run asks for, in the order of the panel."""
        known = {name: value for name, value in panel.items() if name in self.scores and not math.isnan(value)}
        return {name: known[name] for name in self.panel if name in known}

    def _token_scores(self, model: Network, requests: Sequence[EditRequest]) -> list[dict[str, float]]:
        """The scores of tokens and of their likelihoods; each distinct answer to a prompt is read once."""
        pairs = dict.fromkeys((request.prompt, answer) for request in requests for answer in self._read_after(request))
        with_loss = "contrast" in self.scores and any(request.contrast for request in requests)
        along = self._along(model, [*pairs], with_loss=with_loss)
        scores: list[dict[str, float]] = [{} for _ in requests]
        for request, found in zip(requests, scores, strict=True):
            if "token_accuracy" in self.scores:
                read = along[request.prompt, str(request.target)]
                found["token_accuracy"] = token_accuracy(read.predicted, read.wanted)
            if (compared := _compared(request)) is not None:
                reference, unedited = compared
                found["token_agreement"] = token_agreement(along[request.prompt, reference].predicted, unedited)
            if "contrast" in self.scores and request.contrast:
                first, second = (along[request.prompt, answer].loss for answer in request.contrast)
                found["contrast"] = contrast(first, second)
        return scores

    def _read_after(self, request: EditRequest) -> list[str]:
        """The answers that are read after a request's prompt, for all scores together."""
        answers = [str(request.target)] if "token_accuracy" in self.scores else []
        if (compared := _compared(request)) is not None:
            answers.append(compared[0])
        return [*answers, *(request.contrast or ())] if "contrast" in self.scores else answers

    def _along(
        self, model: Network, pairs: Sequence[tuple[str, str]], *, with_loss: bool
    ) -> dict[tuple[str, str], _Read]:
        """What the model makes of answers that follow prompts; in batches, of all of them together where they fit."""
        sizes = [super(GenerationTask, self).size(model, prompt, [answer]) for prompt, answer in pairs]
        found: dict[tuple[str, str], _Read] = {}
        for chunk in self.batches(sizes):
            chosen = [pairs[i] for i in chunk]
            prompts, answers = zip(*chosen, strict=True)
            rows = self.by_length(model, self.encode(model, prompts, answers), partial(_read, with_loss=with_loss))
            found.update(zip(chosen, rows, strict=True))
        return found

    def unedited_batch(self, model: Network, requests: Sequence[DerivedRequest]) -> list[Unedited]:  # noqa: D102
        texts = self._unedited_texts(model, requests) if "agreement" in self.scores else [None for _ in requests]
        tokens: list[tuple[int, ...] | None] = [None for _ in requests]
        if "token_agreement" in self.scores:
            prompts, answers = [request.prompt for request in requests], [request.reference for request in requests]
            rows = self.by_length(model, self.encode(model, prompts, answers), _read)
            tokens = [tuple(row.predicted) for row in rows]
        return [Unedited(text=text, tokens=along) for text, along in zip(texts, tokens, strict=True)]

    def _unedited_texts(self, model: Network, requests: Sequence[DerivedRequest]) -> list[str | None]:
        """Free answers; where they are the targets they were given already."""
        texts: list[str | None] = [str(r.target) if r.target_from_model else None for r in requests]
        asked = [i for i, request in enumerate(requests) if not request.target_from_model]
        if asked:
            for i, answer in zip(asked, self.answers(model, [requests[i].prompt for i in asked]), strict=True):
                texts[i] = str(answer)
        return texts

    def size(self, model: Network, prompt: str, targets: Iterable[str | int] = ()) -> int:  # noqa: D102
        room = least(self._count(model, prompt, is_prompt=True) + self.max_new_tokens, model.max_length) or 1
        return max(super().size(model, prompt, targets), room)

    def answerability(self, model: Network, requests: Sequence[EditRequest]) -> Answerability:  # noqa: D102
        accepted = self._accepted(model, requests)
        reasons = Counter(each.unanswerable for each in accepted if each.unanswerable is not None)
        return Answerability(
            n_targets=len(requests),
            unanswerable=dict(sorted(reasons.items(), key=lambda counted: (-counted[1], counted[0]))),
            n_given_back=sum(each.only_given_back for each in accepted),
        )

    def longest_target(self, model: Network, requests: Sequence[EditRequest]) -> int:  # noqa: D102
        pairs = [(request.prompt, text) for request in requests for text in _answers_of(request)]
        return max(map(len, self._target_ids(model, pairs)), default=0)

    def _accepted(self, model: Network, requests: Sequence[EditRequest]) -> list[_Accepted]:
        """The accepted answers to each request."""
        tokens, limit = self.tokens(model), self.max_new_tokens
        keys = [(tokens, limit, request.prompt, *_answers_of(request)) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        pairs = [(request.prompt, text) for request in new.values() for text in _answers_of(request)]
        ids = iter(self._target_ids(model, pairs))
        for key, request in new.items():
            self._known[key] = self._accepted_of(model, [(text, next(ids)) for text in _answers_of(request)])
        return [self._known[key] for key in keys]

    def _accepted_of(self, model: Network, answers: Sequence[tuple[str, list[int]]]) -> _Accepted:
        tokens, longest = self.tokens(model), self._longest_target(model)
        matches = partial(exact_match, normalise=self.normalise)
        texts = [tokens.decode(ids) if len(ids) == longest else text for text, ids in answers]
        free = [tokens.answer(ids[: self.max_new_tokens])[0] for _, ids in answers]
        lacking = [self._lacking(tokens, ids) for _, ids in answers]
        free = [text if _has_words(text, given) else "" for text, (given, _) in zip(free, answers, strict=True)]
        given_back = [text for text, reason in zip(free, lacking, strict=True) if text and reason is None]
        # In its normal form an answer may be accepted already; then the scores of others should not change.
        accepted = [*texts, *(text for text in given_back if not matches(text, texts))]
        free = [text for text in free if text]
        is_answerable = any(matches(text, accepted) for text in free)
        return _Accepted(
            texts=tuple(accepted),
            unanswerable=None if is_answerable else lacking[0] or _CHARACTERS,
            only_given_back=is_answerable and not any(matches(text, texts) for text in free),
        )

    def _longest_target(self, model: Network) -> int | None:
        """The length to which targets are cut, in tokens; None without a limit."""
        return least(self.max_target_tokens, model.max_target_length)

    def _lacking(self, tokens: PromptTokenizer, ids: Sequence[int]) -> str | None:
        """Why generation does not give all tokens of a target; None if it does."""
        is_ended = tokens.end_id is not None
        content = ids[:-1] if is_ended else ids
        given = content[: self.max_new_tokens]
        if tokens.has_line_break(given):
            return _LINES
        if tokens.has_full_stop_inside(given):
            return _SENTENCES
        if tokens.ends_in(given):
            return _SPECIAL
        if len(content) > self.max_new_tokens:
            return f"longer than max_new_tokens={self.max_new_tokens}"
        return None if is_ended or len(content) == self.max_new_tokens else _ENDLESS

    @abstractmethod
    def _target_ids(self, model: Network, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Returns the token ids of targets after their prompts, end token included, cut like targets in training."""

    def check_reading(self, model: Network, request: EditRequest) -> None:  # noqa: D102
        try:
            self.answers(model, [request.prompt])
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"model {model.name} cannot generate an answer: {reason_of(error)}") from error

    def answers(self, model: Network, prompts: Sequence[str]) -> list[str | int]:  # noqa: D102
        return [text for text, _ in self.generate(model, prompts)]

    @torch.no_grad()
    def generate(self, model: Network, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Answers prompts greedily up to the end token or a newline, with at most `max_new_tokens`.

        Returns:
            For each prompt the text, up to the newline, and the generated token ids with the end token.
        """
        return [(text, ids) for text, ids, _ in self._generate(model, prompts)]

    def _generate(self, model: Network, prompts: Sequence[str]) -> list[tuple[str, list[int], dict[str, Any]]]:
        """Does what `generate` does; adds the records of hooks."""
        batch = self.encode(model, prompts, side=self._generation_side)
        return self.by_length(model, batch, self._generate_batch, generates=True)

    def _generate_batch(self, model: Network, batch: EncodedBatch) -> list[tuple[str, list[int], dict[str, Any]]]:
        tokens = self.tokens(model)
        longest = least(self.max_new_tokens, self._room(model, batch))
        rows = generated_rows(self, model, batch, max_new_tokens=longest, stops=tokens.stop_ids)
        notes = notes_of(model.last_state, len(batch))
        return [(*tokens.answer(row), note) for row, note in zip(rows, notes, strict=True)]

    @abstractmethod
    def _room(self, model: Network, batch: EncodedBatch) -> int | None:
        """Returns how many tokens the model can write after a batch of prompts; None without a limit."""


class QuestionAnswering(GenerationTask):
    """Short answers of an encoder-decoder model; scored by the token F1 of SQuAD on free generation."""

    name = "qa"
    auto_class = "AutoModelForSeq2SeqLM"
    model_kind = "an encoder-decoder"
    _generation_side = "right"

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        if not getattr(model.config, "is_encoder_decoder", False) or not callable(
            getattr(model.module, "generate", None)
        ):
            return "an encoder-decoder that generates"
        return "a tokenizer" if model.tokenizer is None else None

    def _encode(
        self,
        model: Network,
        texts: Sequence[str],
        targets: Sequence[str | int] | None,
        side: PaddingSide,
        *,
        prompts: Sequence[str],
    ) -> EncodedBatch:
        return encoding.encode_seq2seq(
            self.tokens(model),
            texts,
            None if targets is None else [str(target) for target in targets],
            side=side,
            max_length=least(model.max_length, self.max_input_tokens),
            max_target_length=self._longest_target(model),
            decoder_start=model.decoder_start,
            query_in_decoder=model.layer_in_decoder,
            questions=prompts,
        )

    def _room(self, model: Network, batch: EncodedBatch) -> int | None:
        return model.max_target_length

    def _target_ids(self, model: Network, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        tokens = self.tokens(model)
        answers = tokens.answer_ids([target for _, target in pairs])
        return [tokens.with_end(ids, self._longest_target(model)) for ids in answers]


class Completion(GenerationTask):
    """The continuation of a prompt by a causal language model; scored by the token F1 of SQuAD on free generation."""

    name = "completion"
    auto_class = "AutoModelForCausalLM"
    model_kind = "a causal language model"
    reads_running_text = True
    _generation_side = "left"

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        if getattr(model.config, "is_encoder_decoder", False) or not callable(getattr(model.module, "generate", None)):
            return "a causal language model that generates"
        return "a tokenizer" if model.tokenizer is None else None

    def check_reading(self, model: Network, request: EditRequest) -> None:  # noqa: D102
        super().check_reading(model, request)
        check_causal(self, model, request)

    def _encode(
        self,
        model: Network,
        texts: Sequence[str],
        targets: Sequence[str | int] | None,
        side: PaddingSide,
        *,
        prompts: Sequence[str],
    ) -> EncodedBatch:
        return encoding.encode_causal(
            self.tokens(model),
            texts,
            None if targets is None else [str(target) for target in targets],
            side=side,
            max_length=model.max_length,
            max_prompt_length=least(
                None if model.max_length is None else max(1, model.max_length - self.max_new_tokens),
                self.max_input_tokens,
            ),
            max_target_length=self.max_target_tokens,
        )

    def _room(self, model: Network, batch: EncodedBatch) -> int | None:
        return None if model.max_length is None else max(1, model.max_length - batch.inputs["input_ids"].shape[1])

    def _target_ids(self, model: Network, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        tokens = self.tokens(model)
        split = tokens.split([prompt for prompt, _ in pairs], [target for _, target in pairs])
        return [tokens.with_end(ids, self.max_target_tokens) for _, ids in split]


@torch.no_grad()
def _read(model: Network, encoded: EncodedBatch, *, with_loss: bool = False) -> list[_Read]:
    """What a model makes of the answer in each row."""
    logits, batch = model.labelled_logits(encoded)
    predicted, losses = predicted_tokens(logits, batch), [math.nan] * len(batch)
    if with_loss:
        # It takes a float32 copy of all logits.
        assert batch.content is not None
        losses = ((token_losses(logits, batch) * batch.content).sum(dim=1) / batch.content.sum(dim=1)).tolist()
    return [_Read(*row) for row in zip(predicted, labelled_tokens(batch), losses, strict=True)]


def _compared(request: EditRequest) -> tuple[str, Sequence[int]] | None:
    """The reference answer of a locality probe, and the unedited model's tokens along it; None if there are none."""
    if not isinstance(request, DerivedRequest) or request.unedited is None or request.unedited.tokens is None:
        return None
    return request.reference, request.unedited.tokens


def _has_words(text: str, given: str) -> bool:
    """Whether what came back of a text says anything: not if of all its letters and digits only punctuation is left."""
    return bool(text.strip()) and (any(map(str.isalnum, text)) or not any(map(str.isalnum, given)))


def _answers_of(request: EditRequest) -> list[str]:
    return [str(request.target), *request.answers]
