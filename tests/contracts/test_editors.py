"""What every registered editor promises, on every task it says it works on."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
import torch
from avalanche.benchmarks.scenarios.generic_scenario import MaskedAttributeError
from avalanche.core import BasePlugin
from torch import Tensor
from torch.nn import functional

from grace_bench.data.benchmark import EditExperience
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakeEditor = Callable[..., EditorStrategy]

TASKS = get_args(TaskName)
# One editor shows every task. The others take turns, each with one task of those it works on; `make test-slow` has the
# rest. Running text is completion with other labels.
SHOWS_ALL = "grace"


def shown_task(name: str, turn: int) -> str:
    """The task with which an editor is tested where minutes count."""
    tasks = [task for task in EDITORS.get(name).supported_tasks if task != "language_modelling"]
    return tasks[turn % len(tasks)]


SUPPORTED = [
    pytest.param(
        name,
        task,
        id=f"{name}-{task}",
        marks=() if name == SHOWS_ALL or task == shown_task(name, turn) else pytest.mark.slow,
    )
    for turn, name in enumerate(EDITORS.entries())
    for task in EDITORS.get(name).supported_tasks
]
UNSUPPORTED = [
    (name, task) for name in EDITORS.entries() for task in TASKS if task not in EDITORS.get(name).supported_tasks
]
each_supported = pytest.mark.parametrize(("name", "task"), SUPPORTED)
each_editor = pytest.mark.parametrize("name", list(EDITORS.entries()))


# bfloat16 and float16 where minutes do not count; a few edits in bfloat16 are among the tests of tasks.
VARIANTS = [
    pytest.param({}, id="float32"),
    pytest.param({"dtype": torch.bfloat16}, id="bfloat16", marks=pytest.mark.slow),
    pytest.param({"dtype": torch.float16}, id="float16", marks=pytest.mark.slow),
]
if torch.cuda.is_available():
    VARIANTS += [
        pytest.param({"device": "cuda"}, id="cuda"),
        pytest.param({"device": "cuda", "dtype": torch.bfloat16}, id="cuda-bfloat16"),
    ]
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def apply(editor: EditorStrategy, requests: list[EditRequest]) -> list[EditOutcome]:
    return [
        editor.edit_text(request.prompt, request.target, subject=request.subject)
        if editor.needs_subject
        else editor.edit_text(request.prompt, request.target)
        for request in requests
    ]


Edited = Callable[..., tuple[EditableModel, EditorStrategy]]


@pytest.fixture(scope="module")
def edited(make_editor: MakeEditor, make_model: MakeModel, make_requests: MakeRequests) -> Iterator[Edited]:
    """Gives a model and the editor that made the first two edits in it, for tests that change neither."""
    made: dict[tuple[str, ...], tuple[EditableModel, EditorStrategy]] = {}
    with ExitStack() as stack:

        def give(name: str, task: str, **variant: Any) -> tuple[EditableModel, EditorStrategy]:
            key = name, task, str(variant)
            if key not in made:
                model = make_model(task, **variant)
                made[key] = model, stack.enter_context(make_editor(name, model))
                apply(made[key][1], make_requests(task)[:2])
            return made[key]

        yield give


def logits_of(model: EditableModel, requests: list[EditRequest]) -> list[Tensor]:
    """The logits of the first requests on their own, and of all in one padded batch."""
    batches = [model.encode_batch([r.prompt], [r.target]) for r in requests[:3]]
    batches.append(model.encode_batch([r.prompt for r in requests], [r.target for r in requests]))
    with torch.no_grad():
        return [model.logits(batch).clone() for batch in batches]


def batch_of(
    model: EditableModel, requests: list[EditRequest], *, needs_subject: bool, side: str = "right"
) -> EditBatch:
    prompts, targets = [r.prompt for r in requests], [r.target for r in requests]
    return EditBatch(
        prompts=tuple(prompts),
        targets=tuple(targets),
        subjects=tuple(r.subject for r in requests) if needs_subject else None,
        encoded=model.encode_batch(prompts, targets, side=side),
    )


def losses_in_batch(model: EditableModel, requests: list[EditRequest], *, side: str) -> list[float]:
    """The mean loss of each request's target, in one padded batch or each on its own."""
    if side == "alone":
        return [loss_of(model, request) for request in requests]
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests], side=side)
    assert batch.labels is not None
    with torch.no_grad():
        logits = model.logits(batch)
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.labels, reduction="none", ignore_index=-100)
    return [float(x) for x in losses.sum(dim=1) / (batch.labels != -100).sum(dim=1)]


