"""The run loop keeps the protocol: who is edited, when it is scored, what counts, and that nothing else moves it."""

import io
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from avalanche.training.plugins.evaluation import EvaluationPlugin

from grace_bench import EditableModel, EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.requests import DerivedRequest, Probe
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import EditFailure, UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.run_folder import run_or_reuse
from grace_bench.models.engine.engine import EngineName
from grace_bench.models.tasks.generation import Completion
from grace_bench.models.zoo import resolve_model
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.results.reading import read_result
from grace_bench.results.schema import EvaluationRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan
from grace_bench.run.loggers.jsonl import JsonlLogger
from grace_bench.run.loop import RunLoop
from grace_bench.run.observer import RunObserver
from helpers import read_lines

# A point is one position, so there is nothing before it to replace.
GRACE = partial(EDITORS.get("grace"), replacement="replace_last", eps_init=0.3)
each_editor = pytest.mark.parametrize("editor", [GRACE, EDITORS.get("ft")], ids=["grace", "ft"])
TURNED = ("(-1.2000, 1.8000)", "(-1.0000, 1.9000)", "(-1.4000, 1.7000)", "(-1.1000, 2.0000)")
"""Points of the disc that turned: the unedited model says 1, the stream wants 0."""
LABEL_NAMES = ("below", "above")


def run_toy(folder: Path, *, editor: Any = GRACE, seed: int = 0, stream: Any = "toy", **schedule: Any) -> RunResult:
    schedule = {"max_edits": 5, "eval_every": 2, "max_upstream": 40, **schedule}
    return run_benchmark(
        stream,
        model="toy",
        editor=editor,
        settings=RunSettings(seed=seed, schedule=Schedule(**schedule)),
        folder=folder,
    )


class Recorder(RunLogger):
    """Keeps every candidate's record and every evaluation's values."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self._values: dict[str, Any] = {}

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        self._values[name] = value

    def after_candidate(self, strategy: EditorStrategy, metric_values: Any) -> None:
        assert strategy.record is not None
        self.records.append(strategy.record.model_dump(exclude={"seconds"}))

    def after_eval(self, strategy: EditorStrategy, metric_values: Any) -> None:
        self.evaluations.append({"n_edits": strategy.n_edits, **self._values})
        self._values = {}


def start(
    data: StreamData, *, editor: Any = GRACE, plugins: Sequence[Any] = (), engine: EngineName = "exact", **schedule: Any
) -> Any:
    """A run over requests in the order given, on the toy model, and what its logger hears."""
    model = EditableModel.from_pretrained("toy", task="classification", engine=engine)
    recorder = Recorder()
    evaluator = EvaluationPlugin(
        *(METRICS.get(name)() for name in METRICS.entries()), loggers=[recorder], collect_all=False
    )
    make = EDITORS.get(editor) if isinstance(editor, str) else editor
    strategy = make(model=model, evaluator=evaluator, plugins=plugins)
    benchmark = EditBenchmark(
        name="points",
        data=data,
        task="classification",
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="0" * 64,
        max_new_tokens=1,
    )
    return RunLoop(benchmark=benchmark, strategy=strategy, schedule=Schedule(**{"eval_every": 1, **schedule})), recorder


def point(index: int, target: int = 0, *, name: str | None = None, **fields: Any) -> EditRequest:
    return EditRequest(id=name or f"p{index}", prompt=TURNED[index], target=target, **fields)


def labels(model: EditableModel, prompts: Sequence[str]) -> list[int]:
    with torch.no_grad():
        return [int(label) for label in model.logits(model.encode_batch(list(prompts))).argmax(dim=-1)]


def unedited_labels(prompts: Sequence[str]) -> list[int]:
    return labels(EditableModel.from_pretrained("toy", task="classification"), prompts)


@each_editor
def test_a_candidate_the_model_as_edited_so_far_already_answers_is_not_edited(editor: Any) -> None:
    data = STREAMS.get("toy")().load()
    run, heard = start(StreamData(edits=data.edits[:15], upstream=data.upstream[:20]), editor=editor, eval_every=50)
    expected: list[bool] = []
    steps = run.steps()
    for index in steps:
        # Edits that wait to be finished together are told of when they are.
        run.settle()
        assert len(heard.records) == index
        if index < 15:
            expected.append(labels(run.strategy.model, [data.edits[index].prompt]) != [data.edits[index].target])
    assert [record["edited"] for record in heard.records] == expected
    assert [record["was_error"] for record in heard.records] == expected
    assert 0 < sum(expected) < 15, "one disc turned, so some edits carry over to candidates that follow"
    for record in heard.records:
        assert (record["score_after"] is None) == (not record["edited"])
        assert record["steps"] == 0 or record["edited"]
    clock = [record["n_edits"] for record in heard.records]
    assert clock == [sum(expected[: i + 1]) for i in range(15)]


def test_a_run_stops_at_exactly_max_edits(tmp_path: Path) -> None:
    result = run_toy(tmp_path, max_edits=5)
    records = read_lines(tmp_path / "edits.jsonl")
    assert sum(record["edited"] for record in records) == result.metrics["n_edits"] == 5
    assert records[-1]["edited"]
    assert len(records) == result.metrics["n_candidates"]
    assert [record["index"] for record in records] == list(range(len(records)))


@pytest.mark.parametrize(
    ("eval_every", "clock"), [(2, [0, 2, 4, 5]), (5, [0, 5]), (1, [0, 1, 2, 3, 4, 5]), (50, [0, 5])]
)
def test_streams_are_scored_at_the_start_every_eval_every_edits_and_at_the_end_once_each(
    tmp_path: Path, eval_every: int, clock: list[int]
) -> None:
    result = run_toy(tmp_path, max_edits=5, eval_every=eval_every)
    measured = read_lines(tmp_path / "metrics.jsonl")
    assert [line["n_edits"] for line in measured] == clock
    assert all("TRR" in line for line in measured)
    assert "ERR" not in measured[0]
    assert all({"ERR", "Holdout", "ES"} <= line.keys() for line in measured[1:])
    for name, value in measured[-1].items():
        assert result.metrics[name] == value
    assert result.before["TRR"] == measured[0]["TRR"]


def test_a_stream_that_ends_before_max_edits_is_scored_at_its_end() -> None:
    run, heard = start(StreamData(edits=tuple(point(i) for i in range(4))), max_edits=100, eval_every=3)
    run.run()
    clock = [values["n_edits"] for values in heard.evaluations]
    assert clock == sorted(set(clock))
    assert clock[0] == 0
    assert clock[-1] == run.strategy.n_edits <= 4
    assert run.position.index == 4


class EveryOther(EDITORS.get("ft")):  # type: ignore[misc]
    """Takes every other edit for made."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        outcome: EditOutcome = super().edit(batch) if self.n_edits % 2 else EditOutcome()
        return outcome


