"""Tasks: everything in which classification, question answering, completion and language modelling differ.

A task encodes text, defines the loss, says what an error is and scores answers. Nothing else in the harness branches on
the kind of model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional

from grace_bench.models import encoding
from grace_bench.models.encoding import IGNORED, EncodedBatch, PaddingSide, least
from grace_bench.errors import UserError, did_you_mean
from grace_bench.common.options import check_choice, check_whole
from grace_bench.models.tasks.text_scores import exact_match, reference_f1, token_f1
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.common.progress import Progress

if TYPE_CHECKING:
    from grace_bench.models.editable import EditableModel, QueryState

_OUTLIER = 1000.0
_ENOUGH_ON_CPU = 1024
"""Tokens that two cores take no longer for, each, than for those of larger batches (`docs/performance.md`).

The fewer inputs a batch holds, the fewer are scored again with one that changed.
"""


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """What the model answered to one request and how good it was.

    Attributes:
        score: The task's main score.
        text: The answer as text; empty for language modelling.
        correct: Whether the answer counts as right; None where every candidate is an error.
        others: The task's other scores by name.
        n_tokens: Scored tokens, for the token-weighted perplexity.
        entry: The codebook entry that answered, -1 for none; None where there is no codebook or nothing in it.
        distance: Distance of the query to the nearest entry.
        contested: Whether the query lies in balls of two different labels.
        query: (D_in,) what entered the edited layer at the query; None unless it was asked for.
    """

    score: float
    text: str = ""
    correct: bool | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    n_tokens: int = 1
    entry: int | None = None
    distance: float | None = None
    contested: bool | None = None
    query: Tensor | None = field(default=None, compare=False, repr=False)
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything but the query, by field, as JSON values."""
        return {**{name: value for name, value in vars(self).items() if name != "query"}, "others": dict(self.others)}


