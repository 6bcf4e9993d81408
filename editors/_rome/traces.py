"""Replays recorded runs of ROME's family and reports whether this implementation agrees.

The recorded code breaks requests into tokens in its own way: the target without an end token, the begin token twice
where a context holds it. A replay encodes them so, and leaves everything else to our editors.

Adam turns the sign of a gradient that is all rounding into a whole step, and each edit builds on those before it, so
that the rounding of a first edit may show in the third digit of the last. Where a number is out of tolerance, the run
is made again from weights and second moments that differ by one or by four units in the last place, and the range of
these runs is allowed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from grace_bench.editing.commands import Verdict
from grace_bench.editors._recordings import (
    Expectations,
    Tolerance,
    UnusableError,
    check_ids,
    check_positions,
    last_logits,
    load_recorded_model,
    models_folder,
    perturb,
    replaying,
    usable_model,
)
from grace_bench.editors._rome.facts import Fact
from grace_bench.editors._rome.record import Record, RecordedValue, Request, Turn, read_record
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch, pad
from grace_bench.registry import EDITORS

_MEMIT = Tolerance(loss=4.4e-4, weight=3.4e-4, entry=1.6e-3, logit=1.5e-3)
_ALPHAEDIT = Tolerance(loss=2.9e-4, weight=1.5e-4, entry=8e-4, logit=1.4e-3)
# The official code solves in float32, whose errors grow along a stream.
_ALPHAEDIT_LONG = Tolerance(loss=1.5e-2, weight=1.1e-2, entry=4.5e-2, logit=1.2e-1)
_ROME = Tolerance(loss=5.5e-5, weight=2.7e-4, entry=1.5e-3, logit=3.1e-3)


def replay_file(path: Path) -> Verdict:
    """Replays a recorded run on the CPU, with one thread.

    Args:
        path: A record `<editor>/<model>/<name>.json`, with a safetensors file of the same name; the model and its
            second moments are the folder `models/<model>` beside `<editor>`.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If the record or its model is missing or damaged, naming the field.
    """
    record, tensors = read_record(path)
    if record.model == "llama" and record.hparams.fact_token == "subject_first":
        return Verdict(
            not_replayed="it documents a fault: the official code counts the position from the end of a padded row"
        )
    expected = _expected(record, tensors, _tolerance(record, path.stem))
    with replaying(path):
        ours, difference = _replayed(record, path)
        if difference is not None:
            return Verdict(difference)
        return expected.compare(ours, perturbed=lambda seed: _replayed(record, path, perturbation=seed)[0])


def _tolerance(record: Record, name: str) -> Tolerance:
    if record.editor == "AlphaEdit":
        is_long = name == "singles" or (name == "paper_settings" and record.model == "llama")
        return _ALPHAEDIT_LONG if is_long else _ALPHAEDIT
    if record.editor == "MEMIT":
        return replace(_MEMIT, entry=4.5e-3) if name == "paper_settings" else _MEMIT
    return replace(_ROME, entry=4.8e-3, logit=1.5e-2) if record.hparams.original_implementation else _ROME


def _expected(record: Record, tensors: dict[str, Tensor], allowed: Tolerance) -> Expectations:
    """Everything recorded that has a counterpart of ours."""
    expected = Expectations()

    def add_norms(where: str, figures: Any, *names: str) -> None:
        for name in names:
            expected.add_norms(f"{name} at {where}", getattr(figures, name), allowed.weight)

    def add_tensor(name: str, where: str, rows: slice) -> None:
        if name in tensors:
            expected.add_tensor(f"{name} at {where}", tensors[name][rows], allowed.weight)

    n_written = 0
    for index, turn in enumerate(record.edits):
        where = f"edit {index + 1}"
        values = turn.z or [turn]
        for number, value in enumerate(values):
            here = f"{where}, request {number + 1}" if turn.z else where
            for step, losses in enumerate(value.losses):
                expected.add(f"losses at {here}, pass {step + 1}", losses, allowed.loss * abs(losses[0]))
            if turn.z:
                add_norms(here, value, "init_norm", "delta_norm", "z_norm")
        rows = slice(n_written, n_written + len(values))
        n_written += len(values)
        for name in ("z", "u", "v"):
            add_tensor(name, where, rows)
        if turn.change is not None:
            add_norms(where, turn, "division_factor", "delta_norm")
            expected.add_change(where, turn.change, allowed)
        for number, change in turn.layers.items():
            here = f"{where}, layer {number}"
            for name in ("keys", "keys_for_cache", "resid", "adj_k"):
                add_tensor(f"{name}.{number}", where, rows)
            norms = ("key_norms", "z_error", "residual_norms", "adj_k_norms", "cache_fro", "cache_trace")
            add_norms(here, change, *norms)
            expected.add_change(here, change, allowed)
    total = record.total_change
    for number in record.hparams.layers:
        over_all = total[number] if isinstance(total, dict) else total
        expected.add_change(f"the end, layer {number}", over_all, allowed)
        name = "final_weight" if "final_weight" in tensors else f"final_weight.{number}"
        add_tensor(name, "the end", slice(None))
    for index in range(len(record.probes) if "probe_logits_after" in tensors else 0):
        expected.add(f"probe_logits_after at probe {index + 1}", tensors["probe_logits_after"][index], allowed.logit)
    return expected


@contextmanager
def _editing(record: Record, path: Path, *, perturbation: int | None = None) -> Iterator[Any]:
    """Our editor with the record's settings, on the model that the record was made with.

    Args:
        record: The record.
        path: The recording.
        perturbation: Seeds a difference of all weights and second moments in their last bits; None for none.
    """
    layer = record.layers[-1]
    model = load_recorded_model(path, record, layer=layer, field="hparams.rewrite_module_tmp", task="completion")
    with usable_model():
        moments = load_file(models_folder(path) / record.model / "second_moments.safetensors")
    lacking = next((layer for layer in record.layers if layer not in moments), None)
    if lacking is not None:
        raise UnusableError(f"field 'hparams.layers': second_moments.safetensors has none of {lacking}")
    _check_fits(record, model)
    if perturbation is not None:
        perturb([*model.module.parameters(), *moments.values()], perturbation)
    name, options = _editor_of(record)
    with EDITORS.get(name)(model=model, **options) as editor:
        editor.contexts = record.contexts
        if editor.needs_moments:
            editor.use_moments({layer: moments[layer] for layer in record.layers})
        yield editor


def _check_fits(record: Record, model: EditableModel) -> None:
    """Raises `UnusableError` if positions or tokens are outside the model's tensors."""
    for number, path in zip(record.hparams.layers, record.layers, strict=True):
        positions = record.entry_positions
        check_positions(positions if isinstance(positions, list) else positions[number], path, model)
    for index, probe in enumerate(record.probes):
        check_ids(probe.input_ids, f"probes.{index}.input_ids", model)