def test_es_is_the_mean_score_right_after_each_edit(tmp_path: Path) -> None:
    run_toy(tmp_path, editor=EveryOther, max_edits=6)
    records = read_lines(tmp_path / "edits.jsonl")
    for line in read_lines(tmp_path / "metrics.jsonl")[1:]:
        so_far = [r["score_after"] for r in records if r["edited"] and r["n_edits"] <= line["n_edits"]]
        assert len(so_far) == line["n_edits"]
        assert line["ES"] == fmean(so_far)
    assert {record["score_after"] for record in records} >= {0.0, 1.0}


@each_editor
def test_metrics_are_the_means_of_the_predictions_beside_them(tmp_path: Path, editor: Any) -> None:
    run_toy(tmp_path, editor=editor)
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    measured = read_lines(tmp_path / "metrics.jsonl")
    for line in measured:
        rows = predictions[predictions.n_edits == line["n_edits"]]
        for name, stream in {"TRR": "upstream", "ERR": "edited", "Holdout": "holdout"}.items():
            scores = rows[rows.stream == stream].score
            assert line.get(name) == (pytest.approx(scores.mean(), abs=1e-12) if len(scores) else None)
        if "ERR" in line:
            assert line["Avg"] == (line["TRR"] + line["ERR"]) / 2
            assert len(rows[rows.stream == "edited"]) == line["n_edits"]
        assert len(rows[rows.stream == "upstream"]) == 40
    last = max(line["n_edits"] for line in measured)
    with_text = set(predictions[predictions.text.notna()].n_edits)
    assert with_text == {0, last}


def test_the_unedited_model_is_scored_as_it_is(tmp_path: Path) -> None:
    run_toy(tmp_path, editor="ft")
    data = STREAMS.get("toy")().load()
    targets = {request.id: request for request in data.upstream}
    rows = pd.read_parquet(tmp_path / "predictions.parquet")
    rows = rows[(rows.n_edits == 0) & (rows.stream == "upstream")]
    expected = unedited_labels([targets[i].prompt for i in rows.request_id])
    assert rows.text.tolist() == [LABEL_NAMES[label] for label in expected]
    assert rows.score.tolist() == [
        float(label == targets[i].target) for label, i in zip(expected, rows.request_id, strict=True)
    ]


@pytest.mark.parametrize("targets", [(0, 1), (0, 1, 0), (0, 1, 0, 1)])
def test_a_request_whose_input_is_edited_again_with_another_target_leaves_err_and_is_counted(
    targets: tuple[int, ...],
) -> None:
    edits = tuple(point(0, target, name=f"turn-{i}") for i, target in enumerate(targets))
    run, heard = start(StreamData(edits=edits), editor="ft")
    run.run()
    assert [record["edited"] for record in heard.records] == [True] * len(targets)
    assert run.metrics()["n_superseded"] == len(targets) - 1
    assert [edits[i].id for i in run.position.edited] == [edits[-1].id]
    assert [values["ERR"] for values in heard.evaluations[1:]] == [1.0] * len(targets)


class Powerless(EDITORS.get("none")):  # type: ignore[misc]
    """Edits nothing, so that the same error is met again."""


def test_every_earlier_edit_of_an_input_is_superseded_not_only_the_last() -> None:
    edits = (point(0, 0, name="a"), point(0, 0, name="b"), point(1, 0), point(0, 3, name="c"))
    run, _ = start(StreamData(edits=edits), editor=Powerless)
    # Labels that the model never gives, so that each is an error.
    run.strategy.model.n_labels = 4
    run.run()
    assert run.metrics()["n_superseded"] == 2
    assert [edits[i].id for i in run.position.edited] == ["p1", "c"]


