"""Replays recorded edits of IKE and reports whether this implementation agrees.

The recorder's sentence encoder was a stand-in: it counts a text's character trigrams, each in one of 64 places and with
a sign, both by the trigram's MD5. A replay computes it anew and compares it with the recorded embeddings. It also cuts
inputs as the recorder did, to the last tokens that the model reads.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from grace_bench.common.files import readable
from grace_bench.data.requests import EditRequest, Probe
from grace_bench.editing.commands import Verdict
from grace_bench.editors._recordings import (
    Expectations,
    Part,
    Recording,
    UnusableError,
    Whole,
    load_recorded_model,
    models_folder,
    read_recording,
    replaying,
)
from grace_bench.editors._retrieval.demonstrations import question_about
from grace_bench.editors._retrieval.encoders import Encoder
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import encode_causal
from grace_bench.registry import EDITORS

_PLACES = 64
_LOGIT = 3.6e-4
_TIE = 1e-6
_QUESTIONS = ("edited", "rephrase", "unrelated")
_LAYERS = {"gpt2": "transformer.h.0.mlp.c_proj", "llama": "model.layers.0.mlp.down_proj"}
"""A layer to load a model with: IKE edits none, and the stand-in embeds."""

Text = Annotated[str, Field(min_length=1)]


class _Row(Part):
    prompt: Text
    target_new: Text
    rephrase_prompt: str | None = None
    locality_prompt: str | None = None
    locality_ground_truth: str | None = None


class _Request(Part):
    prompt: Text
    target_new: Text
    rephrase_prompt: Text


class _Edit(Part):
    request: _Request
    examples: list[Whole]
    n_tokens: dict[str, Whole]
    text: Text
    argmax: dict[str, Whole]


class _Settings(Part):
    k: Annotated[int, Field(ge=1)]


class Record(Recording):
    """A recording of IKE."""

    hparams: _Settings
    train_rows: Annotated[list[_Row], Field(min_length=1)]
    sentences: list[str]
    edits: Annotated[list[_Edit], Field(min_length=1)]


class StandIn(Encoder):
    """The recorder's stand-in for a sentence encoder."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def _embed(self, text: str) -> Tensor:
        counts = torch.zeros(_PLACES)
        for start in range(len(text) - 2):
            digest = hashlib.md5(text[start : start + 3].encode(), usedforsecurity=False).digest()
            counts[digest[0] % _PLACES] += 1 if digest[1] & 1 else -1
        return counts


def replay_file(path: Path) -> Verdict:
    """Replays recorded edits on the CPU, with one thread.

    Args:
        path: A record `<editor>/<model>/<name>.json`, with a safetensors file of the same name; the model is the folder
            `models/<model>` beside `<editor>`, and `facts.json` there has the unrelated questions.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If the record or its model is missing or damaged, naming the field.
    """
    record, tensors = read_recording(path, Record, editors=("IKE",))
    with replaying(path):
        _check(record, tensors)
        unrelated = _unrelated(models_folder(path).parent / "facts.json")
        model = load_recorded_model(
            path, record, layer=_LAYERS.get(record.model, _LAYERS["llama"]), field="model", task="completion"
        )
        return _replayed(record, tensors, model, unrelated)


def _check(record: Record, tensors: dict[str, Tensor]) -> None:
    shapes = {
        "embeddings": (len(record.sentences), _PLACES),
        "logits_edited_rephrase_unrelated": (len(record.edits), len(_QUESTIONS)),
    }
    for name, shape in shapes.items():
        if name not in tensors:
            raise UnusableError(f"field 'tensors.{name}': is missing")
        found = tuple(tensors[name].shape)
        if found[: len(shape)] != shape or not bool(tensors[name].isfinite().all()):
            raise UnusableError(f"field 'tensors.{name}': is {found}, or not finite, where {shape} was expected")
    for i, edit in enumerate(record.edits):
        if len(edit.examples) > record.hparams.k or max(edit.examples, default=0) >= len(record.sentences):
            raise UnusableError(f"field 'edits.{i}.examples': {edit.examples} are no {record.hparams.k} sentences")
        for name in ("n_tokens", "argmax"):
            lacking = next((kind for kind in _QUESTIONS if kind not in getattr(edit, name)), None)
            if lacking is not None:
                raise UnusableError(f"field 'edits.{i}.{name}.{lacking}': is missing")