class Task(ABC):
    """One way of using a model.

    Args:
        max_new_tokens: The longest free answer.
        query: `prefix` queries running text after `prefix_length` tokens and scores the rest; `last_token` queries its
            last token and scores everything, as the official GRACE code does.
        prefix_length: Tokens of running text that are read and not scored.
        batch_size: The most inputs in one forward pass of scoring. Inputs are grouped by length.
        batch_tokens: The most tokens in one, padding included; a single longer input goes alone. On a CPU at most 1,024
            are scored in one where nothing is generated.
        max_input_tokens: Where prompts are cut; None for the model's own limit.
        max_target_tokens: Where targets are cut, end token included, and the answers accepted beside them.
        label_names: The names of the label ids, which answers are shown by; classification only.

    Raises:
        UserError: If an option is not one of its choices, or a number is out of range, naming it.
    """

    name: ClassVar[TaskName]
    auto_class: ClassVar[str]
    """The transformers class that loads a model for this task."""
    main_score: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    other_scores: ClassVar[tuple[str, ...]] = ()
    generates: ClassVar[bool] = False
    """Whether answers are generated token by token, each of which reads all weights once a batch."""
    carried_scores: ClassVar[tuple[str, ...]] = ()
    """Scores that only requests have which carry what they need."""

    def __init__(
        self,
        *,
        max_new_tokens: int = 16,
        query: str = "prefix",
        prefix_length: int = 8,
        batch_size: int = 64,
        batch_tokens: int = 16384,
        max_input_tokens: int | None = None,
        max_target_tokens: int | None = None,
        label_names: Sequence[str] = (),
    ) -> None:
        check_choice("protocol.query", query, ("prefix", "last_token"))
        check_whole("batch_tokens", batch_tokens, least=1)
        for option, limit in (("max_input_tokens", max_input_tokens), ("max_target_tokens", max_target_tokens)):
            if limit is not None:
                check_whole(option, limit, least=1)
        self.max_new_tokens = max_new_tokens
        self.query = query
        self.prefix_length = prefix_length
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.label_names = tuple(label_names)
        self._counts: dict[str, int] = {}

    def named(self, target: str | int) -> str:
        """Returns a target as answers are shown: a label by its name, if it has one."""
        has_name = isinstance(target, int) and target < len(self.label_names)
        return self.label_names[int(target)] if has_name else str(target)

    @abstractmethod
    def encode(
        self,
        model: "EditableModel",
        prompts: Sequence[str],
        targets: Sequence[str | int] | None = None,
        *,
        side: PaddingSide | None = None,
    ) -> EncodedBatch:
        """Encodes prompts, with targets for loss and teacher-forced scores, without for answering."""

    @abstractmethod
    def score_batch(self, model: "EditableModel", requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests of like length, in one batch."""

    def loss(self, logits: Tensor, batch: EncodedBatch) -> Tensor:
        """Returns the mean cross-entropy over the batch's labels, in float32."""
        assert batch.labels is not None
        return functional.cross_entropy(logits.float().flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORED)

    def row_losses(self, logits: Tensor, batch: EncodedBatch) -> Tensor:
        """Returns the (B,) mean cross-entropies over each row's own labels, in float32."""
        assert batch.labels is not None
        n_rows, classes = len(batch.labels), logits.shape[-1]
        losses = functional.cross_entropy(
            logits.float().reshape(-1, classes), batch.labels.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        return losses.reshape(n_rows, -1).sum(dim=1) / (batch.labels != IGNORED).reshape(n_rows, -1).sum(dim=1)

    def answered(self, logits: Tensor, batch: EncodedBatch) -> bool:
        """Whether every labelled position already gets its label, so that training may stop."""
        assert batch.labels is not None
        wrong = (logits.argmax(dim=-1) != batch.labels) & (batch.labels != IGNORED)
        return not bool(wrong.any())

    @torch.no_grad()
    def score(self, model: "EditableModel", requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests, in the order given; batches hold inputs of like length."""
        results: list[ItemScore | None] = [None] * len(requests)
        for chunk in self.together(model, requests):
            for index, item in zip(chunk, self.score_batch(model, [requests[i] for i in chunk]), strict=True):
                results[index] = item
        return [item for item in results if item is not None]

    def together(self, model: "EditableModel", requests: Sequence[EditRequest]) -> Iterator[list[int]]:
        """Yields the indices of requests that are scored in one batch."""
        sizes = [self.size(model, r.prompt, (r.target, *contrast_of(r))) for r in requests]
        is_enough = model.layer_device.type == "cpu" and not self.generates
        return self.batches(sizes, most_tokens=_ENOUGH_ON_CPU if is_enough else None)

    @torch.no_grad()
    def ask(
        self, model: "EditableModel", prompts: Sequence[str], *, progress: Progress | None = None
    ) -> list[str | int]:
        """Returns the model's own answers to any number of prompts, in the order given; batched as `score` is.

        Args:
            model: The model.
            prompts: The questions.
            progress: Called after every batch.

        Raises:
            UserError: For a task whose targets are texts that no model answers.
        """
        results: dict[int, str | int] = {}
        for chunk in self.batches([self.size(model, prompt) for prompt in prompts]):
            results.update(zip(chunk, self.answers(model, [prompts[i] for i in chunk]), strict=True))
            if progress is not None:
                progress("answers of the unedited model", len(results), len(prompts))
        return [results[i] for i in range(len(prompts))]

    def batches(self, sizes: Sequence[int], *, most_tokens: int | None = None) -> Iterator[list[int]]:
        """Yields the indices of inputs of like size together, within `batch_size` and `batch_tokens`.

        Args:
            sizes: Each input's length in tokens.
            most_tokens: A lower bound than `batch_tokens`.
        """
        chunk: list[int] = []
        most = least(self.batch_tokens, most_tokens) or 1
        for index in sorted(range(len(sizes)), key=sizes.__getitem__):
            if len(chunk) == self.batch_size or (chunk and (len(chunk) + 1) * sizes[index] > most):
                yield chunk
                chunk = []
            chunk.append(index)
        if chunk:
            yield chunk

    def size(self, model: "EditableModel", prompt: str, targets: Iterable[str | int] = ()) -> int:
        """Returns how many tokens a forward pass reads at most of a prompt with one of the targets."""
        longest = max((self._count(model, str(target)) for target in targets), default=0)
        return least(self._count(model, prompt) + longest, model.max_length) or 1

    def _count(self, model: "EditableModel", text: str) -> int:
        if model.tokenizer is None:
            return len(text)
        if text not in self._counts:
            self._counts[text] = encoding.count_tokens(model.tokenizer, text)
        return self._counts[text]

    def aggregate(self, items: Sequence[ItemScore]) -> dict[str, float]:
        """Returns the mean of the main score under "" and of every other score under its name, NaN left out.

        A score that no item carries is absent.
        The number of items whose main score is NaN stands under `n_nan` if there are any.
        """
        means = {"": _mean(item.score for item in items)}
        means |= {name: _mean(item.others[name] for item in items) for name in self.other_scores}
        for name in self.carried_scores:
            carried = [item.others[name] for item in items if name in item.others]
            means |= {name: _mean(carried)} if carried else {}
        n_nan = sum(math.isnan(item.score) for item in items)
        if n_nan:
            means["n_nan"] = float(n_nan)
        return means

    def answers(self, model: "EditableModel", prompts: Sequence[str]) -> list[str | int]:
        """Returns the model's own answers as targets: label ids, or free text.

        Raises:
            UserError: For a task whose targets are texts that no model answers.
        """
        raise UserError(f"task {self.name} has no answers to ask a model for")

    def count_labels(self, model: "EditableModel", prompt: str) -> int | None:
        """Returns how many labels the model has for a prompt; None for tasks that answer in text."""
        return None

    def check_targets(self, model: "EditableModel", requests: Iterable[EditRequest]) -> None:  # noqa: B027 - most tasks take any
        """Makes sure that the model can give every target.

        Raises:
            UserError: If one is a class the model does not have, naming the request.
        """


class Classification(Task):
    """One label a text; scored by accuracy."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    main_score = "accuracy"

    def encode(  # noqa: D102
        self,
        model: "EditableModel",
        prompts: Sequence[str],
        targets: Sequence[str | int] | None = None,
        *,
        side: PaddingSide | None = None,
    ) -> EncodedBatch:
        labels = None if targets is None else [int(target) for target in targets]
        if model.encode is not None:
            return EncodedBatch(
                inputs=model.encode(prompts),
                query=torch.full((len(prompts),), -1),
                labels=None if labels is None else torch.tensor(labels),
                target_ids=() if labels is None else tuple((label,) for label in labels),
            )
        return encoding.encode_classification(
            model.tokenizer,
            prompts,
            labels,
            side=side or "right",
            max_length=least(model.max_length, self.max_input_tokens),
        )

    def size(self, model: "EditableModel", prompt: str, targets: Iterable[str | int] = ()) -> int:  # noqa: D102
        return super().size(model, prompt)

    def score_batch(self, model: "EditableModel", requests: Sequence[EditRequest]) -> list[ItemScore]:  # noqa: D102
        chosen = self._labels(model, [request.prompt for request in requests])
        noted = _noted(model.last_state, len(requests))
        return [
            ItemScore(
                score=float(label == request.target),
                text=self.named(label),
                correct=label == request.target,
                **note,
            )
            for request, label, note in zip(requests, chosen, noted, strict=True)
        ]

    def answers(self, model: "EditableModel", prompts: Sequence[str]) -> list[str | int]:  # noqa: D102
        return [*self._labels(model, prompts)]

    @torch.no_grad()
    def count_labels(self, model: "EditableModel", prompt: str) -> int:
        """Returns the width of the logits."""
        return model.logits(model.encode_batch([prompt])).shape[-1]

    def check_targets(self, model: "EditableModel", requests: Iterable[EditRequest]) -> None:
        """Compares label ids with the number of labels."""
        n_labels: int | None = None
        for request in requests:
            if n_labels is None:
                n_labels = self.count_labels(model, request.prompt)
            if not 0 <= int(request.target) < n_labels:
                raise UserError(
                    f"request '{request.id}': field 'target': label {request.target} is none of the model's {n_labels} "
                    f"(0 to {n_labels - 1})"
                )

    def _labels(self, model: "EditableModel", prompts: Sequence[str]) -> list[int]:
        logits, _ = model.labelled_logits(model.encode_batch(prompts))
        return [int(label) for label in logits.argmax(dim=-1)]


class _Generating(Task):
    """Tasks whose answers are generated freely and compared as text."""

    main_score = "f1"
    generates = True
    other_scores = ("exact_match", "token_accuracy", "reference_f1")
    carried_scores = ("contrast",)

    def score_batch(self, model: "EditableModel", requests: Sequence[EditRequest]) -> list[ItemScore]:
        generated = self.generate(model, [request.prompt for request in requests])
        noted = _noted(model.last_state, len(requests))
        logits, batch = model.labelled_logits(
            model.encode_batch([request.prompt for request in requests], [str(request.target) for request in requests])
        )
        assert batch.content is not None
        hits = (logits.argmax(dim=-1) == batch.labels) & batch.content
        accuracies = (hits.sum(dim=1) / batch.content.sum(dim=1)).tolist()
        contrasts = self._contrasts(model, requests)
        items = []
        for i, (request, (text, ids)) in enumerate(zip(requests, generated, strict=True)):
            accepted = self._accepted(model, request)
            match = exact_match(text, accepted)
            items.append(
                ItemScore(
                    score=token_f1(text, accepted),
                    text=text,
                    correct=match == 1.0,
                    others={
                        "exact_match": match,
                        "token_accuracy": accuracies[i],
                        "reference_f1": reference_f1(ids, batch.target_ids[i]),
                        **contrasts[i],
                    },
                    **noted[i],
                )
            )
        return items

    def size(self, model: "EditableModel", prompt: str, targets: Iterable[str | int] = ()) -> int:
        room = least(self._count(model, prompt) + self.max_new_tokens, model.max_length) or 1
        return max(super().size(model, prompt, targets), room)

    def _accepted(self, model: "EditableModel", request: EditRequest) -> list[str]:
        """The accepted answers, cut where what the model is taught is cut."""
        accepted = [str(request.target), *request.answers]
        if self.max_target_tokens is None:
            return accepted
        ids = self.encode(model, [request.prompt] * len(accepted), accepted).target_ids
        return [
            model.tokenizer.decode(kept, skip_special_tokens=True) if len(kept) == self.max_target_tokens else text
            for text, kept in zip(accepted, ids, strict=True)
        ]

    def _contrasts(self, model: "EditableModel", requests: Sequence[EditRequest]) -> list[dict[str, float]]:
        """For each request that carries a contrast, whether its first answer is the likelier (Meng et al. 2022)."""
        pairs = [contrast_of(request) for request in requests]
        carrying = [i for i, pair in enumerate(pairs) if pair]
        scores: list[dict[str, float]] = [{} for _ in requests]
        if carrying:
            prompts = [requests[i].prompt for i in carrying]
            first, second = (self.losses(model, prompts, [pairs[i][side] for i in carrying]) for side in (0, 1))
            for i, likelier, less_likely in zip(carrying, first.tolist(), second.tolist(), strict=True):
                scores[i] = {"contrast": float(likelier < less_likely)}
        return scores

    @torch.no_grad()
    def losses(self, model: "EditableModel", prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Returns the (B,) mean negative log-likelihoods per token of answers to prompts, end token left out."""
        logits, batch = model.labelled_logits(model.encode_batch(prompts, answers))
        assert batch.labels is not None
        assert batch.content is not None
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none"
        )
        return (losses * batch.content).sum(dim=1) / batch.content.sum(dim=1)

    def answers(self, model: "EditableModel", prompts: Sequence[str]) -> list[str | int]:
        return [text for text, _ in self.generate(model, prompts)]

    @torch.no_grad()
    def generate(self, model: "EditableModel", prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Answers prompts greedily to the end token or a newline, at most `max_new_tokens`.

        Returns:
            For each prompt the text, up to the newline, and the generated token ids with the end token.
        """
        batch = self.encode(model, prompts, side=self._generation_side).to(model.device)
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        tokenizer = model.tokenizer
        stops = [tokenizer.eos_token_id, *_newline_ids(tokenizer)]
        with model.querying(batch.query):
            output = model.module.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=self.max_new_tokens,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        results = []
        for row in output[:, self._n_given(inputs) :].tolist():
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            ids = row[:end]
            results.append((tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0].strip(), ids))
        return results

    _generation_side: ClassVar[PaddingSide]

    @abstractmethod
    def _n_given(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns how many tokens of a generated row were given."""


class QuestionAnswering(_Generating):
    """Short answers of an encoder-decoder model; scored by SQuAD token F1 on free generation."""

    name = "qa"
    auto_class = "AutoModelForSeq2SeqLM"
    _generation_side = "right"

    def encode(  # noqa: D102
        self,
        model: "EditableModel",
        prompts: Sequence[str],
        targets: Sequence[str | int] | None = None,
        *,
        side: PaddingSide | None = None,
    ) -> EncodedBatch:
        return encoding.encode_seq2seq(
            model.tokenizer,
            prompts,
            None if targets is None else [str(target) for target in targets],
            side=side or "right",
            max_length=least(model.max_length, self.max_input_tokens),
            max_target_length=self.max_target_tokens,
            decoder_start=model.config.decoder_start_token_id,
            query_in_decoder=model.layer_in_decoder,
        )

    def _n_given(self, inputs: Mapping[str, Tensor]) -> int:
        return 1


class Completion(_Generating):
    """The continuation of a prompt by a causal language model; scored by SQuAD token F1 on free generation."""

    name = "completion"
    auto_class = "AutoModelForCausalLM"
    _generation_side = "left"

    def encode(  # noqa: D102
        self,
        model: "EditableModel",
        prompts: Sequence[str],
        targets: Sequence[str | int] | None = None,
        *,
        side: PaddingSide | None = None,
    ) -> EncodedBatch:
        return encoding.encode_causal(
            model.tokenizer,
            prompts,
            None if targets is None else [str(target) for target in targets],
            side=side or "right",
            max_length=model.max_length,
            max_prompt_length=least(
                None if model.max_length is None else max(1, model.max_length - self.max_new_tokens),
                self.max_input_tokens,
            ),
            max_target_length=self.max_target_tokens,
        )

    def _n_given(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs["input_ids"].shape[1]


class LanguageModelling(Task):
    """Sentences that follow a text, or running text; scored by perplexity, the mean over texts.

    A sentence that is edited into running text is not followed by an end token, in training or in scoring.
    """

    name = "language_modelling"
    auto_class = "AutoModelForCausalLM"
    main_score = "perplexity"
    higher_is_better = False

    def encode(  # noqa: D102
        self,
        model: "EditableModel",
        prompts: Sequence[str],
        targets: Sequence[str | int] | None = None,
        *,
        side: PaddingSide | None = None,
    ) -> EncodedBatch:
        return encoding.encode_causal(
            model.tokenizer,
            prompts,
            None if targets is None else [str(target) for target in targets],
            side=side or "right",
            max_length=model.max_length,
            max_prompt_length=self.max_input_tokens,
            max_target_length=self.max_target_tokens,
            end_token=False,
            prefix_length=self.prefix_length if self.query == "prefix" else None,
        )

    def score_batch(self, model: "EditableModel", requests: Sequence[EditRequest]) -> list[ItemScore]:  # noqa: D102
        logits, batch = model.labelled_logits(
            model.encode_batch([request.prompt for request in requests], [str(request.target) for request in requests])
        )
        assert batch.labels is not None
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none"
        )
        counts = (batch.labels != IGNORED).sum(dim=1)
        totals = losses.double().sum(dim=1)
        noted = _noted(model.last_state, len(requests))
        return [
            ItemScore(score=math.exp(min(total / count, 700.0)) if count else math.nan, n_tokens=count, **note)
            for total, count, note in zip(totals.tolist(), counts.tolist(), noted, strict=True)
        ]

    def aggregate(self, items: Sequence[ItemScore]) -> dict[str, float]:
        """Adds the perplexity of all tokens together, and the share of texts whose own is above 1,000.

        They are `perplexity_weighted` and `perplexity_outliers`.
        """
        means = super().aggregate(items)
        finite = [item for item in items if not math.isnan(item.score)]
        n_tokens = sum(item.n_tokens for item in finite)
        nll = sum(math.log(item.score) * item.n_tokens for item in finite)
        means["perplexity_weighted"] = math.exp(nll / n_tokens) if n_tokens else math.nan
        means["perplexity_outliers"] = _mean(float(item.score > _OUTLIER) for item in finite)
        return means


_TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, QuestionAnswering, Completion, LanguageModelling)
}


def get_task(name: str, **settings: Any) -> Task:
    """Returns the task of that name.

    Raises:
        UserError: If there is none, with the closest one that exists.
    """
    if name not in _TASKS:
        raise UserError(f"no task {name!r}{did_you_mean(name, _TASKS)} (there are: {', '.join(_TASKS)})")
    return _TASKS[name](**settings)


def contrast_of(request: EditRequest) -> tuple[str, ...]:
    """Returns the two answers that a request compares, of which the first should be the likelier; () without any."""
    return request.contrast or ()


def _noted(state: "QueryState", n_rows: int) -> list[dict[str, Any]]:
    """What hooks noted of each row while its prompt was read."""
    columns = {
        name: column.unbind() if name == "query" else column.tolist()
        for name, column in (
            ("entry", state.entry),
            ("distance", state.distance),
            ("contested", state.contested),
            ("query", state.activation),
        )
        if column is not None
    }
    return [{name: column[row] for name, column in columns.items()} for row in range(n_rows)]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


@lru_cache(maxsize=8)
def _newline_ids(tokenizer: Any) -> tuple[int, ...]:
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if "\n" in text)
