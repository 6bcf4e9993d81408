"""Tasks: all differences between classification, question answering, completion and language modelling.

A task encodes text, defines the loss, says what an error is and scores answers. Nothing else in the harness branches on
the kind of model.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, ClassVar, TypeVar, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.nn import functional

from grace_bench.common.options import check_choice, check_whole
from grace_bench.common.progress import Progress
from grace_bench.common.scores import ScoreInfo, check_scores, score_info
from grace_bench.data.requests import DerivedRequest, EditRequest, TaskName, Unedited
from grace_bench.data.stream import Normalise
from grace_bench.errors import UserError
from grace_bench.models.calls import QueryState
from grace_bench.models.encoding import IGNORED, EncodedBatch, PaddingSide, check_texts, least
from grace_bench.models.network import Network, agree
from grace_bench.models.tasks.token_scores import perplexity_outliers, perplexity_weighted
from grace_bench.models.tokens import PromptTokenizer, TextFormat

Row = TypeVar("Row")

_CPU_BATCH_TOKENS = 1024
"""Maximum number of tokens per scoring batch on a CPU: on two cores larger ones are no faster (docs/performance.md).

The smaller a batch, the fewer inputs are rescored along with one that changed.
"""


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """The model's answer to one request, with its scores.

    Attributes:
        score: The main score; NaN if the item lacks it.
        text: The answer as text; empty for language modelling.
        correct: Whether the answer counts as right; None in tasks where every candidate is an error.
        others: Its other scores by name, those that it lacks left out.
        n_tokens: Number of scored tokens, for the token-weighted perplexity.
        entry: The codebook entry that answered, -1 for none; None without a codebook or with an empty one.
        distance: Distance of the query to the nearest entry.
        contested: Whether the query lies in the balls of two different labels.
        query: (D_in,) input of the edited layer at the query, if a hook recorded it.
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
        """Returns all fields but the query, as JSON values."""
        return {**{name: value for name, value in vars(self).items() if name != "query"}, "others": dict(self.others)}


@dataclass(frozen=True, kw_only=True)
class Answerability:
    """How many targets a free answer can equal.

    Attributes:
        n_targets: The number of targets.
        unanswerable: How many of them no free answer can equal, by reason.
        n_given_back: How many of them are accepted only as the tokenizer gives them back.
    """

    n_targets: int = 0
    unanswerable: Mapping[str, int] = field(default_factory=dict)
    n_given_back: int = 0

    def lines(self) -> list[str]:
        """Returns what a user should know before the run, in single lines; none if every target can be answered.

        >>> Answerability(n_targets=20, unanswerable={"longer than max_new_tokens=16": 17}).lines()
        ['17 of 20 targets cannot be answered freely: longer than max_new_tokens=16']
        """
        lines = []
        if self.unanswerable:
            counts = [f"{reason} ({number})" for reason, number in self.unanswerable.items()]
            reasons = counts if len(counts) > 1 else self.unanswerable
            n_lacking = sum(self.unanswerable.values())
            lines.append(f"{n_lacking} of {self.n_targets} targets cannot be answered freely: {', '.join(reasons)}")
        if self.n_given_back:
            accepted = "is accepted as the tokenizer gives it back"
            if self.n_given_back > 1:
                accepted = "are accepted as the tokenizer gives them back"
            lines.append(f"{self.n_given_back} of {self.n_targets} targets {accepted}")
        return lines