def loss_of(model: EditableModel, request: EditRequest) -> float:
    batch = model.encode_batch([request.prompt], [request.target])
    with torch.no_grad():
        return float(model.task.loss(model.logits(batch), batch))


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[key]) if isinstance(value, Tensor) else value == b[key] for key, value in a.items()
    )


@each_variant
@each_supported
def test_an_edit_moves_the_answer_towards_the_target(
    make_editor: MakeEditor,
    name: str,
    task: str,
    variant: dict[str, Any],
    make_model: MakeModel,
    make_requests: MakeRequests,
) -> None:
    model, request = make_model(task, **variant), make_requests(task)[0]
    before, untouched = loss_of(model, request), logits_of(model, [request])
    with make_editor(name, model) as editor:
        (outcome,) = apply(editor, [request])
        assert editor.n_edits == 1
        if name == "none":
            assert same_bits(logits_of(model, [request]), untouched)
            return
        assert outcome.failed is None
        (read,) = model.as_read([request.prompt])
        if read != request.prompt:
            # What a model makes of what it reads is not the editor's doing.
            assert str(request.target) in read
            assert read.endswith(request.prompt)
            return
        assert outcome.steps > 0
        assert loss_of(model, request) < before


@each_variant
@each_supported
def test_rollback_and_detach_give_the_unedited_model_back_bit_for_bit(
    make_editor: MakeEditor,
    name: str,
    task: str,
    variant: dict[str, Any],
    make_model: MakeModel,
    make_requests: MakeRequests,
) -> None:
    model, requests = make_model(task, **variant), make_requests(task)
    untouched, weights = logits_of(model, requests), copied(model.module.state_dict())
    editor = make_editor(name, model)
    apply(editor, requests[:2])
    edited = logits_of(model, requests)
    assert same_bits(edited, untouched) == (name == "none")
    editor.rollback()
    assert same_bits(logits_of(model, requests), untouched)
    assert editor.n_edits == 0
    apply(editor, requests[:2])
    assert same_bits(logits_of(model, requests), edited), "after a rollback an editor edits as it did at first"
    editor.detach()
    assert same_bits(logits_of(model, requests), untouched)
    assert same_state(model.module.state_dict(), weights)


@each_supported
def test_a_batch_of_edits_moves_its_answers_towards_their_targets(
    make_editor: MakeEditor, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)[:3]
    before = [loss_of(model, request) for request in requests]
    with make_editor(name, model) as editor:
        editor.edit(batch_of(model, requests, needs_subject=editor.needs_subject))
        editor.flush()
        after = [loss_of(model, request) for request in requests]
        assert after == before if name == "none" else fmean(after) < fmean(before)


@pytest.mark.parametrize(("name", "task"), [param for param in SUPPORTED if param.values[1] != "classification"])
def test_an_edit_answers_the_same_whichever_side_is_padded(
    edited: Edited, name: str, task: str, make_requests: MakeRequests
) -> None:
    (model, _), requests = edited(name, task), make_requests(task)
    longer = requests[1].model_copy(update={"prompt": f"in {requests[1].prompt} the river of Italy is"})
    losses = {side: losses_in_batch(model, [requests[0], longer], side=side) for side in ("left", "right", "alone")}
    assert losses["left"] == pytest.approx(losses["alone"], abs=1e-4)
    assert losses["right"] == pytest.approx(losses["alone"], abs=1e-4)


@pytest.mark.parametrize(("name", "task"), [param for param in SUPPORTED if param.values[1] != "classification"])
def test_an_edit_made_in_a_batch_is_the_same_whichever_side_is_padded(
    make_editor: MakeEditor, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    first, second = make_requests(task)[:2]
    requests = [first, second.model_copy(update={"prompt": f"in {second.prompt} the river of Italy is"})]
    losses = []
    for side in ("left", "right"):
        model = make_model(task)
        with make_editor(name, model) as editor:
            editor.edit(batch_of(model, requests, needs_subject=editor.needs_subject, side=side))
            editor.flush()
            losses.append(losses_in_batch(model, requests, side="alone"))
    # Rounding differs, and Adam turns what is next to nothing into a whole step.
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)


