"""What every registered metric promises: a docstring, a state that can be taken up, NaN counted rather than lost."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from statistics import fmean
from typing import Any, get_args

import pytest
import torch
from avalanche.training.plugins.evaluation import EvaluationPlugin

from grace_bench import EditableModel, EditRequest, Schedule
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.requests import Probe
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.capability import CapabilityMeter, TaskScore
from grace_bench.evaluation.metric import EditMetric, StreamMetric, StreamScore
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.results.metric_info import MetricInfo, Place, metric_infos
from grace_bench.results.schema import Protocol
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loop import RunLoop

each_metric = pytest.mark.parametrize("name", list(METRICS.entries()))
PROTOCOL = Protocol(
    split="edits",
    main_score="f1",
    higher_is_better=True,
    max_edits=None,
    eval_every=1,
    max_upstream=None,
    max_new_tokens=1,
    query="prefix",
    prefix_length=8,
)
METADATA = StreamMetadata(source="this test", revision="1", license="MIT")


class Heard(RunLogger):
    """Every value of one metric, with its clock."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.values: list[tuple[str, float, int]] = []
        self._name = name

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        assert name.split("/")[0] == self._name
        self.values.append((name, value, x_plot))


class OfPoints:
    """What a classifier of points can do besides; lm-eval asks no classifiers."""

    def __init__(self, requests: Sequence[EditRequest]) -> None:
        self._requests = requests

    def measure(self, model: EditableModel) -> dict[str, TaskScore]:
        items = [float(item.correct or False) for item in model.score(self._requests)]
        return {"points": TaskScore(value=fmean(items), higher_is_better=True, items=items)}


def toy_run(name: str) -> tuple[RunLoop, EditMetric, Heard]:
    """Ten candidates of the toy stream under GRACE, measured by one metric."""
    toy = STREAMS.get("toy")().load()
    probes = {"locality": (Probe(prompt="(1.2000, -1.8000)"),), "portability": (Probe(prompt="(0, 2)", target=0),)}
    metric, heard = METRICS.get(name)(), Heard(name)
    strategy = EDITORS.get("grace")(
        model=EditableModel.from_pretrained("toy", task="classification"),
        evaluator=EvaluationPlugin(metric, loggers=[heard], collect_all=False),
        n_iter=15,
        eps_init=0.3,
        replacement="replace_last",
    )
    benchmark = EditBenchmark(
        name="points",
        data=StreamData(
            edits=tuple(request.model_copy(update=probes) for request in toy.edits[:10]),
            upstream=toy.upstream[:20],
            holdout=toy.holdout[:10],
            accurate=toy.upstream[20:30],
        ),
        task="classification",
        metadata=METADATA,
        fingerprint="0" * 64,
        max_new_tokens=1,
    )
    capability = CapabilityMeter(OfPoints(toy.upstream[30:40]), every=4)  # type: ignore[arg-type]
    loop = RunLoop(benchmark=benchmark, strategy=strategy, schedule=Schedule(eval_every=2), capability=capability)
    return loop, metric, heard


@each_metric
def test_the_class_of_a_metric_is_fit_to_be_registered(name: str) -> None:
    assert METRICS.get(name).check_class() is None


@each_metric
def test_a_metric_has_a_docstring_that_starts_with_its_name(name: str) -> None:
    cls = METRICS.get(name)
    assert issubclass(cls, EditMetric)
    assert (cls.__doc__ or "").startswith(f"{name}:")


@each_metric
def test_a_metric_is_described_by_literals_of_its_class(name: str) -> None:
    cls, info = METRICS.get(name), metric_infos().get(name)
    assert info is not None
    for field in fields(MetricInfo):
        if field.name not in ("name", "summary"):
            assert getattr(info, field.name) == getattr(cls, field.name)
    assert set(info.shown_in or ()) <= set(get_args(Place))
    assert (info.stream is not None) == issubclass(cls, StreamMetric)
    assert info.direction(PROTOCOL) in (True, False, None)


def test_columns_have_one_metric_each_and_are_ordered_by_the_classes() -> None:
    metrics = metric_infos()
    headers = [info.header for info in metrics.shown("table")]
    assert len(set(headers)) == len(headers)
    assert [info.order for info in metrics] == sorted(info.order for info in metrics)
    assert [info.name for info in metrics.ranking] == sorted(
        (info.name for info in metrics if info.ranks), key=lambda name: METRICS.get(name).ranks
    )