def _editor_of(record: Record) -> tuple[str, dict[str, Any]]:
    """The name of our editor, and its options."""
    given = record.hparams
    options: dict[str, Any] = {
        "n_iter": given.v_num_grad_steps,
        "lr": given.v_lr,
        "kl_weight": given.kl_factor,
        "weight_decay": given.v_weight_decay,
        "clamp": given.clamp_norm_factor,
    }
    if record.editor == "R-ROME":
        options["second_moments"] = given.mom2_adjustment
        if given.original_implementation:
            return "rome", options
        return "r_rome", {**options, "prompt_key": given.enable_prompt_keys}
    options |= {"layers": record.layers, "fact_token": given.fact_token}
    own = {
        "MEMIT": {"moment_weight": given.mom2_update_weight},
        "EMMET": {
            "moment_weight": given.mom2_update_weight,
            "ridge": given.update_norm_lambda,
            "softness": given.emmet_lambda,
        },
        "AlphaEdit": {"threshold": given.nullspace_threshold, "l2": given.L2},
    }[record.editor]
    lacking = next((name for name, value in own.items() if value is None), None)
    if lacking is not None:
        raise UnusableError(f"field 'hparams': has no value for our option {lacking!r}")
    return record.editor.lower(), {**options, **own}


def _replayed(record: Record, path: Path, *, perturbation: int | None = None) -> tuple[dict[str, Tensor], str | None]:
    """Makes every edit and runs every probe.

    Returns:
        Our numbers by the names of `_expected`, and the first difference in tokens, positions or steps.
    """
    with _editing(record, path, perturbation=perturbation) as editor:
        replay = _Replay(record, editor)
        replay.run()
        return replay.numbers, next(iter(replay.differences), None)