@each_supported
def test_what_an_editor_adds_to_the_model_stays_within_what_it_declares(
    make_editor: MakeEditor, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model(task)
    with make_editor(name, model) as editor:
        assert 0 <= editor.extra_parameters <= editor.max_extra_parameters(0)
        for n_edits, request in enumerate(make_requests(task)[:3], start=1):
            apply(editor, [request])
            assert 0 <= editor.extra_parameters <= editor.max_extra_parameters(n_edits)


@each_supported
def test_suspending_lets_the_unedited_model_answer_and_then_every_edit_holds_again(
    edited: Edited, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    (model, editor), requests = edited(name, task), make_requests(task)
    answers = logits_of(model, requests)
    with editor.suspended():
        assert same_bits(logits_of(model, requests), logits_of(make_model(task), requests))
    assert same_bits(logits_of(model, requests), answers)


@each_variant
@each_supported
def test_a_saved_editor_answers_the_same_bits_on_a_fresh_model(
    edited: Edited,
    name: str,
    task: str,
    variant: dict[str, Any],
    make_model: MakeModel,
    make_requests: MakeRequests,
    tmp_path: Path,
) -> None:
    (model, editor), requests = edited(name, task, **variant), make_requests(task)
    editor.save_pretrained(tmp_path)
    fresh = make_model(task, **variant)
    with type(editor).from_pretrained(tmp_path, model=fresh) as loaded:
        assert same_bits(logits_of(fresh, requests), logits_of(model, requests))
        assert loaded.settings() == editor.settings()
    assert {path.name for path in tmp_path.iterdir()} == {"editor.json", "editor.safetensors"}


@each_editor
def test_a_saved_editor_refuses_another_model_and_an_empty_folder(
    edited: Edited, name: str, make_model: MakeModel, tmp_path: Path
) -> None:
    task = EDITORS.get(name).supported_tasks[0]
    _, editor = edited(name, task)
    editor.save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="saved for other weights"):
        type(editor).from_pretrained(tmp_path / "saved", model=make_model(task, seed=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no saved editor") as caught:
        type(editor).from_pretrained(tmp_path / "empty", model=make_model(task))
    assert "\n" not in str(caught.value)


@each_supported
def test_evaluating_changes_neither_state_nor_weights_nor_the_next_edit(
    make_editor: MakeEditor, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    requests = make_requests(task)
    final: list[list[Tensor]] = []
    for evaluates in (False, True):
        model = make_model(task)
        torch.manual_seed(7)
        with make_editor(name, model) as editor:
            apply(editor, requests[:1])
            if evaluates:
                state, weights = copied(editor.state_dict()), copied(model.module.state_dict())
                first = model.score(requests)
                assert model.score(requests) == first
                assert same_state(editor.state_dict(), state)
                assert same_state(model.module.state_dict(), weights)
            apply(editor, requests[1:2])
            final.append(logits_of(model, requests))
    assert same_bits(*final)


@each_supported
def test_an_editor_goes_on_from_its_state_as_if_it_had_never_stopped(
    make_editor: MakeEditor, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    requests = make_requests(task)
    model = make_model(task)
    with make_editor(name, model) as editor:
        apply(editor, requests[:2])
        state = copied(editor.state_dict())
        apply(editor, requests[2:3])
        uninterrupted, at_the_end = logits_of(model, requests), copied(editor.state_dict())
    fresh = make_model(task)
    torch.manual_seed(123)
    with make_editor(name, fresh) as resumed:
        resumed.load_state_dict(state)
        assert resumed.n_edits == 2
        apply(resumed, requests[2:3])
        assert same_bits(logits_of(fresh, requests), uninterrupted)
        assert same_state(resumed.state_dict(), at_the_end)
        resumed.rollback()
        assert same_bits(logits_of(fresh, requests), logits_of(make_model(task), requests))


@each_supported
def test_a_state_keeps_what_is_pending_and_an_editor_that_was_never_prepared_goes_on_from_it(
    make_editor: MakeEditor, name: str, task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    requests, model, fresh = make_requests(task), make_model(task), make_model(task)

    def edit(editor: EditorStrategy, request: EditRequest) -> None:
        encoded = editor.model.encode_batch([request.prompt], [request.target])
        subjects = (request.subject,) if editor.needs_subject else None
        editor.edit(EditBatch(prompts=(request.prompt,), targets=(request.target,), subjects=subjects, encoded=encoded))

    with make_editor(name, model) as editor, type(editor)(model=fresh, **editor.settings()) as resumed:
        for request in requests[:2]:
            edit(editor, request)
        n_pending, state = editor.n_pending, copied(editor.state_dict())
        assert editor.n_pending == n_pending
        resumed.load_state_dict(state)
        assert resumed.n_pending == n_pending
        for one in (editor, resumed):
            edit(one, requests[2])
        assert editor.flush() == resumed.flush()
        assert same_state(editor.state_dict(), resumed.state_dict())
        assert same_bits(logits_of(model, requests), logits_of(fresh, requests))
        call = model.layer_call(model.encode_batch([requests[0].prompt]))
        answered, again = editor.answered_by(call.query), resumed.answered_by(call.query)
        assert (answered and answered.versions) == (again and again.versions)


@each_supported
def test_a_state_holds_tensors_and_json_values_only(edited: Edited, name: str, task: str) -> None:
    _, editor = edited(name, task)
    rest = {key: value for key, value in editor.state_dict().items() if not isinstance(value, Tensor)}
    assert json.loads(json.dumps(rest)) == rest
    assert json.loads(json.dumps(editor.settings())) == editor.settings()


def masked_fields(experience: EditExperience) -> Iterator[str]:
    for field in ("prompt", "target", "subject", "request", "current_experience"):
        try:
            getattr(experience, field)
        except MaskedAttributeError:
            yield field


class Spy(BasePlugin):  # type: ignore[type-arg]
    """Notes what can be read of the experience an editor is given."""

    def __init__(self) -> None:
        super().__init__()
        self.masked: list[set[str]] = []

    def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.masked.append(set(masked_fields(strategy.experience)))


@each_editor
def test_an_editor_sees_prompt_and_target_and_the_subject_only_if_it_declares_so(
    make_editor: MakeEditor, name: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    cls = EDITORS.get(name)
    task = cls.supported_tasks[0]
    spy = Spy()
    seen: list[Any] = []

    class Watched(cls):  # type: ignore[misc, valid-type]
        """The editor, noting the batches it is given."""

        def edit(self, batch: Any) -> EditOutcome:
            seen.append(batch)
            outcome: EditOutcome = super().edit(batch)
            return outcome

    request = make_requests(task)[0]
    with make_editor(name, make_model(task), cls=Watched, plugins=[spy]) as editor:
        editor.train(EditExperience(request), eval_streams=[])
        assert editor.n_edits == 1
    evaluation_only = {"request", "current_experience"}
    assert spy.masked == [evaluation_only if cls.needs_subject else evaluation_only | {"subject"}]
    (batch,) = seen
    assert batch.prompts == (request.prompt,)
    assert batch.targets == (request.target,)
    assert batch.subjects == ((request.subject,) if cls.needs_subject else None)
    assert set(vars(batch)) == {"prompts", "targets", "subjects", "encoded"}


@each_editor
def test_weights_declared_frozen_never_change(edited: Edited, name: str, make_model: MakeModel) -> None:
    task = EDITORS.get(name).supported_tasks[0]
    model, editor = edited(name, task)
    assert same_state(model.module.state_dict(), make_model(task).module.state_dict()) or not editor.freezes_weights
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert not any(module.training for module in model.module.modules())


def test_a_task_an_editor_does_not_work_on_is_refused(make_editor: MakeEditor, make_model: MakeModel) -> None:
    for name, task in UNSUPPORTED:
        with pytest.raises(UserError, match=f"editor '{name}' does not work on {task}"):
            make_editor(name, make_model(task))


@each_editor
def test_a_task_taken_off_an_editors_list_is_refused_by_name(name: str, make_model: MakeModel) -> None:
    class Narrow(EDITORS.get(name)):  # type: ignore[misc]
        """The editor, for one task only."""

        supported_tasks = ("qa",)

    with pytest.raises(UserError, match=rf"editor '{name}' does not work on completion \(it does on qa\)"):
        Narrow(model=make_model("completion"))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_edited_with_and_without_changing_weights(task: str) -> None:
    editors = [EDITORS.get(name) for name in EDITORS.entries() if name != "none"]
    assert {cls.freezes_weights for cls in editors if task in cls.supported_tasks} == {True, False}


@each_editor
def test_the_class_of_an_editor_is_fit_to_be_registered(name: str) -> None:
    assert EDITORS.get(name).check_class() is None