def test_running_texts_do_not_supersede_one_another(make_model: Callable[..., EditableModel]) -> None:
    texts = ("the river of Italy is the Tiber", "the capital of Peru is Lima", "the currency of France is the Euro")
    data = StreamData(edits=tuple(EditRequest(id=text[:9], prompt="", target=text) for text in texts))
    benchmark = EditBenchmark(
        name="texts",
        data=data,
        task="language_modelling",
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="0" * 64,
        max_new_tokens=1,
    )
    run = RunLoop(
        benchmark=benchmark, strategy=EDITORS.get("none")(model=make_model("language_modelling")), schedule=Schedule()
    )
    run.run()
    assert run.position.edited == [0, 1, 2]
    assert run.position.superseded == []


def test_holdout_asks_only_about_facts_edited_so_far() -> None:
    edits = tuple(point(i, metadata={"fact": f"f{i}"}) for i in range(3))
    holdout = tuple(point(3, name=f"h{i}", metadata={"fact": f"f{i}"}) for i in range(3))

    class Asked(Recorder):
        """Notes which holdout requests are scored."""

        def __init__(self) -> None:
            super().__init__()
            self.asked: dict[int, set[str]] = {}

        def after_eval_exp(self, strategy: EditorStrategy, metric_values: Any) -> None:
            if strategy.experience.origin_stream.name == "holdout":
                self.asked[strategy.n_edits] = {request.id for request in strategy.experience.requests}

    asked = Asked()
    run, _ = start(StreamData(edits=edits, holdout=holdout), editor=Powerless)
    run.strategy.evaluator.loggers.append(asked)
    run.run()
    assert asked.asked == {1: {"h0"}, 2: {"h0", "h1"}, 3: {"h0", "h1", "h2"}}


@each_editor
def test_locality_is_measured_against_the_unedited_model_also_after_edits(editor: Any) -> None:
    probes = (TURNED[0], "(1.2000, -1.8000)", "(0.0000, 2.0000)")
    edits = tuple(point(i, locality=tuple(Probe(prompt=text) for text in probes)) for i in range(3))
    run, heard = start(StreamData(edits=edits), editor=editor)
    before = unedited_labels(probes)
    n_edited = 0
    for _ in run.steps():
        # Evaluations wait with the edits that they are due after.
        run.settle()
        if run.strategy.n_edits > n_edited:
            n_edited = run.strategy.n_edits
            kept = [a == b for a, b in zip(labels(run.strategy.model, probes), before, strict=True)]
            assert heard.evaluations[-1]["Locality"] == sum(kept) / len(kept)
    assert n_edited
    assert min(values.get("Locality", 1.0) for values in heard.evaluations) < 1, (
        "the first edit changes the answer to its own input"
    )


