"""One edit is undone by its request id, and the others hold; an editor that cannot do so says why."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

Begin = Callable[..., tuple[EditorStrategy, list[EditRequest]]]

OPTIONS: dict[str, dict[str, Any]] = {
    # The prompts have most words in common, and the models are random: in most editors an edit would reach its
    # neighbours.
    "grace": {"eps_init": 0.01, "n_iter": 30},
    "melo": {"init_radius": 0.01, "n_iter": 30, "lr": 0.05, "n_blocks": 100},
    "memoir": {"tau": 0.99},
    "retrieve": {"by": "embedding", "k": 1, "threshold": 0.99},
    "ike": {"by": "bm25", "threshold": 0.99},
    "serac": {"threshold": 0.999},
}
REFUSING = sorted(EDITORS.entries().keys() - OPTIONS.keys())
each_undoing = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture
def begin(make_model: Any, make_editor: Any, make_requests: Any) -> Begin:
    def make(name: str, **options: Any) -> tuple[EditorStrategy, list[EditRequest]]:
        task = "completion" if "completion" in EDITORS.get(name).supported_tasks else "classification"
        return make_editor(name, make_model(task), **{**OPTIONS.get(name, {}), **options}), make_requests(task)

    return make


def name_edit(editor: EditorStrategy, request: EditRequest) -> None:
    editor.edit_text(request.prompt, request.target, subject=request.subject, request_id=request.id)


@torch.no_grad()
def answers(model: EditableModel, requests: list[EditRequest]) -> dict[str, Any]:
    """What the model says to each prompt alone, and the loss of its target: equal only where nothing has changed."""
    found = {}
    for request in requests:
        batch = model.encode_batch([request.prompt], [request.target])
        found[request.id] = model.answer([request.prompt])[0], float(model.task.loss(model.logits(batch), batch))
    return found


@each_undoing
def test_whatever_the_order_of_undoing_the_edits_that_are_left_hold(name: str, begin: Begin) -> None:
    editor, requests = begin(name)
    model, chosen = editor.model, requests[:3]
    unedited = answers(model, requests)
    for request in chosen:
        name_edit(editor, request)
    edited, state = answers(model, chosen), editor.state_dict()
    assert all(edited[request.id] != unedited[request.id] for request in chosen)
    # Each edit is the first, the second and the last to be undone.
    for order in [*permutations(chosen)][::2]:
        editor.load_state_dict(state)
        undone: list[str] = []
        for request in order:
            editor.undo(request.id)
            undone.append(request.id)
            expected = {r.id: (unedited if r.id in undone else edited)[r.id] for r in chosen}
            assert answers(model, chosen) == expected
        assert answers(model, requests) == unedited


@each_undoing
def test_ids_are_saved_and_an_undone_prompt_can_be_edited_again(name: str, begin: Begin, tmp_path: Path) -> None:
    editor, requests = begin(name)
    model, (a, b, c) = editor.model, requests[:3]
    unedited = answers(model, requests)
    for request in (a, b, c):
        name_edit(editor, request)
    edited = answers(model, [a, b, c])
    editor.undo(b.id)
    editor.save_pretrained(tmp_path)
    editor.detach()
    with EDITORS.get(name).from_pretrained(tmp_path, model=model) as loaded:
        expected = {a.id: edited[a.id], b.id: unedited[b.id], c.id: edited[c.id]}
        assert answers(model, [a, b, c]) == expected
        with pytest.raises(UserError, match=f"no edit has the request id '{b.id}'"):
            loaded.undo(b.id)
        name_edit(loaded, b)
        assert answers(model, [b])[b.id] != unedited[b.id]
        for request in (b, a, c):
            loaded.undo(request.id)
        assert answers(model, requests) == unedited


@pytest.mark.parametrize("name", REFUSING)
def test_an_editor_that_cannot_undo_one_edit_says_why_and_changes_nothing(name: str, begin: Begin) -> None:
    editor, (request, *_) = begin(name)
    (outcome,) = editor.edit_texts([request])
    assert outcome.failed is None
    edited = answers(editor.model, [request])
    why = "train the same numbers" if editor.freezes_weights else "are mixed in the same weights"
    with pytest.raises(UserError, match=f"editor '{name}' cannot undo one edit: its edits {why}"):
        editor.undo(request.id)
    assert answers(editor.model, [request]) == edited


def test_an_entry_that_answers_other_edits_is_kept(begin: Begin) -> None:
    editor, (a, b, *_) = begin("grace", eps_init=100.0)
    for request in (a, b):
        editor.edit_text(request.prompt, a.target, request_id=request.id)
    edited = answers(editor.model, [a, b])
    for request, why in ((a, f"its entry also answers edit '{b.id}'"), (b, "its entry was made by another edit")):
        with pytest.raises(UserError, match=f"cannot undo edit '{request.id}' alone: {why}"):
            editor.undo(request.id)
    assert answers(editor.model, [a, b]) == edited


def test_an_entry_that_may_answer_edits_without_an_id_is_kept(begin: Begin) -> None:
    editor, (a, b, c, *_) = begin("grace")
    editor.edit_text(a.prompt, a.target)
    name_edit(editor, b)
    assert "named" in editor.state_dict()
    editor.edit_text(c.prompt, c.target)
    with pytest.raises(UserError, match="may answer later edits, which have no request id"):
        editor.undo(b.id)


def test_the_id_of_a_prompt_that_is_edited_again_is_the_last(begin: Begin) -> None:
    editor, (a, b, *_) = begin("retrieve")
    unedited = answers(editor.model, [a])
    editor.edit_text(a.prompt, b.target, request_id="first")
    editor.edit_text(a.prompt, a.target, request_id="second")
    with pytest.raises(UserError, match="an edit of another prompt has the request id 'second': undo it first"):
        editor.edit_text(b.prompt, b.target, request_id="second")
    with pytest.raises(UserError, match="no edit has the request id 'first'"):
        editor.undo("first")
    editor.undo("second")
    assert answers(editor.model, [a]) == unedited


def test_without_ids_a_state_is_what_it_always_was(begin: Begin) -> None:
    editor, (a, b, *_) = begin("grace")
    editor.edit_text(a.prompt, a.target)
    assert "named" not in editor.state_dict()
    name_edit(editor, b)
    editor.undo(b.id)
    assert "named" not in editor.state_dict()


@pytest.mark.parametrize("name", ["grace", "ft", "memit"])
def test_edits_of_several_texts_are_made_in_order(name: str, begin: Begin) -> None:
    editor, requests = begin(name)
    outcomes = editor.edit_texts(requests[:2])
    assert [outcome.failed for outcome in outcomes] == [None, None]
    assert editor.n_edits == 2
    assert editor.n_pending == 0
    assert editor.edit_texts([]) == []
    same = [requests[3], requests[4].model_copy(update={"id": requests[3].id})]
    with pytest.raises(UserError, match="two requests have the id"):
        editor.edit_texts(same)


def test_a_text_that_cannot_be_edited_does_not_keep_the_others_from_it(begin: Begin) -> None:
    editor, (a, b, *_) = begin("retrieve")
    blank = EditRequest(id="blank", prompt="", target="Astana")
    outcomes = editor.edit_texts([a, blank, b])
    assert [outcome.failed is None for outcome in outcomes] == [True, False, True]
    assert editor.n_edits == 2
    with pytest.raises(UserError, match="no edit has the request id 'blank'"):
        editor.undo("blank")