class Task(ABC):
    """One way of using a model.

    Args:
        max_new_tokens: The longest free answer.
        query: `prefix` queries running text after `prefix_length` tokens and scores the rest; `last_token` queries its
            last token and scores everything, as the official GRACE code does.
        prefix_length: Number of tokens at the start of running text that are read and not scored.
        normalise: How answers in text are normalised before they are compared: `squad` or `strict`.
        batch_size: Maximum number of inputs in one forward pass of scoring. Inputs are grouped by length.
        batch_tokens: Maximum number of tokens in such a pass, padding included; a longer input gets a pass of its own.
            On a CPU, a pass without generation has at most 1,024.
        max_input_tokens: Prompts are cut to this length; None for the model's own limit.
        max_target_tokens: Targets, end token included, and the answers accepted beside them are cut to this length.
        label_names: The names of the label ids, for display; classification only.
        format: How prompts and targets are written as tokens.
        main_score: The score that ranks the results; None for the task's own.
        locality_score: The main score of locality probes; None for `main_score`.
        scores: The scores to compute besides the main ones; None for all that need no long generation.

    Raises:
        UserError: If an option is not one of its choices, or a number is out of range, naming it.
    """

    name: ClassVar[TaskName]
    auto_class: ClassVar[str]
    """The transformers class that loads a model for this task."""
    model_kind: ClassVar[str]
    """The kind of model that this class loads, with its article."""
    main_score: str
    """The score that ranks the results; the class has the task's own."""
    panel: ClassVar[tuple[str, ...]]
    """All scores that the task can compute."""
    generates: bool = False
    """Whether answers are generated token by token, each of which reads all weights once per batch."""
    carried_scores: ClassVar[frozenset[str]] = frozenset(
        ("contains", "token_accuracy", "contrast", "agreement", "token_agreement", "gold", "fluency")
    )
    """Scores that exist only for requests with what they need, if only a target that says something."""
    reads_running_text: ClassVar[bool] = False
    """Whether an empty prompt makes its target running text."""
    takes_chat: ClassVar[bool] = False
    """Whether prompts are questions, which can be put into a chat."""

    def __init__(
        self,
        *,
        max_new_tokens: int = 16,
        query: str = "prefix",
        prefix_length: int = 8,
        normalise: Normalise = "squad",
        batch_size: int = 64,
        batch_tokens: int = 16384,
        max_input_tokens: int | None = None,
        max_target_tokens: int | None = None,
        label_names: Sequence[str] = (),
        format: TextFormat | None = None,
        main_score: str | None = None,
        locality_score: str | None = None,
        scores: Sequence[str] | None = None,
    ) -> None:
        check_choice("protocol.query", query, ("prefix", "last_token"))
        check_choice("protocol.normalise", normalise, get_args(Normalise))
        check_whole("batch_tokens", batch_tokens, least=1)
        for option, limit in (("max_input_tokens", max_input_tokens), ("max_target_tokens", max_target_tokens)):
            if limit is not None:
                check_whole(option, limit, least=1)
        self.max_new_tokens = max_new_tokens
        self.query = query
        self.prefix_length = prefix_length
        self.normalise: Normalise = normalise
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.label_names = tuple(label_names)
        self.format = format or TextFormat()
        if self.format.chat and not self.takes_chat:
            raise UserError(f"chat=true is for qa and completion, not for {self.name}")
        check_scores("scores", scores)
        named = (("protocol.main_score", main_score), ("protocol.locality_score", locality_score))
        for option, name in (*named, *(("scores", name) for name in scores or ())):
            if name is not None and name not in self.panel:
                raise UserError(f"{option}={name}: {self.name} has no such score (it has {', '.join(self.panel)})")
        for option, name in named:
            if name is not None and score_info(name).pooling != "mean":
                raise UserError(f"{option}={name} is no mean over items: --score={name} ranks finished runs by it")
        if main_score is not None and score_info(main_score).only_for_locality:
            raise UserError(f"protocol.main_score={main_score} exists only for locality: see protocol.locality_score")
        self.main_score = main_score or type(self).main_score
        self.locality_score = locality_score or self.main_score
        default = (name for name in self.panel if not score_info(name).is_optional)
        self.scores = frozenset((*(default if scores is None else scores), self.main_score, self.locality_score))
        self._tokens: PromptTokenizer | None = None
        self._counts: dict[tuple[str, bool], int] = {}

    @property
    def higher_is_better(self) -> bool:
        """The direction of the main score."""
        return score_info(self.main_score).higher_is_better

    @property
    def compares_with_unedited(self) -> bool:
        """Whether a score of locality probes needs the unedited model."""
        return not self.scores.isdisjoint(("agreement", "token_agreement"))

    # What each task defines.

    @abstractmethod
    def misfit(self, model: Network) -> str | None:
        """Returns what the task needs and the model lacks, as a noun phrase; None if the model can serve the task."""

    @abstractmethod
    def _encode(
        self,
        model: Network,
        texts: Sequence[str],
        targets: Sequence[str | int] | None,
        side: PaddingSide,
        *,
        prompts: Sequence[str],
    ) -> EncodedBatch:
        """Implements `encode`, on the CPU, for the texts that the model reads in place of prompts."""

    @abstractmethod
    def score_batch(self, model: Network, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests of similar length, in one batch."""

    def answers(self, model: Network, prompts: Sequence[str]) -> list[str | int]:
        """Returns the model's own answers as targets: label ids, or free text.

        Raises:
            UserError: For a task without questions.
        """
        raise UserError(f"task {self.name} has no answers to ask a model for")

    def count_labels(self, model: Network, prompt: str) -> int | None:
        """Returns the number of labels that the model has for a prompt; None for tasks that answer in text."""
        return None

    def check_targets(self, model: Network, requests: Iterable[EditRequest]) -> None:  # noqa: B027 - most tasks take any
        """Makes sure that the model can give every target.

        Raises:
            UserError: If a target is a class that the model does not have, naming the request.
        """

    def answerability(self, model: Network, requests: Sequence[EditRequest]) -> Answerability:
        """Returns how many targets of requests a free answer can equal."""
        return Answerability(n_targets=len(requests))

    def longest_target(self, model: Network, requests: Sequence[EditRequest]) -> int | None:
        """Returns how many tokens the longest accepted answer has with its end token; None without free answers."""
        return None

    def check_reading(self, model: Network, request: EditRequest) -> None:  # noqa: B027 - most models may read ahead
        """Makes sure that the model can answer a request, and reads texts in the direction that the task needs.

        Raises:
            UserError: If it fails, or if tokens change what a causal model makes of those before them.
        """

    # Text in, batches out.

    def tokens(self, model: Network) -> PromptTokenizer:
        """Returns the model's tokenizer, used in the task's format.

        Raises:
            UserError: If the format needs a chat template that the tokenizer does not have.
        """
        if self._tokens is None or self._tokens.tokenizer is not model.tokenizer:
            self._tokens = PromptTokenizer(model.tokenizer, self.format)
        return self._tokens

    def encode(
        self,
        model: Network,
        prompts: Sequence[str],
        targets: Sequence[str | int] | None = None,
        *,
        side: PaddingSide = "right",
    ) -> EncodedBatch:
        """Encodes prompts on the model's device: with targets for losses and teacher-forced scores, else for answering.

        Where an editor changes which text is read (`Network.intercept_prompts`), that text is encoded, for the network
        that answers it.

        Args:
            model: The model.
            prompts: B texts, at least one.
            targets: B texts or label ids.
            side: The padding side.

        Raises:
            UserError: If the prompts are not a list of texts, there is not one target for each, or a target is a class
                that the model does not have.
        """
        check_texts("prompts", prompts)
        if not prompts:
            raise UserError("prompts=[] should hold at least one text")
        if targets is not None and (isinstance(targets, str) or len(targets) != len(prompts)):
            raise UserError(f"targets={targets!r} should be a list of {len(prompts)}, one for each prompt")
        readings = model.readings(prompts)
        batch = self._encode(model, [reading.text for reading in readings], targets, side, prompts=prompts)
        networks = tuple(reading.network for reading in readings)
        return replace(batch, networks=networks if any(networks) else ()).to(model.device)

    def size(self, model: Network, prompt: str, targets: Iterable[str | int] = ()) -> int:
        """Returns the maximum number of tokens in a forward pass of a prompt with any of the targets."""
        longest = max((self._count(model, str(target)) for target in targets), default=0)
        return least(self._count(model, prompt, is_prompt=True) + longest, model.max_length) or 1

    def _count(self, model: Network, text: str, *, is_prompt: bool = False) -> int:
        if is_prompt:
            (read,) = model.as_read([text])
            if read != text:
                # Not cached: there may be a new text after every edit.
                return len(read) if model.tokenizer is None else self.tokens(model).count_prompt(read)
        if model.tokenizer is None:
            return len(text)
        key = text, is_prompt and self.format.chat
        if key not in self._counts:
            tokens = self.tokens(model)
            self._counts[key] = tokens.count_prompt(text) if is_prompt else tokens.count(text)
        return self._counts[key]

    def batches(self, sizes: Sequence[int], *, most_tokens: int | None = None) -> Iterator[list[int]]:
        """Yields the indices of inputs of similar size together, within `batch_size` and `batch_tokens`.

        Args:
            sizes: Each input's length in tokens.
            most_tokens: A bound lower than `batch_tokens`.
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

    def together(self, model: Network, requests: Sequence[EditRequest]) -> Iterator[list[int]]:
        """Yields the indices of requests that are scored in one batch."""
        sizes = [self.size(model, r.prompt, (r.target, *(r.contrast or ()))) for r in requests]
        is_enough = model.layer_device.type == "cpu" and not self.generates
        return self.batches(sizes, most_tokens=_CPU_BATCH_TOKENS if is_enough else None)

    def by_length(
        self,
        model: Network,
        batch: EncodedBatch,
        score: Callable[[Network, EncodedBatch], Sequence[Row]],
        *,
        generates: bool = False,
    ) -> list[Row]:
        """Returns one result for each row of a batch.

        Rows that other networks answer are run apart, and so are rows of unequal length if padding changes answers.

        Args:
            model: The model.
            batch: The batch.
            score: Runs a batch with the network that answers it and returns a result for each of its rows.
            generates: Whether it generates answers.
        """
        results: dict[int, Row] = {}
        if batch.networks:
            for network, rows in batch.by_network():
                part = batch.rows(rows).own
                found = self.by_length(network or model, part, score, generates=generates)
                results.update(zip(rows, found, strict=True))
        elif model.pads(batch, generates=generates):
            return list(score(model, batch))
        else:
            for rows in batch.equally_long:
                results.update(zip(rows, score(model, batch.unpadded(rows)), strict=True))
        return [results[row] for row in range(len(batch))]

    # Answers and scores.

    @torch.no_grad()
    def score(self, model: Network, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests, in the order given; batches hold inputs of similar length."""
        results: dict[int, ItemScore] = {}
        for chunk in self.together(model, requests):
            results.update(zip(chunk, self.score_batch(model, [requests[i] for i in chunk]), strict=True))
        return [results[i] for i in range(len(requests))]

    @torch.no_grad()
    def ask(self, model: Network, prompts: Sequence[str], *, progress: Progress | None = None) -> list[str | int]:
        """Returns the model's own answers to any number of prompts, in the order given; batched as in `score`.

        Args:
            model: The model.
            prompts: The questions.
            progress: Called after every batch.

        Raises:
            UserError: For a task without questions.
        """
        results: dict[int, str | int] = {}
        for chunk in self.batches([self.size(model, prompt) for prompt in prompts]):
            results.update(zip(chunk, self.answers(model, [prompts[i] for i in chunk]), strict=True))
            if progress is not None:
                progress("answers of the unedited model", len(results), len(prompts))
        return [results[i] for i in range(len(prompts))]

    def named(self, target: str | int) -> str:
        """Returns a target for display: a label by its name, if it has one."""
        has_name = isinstance(target, int) and target < len(self.label_names)
        return self.label_names[int(target)] if has_name else str(target)

    @torch.no_grad()
    def unedited(
        self, model: Network, requests: Sequence[DerivedRequest], *, progress: Progress | None = None
    ) -> list[Unedited]:
        """Returns what the model, before its first edit, says to locality probes whose targets are known.

        Args:
            model: The model.
            requests: The probes.
            progress: Called after every batch.
        """
        results: dict[int, Unedited] = {}
        for chunk in self.batches([self.size(model, r.prompt, (r.target, r.reference)) for r in requests]):
            results.update(zip(chunk, self.unedited_batch(model, [requests[i] for i in chunk]), strict=True))
            if progress is not None:
                progress("locality of the unedited model", len(results), len(requests))
        return [results[i] for i in range(len(requests))]

    def unedited_batch(self, model: Network, requests: Sequence[DerivedRequest]) -> list[Unedited]:
        """Does what `unedited` does, for probes of similar length."""
        return [Unedited() for _ in requests]

    def main_of(self, stream: str) -> str:
        """Returns the main score of an evaluation stream."""
        return self.locality_score if stream == "locality" else self.main_score

    def item(self, request: EditRequest, scores: Mapping[str, float], **fields: Any) -> ItemScore:
        """Returns the scores of an item with the one that ranks it apart.

        Args:
            request: The request.
            scores: Its scores by the names of their columns (`ScoreInfo.column`).
            fields: The other fields of `ItemScore`.
        """
        is_locality = isinstance(request, DerivedRequest) and request.is_locality
        main = score_info(self.locality_score if is_locality else self.main_score).column
        others = {name: value for name, value in scores.items() if name != main}
        return ItemScore(score=scores.get(main, math.nan), others=others, **fields)

    def columns(self, item: ItemScore, *, stream: str) -> dict[str, float]:
        """Returns all scores of an item of an evaluation stream by column; the main one is NaN if the item lacks it."""
        return {**item.others, score_info(self.main_of(stream)).column: item.score}

    def aggregate(self, items: Sequence[ItemScore], *, stream: str = "") -> dict[str, float]:
        """Returns the main score of items under "", and every other score under its name.

        Those that exist for some requests only (`carried_scores`) are absent if no item has them.

        Scores that are NaN are left out. If there are items whose main score is NaN because the model's numbers are
        not finite, `n_nan` is their number.

        Args:
            items: The items of one stream.
            stream: The evaluation stream, if it has a main score of its own.
        """
        main = self.main_of(stream)
        found = [(item, self.columns(item, stream=stream)) for item in items]

        def pooled(info: ScoreInfo) -> float:
            known = [
                (item, value) for item, scores in found if not math.isnan(value := scores.get(info.column, math.nan))
            ]
            values = [value for _, value in known]
            if info.pooling == "tokens":
                return perplexity_weighted(values, [item.n_tokens for item, _ in known])
            if info.pooling == "outliers":
                return perplexity_outliers(values)
            if info.name == "token_accuracy" and info.name != main:
                # Runs so far computed it in float32.
                values = torch.tensor(values, dtype=torch.float32).tolist()
            return mean(values)

        has_main = main not in self.carried_scores or any(not math.isnan(item.score) for item in items)
        means = {"": pooled(score_info(main))} if has_main else {}
        for name in self.panel:
            info = score_info(name)
            is_there = name not in self.carried_scores or any(info.column in scores for _, scores in found)
            if name != main and name in self.scores and is_there:
                means[name] = pooled(info)
        n_nan = 0 if main in self.carried_scores else sum(math.isnan(item.score) for item in items)
        if n_nan:
            means["n_nan"] = float(n_nan)
        return means

    # Losses.

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
        """Whether the model gives every label of the batch, so that training can stop."""
        assert batch.labels is not None
        wrong = (logits.argmax(dim=-1) != batch.labels) & (batch.labels != IGNORED)
        return not bool(wrong.any())


@torch.no_grad()
def check_causal(task: Task, model: Network, request: EditRequest) -> None:
    """Compares the logits after a prompt with those that the model gives when the target follows.

    Raises:
        UserError: If they differ: an encoder was loaded as a causal model, for one.
    """
    prompt = request.prompt
    alone, followed = (task.encode(model, [prompt], targets) for targets in (None, [request.target]))
    while prompt.strip() and not torch.equal(alone.query, followed.query):
        # A prompt that is cut to make room for the target is another prompt.
        prompt = prompt[-(len(prompt) // 2) :] if len(prompt) > 1 else ""
        alone, followed = (task.encode(model, [prompt], targets) for targets in (None, [request.target]))
    if not prompt.strip():
        return
    with model.bypassing():
        own, other = (model.logits(batch)[0, batch.query[0]].float() for batch in (alone, followed))
    if not bool((own - other).isnan().any()) and not agree(other, own, model.dtype):
        raise UserError(
            f"model {model.name} is not causal: what follows a prompt changes how it reads the prompt; an encoder that "
            f"is to serve {task.name} has is_decoder=true in its config.json"
        )


def token_losses(logits: Tensor, batch: EncodedBatch) -> Tensor:
    """Returns the (B, T) negative log-likelihoods of a batch's labels, in float32; 0 at ignored positions."""
    assert batch.labels is not None
    return functional.cross_entropy(
        logits.float().transpose(1, 2), batch.labels, ignore_index=IGNORED, reduction="none"
    )


def notes_of(state: QueryState, n_rows: int) -> list[dict[str, Any]]:
    """Returns the records of hooks about each row at its prompt, as fields of `ItemScore`."""
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


def mean(values: Iterable[float]) -> float:
    """Returns the mean of the values that are numbers; NaN if there are none.

    >>> mean([1.0, math.nan, 2.0])
    1.5
    """
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan


def is_language_model(model: Network) -> bool:
    """Whether a model's outputs are tokens of a vocabulary: it generates, or has output embeddings."""
    module = model.module
    embeddings = getattr(module, "get_output_embeddings", None)
    return callable(getattr(module, "generate", None)) or (embeddings is not None and embeddings() is not None)
