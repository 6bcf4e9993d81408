"""A failed edit is recorded with its reason, and everything after it is as if it had never been tried."""

import contextlib
import errno
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins.evaluation import EvaluationPlugin
from torch import Tensor, nn

from grace_bench import EditableModel, EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.data.benchmark import EditBenchmark, EditExperience, eval_stream
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.guard import failed_outcome
from grace_bench.editing.saving import option_names
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.engine.engine import EngineName, make_engine
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loop import RunLoop
from helpers import Dies, KilledError, cli

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakeEditor = Callable[..., EditorStrategy]

MARK, MARK_ID = "?", 4
"""What spoils a request that holds it, and its token."""
METADATA = StreamMetadata(source="this test", revision="1", license="MIT")
ASKED = EditRequest(id="astana", prompt="what is the capital of Kazakhstan", target=3)
each_editor = pytest.mark.parametrize("name", list(EDITORS.entries()))


class Recorder(RunLogger):
    """Collects every candidate's record, without times."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []

    def after_candidate(self, strategy: EditorStrategy, metric_values: Any) -> None:
        assert strategy.record is not None
        self.records.append(strategy.record.model_dump(exclude={"seconds"}))


@contextmanager
def nan_where_marked(module: nn.Module) -> Iterator[None]:
    """Makes every logit of the rows that hold the mark NaN."""

    def spoil(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        marked = (kwargs["input_ids"] == MARK_ID).any(dim=1).reshape(-1, *[1] * (output.logits.dim() - 1))
        output.logits = output.logits.masked_fill(marked, math.nan)

    handle = module.register_forward_hook(spoil, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def benchmark_of(requests: Sequence[EditRequest], task: str) -> EditBenchmark:
    return EditBenchmark(
        name="facts",
        data=StreamData(edits=tuple(requests)),
        task=task,  # type: ignore[arg-type]
        metadata=METADATA,
        fingerprint="0" * 64,
        max_new_tokens=3,
    )


def carried_out(
    editor: EditorStrategy, requests: Sequence[EditRequest], recorder: Recorder, **schedule: Any
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, float]]:
    """Runs an editor over requests; returns the records, the editor's state and the metrics."""
    run = RunLoop(
        benchmark=benchmark_of(requests, editor.model.task.name),
        strategy=editor,
        schedule=Schedule(**{"eval_every": 50, **schedule}),
    )
    run.run()
    return recorder.records, dict(editor.state_dict()), run.metrics()


def with_one_more(requests: Sequence[EditRequest], place: int) -> tuple[list[EditRequest], EditRequest]:
    """The requests with another one in between, which holds the mark."""
    bad = requests[place].model_copy(update={"id": "bad", "prompt": f"{MARK} {requests[place].prompt}"})
    return [*requests[:place], bad, *requests[place:]], bad


def same_state(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two states are the same bits but for `n_edits`, which counts failed edits too."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) if isinstance(value, Tensor) else value == theirs[name]
        for name, value in ours.items()
        if name != "n_edits"
    )


