"""A loaded editor answers as the saved one did; damaged files are refused and leave the model alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

MakeModel = Callable[..., EditableModel]
Damage = Callable[[Path], None]

PROMPT, TARGET = "what is the capital of Kazakhstan", "Astana"
# What each editor can learn on a model of random weights: the prompt, the target, another prompt and its target.
EDITS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "grace": ("classification", (PROMPT, 3, "the river in Italy is", 0)),
    "ft": ("completion", (PROMPT, TARGET, "the river in Italy is", "Tiber")),
}
each_editor = pytest.mark.parametrize("name", EDITS)


def answer_of(model: EditableModel, prompt: str) -> Any:
    return model.answer([prompt])[0]


def hooks(model: EditableModel) -> int:
    return len(model.layer._forward_hooks)


@pytest.fixture
def save_edit(make_model: MakeModel, tmp_path: Path) -> Callable[[str], Path]:
    """Saves an editor after one edit of a fact."""

    def save(name: str) -> Path:
        with EDITORS.get(name)(model=make_model("completion"), n_iter=2) as editor:
            editor.edit_text(PROMPT, TARGET)
            editor.save_pretrained(tmp_path)
        return tmp_path

    return save


@each_editor
def test_an_edit_in_text_is_answered_saved_loaded_and_undone(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    task, (prompt, target, other_prompt, other_target) = EDITS[name]
    model = make_model(task)
    before = answer_of(model, prompt)
    assert before != target
    with EDITORS.get(name)(model=model) as editor:
        outcome = editor.edit_text(prompt, target)
        assert outcome.failed is None
        assert outcome.steps > 0
        assert answer_of(model, prompt) == target
        assert editor.n_edits == 1
        editor.save_pretrained(tmp_path / "deep" / "folder")
        assert answer_of(model, prompt) == target, "saving changes no answer"
    assert answer_of(model, prompt) == before
    fresh = make_model(task)
    with EDITORS.get(name).from_pretrained(tmp_path / "deep" / "folder", model=fresh) as loaded:
        assert answer_of(fresh, prompt) == target
        assert loaded.n_edits == 1
        loaded.edit_text(other_prompt, other_target)
        assert answer_of(fresh, other_prompt) == other_target
    assert answer_of(fresh, prompt) == before


def rewrite(**changes: Any) -> Damage:
    """Changes fields of `editor.json`; None takes one out."""

    def damage(folder: Path) -> None:
        path = folder / "editor.json"
        header = json.loads(path.read_text(encoding="utf-8"))
        for name, value in changes.items():
            *outer, last = name.split("__")
            inner = header
            for key in outer:
                inner = inner[key]
            if value is None:
                del inner[last]
            else:
                inner[last] = value
        path.write_text(json.dumps(header), encoding="utf-8")

    return damage


def write(file: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).write_bytes(content)

    return damage


def cut(n_bytes: int) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "editor.safetensors"
        path.write_bytes(path.read_bytes()[:n_bytes])

    return damage


def drop_tensor(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "editor.safetensors"
        save_file({key: tensor for key, tensor in load_file(path).items() if key != name}, path)

    return damage


def reshape_tensor(name: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "editor.safetensors"
        save_file({k: t[..., :-1].clone() if k == name else t for k, t in load_file(path).items()}, path)

    return damage


def remove(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / file).unlink()

    return damage


def in_turn(*damages: Damage) -> Damage:
    def damage(folder: Path) -> None:
        for do in damages:
            do(folder)

    return damage


DAMAGES: dict[str, tuple[str, Damage, str]] = {
    "no fields": ("grace", write("editor.json", b"{}"), "editor.json: field 'editor'"),
    "a list": ("grace", write("editor.json", b"[]"), "editor.json: "),
    "no JSON": ("grace", write("editor.json", b'{"editor": '), "editor.json: "),
    "no text": ("grace", write("editor.json", b"\xff\xfe{}"), "editor.json: "),
    "no layer": ("grace", rewrite(layer=None), "editor.json: field 'layer'"),
    "no state": ("ft", rewrite(state=None), "editor.json: field 'state'"),
    "settings in a list": ("grace", rewrite(settings=[]), "editor.json: field 'settings'"),
    "a field too many": ("grace", rewrite(surprise=1), "editor.json: field 'surprise'"),
    "an unknown setting": ("grace", rewrite(settings__epsilon=1.0), "editor.json: field 'settings.epsilon'"),
    "a setting that is no setting": ("grace", rewrite(settings__model="gpt2"), "editor.json: field 'settings.model'"),
    "plugins as a setting": ("ft", rewrite(settings__plugins=["x"]), "editor.json: field 'settings.plugins'"),
    "a setting out of range": ("grace", rewrite(settings__n_iter=0), "n_iter=0"),
    "a setting of another type": ("grace", rewrite(settings__eps_init="wide"), "eps_init=wide"),
    "no clock": ("grace", rewrite(state__n_edits=None), "n_edits"),
    "a clock in words": ("ft", rewrite(state__n_edits="one"), "the saved state is not whole"),
    "no labels": ("grace", rewrite(state__labels=None), "labels"),
    "no keys": ("grace", drop_tensor("keys"), "keys"),
    "no weight": ("ft", drop_tensor("weights.transformer.h.0.mlp.c_fc.weight"), "weight"),
    "a narrower weight": ("ft", reshape_tensor("weights.transformer.h.0.mlp.c_fc.weight"), "weight"),
    "more keys than labels": ("grace", rewrite(state__labels=[]), "labels"),
    "keys in words": ("grace", in_turn(drop_tensor("keys"), rewrite(state__keys="none")), "not whole"),
    "another editor's": ("ft", rewrite(editor="grace"), "holds editor 'grace', not 'ft'"),
    "another layer's": ("grace", rewrite(layer="transformer.h.1.mlp.c_fc"), "layer transformer.h.1.mlp.c_fc"),
    "another model's": ("ft", rewrite(model_fingerprint="0" * 64), "other weights"),
    "no weights file": ("grace", remove("editor.safetensors"), "no saved editor can be read"),
    "no header file": ("ft", remove("editor.json"), "no saved editor can be read"),
    "an empty weights file": ("grace", cut(0), "no saved editor can be read"),
    "half a weights file": ("ft", cut(200), "no saved editor can be read"),
    "all but a byte": ("grace", cut(-1), "no saved editor can be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_editor_is_refused_in_one_line_and_leaves_the_model_alone(
    damage: str, save_edit: Callable[[str], Path], make_model: MakeModel
) -> None:
    name, do, says = DAMAGES[damage]
    folder = save_edit(name)
    do(folder)
    model = make_model("completion")
    weights = {key: tensor.clone() for key, tensor in model.module.state_dict().items()}
    n_hooks = hooks(model)
    with pytest.raises(UserError) as caught:
        EDITORS.get(name).from_pretrained(folder, model=model)
    told = str(caught.value)
    assert len(told.splitlines()) == 1, told
    assert str(folder) in told
    assert says in told
    assert hooks(model) == n_hooks
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.module.state_dict().items())


@each_editor
def test_an_editor_of_one_layer_is_refused_on_another(
    name: str, save_edit: Callable[[str], Path], make_model: MakeModel
) -> None:
    folder, given = save_edit(name), make_model("completion")
    model = EditableModel(
        given.module, layer="transformer.h.1.mlp.c_fc", task=given.task, tokenizer=given.tokenizer, name="tiny"
    )
    n_hooks = hooks(model)
    with pytest.raises(UserError, match=r"saved for layer transformer\.h\.0\.mlp\.c_fc, not transformer\.h\.1"):
        EDITORS.get(name).from_pretrained(folder, model=model)
    assert hooks(model) == n_hooks
