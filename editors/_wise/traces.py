"""Replays recorded runs of WISE and reports whether this implementation agrees.

Contexts, masks and the edits that were chosen for replaying are the recorded ones, and attention is the one that the
records were made with: padding is read. The rest is our editor with `fidelity=reference`.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_bench.editing.commands import Verdict
from grace_bench.editors._recordings import (
    Change,
    Expectations,
    Tolerance,
    UnusableError,
    check_ids,
    check_positions,
    last_logits,
    load_recorded_model,
    perturb,
    replaying,
)
from grace_bench.editors._wise.editor import MemoryEditor
from grace_bench.editors._wise.memory import chosen
from grace_bench.editors._wise.record import Record, Routing, Turn, read_record
from grace_bench.models.encoding import IGNORED, EncodedBatch
from grace_bench.registry import EDITORS

_ALLOWED = Tolerance(loss=2e-6, weight=4e-8, entry=0.0, logit=0.0)
_ORIGINAL = "original"


def replay_file(path: Path) -> Verdict:
    """Replays a recorded run on the CPU, with one thread.

    Args:
        path: A record `wise/<model>/<name>.json`, with a safetensors file of the same name; the model is the folder
            `models/<model>` beside `wise`.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If the record or its model is missing or damaged, naming the field.
    """
    record, tensors = read_record(path)
    with replaying(path):
        ours, difference = _replayed(record, tensors, path)
        if difference is not None:
            return Verdict(difference)
        return _expected(record, tensors).compare(
            ours, perturbed=lambda seed: _replayed(record, tensors, path, perturbation=seed)[0], family=_family
        )


def _family(name: str) -> str:
    """The kind of a number: what comes before the place where it was recorded."""
    kind = name.partition(" at ")[0]
    return "probe_logits_after" if kind == "argmax_after" else kind


def _expected(record: Record, tensors: dict[str, Tensor]) -> Expectations:
    """Everything recorded that has a counterpart of ours."""
    expected = Expectations()

    def add_routing(where: str, routing: Routing) -> None:
        for kind, numbers in (("distance", routing.distances), ("threshold", routing.thresholds)):
            for name, number in numbers.items():
                expected.add(f"{kind} at {where}, {name}", number, _ALLOWED.loss * abs(number))

    def add_number(name: str, number: float) -> None:
        expected.add(name, number, _ALLOWED.loss * abs(number))

    for index, turn in enumerate(record.edits):
        where = f"edit {index + 1}"
        last = turn.losses_last_10 or []
        steps = [*enumerate(turn.losses), *enumerate(last, turn.n_updates - len(last))]
        for step, losses in steps:
            expected.add(f"losses at {where}, pass {step + 1}", losses, _ALLOWED.loss * abs(losses[0]))
        expected.add(f"n_updates at {where}", turn.n_updates, 0.0)
        add_number(f"editing_activation at {where}", turn.editing_activation[0])
        add_number(f"editing_min_act at {where}", turn.editing_min_act)
        for number, least in enumerate(turn.memory_min_acts):
            add_number(f"memory_min_acts at {where}, memory {number}", least)
        for name, change in _changes(turn):
            expected.add_change(f"{where}, {name}", change, _ALLOWED)
        for number, routing in enumerate(turn.routing):
            add_routing(f"{where}, text {number + 1}", routing)
        if turn.after_evaluation is not None:
            expected.add_change(f"{where}, layer after evaluation", turn.after_evaluation.layer_weight_change, _ALLOWED)
            expected.add_change(f"{where}, new after evaluation", turn.after_evaluation.new_weight_change, _ALLOWED)
    if "probe_logits_after" in tensors:
        # All probes are made after the last edit: what rounding moves in one of them counts for all.
        expected.add("probe_logits_after at all probes", tensors["probe_logits_after"], math.inf)
    for index, probe in enumerate(record.probes):
        add_routing(f"probe {index + 1}", probe.routing)
        if "probe_logits_after" in tensors:
            logits = tensors["probe_logits_after"][index]
            expected.add(f"probe_logits_after at probe {index + 1}", logits, _ALLOWED.logit)
        # How far the recorded answer is from the most likely one.
        expected.add(f"argmax_after at probe {index + 1}", 0.0, _ALLOWED.logit)
    for name in tensors:
        if name.startswith("final."):
            expected.add_tensor(f"weight at {name}", tensors[name], _ALLOWED.weight)
    add_number("editing_min_act at the end", record.final_editing_min_act)
    for number, least in enumerate(record.final_memory_min_acts):
        add_number(f"memory_min_acts at the end, memory {number}", least)
    return expected


def _changes(turn: Turn) -> Iterator[tuple[str, Change]]:
    yield "new", turn.new_weight_change
    yield "layer", turn.layer_weight_change
    yield from ((f"memory {number}", change) for number, change in enumerate(turn.memory_changes))


@contextmanager
def _editing(
    record: Record, tensors: dict[str, Tensor], path: Path, *, perturbation: int | None = None
) -> Iterator[Any]:
    """Our editor with the record's settings, on the model that the record was made with.

    Args:
        record: The record.
        tensors: Its tensors.
        path: The recording.
        perturbation: Seeds a difference of all weights in their last bits; None for none.
    """
    model = load_recorded_model(path, record, layer=record.layer, field="weight_name", task="completion")
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    check_positions(record.entry_positions, record.layer, model)
    for index, probe in enumerate(record.probes):
        check_ids(probe.input_ids, f"probes.{index}.input_ids", model)
    if perturbation is not None:
        perturb([*model.module.parameters()], perturbation)
    weight = model.layer.get_parameter("weight")
    masks, n_masks = tensors["masks"], -(-len(record.edits) // record.hparams.save_freq)
    if masks.shape != (n_masks, weight.numel()):
        raise UnusableError(
            f"field 'tensors.masks': has the shape {list(masks.shape)}, where {[n_masks, weight.numel()]} is needed"
        )
    given = record.hparams
    # Rounding decides later steps: passes are computed in full, as they were for the records.
    with (
        model.serving(model.task, engine="plain"),
        EDITORS.get("wise")(
            model=model,
            edit_lr=given.edit_lr,
            n_iter=given.n_iter,
            mask_ratio=given.mask_ratio,
            act_margin=given.act_margin,
            act_ratio=given.act_ratio,
            norm_constraint=given.norm_constraint,
            save_freq=given.save_freq,
            merge_freq=given.merge_freq,
            merge_alg=given.merge_alg,
            density=given.densities,
            weight=given.weights,
            retrieve=given.retrieve,
            replay=given.replay,
            irrelevant="locality",
            fidelity="reference",
        ) as editor,
    ):
        editor.contexts = record.contexts
        editor.mask_of = lambda shard: masks[shard].bool().view(weight.shape)
        yield editor


def _replayed(
    record: Record, tensors: dict[str, Tensor], path: Path, *, perturbation: int | None = None
) -> tuple[dict[str, Tensor], str | None]:
    """Makes every edit and runs every probe.

    Returns:
        Our numbers by the names of `_expected`, and the first difference in what rounding cannot move.
    """
    with _editing(record, tensors, path, perturbation=perturbation) as editor:
        replay = _Replay(record, editor)
        replay.run()
        return replay.numbers, next(iter(replay.differences), None)


class _Replay:
    """Our editor on the turns and probes of a record.

    Attributes:
        numbers: What it computed, by the names of `_expected`.
        differences: Differences in what is no measurement: tokens, decisions, steps.
    """

    def __init__(self, record: Record, editor: MemoryEditor) -> None:
        self.numbers: dict[str, Tensor] = {}
        self.differences: list[str] = []
        self._record = record
        self._editor = editor
        self._memories = editor.memories
        self._choices: Iterator[int] = iter(())
        editor.choose_present = lambda n_edits: self._chosen(n_edits)  # type: ignore[method-assign]

    def run(self) -> None:
        """Makes every edit and runs every probe."""
        for index, turn in enumerate(self._record.edits):
            self._turn(f"edit {index + 1}", turn)
        found: list[Tensor] = []
        for index, probe in enumerate(self._record.probes):
            where = f"probe {index + 1}"
            found.append(logits := last_logits(self._editor.model, probe))
            self.numbers[f"probe_logits_after at {where}"] = logits
            self._number(f"argmax_after at {where}", float(logits.max() - logits[probe.argmax_after]))
            self._route(where, probe.input_ids, probe.routing)
        self.numbers["probe_logits_after at all probes"] = torch.stack(found) if found else torch.zeros(0)
        memories = self._memories
        self._least("the end")
        self.numbers["weight at final.new_weight"] = self._weight("new")
        self.numbers["weight at final.layer_weight"] = self._weight("layer")
        for number, weight in enumerate(memories.saved):
            self.numbers[f"weight at final.memory.{number}"] = weight

    def _turn(self, where: str, turn: Turn) -> None:
        self._check_rows(where, turn)
        memories, given = self._memories, turn.request
        mask = self._editor.mask_of(memories.n_edits // memories.sharding.save_freq)
        self._choices = iter(turn.replay_choices or ())
        trained = self._editor.edit_one((given.prompt, given.target_new, given.loc_prompt))
        self._same(f"mask_ones at {where}", int(mask.sum()), turn.mask_ones)
        self._same(f"saved at {where}", not memories.n_edits % memories.sharding.save_freq, turn.saved)
        self._same(f"merged at {where}", not memories.n_edits % memories.sharding.merge_freq, turn.merged)
        self._same(f"n_memories at {where}", len(memories.saved), turn.n_memories)
        self._number(f"n_updates at {where}", len(trained.losses))
        lacking = [(torch.nan,) * len(turn.losses[0])] * (turn.n_updates - len(trained.losses))
        for step, losses in enumerate([*trained.losses, *lacking]):
            self.numbers[f"losses at {where}, pass {step + 1}"] = torch.tensor(losses, dtype=torch.float64)
        self._number(f"editing_activation at {where}", trained.activation)
        self._least(where)
        for name, _ in _changes(turn):
            self._change(f"{where}, {name}", name)
        for number, routing in enumerate(turn.routing):
            ids = self._editor.model.tokenizer(routing.text)["input_ids"]
            self._route(f"{where}, text {number + 1}", ids, routing)
        if turn.after_evaluation is not None:
            last_logits(self._editor.model, self._record.probes[0])
            self._same(f"n_memories after evaluation at {where}", len(memories.saved), turn.after_evaluation.n_memories)
            self._change(f"{where}, layer after evaluation", "layer")
            self._change(f"{where}, new after evaluation", "new")

    def _check_rows(self, where: str, turn: Turn) -> None:
        """Compares the tokens, the labels and the positions of the subject."""
        given = turn.request
        rows = self._editor.rows((given.prompt, given.target_new, given.loc_prompt))
        assert rows.batch.labels is not None
        ids, mask = rows.batch.inputs["input_ids"], rows.batch.inputs["attention_mask"]
        # The labels of the irrelevant prompt are recorded, but no loss.
        labels, n_asked = rows.batch.labels[:-1, :-1], len(ids) - 1
        self._same(f"rows at {where}", len(ids), turn.rows)
        self._same(f"padded_length at {where}", ids.shape[1], turn.padded_length)
        self._same(f"input_ids at {where}", ids.tolist(), turn.input_ids)
        self._same(f"attention_mask_sum at {where}", mask.sum(dim=1).tolist(), turn.attention_mask_sum)
        self._same(f"labels at {where}", labels.tolist(), turn.labels and [row[1:] for row in turn.labels[:n_asked]])
        n_labels = (labels != IGNORED).sum(dim=1).tolist()
        self._same(f"labels_per_row at {where}", n_labels, turn.labels_per_row and turn.labels_per_row[:n_asked])
        if turn.act_mask is not None:
            assert rows.inside is not None
            self._same(f"act_mask at {where}", rows.inside[:-1].long().tolist(), turn.act_mask)

    def _route(self, where: str, ids: list[int], recorded: Routing) -> None:
        """Compares which weight answers a text, without a call of the edited model."""
        tokens = torch.tensor([ids])
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        with self._editor.model.bypassing():
            call = self._editor.model.layer_call(EncodedBatch(inputs=inputs, query=torch.tensor([-1])))
        routes = self._memories.route(call.input, torch.ones_like(tokens, dtype=torch.bool))
        ours = {one.name: (routes.distances[index, 0], one.least) for index, one in enumerate(routes.candidates)}
        # A memory that is the layer's own weight is no candidate.
        nothing = 0.0, self._memories.least_new * self._memories.sharding.act_ratio
        for name in recorded.distances:
            self._number(f"distance at {where}, {name}", float(ours.get(name, nothing)[0]))
        for name in recorded.thresholds:
            self._number(f"threshold at {where}, {name}", ours.get(name, nothing)[1])
        # Rounding may move our distances across a threshold, so the decision is made with those recorded.
        names = sorted(recorded.distances, key=lambda name: name != "new")
        least = [recorded.thresholds.get(name, recorded.thresholds["new"]) for name in names]
        distances = torch.tensor([[recorded.distances[name]] for name in names], dtype=torch.float64)
        index = int(chosen(names, least, distances))
        used = _ORIGINAL if index < 0 else names[index]
        if used not in recorded.equal_outputs:
            self._same(f"used at {where}", used, recorded.used)

    def _least(self, where: str) -> None:
        self._number(f"editing_min_act at {where}", self._memories.least_new)
        for number, least in enumerate(self._memories.least):
            self._number(f"memory_min_acts at {where}, memory {number}", least)

    def _chosen(self, n_edits: int) -> int:
        return next(self._choices)

    def _weight(self, name: str) -> Tensor:
        """A weight by the name of its candidate; the layer's own where there is none."""
        memories = self._memories
        if name.startswith("memory "):
            index = int(name.removeprefix("memory "))
            found = memories.saved[index] if index < len(memories.saved) else None
        else:
            found = memories.new if name == "new" else memories.merged
        return memories.original if found is None else found

    def _change(self, where: str, name: str) -> None:
        change = self._weight(name) - self._memories.original
        self.numbers[f"fro at {where}"] = change.double().norm()
        self.numbers[f"entries at {where}"] = change.flatten()[self._record.entry_positions]

    def _number(self, name: str, value: float) -> None:
        self.numbers[name] = torch.tensor(value, dtype=torch.float64)

    def _same(self, what: str, ours: Any, recorded: Any) -> None:
        """Notes a difference from what was recorded, if it was."""
        if recorded is not None and ours != recorded:
            self.differences.append(f"{what} is {_shown(recorded)} in the record, ours is {_shown(ours)}")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