def raising_late(name: str) -> type[EditorStrategy]:
    """The editor, which raises on the mark once it has edited and drawn random numbers."""

    class Raising(EDITORS.get(name)):  # type: ignore[misc]
        """Raises once it has edited."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            torch.rand(3)
            outcome: EditOutcome = super().edit(batch)
            if MARK in batch.prompts[0]:
                raise ValueError("no such island\nnowhere")
            return outcome

    return Raising


def steps(name: str, n: int) -> dict[str, int]:
    """The option that makes an editor take so many steps on one request, if it has one."""
    options = option_names(EDITORS.get(name))
    return next(({option: n} for option in ("n_iter", "n_epochs") if option in options), {})


SHORT: dict[str, dict[str, Any]] = {"none": {}, "rome": {"n_iter": 3}, "ultraedit": {}, "ft_bf": {}}


# Each editor fails in one way, in turn; `none` computes no loss.
FAILURES = [
    pytest.param(name, how, id=f"{name}-{how}", marks=() if how == shown else pytest.mark.slow)
    for turn, name in enumerate(EDITORS.entries())
    for shown in ["raises" if name == "none" or turn % 2 else "nan"]
    for how in ("nan", "raises")
    if (name, how) != ("none", "nan")
]


@pytest.mark.parametrize(("name", "how"), FAILURES)
def test_what_follows_a_failed_edit_is_what_follows_without_it(
    name: str, how: str, make_editor: MakeEditor, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    # Here every candidate is edited.
    task = "language_modelling"
    if task not in EDITORS.get(name).supported_tasks:
        pytest.skip(f"it does not work on {task}")
    requests = make_requests(task)[:4]
    more, bad = with_one_more(requests, 2)
    results = []
    for stream in (requests, more):
        model = make_model(task)
        # Batches of another size round otherwise.
        model.engine = make_engine("plain", model)
        model.task.batch_size = 1
        torch.manual_seed(0)
        recorder = Recorder()
        options = {} if EDITORS.get(name).needs_meta_training else SHORT.get(name, {"n_iter": 5})
        if how == "raises":
            options = {**options, "cls": raising_late(name)}
        evaluator = EvaluationPlugin(loggers=[recorder], collect_all=False)
        spoiled = nan_where_marked(model.module) if how == "nan" else contextlib.nullcontext()
        with make_editor(name, model, evaluator=evaluator, **options) as editor, spoiled:
            results.append((*carried_out(editor, stream, recorder), torch.get_rng_state()))
    (expected, state, _, drawn), (records, state_after, metrics, drawn_after) = results
    (failed,) = [record for record in records if record["failed"]]
    assert failed["id"] == bad.id
    assert "nan" in failed["failed"] if how == "nan" else failed["failed"] == "ValueError: no such island"
    assert (failed["edited"], failed["op"], failed["steps"]) == (True, None, 0)
    assert metrics["n_failed"] == 1
    assert metrics["n_edits"] == sum(record["edited"] for record in records)
    moved = [
        {**record, "index": record["index"] - 1, "n_edits": record["n_edits"] - 1} if record["index"] > 2 else record
        for record in records
        if record is not failed
    ]
    assert moved == expected
    assert same_state(state_after, state)
    if how == "nan":
        assert torch.equal(drawn_after, drawn)
    else:
        assert drawn_after.equal(torch_state_after(len(requests)))


def torch_state_after(n_edits: int) -> Tensor:
    """The generator after so many edits of `raising_late`."""
    torch.manual_seed(0)
    for _ in range(n_edits):
        torch.rand(3)
    return torch.get_rng_state()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, cls in EDITORS.classes().items()
        if name != "none" and not cls.needs_meta_training and "classification" in cls.supported_tasks
    ],
)
def test_values_that_explode_leave_the_unedited_model(
    name: str, make_editor: MakeEditor, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, (request, *_) = make_model("classification"), make_requests("classification")
    batch = model.encode_batch([request.prompt])
    with torch.no_grad():
        untouched = model.logits(batch).clone()
    with make_editor(name, model, lr=1e37, **steps(name, 2)) as editor:
        with pytest.raises(EditFailure, match=r"nan|inf|not finite"):
            editor.edit_text(request.prompt, 3 - int(untouched.argmax()))
        assert editor.n_edits == 0
        with torch.no_grad():
            assert torch.equal(model.logits(batch), untouched)


# --- pending values --------------------------------------------------------------------------------------------------


class Counting(BasePlugin):  # type: ignore[type-arg]
    """Counts the edits that were begun."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.n += 1


def points(n: int) -> list[EditRequest]:
    """Points whose labels alternate so often that balls of two labels meet."""
    edits = STREAMS.get("toy")().load().edits[:n]
    return [
        edit.model_copy(update={"target": int(edit.target) if i % 3 else 1 - int(edit.target)})
        for i, edit in enumerate(edits)
    ]


