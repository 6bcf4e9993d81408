"""The settings of a run beside its stream, model and editor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from grace_bench.common.options import check_choice, check_whole
from grace_bench.common.scores import Stop
from grace_bench.data.stream import Normalise, Order
from grace_bench.models.engine.engine import EngineName
from grace_bench.models.tokens import SpecialTokens, TargetSpace, TextFormat

EditedRequests = Literal["errors", "all"]
"""Which of the requests that a run reaches are edited."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run edits and evaluates.

    Attributes:
        edit: Which of the requests reached are edited: `errors`, those that the model, as edited so far, gets wrong, or
            `all`.
        edits_at_once: How many requests are reached together. With `errors` all of them are judged before the first is
            edited. Editors that declare `edits_together` edit them as one batch, after which `n_edits` has grown by
            as many as were edited.
        max_edits: Stop at exactly this many edits; None for the whole stream.
        eval_every: Evaluate after every this many edits, or after every time `step` of the stream; and at the start and
            the end.
        score_after: What is scored right after each edit: its `target`, or `all` for its holdout requests, locality and
            portability probes too.
        max_upstream: Score at most this many upstream requests, spread evenly over the stream; None for all.

    Raises:
        UserError: If one of them is not a whole number of at least 1.
    """

    edit: EditedRequests = "errors"
    edits_at_once: int = 1
    max_edits: int | None = None
    eval_every: int | Literal["step"] = 50
    score_after: Literal["target", "all"] = "target"
    max_upstream: int | None = 500

    def __post_init__(self) -> None:
        check_choice("edit", self.edit, get_args(EditedRequests))
        check_whole("edits_at_once", self.edits_at_once, least=1)
        check_choice("score_after", self.score_after, ("target", "all"))
        if self.eval_every != "step":
            check_whole("eval_every", self.eval_every, least=1)
        for name in ("max_edits", "max_upstream"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=1)

    def is_due(self, n_edits: int, *, since: int | None = None) -> bool:
        """Returns whether an evaluation is due after `n_edits` edits; with `step`, `Position.is_due` knows.

        Args:
            n_edits: The number of edits.
            since: The number before the batch that was just edited; None if it was a single request.
        """
        if self.eval_every == "step":
            return False
        is_passed = since is not None and n_edits // self.eval_every > since // self.eval_every
        return is_passed or n_edits % self.eval_every == 0

    def changed(self) -> dict[str, Any]:
        """Returns the fields without those that are younger than checkpoints and have their default."""
        young = {"edit": "errors", "edits_at_once": 1, "score_after": "target"}
        return {name: value for name, value in vars(self).items() if young.get(name, ...) != value}

    def is_full(self, n_edits: int) -> bool:
        """Returns whether the run makes no more edits after `n_edits`."""
        return self.max_edits is not None and n_edits >= self.max_edits


@dataclass(frozen=True, kw_only=True)
class CapabilitySettings:
    """What is measured by lm-evaluation-harness, and when.

    Attributes:
        tasks: Names of tasks, groups or tags.
        every: Measure at the first evaluation after every so many edits, besides before the first edit and at the end.
        limit: Use only so many documents of each task; None for all.
        folders: Folders of task files.
    """

    tasks: Sequence[str]
    every: int | None = None
    limit: int | None = None
    folders: Sequence[Path] = ()


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a run needs beside its stream, model and editor.

    Attributes:
        seed: Shuffles the edits and seeds every random generator.
        schedule: When to edit and evaluate.
        split: `edits`, or `validation` for tuning.
        order: `shuffle` the edits by seed, or take them in the order of the `stream`; None for the stream's default.
        query: Where running text is queried: `prefix` or `last_token`.
        prefix_length: Tokens of running text that are read but not scored.
        normalise: How answers are normalised before they are compared: `squad` or `strict`; None for the stream's
            default.
        main_score: The score that ranks the results; None for the task's own.
        locality_score: The main score of locality probes; None for the same.
        stop: Where a free answer ends: at a `newline`, or at the first full stop of a `sentence` too.
        scores: The scores of the panel to compute; None for all but fluency.
        chat: Whether prompts go through the tokenizer's chat template.
        chat_system: The system message of the chat; None for none.
        target_space: The space between a prompt and its target: `auto`, `always` or `never`.
        special_tokens: What the names of special tokens in prompts and targets are: `text`, or `parse` for the tokens.
        batch_size: Maximum number of inputs in one forward pass of scoring.
        batch_tokens: Maximum number of tokens in such a pass, padding included. On a CPU at most 1,024, unless answers
            are generated.
        engine: `exact`, or `plain` to compute every pass in full and one input at a time, whatever `batch_size` is.
        engine_memory_mb: Memory limit of the exact engine's recordings between evaluations; None for a quarter of the
            free memory.
        threads: torch threads, or `auto` to choose by the model's size.
        tuning_budget: How the hyperparameters were chosen, as the leaderboard shows it.
        checkpoint_every: Write a checkpoint after every this many edits, and at the start.
        strict: Stop at the first edit that fails, instead of recording it and continuing.
        capability: What is measured by lm-evaluation-harness besides; None for nothing.
    """

    seed: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    split: str = "edits"
    order: Order | None = None
    query: str = "prefix"
    prefix_length: int = 8
    normalise: Normalise | None = None
    main_score: str | None = None
    locality_score: str | None = None
    stop: Stop = "newline"
    scores: Sequence[str] | None = None
    chat: bool = False
    chat_system: str | None = None
    target_space: TargetSpace = "auto"
    special_tokens: SpecialTokens = "text"
    batch_size: int = 64
    batch_tokens: int = 16384
    engine: EngineName = "exact"
    engine_memory_mb: int | None = None
    threads: int | Literal["auto"] = "auto"
    tuning_budget: str | None = None
    checkpoint_every: int = 50
    strict: bool = False
    capability: CapabilitySettings | None = None

    @property
    def text_format(self) -> TextFormat:
        """How prompts and targets are written as tokens.

        Raises:
            UserError: If a value is not one of its choices, or there is a system message without a chat.
        """
        return TextFormat(
            chat=self.chat,
            system=self.chat_system,
            target_space=self.target_space,
            special_tokens=self.special_tokens,
            stop=self.stop,
        )
