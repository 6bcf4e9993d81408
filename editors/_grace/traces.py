"""Replays recorded runs of GRACE and reports whether this implementation agrees.

Two kinds of numbers in a record are rounding noise, which another machine cannot repeat:

- Above 25 entries the official distances come from a matrix product. Where an input is repeated, and a distance is zero
or equals a radius, the error of that product decides. There the replay follows the record, as far as rounding can
explain it.
- Adam divides a gradient by its own size, so a gradient near zero turns a last bit into a whole step. A loss or a logit
  that is out of tolerance is measured again from starting values that differ by one or by four units in the last place,
  and the range of these runs is allowed. Another processor rounds differently in every step, not only at the start: on
  one machine, runs that start one unit apart stay closer to each other than to runs on another machine.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_bench.data.requests import TaskName
from grace_bench.editing.batch import EditBatch
from grace_bench.editing.commands import Verdict
from grace_bench.editors._grace.record import Record, RecordedStep, read_record
from grace_bench.editors._grace.rounding import MAX_EXACT_ROWS, Rounding
from grace_bench.editors._recordings import UnusableError, replaying, usable_model
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import EncodedBatch, causal_batch, pad, seq2seq_batch
from grace_bench.registry import EDITORS

# Tolerances: absolute for radii and logits, relative to max(1, |loss|) for losses.
_RADIUS, _LOOSE_RADIUS, _LOSS, _LOGIT = 1e-5, 1e-3, 1e-4, 1e-3
_N_PERTURBED = 8
# The differences of the starting values, in units in the last place.
_PERTURBATIONS = (1, 4)

_TASKS: dict[str, TaskName] = {"qa": "qa", "scotus": "classification", "hallucination": "language_modelling"}


def replay_file(path: Path) -> Verdict:
    """Replays a recorded run on the CPU, with one thread.

    Args:
        path: A record; the model it was made with is the folder `model` beside it.

    Raises:
        UserError: If the record or its model is missing or damaged, naming the field.
    """
    record = read_record(path)
    with replaying(path):
        model = _load_model(path.parent / "model", record)
        with _editing(model, record) as replay:
            replay.run()
            return replay.compare()


def _load_model(folder: Path, record: Record) -> EditableModel:
    if not folder.is_dir():
        raise UnusableError("the model it was made with is not beside it (folder 'model')")
    layer = record.layer.removesuffix(".weight").replace("[", ".").replace("]", "")
    with usable_model():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config["model_type"] != record.family:
                raise UnusableError(
                    f"field 'family': {record.family!r}, but the model beside it is {config['model_type']!r}"
                )
            model = EditableModel.from_pretrained(
                folder, layer=layer, task=_TASKS[record.task], device="cpu", tokenizer=False
            )
        except UserError as error:
            raise UnusableError(f"field 'layer': {error}" if str(error).startswith("layer=") else str(error)) from error
    # One thread: a step of a tiny model is mostly overhead of the framework.
    model.config.use_cache = False
    return model


def _encode(
    model: EditableModel, family: str, input_ids: list[int], labels: list[int], fields: tuple[str, str]
) -> EncodedBatch:
    input_field, labels_field = fields
    n_classes = model.config.num_labels if family == "bert" else model.config.vocab_size
    for field, given, limit in ((input_field, input_ids, model.config.vocab_size), (labels_field, labels, n_classes)):
        if max(given) >= limit:
            raise UnusableError(f"field '{field}': {max(given)} is not one of the model's {limit} ids")
    length = len(input_ids) + (len(labels) if family == "gpt2" else 0)
    if model.max_length is not None and length > model.max_length:
        raise UnusableError(f"field '{input_field}': {length} tokens, where the model reads {model.max_length}")
    if family == "gpt2":
        n_prompt = len(input_ids)
        return causal_batch([input_ids + labels], [n_prompt], [n_prompt - 1], pad_id=0, end=None)
    ids, mask = pad([input_ids], 0, "right")
    inputs = {"input_ids": ids, "attention_mask": mask}
    query = torch.tensor([len(input_ids) - 1])
    if family == "bert":
        if len(labels) != 1:
            raise UnusableError(f"field '{labels_field}': {len(labels)} labels, where a classifier has one")
        return EncodedBatch(inputs=inputs, query=query, labels=torch.tensor(labels), target_ids=(tuple(labels),))
    return seq2seq_batch(inputs, query, [labels], end=None, pad_id=0, decoder_start=model.decoder_start)


@dataclass(frozen=True)
class _Step:
    """What our editor did on one edit, and the inputs to train its value again."""

    op: str
    n_keys: int
    radii: list[float]
    key: int
    loss_first: float
    loss_last: float
    encoded: EncodedBatch
    hit: bool


@dataclass(frozen=True)
class _Answer:
    """One way in which a probe may be answered: by an entry or, with `hit` false, by the model alone."""

    entry: int
    hit: bool
    logits: list[float]


@contextmanager
def _editing(model: EditableModel, record: Record) -> Iterator["_Replay"]:
    settings = record.grace.model_dump(exclude={"eps_expand"})
    with EDITORS.get("grace")(model=model, fidelity="reference", **settings) as editor:
        yield _Replay(model, record, editor)


class _Replay:
    """Our editor on the edits and probes of a record."""

    def __init__(self, model: EditableModel, record: Record, editor: Any) -> None:
        self._model = model
        self._record = record
        self._editor = editor
        self._rounding = Rounding(editor.codebook)
        self._steps: list[_Step] = []
        self._probes: list[EncodedBatch] = []
        self._answers: list[list[_Answer]] = []
        self._starts: list[Tensor] = []
        self._notes: Counter[tuple[str, str]] = Counter()
        self._own_start = editor.initial_value
        editor.initial_value = self._start

    def run(self) -> None:
        """Makes every edit and runs every probe.

        Raises:
            _Unusable: If the record does not fit its model.
        """
        record = self._record
        edits = [
            _encode(
                self._model, record.family, edit.input_ids, edit.labels, (f"edits.{i}.input_ids", f"edits.{i}.labels")
            )
            for i, edit in enumerate(record.edits)
        ]
        labels = [1] if record.family == "bert" else [1, 2]
        self._probes = [
            _encode(self._model, record.family, probe, labels, (f"probes.{i}", "probes"))
            for i, probe in enumerate(record.probes)
        ]
        try:
            self._model.layer_call(edits[0])
        # Any module can be named, and each that is not a layer of the forward pass fails in its own way.
        except Exception as error:
            raise UnusableError(f"field 'layer': an entry cannot replace what {record.layer} gives") from error
        previous: list[float] = []
        for encoded, step in zip(edits, record.trace, strict=True):
            self._steps.append(self._edit(encoded, previous, step))
            previous = step.epsilons
        self._answers = [self._answer(probe) for probe in self._probes]

    def compare(self) -> Verdict:
        """Compares with the record, in the order of the recorded run."""
        difference = next(self._differences(), None)
        notes = (f"{n} {one if n == 1 else many}" for (one, many), n in self._notes.items())
        return Verdict(difference, tuple(notes))

    def _edit(self, encoded: EncodedBatch, previous: list[float], step: RecordedStep) -> _Step:
        codebook = self._editor.codebook
        query = self._model.layer_call(encoded).query
        before = _rounded(codebook.radii)
        assert encoded.labels is not None
        with self._rounding.as_recorded(previous, step, float(encoded.labels.float().mean())) as believed:
            outcome = self._editor.edit(EditBatch(prompts=("",), targets=("",), encoded=encoded))
            hit = bool(codebook.retrieve(query).hit[0])
            if any(believed.values()):
                self._notes["edit decided by rounding, as recorded", "edits decided by rounding, as recorded"] += 1
        after = _rounded(codebook.radii)
        moved = before != after[: len(before)]
        grew = len(after) > len(before)
        assert outcome.n_keys is not None
        assert outcome.key is not None
        assert outcome.loss_first is not None
        assert outcome.loss is not None
        return _Step(
            op=("split" if moved else "add") if grew else ("expand" if moved else "hit"),
            n_keys=outcome.n_keys,
            radii=codebook.radii.tolist(),
            key=outcome.key,
            loss_first=outcome.loss_first,
            loss_last=outcome.loss,
            encoded=encoded,
            hit=hit,
        )

    def _answer(self, probe: EncodedBatch) -> list[_Answer]:
        """Every answer to a probe that rounding allows, the computed one first."""
        query = self._model.layer_call(probe).query
        found = self._editor.codebook.retrieve(query)
        computed = (int(found.entry[0]), bool(found.hit[0]))
        answers = []
        for entry, hit in dict.fromkeys([computed, *self._rounding.possible(query)]):
            with self._rounding.forced(entry, hit):
                answers.append(_Answer(entry, hit, self._last_logits(probe).tolist()))
        return answers

    @torch.no_grad()
    def _last_logits(self, probe: EncodedBatch) -> Tensor:
        logits = self._model.logits(probe)
        return logits[0] if logits.dim() == 2 else logits[0, -1]

    def _start(self, call: LayerCall) -> Tensor:
        cold = self._record.grace.value_init == "cold"
        value = self._recorded_start(call.output.shape[-1]) if cold else self._own_start(call)
        self._starts.append(value.detach().clone())
        return value

    def _recorded_start(self, width: int) -> Tensor:
        recorded, number = self._record.initial_values or [], len(self._starts)
        if number >= len(recorded):
            raise UnusableError(f"field 'initial_values': {len(recorded)} values, fewer than new entries")
        if len(recorded[number]) != width:
            raise UnusableError(
                f"field 'initial_values.{number}': {len(recorded[number])} numbers, where the layer gives {width}"
            )
        return torch.tensor(recorded[number])

    def _differences(self) -> Iterator[str]:
        for index, (recorded, ours) in enumerate(zip(self._record.trace, self._steps, strict=True)):
            where = f"edit {index + 1}"
            for field, theirs, own in (
                ("op", recorded.op, ours.op),
                ("n_keys", recorded.n_keys, ours.n_keys),
                ("chosen_key", recorded.chosen_key, ours.key),
            ):
                if theirs != own:
                    yield f"{field} differs at {where}: recorded {theirs}, ours {own}"
            # The error of a distance carries over to the radius derived from it.
            allowed = _LOOSE_RADIUS if recorded.n_keys > MAX_EXACT_ROWS else _RADIUS
            yield from _compare("epsilons", recorded.epsilons, ours.radii, [allowed] * len(ours.radii), where)
            yield from self._loss_differences(recorded, ours, index)
        n_given = len(self._record.initial_values or [])
        if self._record.grace.value_init == "cold" and n_given != len(self._starts):
            yield f"initial_values differs: recorded {n_given} values, ours {len(self._starts)} new entries"
        for index, answers in enumerate(self._answers):
            yield from self._probe_differences(self._record.probe_last_logits[index], answers, index)

    def _loss_differences(self, recorded: RecordedStep, ours: _Step, index: int) -> Iterator[str]:
        theirs, own = [recorded.loss_first, recorded.loss_last], [ours.loss_first, ours.loss_last]
        allowed = [_LOSS * max(1.0, abs(loss)) for loss in theirs]
        if _agree(theirs, own, allowed):
            return
        spread = self._spread(ours.key, index, lambda losses: torch.tensor([losses[0], losses[-1]]))
        for i, field in enumerate(("loss_first", "loss_last")):
            limit = max(allowed[i], spread[i])
            yield from _compare(field, theirs[i : i + 1], own[i : i + 1], [limit], f"edit {index + 1}")
            if not _agree(theirs[i : i + 1], own[i : i + 1], allowed[i : i + 1]):
                self._notes["loss within what rounding moves it", "losses within what rounding moves them"] += 1

    def _probe_differences(self, recorded: list[float], answers: list[_Answer], index: int) -> Iterator[str]:
        allowed = [_LOGIT] * len(answers[0].logits)
        for answer in answers:
            if _agree(recorded, answer.logits, allowed):
                if answer is not answers[0]:
                    self._notes["probe decided by rounding", "probes decided by rounding"] += 1
                return
        for answer in answers if len(recorded) == len(allowed) else ():
            with self._rounding.forced(answer.entry, answer.hit):
                spread = self._spread(answer.entry, len(self._steps), lambda _: self._last_logits(self._probes[index]))
            if _agree(recorded, answer.logits, [max(pair) for pair in zip(allowed, spread, strict=True)]):
                self._notes["probe within what rounding moves it", "probes within what rounding moves them"] += 1
                return
        yield from _compare("probe_last_logits", recorded, answers[0].logits, allowed, f"probe {index + 1}")

    def _spread(self, entry: int, until: int, measure: Callable[[list[float]], Tensor]) -> list[float]:
        """Returns twice the range of some numbers over starting values that differ in their last bits.

        Args:
            entry: The entry, whose value is trained again on all edits up to `until` that chose it.
            until: Index of the last of these edits.
            measure: Computes the numbers, after training, from the losses of the last of these edits.
        """
        values = self._editor.codebook.values
        kept = values[entry].clone()
        measured = []
        for seed in range(_N_PERTURBED):
            generator = torch.Generator().manual_seed(seed)
            start = self._starts[entry]
            signs = torch.randint(0, 2, start.shape, generator=generator) * 2 - 1
            size = _PERTURBATIONS[seed % len(_PERTURBATIONS)] * torch.finfo(torch.float32).eps
            values[entry] = start * (1 + signs * size)
            losses: list[float] = []
            for step in self._steps[: until + 1]:
                if step.key == entry:
                    with self._rounding.forced(entry, step.hit):
                        losses = self._editor.train_value(entry, step.encoded)
            measured.append(measure(losses))
        values[entry] = kept
        numbers = torch.stack(measured)
        return (2 * (numbers.amax(dim=0) - numbers.amin(dim=0))).tolist()


def _rounded(radii: Tensor) -> list[float]:
    """Radii rounded as in records; a recorder detects changes on the rounded radii."""
    return [round(radius, 6) for radius in radii.tolist()]


def _agree(recorded: list[float], ours: list[float], allowed: list[float]) -> bool:
    return len(recorded) == len(ours) and all(
        abs(a - b) <= limit for a, b, limit in zip(recorded, ours, allowed, strict=True)
    )


def _compare(field: str, recorded: list[float], ours: list[float], allowed: list[float], where: str) -> Iterator[str]:
    if len(recorded) != len(ours):
        yield f"{field} differs at {where}: recorded {len(recorded)} numbers, ours {len(ours)}"
    elif not _agree(recorded, ours, allowed):
        # NaN does not compare with numbers; it counts as the worst difference.
        gaps = [abs(a - b) for a, b in zip(recorded, ours, strict=True)]
        worst = max(range(len(gaps)), key=lambda i: math.inf if math.isnan(gaps[i]) else gaps[i] - allowed[i])
        which = f"[{worst}]" if len(gaps) > 1 else ""
        yield (
            f"{field}{which} differs at {where}: recorded {recorded[worst]:.6g}, ours {ours[worst]:.6g}, "
            f"by {gaps[worst]:.2g} where {allowed[worst]:.2g} is allowed"
        )
