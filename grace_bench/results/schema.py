"""The records of a run, from an edit to the result, as they are written to disk."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, PlainSerializer, SerializerFunctionWrapHandler, model_serializer

from grace_bench.common.files import hash_file
from grace_bench.common.scores import ITEM_SCORES

SCHEMA_VERSION = 1
PREDICTIONS = pa.schema(
    [
        ("n_edits", pa.int64()),
        ("stream", pa.string()),
        ("request_id", pa.string()),
        ("probe", pa.string()),
        ("score", pa.float64()),
        ("entry", pa.int64()),
        ("distance", pa.float64()),
        ("text", pa.string()),
        ("n_tokens", pa.int64()),
        *((name, pa.float64()) for name in ITEM_SCORES),
    ]
)
"""The columns of `predictions.parquet`; `score` is the main score, and the last ones are all scores by name."""
YOUNG_COLUMNS = frozenset(("n_tokens", *ITEM_SCORES))
"""The columns that runs made before they were recorded do not have."""

RUN_FILES = (
    "config.yaml",
    "edits.jsonl",
    "metrics.jsonl",
    "predictions.parquet",
    "editor/editor.json",
    "editor/editor.safetensors",
)
"""The files of a run folder whose hashes `result.json` records."""

# JSON has no NaN: a score that is not finite is written as null; metrics count such scores.
JsonFloat = Annotated[
    float | None,
    PlainSerializer(lambda x: None if x is None or not math.isfinite(x) else x, when_used="json"),
]


LONGEST_TEXT = 500
"""Characters of a prompt or a target after which an `EditRecord` cuts it."""


class EditRecord(BaseModel):
    """One candidate: a line of `edits.jsonl`.

    Attributes:
        index: Position in the run's order, from 0.
        id: The request's id.
        was_error: Whether the model, as edited so far, answered it wrongly; None where every candidate is an error.
        edited: Whether it was edited.
        n_edits: Edits made so far, this one included.
        prompt, target: The input and the target answer or label name, cut after `LONGEST_TEXT` characters; None in
            runs made before they were recorded.
        before_text, after_text: The answer before and after the edit.
        score_before, score_after: The main score before and after the edit; `score_after` is None if it was not edited.
        scores_after: All scores after the edit by name; empty if it was not edited, and in runs made before they were
            recorded.
        loss: Loss at the edit's last step.
        steps: Gradient steps taken.
        seconds: Duration of the edit, without scoring.
        failed: Why the edit failed; None if it succeeded.
        op, key, distance, n_keys: The codebook's operation, for editors that have a codebook.
    """

    model_config = ConfigDict(extra="forbid")

    index: int
    id: str
    was_error: bool | None
    edited: bool
    n_edits: int
    prompt: str | None = None
    target: str | None = None
    before_text: str
    after_text: str | None = None
    score_before: JsonFloat
    score_after: JsonFloat = None
    scores_after: dict[str, JsonFloat] = {}
    loss: JsonFloat = None
    steps: int = 0
    seconds: float = 0.0
    failed: str | None = None
    op: str | None = None
    key: int | None = None
    distance: JsonFloat = None
    n_keys: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation as read from its line of `metrics.jsonl`.

    Attributes:
        n_edits: Edits made before it.
        metrics: Values by metric name; None for a value that is not finite.
    """

    n_edits: int
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Everything that one evaluation measured; every file and view of a run is written from it.

    Attributes:
        n_edits: Edits made before it.
        metrics: The values that metrics emitted since the previous evaluation, by name, in the order of emission;
            the last value where a metric emitted several.
        predictions: One row an item, with the columns of `PREDICTIONS`.
    """

    n_edits: int
    metrics: Mapping[str, float]
    predictions: Sequence[Mapping[str, Any]]

    def line(self) -> str:
        """Returns the line of `metrics.jsonl`; values that are not finite, which JSON does not know, are null."""
        finite = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return json.dumps({"n_edits": self.n_edits, **finite}) + "\n"


@dataclass(frozen=True, kw_only=True)
class CapabilityScores:
    """What a model can do that no stream asks.

    Attributes:
        scores: The score of each task of lm-evaluation-harness, by its name.
        mean: The mean over the tasks whose score is better when it is higher; None if there is none.
        drop: How far that mean has fallen since before the first edit; None before it.
        drop_stderr: The standard error of `drop`; None if it is not known.
    """

    scores: Mapping[str, float]
    mean: float | None
    drop: float | None = None
    drop_stderr: float | None = None


class EvaluationLine(BaseModel):
    """Validates a line of `metrics.jsonl`."""

    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, float | None]
    n_edits: int


class StreamInfo(BaseModel):
    """The stream of a run.

    Attributes:
        left_out: How many records of its source the stream does not use, by reason.
        unanswerable: How many targets of its candidates no free answer can equal, by reason.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    task: str
    fingerprint: str
    n_candidates: int
    left_out: dict[str, int] = {}
    unanswerable: dict[str, int] = {}
    source: str
    revision: str
    license: str