def test_another_seed_gives_another_order_of_the_same_splits(tmp_path: Path) -> None:
    a, b = (run_toy(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    first, second = (read_lines(tmp_path / str(seed) / "edits.jsonl") for seed in (0, 1))
    assert [record["id"] for record in first] != [record["id"] for record in second]
    assert a.stream == b.stream
    assert a.protocol == b.protocol
    scored = [pd.read_parquet(tmp_path / str(seed) / "predictions.parquet") for seed in (0, 1)]
    upstream = [set(frame[frame.stream == "upstream"].request_id) for frame in scored]
    assert upstream[0] == upstream[1]
    everything = {request.id for request in STREAMS.get("toy")().load().edits}
    assert {record["id"] for record in first + second} <= everything


def through_storage(state: Mapping[str, Any]) -> Any:
    """What comes back from a file that may hold tensors and plain values only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@each_editor
@pytest.mark.parametrize("stop_at", [0, 3, 7])
def test_a_run_goes_on_from_its_state_as_if_it_had_never_stopped(editor: Any, stop_at: int) -> None:
    toy = STREAMS.get("toy")().load()
    probes = (Probe(prompt="(1.2000, -1.8000)"),)
    edits = tuple(request.model_copy(update={"locality": probes}) for request in toy.edits[:12])
    # The first input comes back with the other target.
    again = edits[0].model_copy(update={"id": "again", "target": 1 - int(edits[0].target)})
    data = StreamData(edits=(*edits[:9], again, *edits[9:]), upstream=toy.upstream[:20], holdout=toy.holdout[:10])

    whole, heard = start(data, editor=editor, eval_every=2)
    whole.run()

    stopped, heard_before = start(data, editor=editor, eval_every=2)
    for index in stopped.steps():
        if index == stop_at:
            break
    kept = stopped.state_dict()
    stopped.strategy.detach()
    state = through_storage(kept)
    resumed, heard_after = start(data, editor=editor, eval_every=2)
    torch.manual_seed(99)
    resumed.load_state_dict(state)
    resumed.run()

    assert heard_before.records + heard_after.records == heard.records
    assert heard_before.evaluations + heard_after.evaluations == heard.evaluations
    assert resumed.metrics() == whole.metrics()
    assert resumed.before == whole.before
    ended, expected = resumed.strategy.state_dict(), whole.strategy.state_dict()
    assert ended.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(ended[name], value) if isinstance(value, torch.Tensor) else ended[name] == value
    assert len(resumed.meter.edit_times) == resumed.strategy.n_edits


@each_editor
def test_a_state_stays_what_it_was_while_the_run_goes_on(editor: Any) -> None:
    data = StreamData(edits=STREAMS.get("toy")().load().edits[:8])
    run, _ = start(data, editor=editor)
    steps = run.steps()
    while next(steps) < 2:
        pass
    state = run.state_dict()
    then = through_storage(state)
    for _ in steps:
        pass
    run.strategy.detach()

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        return bool(a == b)

    assert same(state, then)


class Refusing(EditorStrategy):
    """Edits nothing and says that it cannot do every other edit."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        if self.n_edits % 2 == 0:
            raise EditFailure("this one is too hard")
        return EditOutcome()


def test_an_edit_that_cannot_be_made_is_recorded_and_the_run_goes_on() -> None:
    Refusing.registered_name = "refusing"
    run, heard = start(StreamData(edits=tuple(point(i) for i in range(4))), editor=Refusing)
    run.run()
    assert [record["failed"] for record in heard.records] == ["this one is too hard", None] * 2
    assert run.metrics()["n_failed"] == 2
    assert run.metrics()["n_edits"] == 4


def write_requests(path: Path, requests: Sequence[EditRequest]) -> str:
    path.write_text("".join(request.model_dump_json() + "\n" for request in requests), encoding="utf-8")
    return str(path)


def test_without_upstream_data_trr_is_null_and_said_once(tmp_path: Path) -> None:
    path = write_requests(tmp_path / "r.jsonl", [point(i) for i in range(3)])
    said: list[str] = []
    config = compose(
        [
            *("stream=jsonl", f"stream.path={path}", "stream.task=classification", "model=toy", "editor=none"),
            *(f"out={tmp_path / 'runs'}", "wandb.mode=disabled"),
        ]
    )
    result = run_or_reuse(config, say=said.append)
    assert "\n".join(said).count("no upstream") == 1
    (file,) = (tmp_path / "runs").rglob("result.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    for values in (written["before"], written["metrics"]):
        assert values["TRR"] is None
        assert values["Avg"] is None
    assert read_result(file) == result
    assert result.metrics["ERR"] == 0.0


def test_upstream_is_thinned_evenly_and_the_same_for_every_seed() -> None:
    toy = STREAMS.get("toy")().load()
    run, _ = start(StreamData(edits=toy.edits[:1], upstream=toy.upstream[:100]), max_upstream=10)
    assert run.benchmark.data.upstream == toy.upstream[:100:10]


@pytest.mark.parametrize("name", ["max_edits", "eval_every", "max_upstream"])
def test_a_schedule_that_cannot_be_is_refused_by_name(name: str) -> None:
    for value in (0, -3):
        with pytest.raises(UserError, match=f"{name}={value} should be a whole number, at least 1"):
            Schedule(**{name: value})


def test_a_finished_run_leaves_the_model_as_it_was_and_an_editor_that_can_be_loaded(tmp_path: Path) -> None:
    model = EditableModel.from_pretrained("toy", task="classification")
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    run_benchmark(
        "toy",
        model=model,
        editor="ft",
        settings=RunSettings(schedule=Schedule(max_edits=2, max_upstream=10)),
        folder=tmp_path,
    )
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.module.state_dict().items())
    edited = [line for line in read_lines(tmp_path / "edits.jsonl") if line["edited"]][-1]
    request = next(r for r in STREAMS.get("toy")().load().edits if r.id == edited["id"])
    with EDITORS.get("ft").from_pretrained(tmp_path / "editor", model=model):
        assert LABEL_NAMES[labels(model, [request.prompt])[0]] == edited["after_text"]


class Asked(RunLogger):
    """Notes which requests of a stream are scored, by clock."""

    def __init__(self, stream: str) -> None:
        super().__init__()
        self.stream = stream
        self.asked: dict[int, set[str]] = {}

    def after_eval_exp(self, strategy: EditorStrategy, metric_values: Any) -> None:
        if strategy.experience.origin_stream.name == self.stream:
            self.asked[strategy.n_edits] = {request.id for request in strategy.experience.requests}


def test_holdout_asks_for_no_target_that_was_superseded_unless_another_edit_keeps_it_alive() -> None:
    def of_fact(request: EditRequest) -> EditRequest:
        return request.model_copy(update={"fact": "f"})

    edits = (
        point(0, 0, name="then"),
        point(0, 3, name="now"),
        # The same fact in other words keeps the old target alive, until its own input is edited again.
        point(1, 0, name="then, in other words"),
        point(1, 3, name="now, in other words"),
    )
    holdout = (point(2, 0, name="old"), point(2, 3, name="new"))
    asked = Asked("holdout")
    run, _ = start(StreamData(edits=tuple(map(of_fact, edits)), holdout=tuple(map(of_fact, holdout))), editor=Powerless)
    run.strategy.evaluator.loggers.append(asked)
    run.strategy.model.n_labels = 4
    run.run()
    assert run.position.superseded == [0, 2]
    assert asked.asked == {1: {"old", "new"}, 2: {"new"}, 3: {"old", "new"}, 4: {"new"}}


def test_random_numbers_of_an_editor_depend_on_the_seed_alone(tmp_path: Path) -> None:
    drawn: list[tuple[float, float, float]] = []

    class Drawing(Powerless):
        """Draws from every generator that an editor may use."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return EditOutcome()

    def draw(seed: int, noise: int) -> list[tuple[float, float, float]]:
        drawn.clear()
        for make_noise in (random.seed, np.random.seed, torch.manual_seed):
            make_noise(noise)
        run_toy(tmp_path / f"{seed}-{noise}", editor=Drawing, seed=seed)
        return list(drawn)

    first, again, other = draw(0, 11), draw(0, 12), draw(1, 11)
    assert len(first) == 5
    assert first == again
    for one, two in zip(zip(*first, strict=True), zip(*other, strict=True), strict=True):
        assert not set(one) & set(two), "python, numpy and torch each draw other numbers"


def test_a_run_folder_holds_the_files_it_promises_and_the_result_last(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    result = run_toy(folder)
    written = {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert set(written) == {
        "edits.jsonl",
        "metrics.jsonl",
        "predictions.parquet",
        "editor",
        "editor/editor.json",
        "editor/editor.safetensors",
        "result.json",
    }
    assert written["result.json"] == max(written.values())
    assert read_result(folder / "result.json") == result
    assert len(read_lines(folder / "metrics.jsonl")) == 4
    assert len(pd.read_parquet(folder / "predictions.parquet")) > 4 * 40


@pytest.mark.parametrize("blocked", ["predictions.parquet", "editor"])
def test_a_folder_that_cannot_be_completed_gets_no_result(tmp_path: Path, blocked: str) -> None:
    if blocked == "editor":
        (tmp_path / "editor").write_text("a file", encoding="utf-8")
    else:
        (tmp_path / blocked / "a folder").mkdir(parents=True)
    with pytest.raises(OSError, match=blocked):
        run_toy(tmp_path, max_edits=1)
    assert not (tmp_path / "result.json").exists()
    assert read_lines(tmp_path / "edits.jsonl")


def test_a_run_without_a_folder_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = RunSettings(schedule=Schedule(max_edits=1, max_upstream=5))
    assert run_benchmark("toy", editor="ft", settings=settings).metrics["n_edits"] == 1
    assert list(tmp_path.iterdir()) == []


class Points(STREAMS.get("toy")):  # type: ignore[misc]
    """Points given by hand."""

    def __init__(self, **roles: Any) -> None:
        self._data = StreamData(**roles)

    def load(self) -> StreamData:
        return self._data


@pytest.mark.parametrize("label", [2, -1])
@pytest.mark.parametrize("role", ["edits", "upstream", "holdout", "accurate", "locality", "portability"])
def test_a_label_that_the_model_does_not_have_is_refused_before_anything_is_written(
    tmp_path: Path, role: str, label: int
) -> None:
    if role in ("locality", "portability"):
        probe = Probe(prompt=TURNED[1], target=label)
        roles = {"edits": (point(0), point(1, name="odd", **{role: (probe,)}))}
    else:
        roles = {"edits": (point(0),)}
        roles[role] = (*roles.get(role, ()), point(1, label, name="odd"))
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        run_benchmark(Points(**roles), model="toy", editor="ft", folder=folder)
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert "'odd" in told
    assert str(label) in told
    assert not folder.exists()


def test_a_layer_that_cannot_be_edited_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    module = EditableModel.from_pretrained("toy", task="classification").module
    wrapped = torch.nn.ModuleDict({"points": module})
    wrapped.forward = lambda points: module(points)  # type: ignore[method-assign]
    encode = EditableModel.from_pretrained("toy", task="classification").encode
    wrapped.spare = torch.nn.Linear(2, 2)
    model = EditableModel(wrapped, layer="spare", task="classification", encode=encode)
    with pytest.raises(UserError, match="layer=spare is never called"):
        run_benchmark("toy", model=model, editor="ft", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def own_requests(path: Path, folder: Path, *overrides: str) -> Any:
    """A run over a user's file, as the command line composes it."""
    return compose(
        [
            *("stream=jsonl", f"stream.path={path}", "stream.task=classification", "model=toy", "editor=ft"),
            *(f"out={folder}", "wandb.mode=disabled", *overrides),
        ]
    )


def test_a_file_that_changed_since_the_finished_run_is_refused_and_can_be_run_anew(tmp_path: Path) -> None:
    path, out = tmp_path / "r.jsonl", tmp_path / "runs"
    write_requests(path, [point(0), point(1)])
    said: list[str] = []
    first = run_or_reuse(own_requests(path, out), say=said.append)
    assert run_or_reuse(own_requests(path, out), say=said.append) == first
    assert said[-1].startswith("finished before, reused: ")
    (folder,) = (file.parent for file in out.rglob("result.json"))
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}

    write_requests(path, [point(0), point(2)])
    with pytest.raises(UserError, match="was made from other requests; existing=rerun") as caught:
        run_or_reuse(own_requests(path, out), say=said.append)
    assert str(folder) in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before

    second = run_or_reuse(own_requests(path, out, "existing=rerun"), say=said.append)
    assert second.stream.fingerprint != first.stream.fingerprint
    assert [line["id"] for line in sorted(read_lines(folder / "edits.jsonl"), key=lambda line: line["id"])] == [
        "p0",
        "p2",
    ]
    assert run_or_reuse(own_requests(path, out), say=said.append) == second
    (aside,) = (entry for entry in folder.parent.iterdir() if entry != folder)
    assert read_result(aside / "result.json") == first


def test_a_finished_run_is_not_reused_for_a_model_whose_files_changed(tmp_path: Path) -> None:
    path, out, model = tmp_path / "r.jsonl", tmp_path / "runs", tmp_path / "model"
    write_requests(path, [point(0)])
    shutil.copytree(resolve_model("toy").path, model)
    said: list[str] = []
    first = run_or_reuse(own_requests(path, out, f"model={model}"), say=said.append)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"was made with other files of model={model}; existing=rerun sets it aside"):
        run_or_reuse(own_requests(path, out, f"model={model}"), say=said.append)
    (model / "model.safetensors").write_bytes(weights)
    assert run_or_reuse(own_requests(path, out, f"model={model}"), say=said.append) == first
    assert said[-1].startswith("finished before, reused: ")


