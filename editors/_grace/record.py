"""The format of recorded runs of GRACE."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from grace_bench.common.files import readable
from grace_bench.editing.commands import OtherRecordError
from grace_bench.errors import UserError, first_error

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]

_FAMILY_TASKS = {"t5": "qa", "bert": "scotus", "gpt2": "hallucination"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Kind(BaseModel):
    """What tells the recordings of other editors apart."""

    editor: object = None


class RecordedEdit(_Strict):
    """One edit of a record: token ids, and label ids (one class id for a classifier)."""

    input_ids: Ids
    labels: Ids


class RecordedStep(_Strict):
    """The recorded editor's behaviour on one edit.

    Attributes:
        op: `add` if there is a new entry and no older radius changed, `split` if one did; without a new entry `expand`
            if a radius changed, else `hit`.
        n_keys: Entries afterwards.
        epsilons: All radii afterwards, rounded to six decimals.
        chosen_key: The entry that answered the last training step.
        loss_first: Loss at the first training step.
        loss_last: Loss at the last training step.
    """

    op: Literal["add", "expand", "split", "hit"]
    n_keys: int
    epsilons: list[float]
    chosen_key: int
    loss_first: float
    loss_last: float


class RecordedSettings(_Strict):
    """The hyperparameters of the recorded editor."""

    eps_init: Annotated[float, Field(gt=0)]
    n_iter: Annotated[int, Field(ge=1)]
    lr: Annotated[float, Field(gt=0)]
    value_init: Literal["warm", "cold"]
    replacement: Literal["replace_last", "replace_all", "replace_prompt"]
    eps_expand: Literal["coverage"]
    distance: Literal["euclidean"]


class Record(_Strict):
    """A recorded run of GRACE: the format of the files that `grace-bench verify` reads (`docs/fidelity.md`)."""

    source: str
    torch: str
    transformers: str
    family: Literal["t5", "bert", "gpt2"]
    layer: Annotated[str, Field(min_length=1)]
    task: Literal["qa", "scotus", "hallucination"]
    seed: int
    grace: RecordedSettings
    edits: Annotated[list[RecordedEdit], Field(min_length=1)]
    trace: list[RecordedStep]
    probes: list[Ids]
    probe_last_logits: list[list[float]]
    initial_values: list[list[float]] | None = None

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.task != _FAMILY_TASKS[self.family]:
            raise ValueError(f"field 'task': {self.task!r} is not what a {self.family} model is recorded on")
        if len(self.trace) != len(self.edits):
            raise ValueError(f"field 'trace': {len(self.trace)} steps for {len(self.edits)} edits")
        if len(self.probe_last_logits) != len(self.probes):
            raise ValueError(
                f"field 'probe_last_logits': {len(self.probe_last_logits)} rows for {len(self.probes)} probes"
            )
        if self.grace.value_init == "cold" and self.initial_values is None:
            raise ValueError("field 'initial_values': missing, and cold values cannot be known without it")
        return self


def read_record(path: Path) -> Record:
    """Reads a record.

    Raises:
        OtherRecordError: If it names the editor that it is of, which those of GRACE do not.
        UserError: If the file is missing or damaged, naming the field.
    """
    try:
        content = readable(path).read_text(encoding="utf-8")
        if "editor" in _Kind.model_validate_json(content).model_fields_set:
            raise OtherRecordError(f"{path}: is no recording of GRACE")
        return Record.model_validate_json(content)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error).removeprefix('Value error, ')}") from error