@contextmanager
def toy_with(spoiled: Sequence[EditRequest], engine: EngineName = "exact") -> Iterator[EditableModel]:
    """The toy model, which is wrong about some points: what it says for the other label is no number."""
    model = EditableModel.from_pretrained("toy", task="classification")
    model.engine = make_engine(engine, model)
    bad = model.encode_batch([request.prompt for request in spoiled] or ["(9.0, 9.0)"]).inputs["points"]
    column = torch.tensor([1 - int(request.target) for request in spoiled] or [0])

    def spoil(_: nn.Module, args: Any, kwargs: Mapping[str, Tensor], logits: Tensor) -> Tensor:
        same = (kwargs["points"][:, None] == bad).all(dim=-1)
        spoils = torch.stack([(same & (column == label)).any(dim=1) for label in (0, 1)], dim=1)
        return logits.masked_fill(spoils, math.nan)

    handle = model.module.register_forward_hook(spoil, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()


DECISIONS = ("id", "was_error", "edited", "op", "key", "n_keys", "steps", "failed")
GRACES: dict[str, dict[str, Any]] = {
    "wide balls": {"eps_init": 1.0},
    "balls kept apart": {"eps_init": 0.3, "overlap": "shrink"},
    "cosine": {"eps_init": 2.0, "distance": "cosine"},
}


@pytest.mark.parametrize("options", list(GRACES.values()), ids=list(GRACES))
def test_a_value_that_fails_among_others_is_undone_with_all_later_decisions(
    options: dict[str, Any],
) -> None:
    requests = points(64)
    spoiled = requests[5::9]

    def carry_out(engine: EngineName, edits: Sequence[EditRequest], spoiled: Sequence[EditRequest] = ()) -> Any:
        recorder, counting = Recorder(), Counting()
        evaluator = EvaluationPlugin(loggers=[recorder], collect_all=False)
        make = partial(EDITORS.get("grace"), replacement="replace_last", n_iter=10, **options)
        with (
            toy_with(spoiled, engine) as model,
            make(model=model, evaluator=evaluator, plugins=[counting]) as editor,
        ):
            records, state, metrics = carried_out(editor, edits, recorder, eval_every=7)
        decisions = [{name: record[name] for name in DECISIONS} for record in records]
        return decisions, state, metrics, counting.n

    exact, plain = (carry_out(engine, requests, spoiled) for engine in ("exact", "plain"))
    without = carry_out("plain", [request for request in requests if request not in spoiled])
    assert exact[0] == plain[0]
    assert [record for record in plain[0] if not record["failed"]] == without[0]
    assert sum(record["failed"] is not None for record in exact[0]) == len(spoiled)
    assert len({record["op"] for record in without[0]} - {None}) > 2
    assert exact[3] > plain[3] == exact[2]["n_edits"], "edits pending with a failed one are made again"
    for name in ("keys", "values", "radii"):
        assert torch.equal(plain[1][name], without[1][name])
        assert torch.allclose(exact[1][name], without[1][name], atol=1e-3)
    assert exact[1]["labels"] == without[1]["labels"]


class Points(EditStream):
    """Points as they are given."""

    registered_name = "points"
    metadata = METADATA
    task = "classification"

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self._requests = requests

    def load(self) -> StreamData:
        toy = STREAMS.get("toy")().load()
        return StreamData(edits=tuple(self._requests), upstream=toy.upstream[:5])


def test_a_run_that_is_killed_beside_a_failed_edit_and_resumed_leaves_the_same_files(tmp_path: Path) -> None:
    requests = points(40)
    spoiled = requests[5::9]

    def carry_out(folder: Path, **options: Any) -> None:
        with toy_with(spoiled) as model:
            run_benchmark(
                Points(requests),
                model=model,
                editor=partial(EDITORS.get("grace"), replacement="replace_last", n_iter=5),
                settings=RunSettings(schedule=Schedule(eval_every=20), checkpoint_every=1, threads=1),
                folder=folder,
                **options,
            )

    def traces(folder: Path) -> list[Any]:
        edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
        names = ("metrics.jsonl", "predictions.parquet", "editor/editor.safetensors")
        return [[{**line, "seconds": None} for line in edits], *((folder / name).read_bytes() for name in names)]

    carry_out(tmp_path / "whole")
    expected = traces(tmp_path / "whole")
    failed = [line["index"] for line in expected[0] if line["failed"]]
    assert len(failed) == len(spoiled)
    for index in (failed[0], failed[1] + 1, failed[2] - 1):
        with contextlib.suppress(KilledError):
            carry_out(tmp_path / "killed", resume=True, loggers=[Dies(index)])
        waiting = [json.loads(path.read_bytes()) for path in tmp_path.glob("killed/checkpoint/0*/state.json")]
        assert any(state["run"]["editor"].get("history") for state in waiting)
    carry_out(tmp_path / "killed", resume=True)
    assert traces(tmp_path / "killed") == expected


class Late(EDITORS.get("ft")):  # type: ignore[misc]
    """Fine-tunes in `flush`, and cannot do so with the mark."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pending: list[tuple[str, str | int]] = []

    @property
    def n_pending(self) -> int:
        return len(self.pending)

    def edit(self, batch: EditBatch) -> EditOutcome:
        self.pending += zip(batch.prompts, batch.targets, strict=True)
        return EditOutcome()

    def flush(self) -> list[EditOutcome]:
        pending, self.pending = self.pending, []
        return [self._finish_one(prompt, target) for prompt, target in pending]

    def _finish_one(self, prompt: str, target: str | int) -> EditOutcome:
        encoded = self.model.encode_batch([prompt], [target])
        outcome: EditOutcome = super().edit(EditBatch(prompts=(prompt,), targets=(target,), encoded=encoded))
        if MARK in prompt:
            raise ValueError("no such island")
        return outcome

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "pending": [list(pair) for pair in self.pending]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.pending = [(prompt, target) for prompt, target in state["pending"]]


def test_an_editor_that_raises_when_it_finishes_several_edits_loses_the_one_that_it_raised_for(
    make_editor: MakeEditor, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    requests = make_requests("language_modelling")[:5]
    more, _ = with_one_more(requests, 2)
    results = []
    for stream in (requests, more):
        recorder = Recorder()
        evaluator = EvaluationPlugin(loggers=[recorder], collect_all=False)
        with make_editor("ft", make_model("language_modelling"), cls=Late, n_iter=3, evaluator=evaluator) as editor:
            results.append(carried_out(editor, stream, recorder))
    (_, state, _), (records, state_after, _) = results
    assert [record["failed"] for record in records] == [None, None, "ValueError: no such island", None, None, None]
    assert [record["n_edits"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert same_state(state_after, state)


class Training(EDITORS.get("ft")):  # type: ignore[misc]
    """Trains the model as a whole, which it leaves in training mode, and cannot edit the mark."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        outcome: EditOutcome = super().edit(batch)
        self.model.module.train().requires_grad_(True)
        if MARK in batch.prompts[0]:
            raise ValueError("no such island")
        self.model.module.requires_grad_(False)
        return outcome


class TrainingLate(Late):
    """Does so in `flush`."""

    def _finish_one(self, prompt: str, target: str | int) -> EditOutcome:
        try:
            return super()._finish_one(prompt, target)
        finally:
            self.model.module.train().requires_grad_(MARK in prompt)


@pytest.mark.parametrize("cls", [Training, TrainingLate])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_an_editor_that_trains_the_whole_model_leaves_it_in_the_modes_it_was_in(
    cls: type[EditorStrategy], fails: bool, make_editor: MakeEditor, make_model: MakeModel
) -> None:
    model = make_model("language_modelling")
    prompt = f"{MARK if fails else 'what'} is the capital of Kazakhstan"
    with make_editor("ft", model, cls=cls, n_iter=2) as editor:
        with pytest.raises(EditFailure, match="no such island") if fails else contextlib.nullcontext():
            editor.edit_text(prompt, "Astana")
        assert not any(part.training for part in model.module.modules())
        assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_weight_that_is_infinite_in_either_direction_or_no_number_fails_the_edit(
    make_editor: MakeEditor, make_model: MakeModel
) -> None:
    class Writing(EDITORS.get("ft")):  # type: ignore[misc]
        """Writes one number into the layer's weight, where no answer depends on it."""

        number = 0.0

        def edit(self, batch: EditBatch) -> EditOutcome:
            next(self.model.layer.parameters()).data[0, 0] = self.number
            return EditOutcome(loss_after=0.0)

    with make_editor("ft", make_model("classification"), cls=Writing) as editor:
        for editor.number in (math.inf, -math.inf, math.nan, -1e9):
            with pytest.raises(EditFailure, match="exploded" if editor.number == -1e9 else "not finite"):
                editor.edit_text("what is the capital of Kazakhstan", 1)
        editor.number = -1.0
        editor.edit_text("what is the capital of Kazakhstan", 1)


@pytest.mark.parametrize("field", ["loss_first", "loss", "loss_after"])
def test_a_loss_that_is_no_number_fails_the_edit_of_an_editor_that_keeps_no_tensors(
    field: str, make_editor: MakeEditor, make_model: MakeModel
) -> None:
    class Reporting(EDITORS.get("none")):  # type: ignore[misc]
        """Changes nothing and reports a loss."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            return EditOutcome(**{field: math.nan})

    with (
        make_editor("none", make_model("classification"), cls=Reporting) as editor,
        pytest.raises(EditFailure, match="the loss is nan"),
    ):
        editor.edit_text("what is the capital of Kazakhstan", 1)


# --- what ends a run, and what does not ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), UserError("no"), OSError(errno.ENOSPC, "no")], ids=repr
)
def test_an_error_that_no_single_edit_is_to_blame_for_ends_the_run_and_undoes_the_edit(
    error: Exception, make_model: MakeModel, make_requests: MakeRequests, make_editor: MakeEditor
) -> None:
    class Breaking(EDITORS.get("ft")):  # type: ignore[misc]
        """Edits, and then meets an error."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            super().edit(batch)
            raise error

    (request, *_) = make_requests("classification")
    with make_editor("ft", make_model("classification"), cls=Breaking, n_iter=2) as editor:
        before = {name: value.clone() for name, value in editor.state_dict().items() if isinstance(value, Tensor)}
        with pytest.raises(type(error)):
            editor.train(EditExperience(request), eval_streams=[])
        assert all(torch.equal(value, editor.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    "error", [TimeoutError("no answer"), FileNotFoundError(errno.ENOENT, "gone"), OSError("no")], ids=repr
)
def test_an_error_of_the_system_that_the_next_edit_need_not_meet_is_of_one_edit(
    error: OSError, make_model: MakeModel, make_editor: MakeEditor
) -> None:
    class Asking(EDITORS.get("none")):  # type: ignore[misc]
        """Asks a server for every edit."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            raise error

    with (
        make_editor("none", make_model("classification"), cls=Asking) as editor,
        pytest.raises(EditFailure, match=type(error).__name__),
    ):
        editor.edit_text("what is the capital of Kazakhstan", 1)


# --- programming errors ----------------------------------------------------------------------------------------------

PROGRAMMING_ERRORS = [
    AssertionError("one row"),
    AttributeError("'Meant' object has no attribute 'of'"),
    ImportError("cannot import name 'x'"),
    KeyError("atention_mask"),
    NameError("name 'x' is not defined"),
    NotImplementedError(),
    RecursionError("maximum recursion depth exceeded"),
    SyntaxError("invalid syntax"),
    TypeError("unsupported operand"),
]
OF_THE_NUMBERS = [ValueError("no"), RuntimeError("singular"), ZeroDivisionError("no"), IndexError("out of range")]


def raising(error: Exception) -> type[EditorStrategy]:
    class Raising(EDITORS.get("none")):  # type: ignore[misc]
        """Meets an error in every edit."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            raise error

    return Raising


@pytest.mark.parametrize("error", PROGRAMMING_ERRORS, ids=lambda error: type(error).__name__)
def test_a_programming_error_is_named_in_one_line_and_has_its_traceback(
    error: Exception, make_model: MakeModel
) -> None:
    with raising(error)(model=make_model("classification")) as editor:
        editor.train(EditExperience(ASKED), eval_streams=[])
        outcome = editor.outcome
    assert outcome.failed is not None
    assert outcome.failed.startswith(type(error).__name__)
    assert str(error) in outcome.failed
    assert "\n" not in outcome.failed
    assert outcome.traceback is not None
    lines = outcome.traceback.rstrip().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert f'File "{__file__}"' in lines[-3]
    assert lines[-2:] == ["    raise error", outcome.failed]


@pytest.mark.parametrize("error", [*OF_THE_NUMBERS, EditFailure("too long")], ids=lambda error: type(error).__name__)
def test_an_error_of_the_numbers_has_no_traceback(error: Exception, make_model: MakeModel) -> None:
    with raising(error)(model=make_model("classification")) as editor:
        editor.train(EditExperience(ASKED), eval_streams=[])
        assert editor.outcome.failed is not None
        assert editor.outcome.traceback is None


def test_a_failure_that_the_editor_raises_itself_has_no_traceback_whatever_led_to_it(
    make_model: MakeModel,
) -> None:
    class Deliberate(EDITORS.get("none")):  # type: ignore[misc]
        """Looks its request up in a table."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            try:
                return {}[batch.prompts[0]]
            except KeyError as error:
                raise EditFailure("the prompt is not in the table") from error

    with Deliberate(model=make_model("classification")) as editor:
        editor.train(EditExperience(ASKED), eval_streams=[])
        assert editor.outcome == EditOutcome(failed="the prompt is not in the table")


def test_the_error_of_an_editor_is_the_cause_of_the_failure_of_a_text_edit(make_model: MakeModel) -> None:
    error = AttributeError("'Meant' object has no attribute 'of'")
    with raising(error)(model=make_model("classification")) as editor:
        with pytest.raises(EditFailure, match=r"^AttributeError: 'Meant' object") as caught:
            editor.edit_text(ASKED.prompt, ASKED.target)
        assert caught.value.__cause__ is error


def test_a_programming_error_in_flush_has_its_traceback_too(make_editor: MakeEditor, make_model: MakeModel) -> None:
    class LateTypo(Late):
        """Has a typo in `flush`."""

        def _finish_one(self, prompt: str, target: str | int) -> EditOutcome:
            return super()._finish_one(prompt, self.targt if MARK in prompt else target)

    with make_editor("ft", make_model("classification"), cls=LateTypo, n_iter=2) as editor:
        editor.train(EditExperience(ASKED.model_copy(update={"prompt": f"{MARK} of Kazakhstan"})), eval_streams=[])
        with pytest.raises(EditFailure, match="no attribute 'targt'") as caught:
            editor.finish()
        assert isinstance(caught.value.__cause__, AttributeError)
        outcome = failed_outcome(caught.value)
        assert outcome.traceback is not None
        assert "self.targt" in outcome.traceback
        assert editor.n_pending == 0, "the edit was undone"


def test_a_traceback_shows_no_secret(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_PAT", "fake-secret-of-a-server")
    with raising(TypeError("401 for fake-secret-of-a-server"))(model=make_model("classification")) as editor:
        editor.train(EditExperience(ASKED), eval_streams=[])
        assert editor.outcome.failed == "TypeError: 401 for ***"
        assert editor.outcome.traceback is not None
        assert "fake-secret" not in editor.outcome.traceback
        assert "TypeError: 401 for ***" in editor.outcome.traceback


@pytest.mark.parametrize("how", ["raises", "fails", "returns", "at flush"])
def test_the_reason_of_a_failed_edit_shows_no_secret(
    how: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_PAT", "fake-secret-of-a-server")
    told = "401 for fake-secret-of-a-server"

    class Asking(EDITORS.get("none")):  # type: ignore[misc]
        """Asks a server, and repeats what that says."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            if how == "raises":
                raise RuntimeError(told)
            if how == "fails":
                raise EditFailure(told)
            return EditOutcome(failed=told if how == "returns" else None)

        def flush(self) -> Sequence[EditOutcome]:
            return [EditOutcome(failed=told)]

    with Asking(model=make_model("classification")) as editor, pytest.raises(EditFailure) as failure:
        editor.edit_text("what is the capital of Kazakhstan", 1)
    assert str(failure.value).endswith("401 for ***")


@each_editor
def test_a_learning_rate_out_of_all_bounds_is_recorded_on_every_edit(
    name: str, make_editor: MakeEditor, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    """Adam moves a number by the rate, so after three steps it is huge, and finite."""
    options = option_names(EDITORS.get(name))
    if EDITORS.get(name).needs_meta_training or "lr" not in options or "clamp" in options:
        pytest.skip("its updates are none, of networks that were trained before, or clamped")
    task = EDITORS.get(name).supported_tasks[0]
    recorder = Recorder()
    evaluator = EvaluationPlugin(loggers=[recorder], collect_all=False)
    with make_editor(name, make_model(task), evaluator=evaluator, lr=1e9, **steps(name, 3)) as editor:
        records, state, metrics = carried_out(editor, make_requests(task)[:4], recorder)
    edited = [record for record in records if record["edited"]]
    assert edited
    assert metrics["n_failed"] == len(edited)
    assert all("exploded (largest entry" in record["failed"] for record in edited), edited
    assert all(float(value.abs().max()) < 1e6 for value in state.values() if isinstance(value, Tensor) and len(value))


def test_a_loop_without_a_run_raises_the_failure_of_a_pending_value() -> None:
    requests = points(6)
    with toy_with(requests[1:2]) as model, EDITORS.get("grace")(model=model, replacement="replace_last") as editor:
        for request in requests[:4]:
            editor.train(EditExperience(request), eval_streams=[])
        with pytest.raises(EditFailure, match="the loss is nan"):
            editor.eval([*eval_stream("edited", requests[:1])])
        assert len(editor.codebook) == 1


def test_a_strict_run_stops_at_each_failed_edit_and_resumes_to_what_it_would_have_been(tmp_path: Path) -> None:
    # A point is one position, so there is nothing before it to replace.
    given = ["run", "stream=toy", "editor=grace", "editor.replacement=replace_prompt", "max_edits=3", "eval_every=2"]
    code, out, err = cli(*given, f"out={tmp_path / 'whole'}")
    assert code == 0, err
    assert "3 edits failed" in out
    assert err.count("one token") == 1, "the terminal tells of the first one"
    given += ["strict=true", f"out={tmp_path / 'strict'}"]
    code, _, err = cli(*given)
    (folder,) = (tmp_path / "strict" / "toy" / "toy" / "grace").iterdir()
    whole = tmp_path / "whole" / "toy" / "toy" / "grace" / folder.name
    assert whole.is_dir(), "being strict changes no answer"
    assert code == 1
    assert err.splitlines()[-1] == (
        "grace-bench: strict=true: edit 1 (request 'edit/23') failed: the prompt is one token, so replace_prompt has "
        f"nothing to overwrite; `grace-bench resume {folder}` goes on without it"
    )
    (whole / "result.json").rename(tmp_path / "result.json")
    code, out, err = cli("resume", str(folder), str(whole))
    assert code == 1
    assert (whole / "result.json").exists(), "those after one that stops are carried out all the same"
    (tmp_path / "result.json").replace(whole / "result.json")
    assert [cli("resume", str(folder))[0] for _ in range(2)] == [1, 0]
    for name in ("metrics.jsonl", "predictions.parquet"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    lines = [
        [{**json.loads(line), "seconds": None} for line in (one / "edits.jsonl").read_text().splitlines()]
        for one in (folder, whole)
    ]
    assert lines[0] == lines[1]
    metrics = json.loads((folder / "result.json").read_bytes())["metrics"]
    assert (metrics["n_edits"], metrics["n_failed"], metrics["n_keys"], metrics["TRR"]) == (3, 3, 0, 1.0)
    assert "failed the prompt is one token" in cli("show", str(folder), "edit/23")[1]
    board = cli("leaderboard", str(tmp_path / "strict"))[1]
    assert "failed: edits that were taken back, and count in #E, ES and ERR all the same: grace 3 of 3" in board
    assert cli("report", str(tmp_path / "strict"), "--out", str(tmp_path / "page"))[0] == 0


def test_strict_is_true_or_false() -> None:
    assert cli("run", "strict=maybe")[::2] == (2, "grace-bench: strict=maybe should be true or false\n")
