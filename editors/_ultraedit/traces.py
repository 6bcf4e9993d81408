"""Replays recorded runs of UltraEdit and reports whether this implementation agrees.

A replay breaks requests into tokens as the recorded code does, without an end token, and leaves everything else to our
editor with `fidelity=reference`. Where the recorded code loses its weights to NaN, our editor refuses the update; the
replay then puts NaN into the weights itself and goes on.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from grace_bench.editing.batch import EditBatch
from grace_bench.editing.commands import Verdict
from grace_bench.editors._recordings import (
    Change,
    Expectations,
    Part,
    Probe,
    Recording,
    Tolerance,
    UnusableError,
    Whole,
    check_ids,
    check_positions,
    last_logits,
    load_recorded_model,
    perturb,
    read_recording,
    replaying,
)
from grace_bench.editors._ultraedit.rows import Rows, passes_of
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, causal_batch
from grace_bench.models.engine.engine import Repeated
from grace_bench.registry import EDITORS

_TOLERANCE = Tolerance(loss=2.9e-5, weight=1.5e-4, entry=2.5e-3, logit=1.6e-3)
# Of the largest weight, for the entries of a change; of its norm, for that of a change.
_ROUNDING = torch.finfo(torch.float32).eps

Size = tuple[int, int]


class Settings(Part):
    """The hyperparameters, by the official names."""

    lr: Annotated[float, Field(gt=0)]
    token: str
    n_edits: Annotated[int, Field(ge=1)]
    dataset_batch_size: Annotated[int, Field(ge=1)]
    edit_modules: Annotated[list[str], Field(min_length=1)]
    half: bool = False


class Request(Part):
    """A request; its tokens are those of the prompt and of a space with the target."""

    prompt: Annotated[str, Field(min_length=1)]
    target_new: Annotated[str, Field(min_length=1)]


class Minibatch(Part):
    """The inputs of a pass, right-padded; labels are aligned with the logits."""

    input_ids: list[list[Whole]]
    attention_mask: list[list[Whole]]
    labels: list[list[int]]


class ModuleChange(Change):
    """A module's change over a turn, with the norms of what it was computed from, one a row."""

    shift_fro: float
    key_norms: list[float]
    value_grad_norms: list[float]


class Turn(Part):
    """What the editor did with the requests of one turn."""

    requests: Annotated[list[Request], Field(min_length=1)]
    rows_per_minibatch: list[int]
    losses: list[float | None]
    normaliser_n: dict[str, float]
    minibatches: Annotated[list[Minibatch], Field(default_factory=list)]
    modules: Annotated[dict[str, ModuleChange], Field(default_factory=dict)]


class Record(Recording):
    """A recorded run: the format of the files that `grace-bench verify` reads (`docs/fidelity.md`)."""

    hparams: Settings
    weights_became_nan: bool
    entry_positions: dict[str, list[Whole]]
    edits: Annotated[list[Turn], Field(min_length=1)]
    total_change: Annotated[dict[str, Change], Field(default_factory=dict)]
    probes: list[Probe]

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        paths = self.hparams.edit_modules
        fields: dict[str, dict[str, Any]] = {"entry_positions": self.entry_positions}
        fields |= {f"edits.{i}.modules": turn.modules for i, turn in enumerate(self.edits)}
        fields["total_change"] = self.total_change
        for name, given in fields.items():
            is_there = name == "entry_positions" or given
            lacking = next((path for path in paths if is_there and path not in given), None)
            if lacking is not None:
                raise ValueError(f"field '{name}': has nothing of {lacking}, which 'hparams.edit_modules' names")
        for i, turn in enumerate(self.edits):
            for name in ("rows_per_minibatch", "minibatches"):
                found = getattr(turn, name)
                if found and len(found) != len(turn.losses):
                    raise ValueError(f"field 'edits.{i}.{name}': {len(found)} for {len(turn.losses)} losses")
        return self


def replay_file(path: Path) -> Verdict:
    """Replays a recorded run on the CPU, with one thread.

    Args:
        path: A record `ultraedit/<model>/<name>.json`, with a safetensors file of the same name if it has tensors; the
            model is the folder `models/<model>` beside `ultraedit`.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If the record or its model is missing or damaged, naming the field.
    """
    record, tensors = read_recording(path, Record, editors=["UltraEdit"])
    with replaying(path):
        replay = _replayed(path, record)
        if replay.difference is not None:
            return Verdict(replay.difference)
        expected = _expected(record, tensors, replay.unedited)
        return expected.compare(replay.numbers, perturbed=lambda seed: _replayed(path, record, seed=seed).numbers)


