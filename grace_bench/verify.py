"""Replays recorded traces of an editor and says whether ours does the same."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from grace_bench.encoding import EncodedBatch, causal_batch, pad, seq2seq_batch
from grace_bench.errors import UserError
from grace_bench.models import EditableModel
from grace_bench.registry import EDITORS
from grace_bench.results import first_error
from grace_bench.strategy import EditBatch
from grace_bench.types import TaskName

Ids = Annotated[list[int], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class RecordedEdit(_Strict):
    """One edit of a record: token ids, and label ids (one class id for a classifier)."""

    input_ids: Ids
    labels: Ids


class RecordedStep(_Strict):
    """What the recorded editor did on one edit."""

    op: Literal["add", "expand", "split", "hit"]
    n_keys: int
    epsilons: list[float]
    chosen_key: int
    loss_first: float
    loss_last: float


class RecordedSettings(_Strict):
    """The hyperparameters of the recorded editor."""

    eps_init: float
    n_iter: int
    lr: float
    value_init: Literal["warm", "cold"]
    replacement: Literal["replace_last", "replace_all", "replace_prompt"]
    eps_expand: Literal["coverage"]
    distance: Literal["euclidean"]


class Record(_Strict):
    """A recorded run of GRACE: the format of the files that `grace-bench verify` reads."""

    source: str
    torch: str
    transformers: str
    family: Literal["t5", "bert", "gpt2"]
    layer: str
    task: Literal["qa", "scotus", "hallucination"]
    seed: int
    grace: RecordedSettings
    edits: Annotated[list[RecordedEdit], Field(min_length=1)]
    trace: list[RecordedStep]
    probes: list[Ids]
    probe_last_logits: list[list[float]]
    initial_values: list[list[float]] | None = None


@dataclass(frozen=True)
class Tolerance:
    """How far numbers may be apart.

    Attributes:
        radius: Absolute, for radii.
        loss: Relative, for losses.
        logits: Absolute, for probe logits.
    """

    radius: float = 1e-5
    loss: float = 1e-4
    logits: float = 1e-3


# Repeated inputs leave the official distances, which multiply matrices, with errors of this size.
_LOOSE = Tolerance(radius=1e-3)

_TASKS: dict[str, TaskName] = {"qa": "qa", "scotus": "classification", "hallucination": "language_modelling"}


def read_record(path: Path) -> Record:
    """Reads a recorded trace.

    Raises:
        UserError: If the file is missing or damaged, naming the field.
    """
    try:
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from error
    if len(record.trace) != len(record.edits):
        raise UserError(f"{path}: field 'trace': {len(record.trace)} steps for {len(record.edits)} edits")
    if len(record.probe_last_logits) != len(record.probes):
        raise UserError(
            f"{path}: field 'probe_last_logits': {len(record.probe_last_logits)} rows for {len(record.probes)} probes"
        )
    return record


def verify(path: Path) -> str | None:
    """Replays a recorded trace.

    Args:
        path: A record; the model it was made with is the folder `model` beside it.

    Returns:
        None if everything agrees, else what differs first, at which edit and by how much.

    Raises:
        UserError: If the record or its model is missing or damaged.
    """
    record = read_record(path)
    layer = record.layer.removesuffix(".weight").replace("[", ".").replace("]", "")
    if not (path.parent / "model").is_dir():
        raise UserError(f"{path}: the model it was made with is not beside it (folder 'model')")
    try:
        model = EditableModel.from_pretrained(
            path.parent / "model", layer=layer, task=_TASKS[record.task], device="cpu", tokenizer=False
        )
    except UserError as error:
        raise UserError(f"{path}: field 'layer' or its model: {error}") from error
    replay = _Replay(model, record)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return next(replay.differences(), None)
    except _Unusable as error:
        raise UserError(f"{path}: {error}") from error
    except (IndexError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be replayed on its model ({str(error).splitlines()[0]})") from error
    finally:
        torch.set_num_threads(threads)
        replay.editor.detach()


class _Unusable(Exception):  # noqa: N818 - carries half a message to where the file's name is known
    pass


class _Replay:
    def __init__(self, model: EditableModel, record: Record) -> None:
        settings = record.grace.model_dump(exclude={"eps_expand"})
        name = next(field for field in Record.model_fields if field in EDITORS.entries())
        self.editor = EDITORS.get(name)(model=model, fidelity="reference", **settings)
        self.model = model
        self.record = record
        if record.initial_values is not None:
            recorded = iter(record.initial_values)
            self.editor.initial_value = lambda call: _next_value(recorded, call.output.shape[-1])
        elif record.grace.value_init == "cold":
            raise UserError("field 'initial_values': missing, and cold values cannot be known without it")

    def differences(self) -> Iterator[str]:
        """Yields what differs, in the order in which it arose."""
        for number, (edit, step) in enumerate(zip(self.record.edits, self.record.trace, strict=True), start=1):
            batch = self._encode(edit.input_ids, edit.labels)
            outcome = self.editor.edit(EditBatch(prompts=("",), targets=("",), encoded=batch))
            for field, recorded, ours in (
                ("op", step.op, outcome.op),
                ("n_keys", step.n_keys, outcome.n_keys),
                ("chosen_key", step.chosen_key, outcome.key),
            ):
                if recorded != ours:
                    yield f"{field} differs at edit {number}: recorded {recorded}, ours {ours}"
            # Above 25 entries the official distances multiply matrices and carry that error.
            tolerance = _LOOSE if step.n_keys > 25 else Tolerance()
            yield from _compare(
                "epsilons", step.epsilons, self.editor.codebook.radii.tolist(), number, tolerance.radius
            )
            for field, recorded_loss, our_loss in (
                ("loss_first", step.loss_first, outcome.loss_first),
                ("loss_last", step.loss_last, outcome.loss),
            ):
                allowed = tolerance.loss * max(1.0, abs(recorded_loss))
                yield from _compare(field, [recorded_loss], [our_loss], number, allowed)
        for number, (probe, recorded_logits) in enumerate(
            zip(self.record.probes, self.record.probe_last_logits, strict=True), start=1
        ):
            with torch.no_grad():
                logits = self.model.logits(self._encode(probe, [1] if self.record.family == "bert" else [1, 2]))
            last = logits[0] if logits.dim() == 2 else logits[0, -1]
            yield from _compare(
                "probe_last_logits", recorded_logits, last.tolist(), number, Tolerance().logits, "probe"
            )

    def _encode(self, input_ids: list[int], labels: list[int]) -> EncodedBatch:
        vocabulary = self.model.config.vocab_size
        if not all(0 <= token < vocabulary for token in input_ids):
            raise _Unusable(f"field 'input_ids': a token id outside the model's {vocabulary}")
        if self.record.family == "gpt2":
            n_prompt = len(input_ids)
            return causal_batch([input_ids + labels], [n_prompt], [n_prompt - 1], pad_id=0, end=None)
        ids, mask = pad([input_ids], 0, "right")
        inputs = {"input_ids": ids, "attention_mask": mask}
        query = torch.tensor([len(input_ids) - 1])
        if self.record.family == "bert":
            if len(labels) != 1 or not 0 <= labels[0] < self.model.config.num_labels:
                raise _Unusable(f"field 'labels': {labels} is not one of {self.model.config.num_labels} classes")
            return EncodedBatch(inputs=inputs, query=query, labels=torch.tensor(labels), target_ids=(tuple(labels),))
        start = self.model.config.decoder_start_token_id
        return seq2seq_batch(inputs, query, [labels], end=None, pad_id=0, decoder_start=start)


def _next_value(recorded: Iterator[list[float]], width: int) -> Tensor:
    values = next(recorded, None)
    if values is None:
        raise _Unusable("field 'initial_values': fewer values than new entries")
    if len(values) != width:
        raise _Unusable(f"field 'initial_values': a value of {len(values)} numbers for a layer of {width}")
    return torch.tensor(values)


def _compare(
    field: str,
    recorded: list[float],
    ours: list[Any],
    number: int,
    allowed: float,
    unit: str = "edit",
) -> Iterator[str]:
    if len(recorded) != len(ours):
        yield f"{field} differs at {unit} {number}: recorded {len(recorded)} numbers, ours {len(ours)}"
        return
    gaps = [abs(a - b) if b is not None else math.nan for a, b in zip(recorded, ours, strict=True)]
    worst = max(range(len(gaps)), key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i])
    if not gaps[worst] <= allowed:
        yield (
            f"{field} differs at {unit} {number}: recorded {recorded[worst]:.6g}, ours {ours[worst]:.6g}, "
            f"by {gaps[worst]:.2g} where {allowed:.2g} is allowed"
        )