class ModelInfo(BaseModel):
    """The model of a run.

    Attributes:
        fingerprint: SHA-256 of its weights.
        config_fingerprint: SHA-256 of its configuration and tokenizer; None in runs made before it was recorded.
        files: SHA-256 of the files in its folder; None for a hub model, and in runs made before it was recorded.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    path: str
    fingerprint: str
    config_fingerprint: str | None = None
    files: str | None = None
    layer: str
    dtype: str
    n_parameters: int


class EditorInfo(BaseModel):
    """The editor of a run, with its settings."""

    model_config = ConfigDict(extra="allow")

    name: str


class Protocol(BaseModel):
    """The protocol of a run: what is scored, when and how. A leaderboard never mixes two protocols.

    Fields with a default were recorded later than the others; runs made before had the default.

    Attributes:
        order: Whether the candidates were shuffled, or taken in the order of the stream.
        edit: Which requests were edited: those that the model got wrong, or all.
        edits_at_once: How many requests were reached together.
        normalise: How answers were normalised before they were compared.
        locality_score: The main score of locality probes; None for `main_score`.
        stop: Where free answers ended.
        score_after: What was scored right after each edit.
        scores: The scores that were asked for; None for all but fluency.
        shows_locality: Whether the editor was shown the locality probes that it is tested on.
        capability_tasks: The tasks by which capability was measured; None without.
        capability_limit: How many documents of each task were used; None for all.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    split: str
    edit: Literal["errors", "all"] = "errors"
    edits_at_once: int = 1
    order: Literal["shuffle", "stream"] = "shuffle"
    main_score: str
    locality_score: str | None = None
    higher_is_better: bool
    max_edits: int | None
    eval_every: int | Literal["step"]
    score_after: Literal["target", "all"] = "target"
    scores: list[str] | None = None
    max_upstream: int | None
    max_new_tokens: int
    max_input_tokens: int | None = None
    max_target_tokens: int | None = None
    decoding: Literal["greedy"] = "greedy"
    query: str
    prefix_length: int
    normalise: Literal["squad", "strict"] = "squad"
    stop: Literal["newline", "sentence"] = "newline"
    chat: bool = False
    chat_system: str | None = None
    target_space: str = "auto"
    special_tokens: str = "text"
    shows_locality: bool = False
    capability_tasks: list[str] | None = None
    capability_limit: int | None = None
    tuning_budget: str | None = None


class Cost(BaseModel):
    """What a run cost.

    Attributes:
        seconds_per_edit_p50, seconds_per_edit_p95: Quantiles of the duration of an edit.
        edit_seconds, eval_seconds: Total time of editing, and of scoring candidates and streams.
        peak_rss_mb, peak_gpu_mb: Peak memory of the process, and of torch on the GPU.
        extra_parameters: Parameters that the editor adds to the model.
    """

    model_config = ConfigDict(extra="forbid")

    seconds_per_edit_p50: float | None
    seconds_per_edit_p95: float | None
    edit_seconds: float
    eval_seconds: float
    peak_rss_mb: float
    peak_gpu_mb: float | None
    extra_parameters: int


class RunResult(BaseModel):
    """The record of one run: `result.json`.

    Attributes:
        configuration: SHA-256 of the resolved configuration (`launch.run_config.hash_config`).
        files: SHA-256 of the other files of the run folder, by path in it.
        digest: SHA-256 of the rest of the record (`digest_of`).
        reduced_from: In a reduced run (`results.reduced`), the digest of the record that it was made from; None, and
            not in the file, in a run as it ended.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    run_id: str
    status: Literal["finished"] = "finished"
    stream: StreamInfo
    model: ModelInfo
    editor: EditorInfo
    protocol: Protocol
    seed: int
    before: dict[str, JsonFloat]
    metrics: dict[str, JsonFloat]
    cost: Cost
    environment: dict[str, Any]
    configuration: str | None = None
    files: dict[str, str] = {}
    digest: str | None = None
    reduced_from: str | None = None

    @property
    def is_reduced(self) -> bool:
        """Whether its folder has only a part of the files that the run left."""
        return self.reduced_from is not None

    @model_serializer(mode="wrap")
    def _without_absent_origin(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        return {name: value for name, value in content.items() if value is not None or name != "reduced_from"}


def sealed(result: RunResult, folder: Path) -> RunResult:
    """Returns the result with the hashes of the files in its folder and its own digest."""
    files = {name: hash_file(folder / name) for name in RUN_FILES if (folder / name).is_file()}
    whole = result.model_copy(update={"files": files})
    return whole.model_copy(update={"digest": digest_of(json.loads(whole.model_dump_json()))})


def digest_of(record: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of the content of a `result.json` without its digest."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
