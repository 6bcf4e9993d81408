"""The validated records that a run leaves on disk."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from grace_bench.common.files import hash_file, readable
from grace_bench.errors import UserError

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
    ]
)
"""The columns of `predictions.parquet`."""
_NEVER_NULL = ("n_edits", "stream", "request_id", "probe")

RUN_FILES = (
    "config.yaml",
    "edits.jsonl",
    "metrics.jsonl",
    "predictions.parquet",
    "editor/editor.json",
    "editor/editor.safetensors",
)
"""The files of a run folder whose hashes `result.json` has."""

Line = TypeVar("Line", bound=BaseModel)

# JSON has no NaN: a score that is not a number is written as null, and counted beside it.
JsonFloat = Annotated[
    float | None,
    PlainSerializer(lambda x: None if x is None or not math.isfinite(x) else x, when_used="json"),
]


LONGEST_TEXT = 500
"""Characters of a prompt or a target that a record of an edit keeps: enough to know it by."""


class EditRecord(BaseModel):
    """One candidate: a line of `edits.jsonl`.

    Attributes:
        index: Position in the run's order, from 0.
        id: The request's id.
        was_error: Whether the model, as edited so far, got it wrong; None where every candidate is an error.
        edited: Whether it was edited.
        n_edits: Edits made so far, this one included.
        prompt, target: The input and the wanted answer, or its label's name, cut after `LONGEST_TEXT` characters; None
            where they were not recorded.
        before_text, after_text: The answer before and after the edit.
        score_before, score_after: The main score before and after; after is None if it was not edited.
        loss: Loss at the edit's last step.
        steps: Gradient steps taken.
        seconds: Time the edit took, scoring excluded.
        failed: Why the edit could not be made.
        op, key, distance, n_keys: What the codebook did, for editors that have one.
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
    """One evaluation: a line of `metrics.jsonl`.

    Attributes:
        n_edits: Edits made before it.
        metrics: Figures by metric name; None for one that is not a number.
    """

    n_edits: int
    metrics: Mapping[str, float | None]


class _EvaluationLine(BaseModel):
    model_config = ConfigDict(extra="allow")

    __pydantic_extra__: dict[str, float | None]
    n_edits: int


class StreamInfo(BaseModel):
    """The stream of a run; `left_out` counts the records of its source that are in no role, by reason."""

    model_config = ConfigDict(extra="forbid")

    name: str
    task: str
    fingerprint: str
    n_candidates: int
    left_out: dict[str, int] = {}
    source: str
    revision: str
    license: str


class ModelInfo(BaseModel):
    """The model of a run.

    Attributes:
        fingerprint: SHA-256 of its weights.
        config_fingerprint: SHA-256 of its configuration and tokenizer; None where it was not recorded.
        files: SHA-256 of the files in its folder; None for one of the hub, and where it was not recorded.
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
    """What was scored, when, how decoded and where queried. Results of two protocols are never ranked together."""

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    split: str
    main_score: str
    higher_is_better: bool
    max_edits: int | None
    eval_every: int
    max_upstream: int | None
    max_new_tokens: int
    max_input_tokens: int | None = None
    max_target_tokens: int | None = None
    decoding: Literal["greedy"] = "greedy"
    query: str
    prefix_length: int
    tuning_budget: str | None = None


class Cost(BaseModel):
    """What a run cost.

    Attributes:
        seconds_per_edit_p50, seconds_per_edit_p95: Quantiles of the time an edit took.
        edit_seconds, eval_seconds: Time in editing, and in scoring candidates and streams.
        peak_rss_mb, peak_gpu_mb: Peak memory of the process, and of torch on the GPU.
        extra_parameters: How many numbers the editor adds to the model.
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
        configuration: SHA-256 of the resolved configuration (`config.hash_config`).
        files: SHA-256 of the other files of the run folder, by path in it.
        digest: SHA-256 of everything else in the record (`digest_of`).
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


def sealed(result: RunResult, folder: Path) -> RunResult:
    """Returns the result with the hashes of the files in its folder, and its own."""
    files = {name: hash_file(folder / name) for name in RUN_FILES if (folder / name).is_file()}
    whole = result.model_copy(update={"files": files})
    return whole.model_copy(update={"digest": digest_of(json.loads(whole.model_dump_json()))})


def digest_of(record: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of what a `result.json` holds, its own digest aside."""
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_edits(path: Path) -> dict[str, EditRecord]:
    """Reads an `edits.jsonl` by request id.

    Raises:
        UserError: If it is missing or a line is broken, naming file, line and field.
    """
    return {record.id: record for record in _read_lines(path, EditRecord)}


def read_evaluations(path: Path) -> list[Evaluation]:
    """Reads a `metrics.jsonl`, in its order.

    Raises:
        UserError: If it is missing or a line is broken, naming file, line and field.
    """
    return [
        Evaluation(n_edits=line.n_edits, metrics=line.model_extra or {}) for line in _read_lines(path, _EvaluationLine)
    ]


def read_predictions(path: Path, *, columns: Sequence[str], filters: Sequence[tuple[str, str, Any]] = ()) -> list[Any]:
    """Reads rows of a `predictions.parquet`, each as a dictionary of the columns asked for.

    Args:
        path: The file.
        columns: The columns to read.
        filters: Conditions that all must hold, as `pyarrow.parquet.read_table` takes them.

    Raises:
        UserError: If it cannot be read, or a column is missing, of another type, or without values it should have.
    """
    try:
        schema = pq.read_schema(readable(path))
        for field in PREDICTIONS:
            if field.name not in schema.names or schema.field(field.name).type != field.type:
                raise UserError(f"{path}: column '{field.name}' should be {field.type}")
        table = pq.read_table(path, columns=list(columns), filters=list(filters) or None)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    for name in _NEVER_NULL:
        if name in table.column_names and table[name].null_count:
            raise UserError(f"{path}: column '{name}' has rows without a value")
    return table.to_pylist()


def read_result(path: Path) -> RunResult:
    """Reads a `result.json`.

    Raises:
        UserError: If it is missing, broken or of another schema version, naming the file and the field.
    """
    try:
        text = readable(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    try:
        header = _Header.model_validate_json(text)
        if header.schema_version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {header.schema_version}, this grace-bench reads {SCHEMA_VERSION}")
        return RunResult.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from error


class _Header(BaseModel):
    schema_version: int


def _read_lines(path: Path, model: type[Line]) -> list[Line]:
    try:
        # Not splitlines, which also breaks at characters that may stand in a text.
        lines = readable(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(model.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}:{number}: {first_error(error)}") from error
    return records


def first_error(error: ValidationError) -> str:
    """Returns pydantic's first complaint as `field 'x.y': message`."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"field '{where}': {first['msg']}" if where else first["msg"]