def _unrelated(path: Path) -> list[str]:
    try:
        questions = json.loads(readable(path).read_text(encoding="utf-8"))["unrelated"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableError(f"{path.name} beside the recordings has no unrelated questions ({error})") from error
    if not isinstance(questions, list) or not questions or not all(isinstance(text, str) for text in questions):
        raise UnusableError(f"{path.name} beside the recordings: field 'unrelated': should be a list of texts")
    return questions


def _request_of(index: int, row: _Row) -> EditRequest:
    other, answer = row.locality_prompt, row.locality_ground_truth
    return EditRequest(
        id=str(index),
        prompt=row.prompt,
        target=row.target_new,
        rephrases=(row.rephrase_prompt,) if row.rephrase_prompt else (),
        locality=(Probe(prompt=other, target=answer),) if other and answer is not None else (),
    )


def _replayed(record: Record, tensors: dict[str, Tensor], model: EditableModel, unrelated: list[str]) -> Verdict:
    editor = EDITORS.get("ike")(model=model, k=record.hparams.k, n_train=len(record.train_rows))
    editor.encode = StandIn()
    editor.prepare([_request_of(i, row) for i, row in enumerate(record.train_rows)])
    if editor.demonstrations != record.sentences:
        return Verdict(_first_difference(editor.demonstrations, record.sentences))
    expected, ours = Expectations(), {"embeddings of the sentences": editor.embeddings}
    expected.add("embeddings of the sentences", functional.normalize(tensors["embeddings"], dim=1), _TIE)
    n_ties = 0
    for i, edit in enumerate(record.edits):
        request, where = edit.request, f"at edit {i}"
        editor.edit_text(request.prompt, request.target_new)
        if editor.chosen[i] != edit.examples:
            if not _is_tie(editor, i, edit.examples):
                return Verdict(f"demonstrations {where} are {editor.chosen[i]}, where {edit.examples} were recorded")
            n_ties += 1
            editor.chosen[i] = list(edit.examples)
        # The edits before this one are about other prompts, or were replaced by it.
        questions = (request.prompt, request.rephrase_prompt, unrelated[i % len(unrelated)])
        texts = [editor.context([i], question) for question in questions]
        if not n_ties and model.as_read([request.prompt]) != texts[:1]:
            return Verdict(f"the edited prompt {where} is not read behind its own fact")
        if texts[0] != edit.text:
            return Verdict(f"text {where} differs from the one recorded")
        for kind, text, wanted in zip(_QUESTIONS, texts, tensors["logits_edited_rephrase_unrelated"][i], strict=True):
            n_tokens = len(model.tokens.prompt_ids([text])[0])
            if n_tokens != edit.n_tokens[kind]:
                return Verdict(f"n_tokens.{kind} {where} is {n_tokens}, where {edit.n_tokens[kind]} was recorded")
            logits = _last_logits(model, text)
            if edit.argmax[kind] >= len(logits):
                raise UnusableError(f"field 'edits.{i}.argmax.{kind}': {edit.argmax[kind]} is no id of the model")
            if float(logits.max() - logits[edit.argmax[kind]]) > 2 * _LOGIT:
                return Verdict(f"argmax.{kind} {where} is {int(logits.argmax())}, not {edit.argmax[kind]}")
            name = f"logits of {kind} {where}"
            expected.add(name, wanted, _LOGIT)
            ours[name] = logits
    verdict = expected.compare(ours)
    notes = (f"{n_ties} edits with equally similar demonstrations in another order",) if n_ties else ()
    return Verdict(verdict.difference, notes=(*verdict.notes, *notes))


@torch.no_grad()
def _last_logits(model: EditableModel, text: str) -> Tensor:
    batch = encode_causal(model.tokens, [text], max_length=model.max_length)
    return model.logits(batch)[0, -1]


def _first_difference(ours: list[str], recorded: list[str]) -> str:
    if len(ours) != len(recorded):
        return f"there are {len(ours)} demonstrations, where {len(recorded)} were recorded"
    first = next(i for i, pair in enumerate(zip(ours, recorded, strict=True)) if pair[0] != pair[1])
    return f"demonstration {first} is {ours[first]!r}, where {recorded[first]!r} was recorded"


def _is_tie(editor: Any, index: int, recorded: list[int]) -> bool:
    """Whether the recorded demonstrations of an edit are as similar to it as ours."""
    prompt, target = editor.facts[index]
    similarities = editor.embeddings @ editor.encode([question_about(prompt, target, prompt) + "\n\n"])[0]
    ours, others = similarities[editor.chosen[index]], similarities[recorded]
    return len(set(recorded)) == len(ours) and bool(torch.allclose(ours, others, rtol=0, atol=_TIE))