def test_the_metrics_of_the_package_are_described_without_importing_them() -> None:
    program = """
import json, sys
from dataclasses import asdict
from grace_bench.results.metric_info import metric_infos
found = [asdict(info) for info in metric_infos()]
heavy = ("torch", "avalanche", "grace_bench.evaluation.metric")
print(json.dumps([found, [name for name in heavy if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found, imported = json.loads(done.stdout)
    assert imported == []
    here = {info.name: asdict(info) for info in metric_infos()}
    assert found == json.loads(json.dumps([here[info["name"]] for info in found]))
    assert {"TRR", "ERR", "Avg", "ES"} <= {info["name"] for info in found}


@each_metric
def test_a_metric_taken_up_from_its_state_goes_on_as_if_it_had_never_stopped(name: str) -> None:
    whole, metric, heard = toy_run(name)
    whole.run()
    assert heard.values, "every registered metric has something to say of a codebook editor on this stream"
    assert all(isinstance(value, int | float) and math.isfinite(value) for _, value, _ in heard.values)

    stopped, before, heard_before = toy_run(name)
    for index in stopped.steps():
        if index == 5:
            break
    state = stopped.state_dict()
    assert json.loads(json.dumps(before.state_dict())) == before.state_dict()
    resumed, after, heard_after = toy_run(name)
    resumed.load_state_dict(state)
    resumed.run()
    assert heard_before.values + heard_after.values == heard.values
    assert after.result() == metric.result()
    assert after.state_dict() == metric.state_dict()


@each_metric
def test_reset_forgets_everything(name: str) -> None:
    run, metric, _ = toy_run(name)
    fresh = METRICS.get(name)()
    for index in run.steps():
        if index == 3:
            break
    metric.reset()
    assert metric.result() == fresh.result()
    assert metric.state_dict() == fresh.state_dict()


def texts(prefix: str, n_empty: int, **fields: Any) -> tuple[EditRequest, ...]:
    """Running texts, the first of which are too short to have anything to score."""
    short = [EditRequest(id=f"{prefix}-short-{i}", prompt="", target="Rome", **fields) for i in range(n_empty)]
    return (*short, EditRequest(id=f"{prefix}-long", prompt="", target="the capital of Italy is Rome", **fields))


@pytest.mark.parametrize("name", [name for name in METRICS.entries() if issubclass(METRICS.get(name), StreamScore)])
def test_a_score_that_is_nan_is_left_out_and_counted(name: str, make_model: Callable[..., EditableModel]) -> None:
    heard = Heard(name)
    model = make_model("language_modelling")
    strategy: EditorStrategy = EDITORS.get("none")(
        model=model, evaluator=EvaluationPlugin(METRICS.get(name)(), loggers=[heard], collect_all=False)
    )
    cls = METRICS.get(name)
    requests = texts(cls.stream, 2)
    from grace_bench.data.benchmark import eval_stream

    strategy.eval(list(eval_stream(cls.stream, requests)))
    values = {key: value for key, value, _ in heard.values}
    assert values[f"{name}/n_nan"] == 2
    batch = model.encode_batch([""], [str(requests[-1].target)])
    with torch.no_grad():
        expected = math.exp(float(model.task.loss(model.logits(batch), batch)))
    assert values[name] == pytest.approx(expected, rel=1e-5)


def test_an_edit_whose_score_is_nan_is_left_out_of_es_and_counted(make_model: Callable[..., EditableModel]) -> None:
    heard = Heard("ES")
    strategy = EDITORS.get("none")(
        model=make_model("language_modelling"),
        evaluator=EvaluationPlugin(METRICS.get("ES")(), loggers=[heard], collect_all=False),
    )
    benchmark = EditBenchmark(
        name="texts",
        data=StreamData(edits=texts("edit", 2)),
        task="language_modelling",
        metadata=METADATA,
        fingerprint="0" * 64,
        max_new_tokens=1,
    )
    RunLoop(benchmark=benchmark, strategy=strategy, schedule=Schedule()).run()
    last = {key: value for key, value, _ in heard.values}
    assert last["ES/n_nan"] == 2
    assert math.isfinite(last["ES"])