def _expected(record: Record, tensors: dict[str, Tensor], unedited: dict[str, Tensor]) -> Expectations:
    """Everything recorded that has a counterpart of ours, by name, in the order of the stream."""
    expected = Expectations()
    weight = _TOLERANCE.weight

    def add_change(where: str, path: str, change: Change) -> None:
        # A change is the difference of two rounded weights.
        rounding = _ROUNDING * unedited[path]
        largest = max(map(abs, change.entries), default=0.0)
        expected.add(f"fro at {where}", change.fro, weight * change.fro + float(rounding.norm()))
        expected.add(
            f"entries at {where}", change.entries, _TOLERANCE.entry * largest + 2 * float(rounding.abs().max())
        )

    n_rows = 0
    for index, turn in enumerate(record.edits):
        where = f"edit {index + 1}"
        known = [0.0 if loss is None else loss for loss in turn.losses]
        expected.add(f"losses at {where}", known, _TOLERANCE.loss * max(map(abs, known)))
        rows = slice(n_rows, n_rows + sum(turn.rows_per_minibatch))
        n_rows = rows.stop
        for name in tensors:
            if name.startswith("normaliser."):
                expected.add_tensor(f"{name} at {where}", _row(tensors, name, index), weight)
        for path, change in turn.modules.items():
            here = f"{where}, {path}"
            for name in ("keys", "value_grads"):
                if f"{name}.{path}" in tensors:
                    expected.add_tensor(f"{name} at {here}", tensors[f"{name}.{path}"][rows], weight)
            expected.add_norms(f"key_norms at {here}", change.key_norms, weight)
            expected.add_norms(f"value_grad_norms at {here}", change.value_grad_norms, weight)
            expected.add_norms(f"shift_fro at {here}", change.shift_fro, weight)
            add_change(here, path, change)
    for path, total in record.total_change.items():
        add_change(f"the end, {path}", path, total)
    for path in record.hparams.edit_modules:
        if f"final_weight.{path}" in tensors:
            expected.add_tensor(f"final_weight at the end, {path}", tensors[f"final_weight.{path}"], weight)
    for when in ("before", "after"):
        name = f"probe_logits_{when}"
        for index in range(len(record.probes) if name in tensors else 0):
            expected.add(f"{name} at probe {index + 1}", _row(tensors, name, index), _TOLERANCE.logit)
    return expected


def _row(tensors: dict[str, Tensor], name: str, index: int) -> Tensor:
    tensor = tensors[name]
    if tensor.dim() != 2 or index >= len(tensor):
        raise UnusableError(
            f"field 'tensors.{name}': its shape is {tuple(tensor.shape)}, where row {index + 1} is needed"
        )
    return tensor[index]


@contextmanager
def _editing(path: Path, record: Record, seed: int | None) -> Iterator[Any]:
    """Our editor with the record's settings, on the model that the record was made with."""
    given = record.hparams
    if given.half:
        raise UnusableError("field 'hparams.half': recordings in bfloat16 are not replayed")
    paths = given.edit_modules
    model = load_recorded_model(path, record, layer=paths[0], field="hparams.edit_modules", task="completion")
    for index, probe in enumerate(record.probes):
        check_ids(probe.input_ids, f"probes.{index}.input_ids", model)
    if seed is not None:
        perturb([*model.module.parameters()], seed)
    editor = EDITORS.get("ultraedit")(
        model=model,
        layers=paths,
        lr=given.lr,
        batch_size=given.dataset_batch_size,
        tokens="ans" if given.token == "ans" else "mask",
        fidelity="reference",
    )
    for layer in paths:
        check_positions(record.entry_positions[layer], layer, model)
    with editor:
        yield editor


def _replayed(path: Path, record: Record, *, seed: int | None = None) -> "_Replay":
    """Makes every edit and runs every probe; `seed` changes all weights in their last bits."""
    with _editing(path, record, seed) as editor:
        replay = _Replay(record, editor)
        replay.run()
        return replay