class _Replay:
    """Our editor on the turns and probes of a record.

    Attributes:
        numbers: What it computed, by the names of `_expected`.
        differences: Differences in what is no measurement: tokens, positions, steps.
    """

    def __init__(self, record: Record, editor: Any) -> None:
        self.numbers: dict[str, Tensor] = {}
        self.differences: list[str] = []
        self._record = record
        self._editor = editor
        self._model: EditableModel = editor.model
        self._numbers_of = dict(zip(record.layers, record.hparams.layers, strict=True))
        self._past: dict[int, Tensor] = {}

    def run(self) -> None:
        """Makes every edit and runs every probe."""
        unedited = self._weights()
        for index, turn in enumerate(self._record.edits):
            self._edit(turn, f"edit {index + 1}")
        for path, weight in self._weights().items():
            number = self._numbers_of[path]
            self._note_change(weight - unedited[path], f"the end, layer {number}", number)
            self.numbers |= {"final_weight at the end": weight, f"final_weight.{number} at the end": weight}
        for index, probe in enumerate(self._record.probes):
            self.numbers[f"probe_logits_after at probe {index + 1}"] = last_logits(self._model, probe)

    def _edit(self, turn: Turn, where: str) -> None:
        requests: list[Request | None] = [*turn.requests] or [turn.request]
        recorded = turn.z or [turn]
        facts = []
        for number, (request, value) in enumerate(zip(requests, recorded, strict=True)):
            assert request is not None
            encoding = _Encoding(self._model, self._record, request)
            here = f"{where}, request {number + 1}" if turn.z else where
            self.differences += encoding.differences(value, here)
            facts.append(encoding.fact())
        before = self._weights()
        with self._noting(where):
            values = self._editor.edit_facts(facts)
        for path, weight in self._weights().items():
            number = self._numbers_of[path]
            here = f"{where}, layer {number}" if turn.layers else where
            self._note_change(weight - before[path], here, number)
        self.numbers[f"z at {where}"] = torch.stack([value.optimised for value in values])
        for number, (value, theirs) in enumerate(zip(values, recorded, strict=True)):
            here = f"{where}, request {number + 1}" if turn.z else where
            if theirs.n_updates != len(value.losses) - 1:
                self.differences.append(
                    f"n_updates differs at {here}: recorded {theirs.n_updates}, ours {len(value.losses) - 1}"
                )
            for step, losses in enumerate(value.losses):
                self.numbers[f"losses at {here}, pass {step + 1}"] = torch.tensor(losses)
            if turn.z:
                figures = {"init_norm": value.initial, "delta_norm": value.delta, "z_norm": value.optimised}
                self.numbers |= {f"{name} at {here}": figure.norm() for name, figure in figures.items()}

    @contextmanager
    def _noting(self, where: str) -> Iterator[None]:
        """Notes what the editor computes inside the context on the way to its changes."""
        editor = self._editor
        # An attribute of the object hides the method of the class.
        if self._record.editor == "R-ROME":
            located = editor.located

            def note_located(*args: Any) -> tuple[Tensor, ...]:
                mean_key, key, output, wanted = located(*args)
                direction = editor.direction(mean_key)
                direction = direction / direction.norm()
                factor, residual = key @ direction, wanted - output
                figures = {"u": direction[None], "v": (residual / factor)[None]}
                figures |= {"division_factor": factor, "delta_norm": residual.norm()}
                self.numbers |= {f"{name} at {where}": figure for name, figure in figures.items()}
                return mean_key, key, output, wanted

            editor.located = note_located
        else:
            change = editor.change

            def note_change(path: str, keys: Tensor, residuals: Tensor) -> Tensor:
                spread = change(path, keys, torch.eye(len(keys), dtype=keys.dtype))
                self._note_layer(self._numbers_of[path], keys, residuals, spread, where)
                return change(path, keys, residuals)

            editor.change = note_change
        try:
            yield
        finally:
            vars(editor).pop("located", None)
            vars(editor).pop("change", None)

    def _note_layer(self, number: int, keys: Tensor, residuals: Tensor, spread: Tensor, where: str) -> None:
        layers = self._record.hparams.layers
        past = self._past[number] = keys.T @ keys + self._past.get(number, 0.0)
        tensors = {"keys": keys, "keys_for_cache": keys, "resid": residuals, "adj_k": spread}
        norms = {
            "key_norms": keys.norm(dim=1),
            "z_error": residuals.norm(dim=1) * (len(layers) - layers.index(number)),
            "residual_norms": residuals.norm(dim=1),
            "adj_k_norms": spread.norm(dim=1),
            "cache_fro": past.norm(),
            "cache_trace": past.trace(),
        }
        self.numbers |= {f"{name}.{number} at {where}": tensor for name, tensor in tensors.items()}
        self.numbers |= {f"{name} at {where}, layer {number}": norm for name, norm in norms.items()}

    def _note_change(self, change: Tensor, where: str, number: int) -> None:
        positions = self._record.entry_positions
        chosen = positions if isinstance(positions, list) else positions[number]
        self.numbers |= {f"fro at {where}": change.norm(), f"entries at {where}": change.flatten()[chosen]}

    def _weights(self) -> dict[str, Tensor]:
        """The rewritten weights as the model stores them, in float64."""
        layers = {path: self._model.find_layer(path) for path in self._record.layers}
        return {path: layer.get_parameter("weight").detach().double().clone() for path, layer in layers.items()}


