"""Replays recorded edits of SERAC, with the recorder's networks, and reports whether this implementation agrees."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from grace_bench.editing.commands import Verdict
from grace_bench.editors._recordings import (
    Expectations,
    Part,
    Recording,
    UnusableError,
    Whole,
    check_ids,
    load_recorded_model,
    models_folder,
    read_recording,
    replaying,
)
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

_TOLERANCE = 3.6e-4
"""Of logits, logarithms of probabilities and of similarities: ten times what a second implementation differed by."""
_LAYERS = {"gpt2": "transformer.h.0.mlp.c_proj", "llama": "model.layers.0.mlp.down_proj"}
"""A layer to load a model with; SERAC edits none."""

Text = Annotated[str, Field(min_length=1)]
Ids = Annotated[list[Whole], Field(min_length=1)]


class _Request(Part):
    prompt: Text
    target_new: Text


class _Edit(Part):
    request: _Request
    cached_input: Text
    classifier_text: Text
    context: Text


class _Probe(Part):
    text: Text
    input_ids: Ids
    similarity: float
    cache_index: Whole
    counterfactual_input_ids: Ids
    generation_uses_counterfactual: bool
    output_length: Whole
    argmax_after: Whole


class _Settings(Part):
    supervised: bool
    cos: bool
    square: bool
    bound_embeds: bool
    dist_heads: Annotated[int, Field(ge=1)]


class Record(Recording):
    """A recording of SERAC."""

    hparams: _Settings
    scale: float
    classifier: Annotated[str, Field(pattern=r"^models/[\w.-]+$")]
    counterfactual_model: Annotated[str, Field(pattern=r"^models/[\w.-]+$")]
    edits: Annotated[list[_Edit], Field(min_length=1)]
    probes: Annotated[list[_Probe], Field(min_length=1)]

    def options(self, folder: Path) -> dict[str, Any]:
        """Returns our options; `folder` has the models."""
        given = self.hparams
        return {
            "classifier": str(folder / Path(self.classifier).name),
            "counterfactual": str(folder / Path(self.counterfactual_model).name),
            "distance": "cosine" if given.cos else "squared" if given.square else "euclidean",
            "dist_heads": given.dist_heads,
            "bound_embeds": given.bound_embeds,
            "mixing": "hard" if given.supervised else "soft",
            "fidelity": "reference",
            "n_steps": 0,
        }


def replay_file(path: Path) -> Verdict:
    """Replays recorded edits on the CPU, with one thread.

    Args:
        path: A record `<editor>/<model>/<name>.json`, with a safetensors file of the same name; the model and the
            networks are folders in `models` beside `<editor>`.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If the record or a model is missing or damaged, naming the field.
    """
    record, tensors = read_recording(path, Record, editors=("SERAC",))
    with replaying(path):
        _check(record, tensors)
        model = load_recorded_model(
            path, record, layer=_LAYERS.get(record.model, _LAYERS["llama"]), field="model", task="completion"
        )
        for i, probe in enumerate(record.probes):
            check_ids(probe.input_ids, f"probes.{i}.input_ids", model)
            check_ids([probe.argmax_after], f"probes.{i}.argmax_after", model)
        try:
            editor = EDITORS.get("serac")(model=model, **record.options(models_folder(path)))
            editor.prepare(())
        except UserError as error:
            raise UnusableError(str(error)) from error
        return _replayed(record, tensors, model, editor)


def _check(record: Record, tensors: dict[str, Tensor]) -> None:
    if record.scale != 1:
        raise UnusableError(f"field 'scale': is {record.scale}, where similarities are exp(-distance)")
    shapes = {"log_similarities": (len(record.probes), len(record.edits)), "probe_output": (len(record.probes),)}
    for name, shape in shapes.items():
        if name not in tensors:
            raise UnusableError(f"field 'tensors.{name}': is missing")
        found = tuple(tensors[name].shape)
        if found[: len(shape)] != shape or len(found) != 2 or not bool(tensors[name].isfinite().all()):
            raise UnusableError(f"field 'tensors.{name}': is {found}, or not finite, where {shape} was expected")
    for i, probe in enumerate(record.probes):
        if probe.cache_index >= len(record.edits):
            raise UnusableError(f"field 'probes.{i}.cache_index': there are {len(record.edits)} edits")


def _replayed(record: Record, tensors: dict[str, Tensor], model: EditableModel, editor: Any) -> Verdict:
    for i, edit in enumerate(record.edits):
        prompt, target = edit.request.prompt, edit.request.target_new
        editor.edit_text(prompt, target)
        context = editor.in_context(prompt, target, "")
        for name, text, recorded in (
            ("cached_input", context.removesuffix(" "), edit.cached_input),
            ("classifier_text", editor.text_in_scope(prompt, target), edit.classifier_text),
            ("context", context, edit.context),
        ):
            if text != recorded:
                return Verdict(f"{name} at edit {i + 1} is {text!r}, where {recorded!r} was recorded")
    expected = Expectations()
    found: dict[str, Tensor] = {}
    for i, probe in enumerate(record.probes):
        where = f"at probe {i + 1}"
        difference = _decision(probe, model, editor)
        if difference is not None:
            return Verdict(f"{difference[0]} {where} is {difference[1]}, not {difference[2]}")
        output = _output(model, probe.text)
        if float(output.max() - output[probe.argmax_after]) > 2 * _TOLERANCE:
            return Verdict(f"argmax_after {where} is {int(output.argmax())}, not {probe.argmax_after}")
        similarities = editor.similarities(probe.text)
        expected.add(f"log_similarities {where}", tensors["log_similarities"][i], _TOLERANCE)
        expected.add(f"similarity {where}", [probe.similarity], _TOLERANCE)
        expected.add(f"probe_output {where}", tensors["probe_output"][i], _TOLERANCE)
        found[f"log_similarities {where}"] = similarities
        found[f"similarity {where}"] = similarities.max().exp()[None]
        found[f"probe_output {where}"] = output
    return expected.compare(found)


def _decision(probe: _Probe, model: EditableModel, editor: Any) -> tuple[str, Any, Any] | None:
    """The first of a probe's decisions that differs: its name, ours, and the recorded one."""
    similarities = editor.similarities(probe.text)
    best, similarity = int(similarities.argmax()), float(similarities.max().exp())
    if float(similarities[best] - similarities[probe.cache_index]) > _TOLERANCE:
        return "cache_index", best, probe.cache_index
    assert editor.memory is not None
    (own,) = model.tokens.prompt_ids([probe.text])
    (ids,) = model.tokens.prompt_ids([editor.in_context(*editor.memory.facts[probe.cache_index], probe.text)])
    if own != probe.input_ids:
        return "input_ids", own, probe.input_ids
    if ids != probe.counterfactual_input_ids:
        return "counterfactual_input_ids", ids, probe.counterfactual_input_ids
    if probe.output_length != len(own):
        return "output_length", len(own), probe.output_length
    uses = similarity > editor.threshold
    if uses != probe.generation_uses_counterfactual and abs(similarity - editor.threshold) > _TOLERANCE:
        return "generation_uses_counterfactual", uses, probe.generation_uses_counterfactual
    return None


@torch.no_grad()
def _output(model: EditableModel, prompt: str) -> Tensor:
    """The (V,) output at the last position of a prompt, as edited."""
    batch = model.encode_batch([prompt])
    return model.logits(batch)[0, -1]