class _Replay:
    """Our editor on the turns and probes of a record.

    Attributes:
        numbers: What it computed, by the names of `_expected`.
        difference: The first difference in what is no measurement: tokens, counts, and which numbers are NaN.
        unedited: The weights before the first edit, by path, as the model stores them.
    """

    def __init__(self, record: Record, editor: Any) -> None:
        self.numbers: dict[str, Tensor] = {}
        self.difference: str | None = None
        self._record = record
        self._editor = editor
        self._model: EditableModel = editor.model
        self.unedited = self._weights()

    def run(self) -> None:
        """Makes every edit and runs every probe."""
        self._probe("before")
        is_lost = False
        for index, turn in enumerate(self._record.edits):
            is_lost |= self._edit(turn, f"edit {index + 1}")
        self._compare("weights_became_nan", "the end", self._record.weights_became_nan, is_lost)
        for path, weight in self._weights().items():
            self._note_change(weight - self.unedited[path], f"the end, {path}", path)
            self.numbers[f"final_weight at the end, {path}"] = weight
        self._probe("after")

    def _probe(self, when: str) -> None:
        for index, probe in enumerate(self._record.probes):
            self.numbers[f"probe_logits_{when} at probe {index + 1}"] = last_logits(self._model, probe)

    def _edit(self, turn: Turn, where: str) -> bool:
        """Makes the edits of a turn and returns whether they lost the weights."""
        before = self._weights()
        batch = self._encoded(turn.requests)
        self._compare_tokens(turn, batch, where)
        losses: list[float] = []
        counts: list[int] = []

        def observe(minibatch: EncodedBatch, run: Repeated) -> Any:
            loss, found = type(self._editor).observe(self._editor, minibatch, run)
            losses.append(loss)
            counts.append(len(next(iter(found.values())).keys))
            return loss, found

        def shift(path: str, rows: Rows) -> Tensor:
            change: Tensor = type(self._editor).shift(self._editor, path, rows)
            here = f"{where}, {path}"
            self.numbers |= {
                f"keys at {here}": rows.keys,
                f"value_grads at {here}": rows.gradients,
                f"key_norms at {here}": rows.keys.norm(dim=1),
                f"value_grad_norms at {here}": rows.gradients.norm(dim=1),
                f"shift_fro at {here}": change.norm(),
            }
            return change

        # Attributes of the object hide the methods of the class.
        self._editor.observe, self._editor.shift = observe, shift
        requests = turn.requests
        is_lost = False
        try:
            self._editor.edit(
                EditBatch(
                    prompts=tuple(request.prompt for request in requests),
                    targets=tuple(request.target_new for request in requests),
                    encoded=batch,
                )
            )
        except EditFailure:
            is_lost = True
            self._lose_weights()
        self._compare("rows_per_minibatch", where, turn.rows_per_minibatch, counts)
        self._compare(
            "losses that are NaN",
            where,
            [loss is None for loss in turn.losses],
            [math.isnan(loss) for loss in losses],
        )
        self.numbers[f"losses at {where}"] = torch.tensor(losses).nan_to_num(nan=0.0)
        for size, normaliser in self._editor.normalisers.items():
            self._compare(f"normaliser_n of {size}", where, turn.normaliser_n.get(str(size)), float(normaliser.n))
            name = f"normaliser.{size[0]}x{size[1]}"
            self.numbers |= {f"{name}.mean at {where}": normaliser.mean, f"{name}.var at {where}": normaliser.var}
        for path, weight in self._weights().items():
            self._note_change(weight - before[path], f"{where}, {path}", path)
        return is_lost

    def _lose_weights(self) -> None:
        for path in self._record.hparams.edit_modules:
            self._model.find_layer(path).get_parameter("weight").data.fill_(torch.nan)

    def _encoded(self, requests: Sequence[Request]) -> EncodedBatch:
        """The requests as the recorded code breaks them into tokens."""
        tokenizer = self._model.tokenizer
        prompts = [list(tokenizer(request.prompt)["input_ids"]) for request in requests]
        targets = [
            list(tokenizer(f" {request.target_new}", add_special_tokens=False)["input_ids"]) for request in requests
        ]
        return causal_batch(
            [prompt + target for prompt, target in zip(prompts, targets, strict=True)],
            [len(prompt) for prompt in prompts],
            [len(prompt) - 1 for prompt in prompts],
            pad_id=0,
            end=None,
        )

    def _compare_tokens(self, turn: Turn, batch: EncodedBatch, where: str) -> None:
        found = passes_of(batch, self._editor.batch_size)
        self._compare("the number of passes", where, len(turn.losses), len(found))
        for number, (ours, theirs) in enumerate(zip(found, turn.minibatches, strict=False), start=1):
            here = f"{where}, minibatch {number}"
            mask = ours.inputs["attention_mask"]
            assert ours.labels is not None
            self._compare("attention_mask", here, theirs.attention_mask, mask.tolist())
            self._compare("input_ids", here, theirs.input_ids, (ours.inputs["input_ids"] * mask).tolist())
            self._compare("labels", here, theirs.labels, ours.labels.tolist())

    def _compare(self, name: str, where: str, theirs: Any, ours: Any) -> None:
        if self.difference is None and theirs != ours:
            self.difference = f"{name} differs at {where}: recorded {theirs}, ours {ours}"

    def _note_change(self, change: Tensor, where: str, path: str) -> None:
        chosen = self._record.entry_positions[path]
        self.numbers |= {f"fro at {where}": change.norm(), f"entries at {where}": change.flatten()[chosen]}

    def _weights(self) -> dict[str, Tensor]:
        """The rewritten weights as the model stores them, in float64."""
        layers = {path: self._model.find_layer(path) for path in self._record.hparams.edit_modules}
        return {path: layer.get_parameter("weight").detach().double().clone() for path, layer in layers.items()}