class _Encoding:
    """A request, broken into tokens as the recorded code does."""

    def __init__(self, model: EditableModel, record: Record, request: Request) -> None:
        self._tokenizer = model.tokenizer
        self._token = record.hparams.fact_token
        self._request = request
        target = request.target
        # R-ROME's code puts a space in front even if there is one.
        spaced = target if target.startswith(" ") and record.editor != "R-ROME" else f" {target}"
        self._target = self._without_begin(self._ids(spaced))
        answer = self._tokenizer.decode(self._target[:-1])
        prompts = [context.replace("{}", request.prompt) for context in record.contexts]
        self._asked = [self._row(prompt) for prompt in prompts]
        self._answered = [self._row(prompt + answer) for prompt in prompts]
        self._essence = self._row("{} is a")

    def fact(self) -> Fact:
        """The request as our editors take it."""
        answered = _batch(self._answered)
        labels = torch.full_like(answered.inputs["input_ids"], IGNORED)
        for index, (ids, _) in enumerate(self._answered):
            labels[index, len(ids) - len(self._target) : len(ids)] = torch.tensor(self._target)
        return Fact(
            asked=_batch(self._asked), answered=replace(answered, labels=labels), essence=_batch([self._essence])
        )

    def differences(self, recorded: RecordedValue, where: str) -> Iterator[str]:
        """Differences in tokens and positions, as far as they were recorded."""
        rows = [*self._answered, self._essence]
        positions = [position for _, position in rows]
        # Some records have no row for the essence.
        if recorded.lookup_idxs != positions[: len(recorded.lookup_idxs)]:
            yield f"lookup_idxs differs at {where}: recorded {recorded.lookup_idxs}, ours {positions}"
        if recorded.target_ids is not None and recorded.target_ids != self._target:
            yield f"target_ids differs at {where}: recorded {recorded.target_ids}, ours {self._target}"
        for index, theirs in enumerate(recorded.input_ids or ()):
            ids = rows[index][0]
            if theirs[: len(ids)] != ids:
                yield f"input_ids[{index}] differs at {where}: recorded {theirs}, ours {ids}"

    def _row(self, template: str) -> tuple[list[int], int]:
        """The tokens of a template with the subject in it, and the position of the fact's token."""
        before, _, after = template.partition("{}")
        subject = self._request.subject
        ids = self._ids(before + subject + after)
        last = len(self._ids(before + subject)) - 1
        if self._token == "subject_first":
            return ids, len(self._ids(before.rstrip(" "))) if before else 0
        if self._token == "subject_first_after_last":
            return ids, min(last + 1, len(ids) - 1)
        return ids, last

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def _without_begin(self, ids: list[int]) -> list[int]:
        return ids[1:] if ids and ids[0] in {self._tokenizer.bos_token_id, self._tokenizer.unk_token_id} else ids


def _batch(rows: Sequence[tuple[list[int], int]]) -> EncodedBatch:
    ids, mask = pad([ids for ids, _ in rows], 0, "right")
    inputs = {"input_ids": ids, "attention_mask": mask}
    return EncodedBatch(inputs=inputs, query=torch.tensor([position for _, position in rows]))