def test_a_record_tells_prompt_and_target_of_its_request_and_cuts_long_ones(
    make_model: Callable[..., EditableModel],
) -> None:
    texts = ("the capital of Peru is Lima", "the river of Italy is the Tiber " * 20)
    benchmark = EditBenchmark(
        name="texts",
        data=StreamData(
            edits=tuple(EditRequest(id=str(n), prompt=text, target="so it is") for n, text in enumerate(texts))
        ),
        task="completion",
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="0" * 64,
        max_new_tokens=1,
    )
    recorder = Recorder()
    evaluator = EvaluationPlugin(loggers=[recorder], collect_all=False)
    RunLoop(
        benchmark=benchmark,
        strategy=EDITORS.get("none")(model=make_model("completion"), evaluator=evaluator),
        schedule=Schedule(),
    ).run()
    told = {record["id"]: (record["prompt"], record["target"]) for record in recorder.records}
    assert told == {"0": (texts[0], "so it is"), "1": (f"{texts[1][:500]}…", "so it is")}


def test_classes_stand_under_their_names_where_the_stream_has_any(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_requests(path, [point(0), point(1)])
    for names, shown in {("no", "yes"): {"no", "yes"}, (): {"0", "1"}}.items():
        folder = tmp_path / str(len(names))
        run_benchmark(
            STREAMS.get("jsonl")(path=str(path), task="classification", label_names=names),
            model="toy",
            layer="second",
            editor="ft",
            folder=folder,
        )
        records = [line for line in read_lines(folder / "edits.jsonl") if line["edited"]]
        assert {text for line in records for text in (line["before_text"], line["after_text"])} == shown
        texts = pd.read_parquet(folder / "predictions.parquet").text.dropna()
        assert set(texts) <= shown


@each_editor
@pytest.mark.parametrize("stop_at", [1, 4, 6])
def test_every_metric_taken_up_midway_has_the_same_result(editor: Any, stop_at: int) -> None:
    toy = STREAMS.get("toy")().load()
    probes = (Probe(prompt="(1.2000, -1.8000)"), Probe(prompt=TURNED[0]))
    edits = tuple(request.model_copy(update={"locality": probes, "portability": probes}) for request in toy.edits[:8])
    data = StreamData(edits=edits, upstream=toy.upstream[:20], holdout=toy.holdout[:10], accurate=toy.upstream[20:30])
    run, _ = start(data, editor=editor, eval_every=1)
    for index in run.steps():
        if index == stop_at:
            break
    run.settle()
    fresh, _ = start(data, editor=editor, eval_every=1)
    fresh.load_state_dict(through_storage(run.state_dict()))

    def results(run: RunLoop) -> dict[str, float | None]:
        assert run.strategy.evaluator is not None
        return {metric.registered_name: metric.result() for metric in run.strategy.evaluator.metrics}

    assert results(fresh) == results(run)
    known = {"TRR", "ERR", "ES", "Holdout", "ARR", "Locality", "Portability", "Avg"}
    assert {name for name, value in results(run).items() if value is not None} >= known
    assert fresh.metrics() == run.metrics()


class Lazy(EDITORS.get("ft")):  # type: ignore[misc]
    """Fine-tunes when it is asked to finish."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.waiting: list[EditBatch] = []

    def edit(self, batch: EditBatch) -> EditOutcome:
        self.waiting.append(batch)
        return EditOutcome()

    def flush(self) -> list[EditOutcome]:
        waiting, self.waiting = self.waiting, []
        return [super(Lazy, self).edit(batch) for batch in waiting]


def test_what_an_editor_finishes_at_flush_is_recorded_as_if_it_had_been_finished_at_once() -> None:
    toy = STREAMS.get("toy")().load()
    data = StreamData(edits=toy.edits[:8], upstream=toy.upstream[:20])
    heard = []
    for editor in (EDITORS.get("ft"), Lazy):
        run, recorder = start(data, editor=editor, eval_every=2)
        run.run()
        heard.append((recorder.records, recorder.evaluations))
    assert heard[0] == heard[1]
    assert any(record["steps"] for record in heard[1][0])


def test_edits_wait_to_be_finished_together_however_often_is_evaluated() -> None:
    data = StreamData(edits=STREAMS.get("toy")().load().edits[:12])
    waiting = []
    for every in (1, 1000):
        run, _ = start(data, eval_every=every)
        waiting.append([run.strategy.n_pending for _ in run.steps()])
    assert waiting[0] == waiting[1]
    assert max(waiting[0]) > 2


@pytest.mark.parametrize("eval_every", [1, 1000])
def test_an_edit_that_a_later_one_shuts_out_while_values_wait_is_scored_as_it_was_made(eval_every: int) -> None:
    # The second edit expands the entry of the first; the third, beyond it, shrinks it until the second is outside.
    model = EditableModel.from_pretrained("toy", task="classification")
    points = np.random.default_rng(0).uniform(-3, 3, (60, 2))
    prompts = [f"({x:.4f}, {y:.4f})" for x, y in points]
    says, queries = labels(model, prompts), model.queries(prompts).double()
    apart = torch.cdist(queries, queries).tolist()
    chosen = next(
        (first, second, third)
        for first, second, third in permutations(range(60), 3)
        if says[first] == says[second] != says[third]
        and 1.05 * apart[first][second] < apart[first][third] < 1.8 * apart[first][second]
        and apart[second][third] > 1.1 * apart[first][third]
    )
    data = StreamData(
        edits=tuple(EditRequest(id=str(i), prompt=prompts[i], target=1 - says[i]) for i in chosen),
        upstream=tuple(EditRequest(id=f"u{i}", prompt=prompts[i], target=says[i]) for i in range(60)),
    )
    grace = partial(GRACE, eps_init=0.9 * apart[chosen[0]][chosen[1]])
    heard = []
    for engine in ("exact", "plain"):
        run, recorder = start(data, editor=grace, engine=engine, eval_every=eval_every)
        run.run()
        heard.append(recorder)
    exact, plain = heard
    assert [record["op"] for record in exact.records] == ["add", "expand", "split"]
    assert [record["score_after"] for record in exact.records] == [1.0, 1.0, 1.0]
    assert [record["after_text"] for record in exact.records] == [record["after_text"] for record in plain.records]
    assert exact.evaluations == [pytest.approx(values, abs=1e-4) for values in plain.evaluations]
    assert exact.evaluations[-1]["ERR"] < 1


def test_a_metric_that_is_no_finite_number_is_null_in_its_line(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path)
    logger.start(
        RunPlan(
            run_id="r",
            folder=tmp_path,
            config={},
            stream="points",
            model="toy",
            editor="grace",
            n_candidates=1,
            max_edits=None,
            higher_is_better=True,
        )
    )
    metrics = {"TRR": math.inf, "ERR": math.nan, "Holdout": 2.5, "n_keys": 3}
    logger.log_evaluation(EvaluationRecord(n_edits=0, metrics=metrics, predictions=[]))
    logger.finish(None)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert read == {"n_edits": 0, "TRR": None, "ERR": None, "Holdout": 2.5, "n_keys": 3}


def test_every_evaluation_after_the_first_edit_has_es(tmp_path: Path) -> None:
    run_toy(tmp_path)
    evaluations = read_lines(tmp_path / "metrics.jsonl")
    assert "ES" not in evaluations[0]
    assert all("ES" in line for line in evaluations[1:])


@each_editor
def test_a_model_of_points_is_edited_in_bfloat16(editor: Any) -> None:
    result = run_benchmark(
        "toy",
        model=EditableModel.from_pretrained("toy", task="classification", dtype="bfloat16"),
        editor=editor,
        settings=RunSettings(schedule=Schedule(max_edits=2, max_upstream=10)),
    )
    assert result.model.dtype == "bfloat16"
    assert result.metrics["n_edits"] == 2


# What the unedited model answers.


class _Asked(Completion):
    """Notes what is asked of the model itself, and after how many edits."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.asked: list[tuple[int, str]] = []
        self.strategy: EditorStrategy | None = None

    def answers(self, model: EditableModel, prompts: Sequence[str]) -> list[str | int]:
        assert self.strategy is not None
        self.asked += [(self.strategy.n_edits, prompt) for prompt in prompts]
        return super().answers(model, prompts)


def _neighbours(make_model: Callable[..., EditableModel], *, max_edits: int | None = None) -> tuple[RunLoop, _Asked]:
    """A run of an editor that changes everything and cannot be suspended, with probes that have no target."""
    model = make_model("completion")
    task = model.task = _Asked(max_new_tokens=3)

    class Blunt(EDITORS.get("ft")):  # type: ignore[misc]
        @contextmanager
        def suspended(self) -> Iterator[None]:
            raise AssertionError("nothing is asked of a suspended editor")
            yield

    questions = ["what is the river of France", "the currency in Italy is", "the capital of Peru", "Lima is in"]
    edits = tuple(
        EditRequest(
            id=f"e{i}",
            prompt=f"what is the capital of {country}",
            target=target,
            locality=(
                Probe(prompt=questions[i]),
                Probe(prompt=questions[0]),
                Probe(prompt="the river is", target="Seine"),
            ),
            portability=(Probe(prompt=questions[i + 1]),),
        )
        for i, (country, target) in enumerate([("France", "Lima"), ("Italy", "Tenge"), ("Peru", "Ishim")])
    )
    upstream = tuple(
        DerivedRequest(id=f"u{i}", prompt=prompt, target="", target_from_model=True)
        for i, prompt in enumerate([questions[1], "the Sol of Peru is", questions[1]])
    )
    benchmark = EditBenchmark(
        name="neighbours",
        data=StreamData(edits=edits, upstream=upstream),
        task="completion",
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="0" * 64,
        max_new_tokens=3,
    )
    evaluator = EvaluationPlugin(
        *(METRICS.get(name)() for name in METRICS.entries()), loggers=[Recorder()], collect_all=False
    )
    task.strategy = Blunt(model=model, evaluator=evaluator, lr=0.03)
    return RunLoop(
        benchmark=benchmark, strategy=task.strategy, schedule=Schedule(eval_every=1, max_edits=max_edits)
    ), task


_QUESTIONS = {
    "what is the river of France",
    "the currency in Italy is",
    "the capital of Peru",
    "Lima is in",
    "the Sol of Peru is",
}


def test_the_unedited_model_is_asked_each_question_once_before_the_first_edit(
    make_model: Callable[..., EditableModel],
) -> None:
    run, task = _neighbours(make_model, max_edits=1)
    run.run()
    assert run.strategy.n_edits == 1
    # A locality probe with a target is asked too, to be compared with later.
    questions = {*_QUESTIONS, "the river is"}
    assert len(task.asked) == len(questions), "each once, those of candidates that are never reached too"
    assert set(task.asked) == {(0, prompt) for prompt in questions}


def test_locality_is_measured_against_the_answers_of_the_model_before_any_edit(
    make_model: Callable[..., EditableModel],
) -> None:
    pristine = make_model("completion", max_new_tokens=3)
    before = dict(zip(sorted(_QUESTIONS), pristine.answer(sorted(_QUESTIONS)), strict=True))
    run, _ = _neighbours(make_model)
    scored: list[Mapping[str, Sequence[EditRequest]]] = []

    class Scored(RunObserver):
        def evaluated(self, streams: Mapping[str, Sequence[EditRequest]], *, seconds: float) -> None:
            scored.append(streams)

    run.observer = Scored()
    assert run.metrics()["n_edits"] == 0
    run.run()
    edited = dict(zip(sorted(_QUESTIONS), run.strategy.model.answer(sorted(_QUESTIONS)), strict=True))
    assert edited != before, "else nothing here could tell the two apart"
    for kind in ("locality", "portability"):
        probes = {p.id: p for evaluation in scored for p in evaluation.get(kind, ())}
        assert probes
        for probe in probes.values():
            assert probe.target == ("Seine" if probe.prompt == "the river is" else before[probe.prompt])
    assert [request.target for request in run.benchmark.data.upstream] == [
        before["the currency in Italy is"],
        before["the Sol of Peru is"],
        before["the currency in Italy is"],
    ]
    final = run.metrics()
    assert final["Locality"] < 1.0
    assert run.before["TRR/exact_match"] == 1.0, "before the first edit the model agrees with itself"


def test_a_run_taken_up_again_keeps_the_unedited_models_answers_and_asks_nothing(
    make_model: Callable[..., EditableModel],
) -> None:
    whole, _ = _neighbours(make_model)
    whole.run()
    halfway, _ = _neighbours(make_model)
    for index in halfway.steps():
        if index == 2:
            break
    state = halfway.state_dict()
    resumed, task = _neighbours(make_model)
    resumed.load_state_dict(state)
    resumed.run()
    assert task.asked == []
    assert resumed.metrics() == whole.metrics()


def test_a_run_does_not_begin_with_an_edited_model(make_model: Callable[..., EditableModel]) -> None:
    run, task = _neighbours(make_model)
    run.strategy.edit_text("what is the river of France", "Ishim")
    with pytest.raises(RuntimeError, match="no edit"):
        run.run()
    assert task.asked == []


def test_the_limits_of_a_stream_are_those_of_its_task_and_stand_in_the_protocol(
    make_model: Callable[..., EditableModel], tmp_path: Path
) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text('{"id": "1", "prompt": "what is the capital of Peru", "target": "Lima of France"}\n')
    stream = STREAMS.get("jsonl")(path=str(file), task="completion")
    stream.max_input_tokens, stream.max_target_tokens = 5, 3
    model = make_model("completion")
    own_task, own_engine = model.task, model.engine
    result = run_benchmark(stream, model=model, editor="none")
    assert (result.protocol.max_input_tokens, result.protocol.max_target_tokens) == (5, 3)
    assert (model.task, model.engine) == (own_task, own_engine), "the caller's model has its own again"
