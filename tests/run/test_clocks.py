"""The three clocks: before, right after each edit, and at a number of edits; and evaluation by time step."""

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import pytest

from grace_bench.data.avalanche import EvaluationPlugin
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.requests import DerivedRequest, EditRequest, Probe
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editors.ft import FineTune
from grace_bench.errors import UserError
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.editable import EditableModel
from grace_bench.models.tasks.base import ItemScore
from grace_bench.registry import EDITORS, METRICS
from grace_bench.results.schema import EvaluationRecord
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loop import RunLoop
from grace_bench.run.opening import check_steps
from grace_bench.run.settings import Schedule

COUNTRIES = ("France", "Italy", "Peru", "Spain", "Japan", "Kenya")
TARGETS = ("Lima", "Euro", "Sol", "Tenge", "Ishim", "Lima")
STREAMS = ("holdout", "locality", "portability")


class Together(FineTune):
    """Fine-tunes on all requests of a batch together."""

    edits_together = True

    def edit(self, batch: EditBatch) -> EditOutcome:
        return super().edit(batch)


EDITORS_TRIED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "grace": (EDITORS.get("grace"), {"eps_init": 0.5, "n_iter": 8}),
    "ft": (EDITORS.get("ft"), {"n_iter": 5, "lr": 0.01}),
}


def requests() -> tuple[EditRequest, ...]:
    return tuple(
        EditRequest(
            id=f"e{i}",
            prompt=f"what is the capital of {country}",
            target=target,
            rephrases=(f"the capital of {country} is",),
            # Close to each other, so that an edit may answer the probes of an earlier one.
            locality=(Probe(prompt=f"the currency in {country} is"), Probe(prompt="the river is", target="Sol")),
            portability=(Probe(prompt=f"what is the currency of {country}", target=target),),
            step=str(i // 2),
        )
        for i, (country, target) in enumerate(zip(COUNTRIES, TARGETS, strict=True))
    )


def benchmark() -> EditBenchmark:
    edits = requests()
    holdout = tuple(
        EditRequest(id=f"h{i}", prompt=request.rephrases[0], target=request.target, fact=request.id)
        for i, request in enumerate(edits)
    )
    # The question of a locality probe again, as upstream: it is not compared with the unedited model there.
    asked = DerivedRequest(id="u", prompt="the currency in France is", target="", target_from_model=True)
    return EditBenchmark(
        name="capitals",
        data=StreamData(edits=edits, upstream=(*edits[:1], asked), holdout=holdout),
        task="completion",
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="f",
        max_new_tokens=3,
    )


class Lines(RunLogger):
    """Notes the record of every evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[EvaluationRecord] = []

    def log_evaluation(self, record: EvaluationRecord) -> None:
        self.records.append(record)


class Kept(METRICS.get("ES")):  # type: ignore[misc]
    """Notes what was scored right after each edit."""

    seen: list[Mapping[str, Sequence[ItemScore]]]

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def after_candidate(self, strategy: Any) -> Any:
        self.seen.append(dict(strategy.scored_after))
        return super().after_candidate(strategy)


def loop(
    make_model: Callable[..., EditableModel],
    editor: str,
    *,
    engine: str = "exact",
    logger: RunLogger | None = None,
    **schedule: Any,
) -> tuple[RunLoop, Kept]:
    model = make_model("completion", max_new_tokens=3)
    make, options = EDITORS_TRIED.get(editor, (Together, {"n_iter": 5, "lr": 0.01}))
    metric = Kept()
    others = [cls() for name, cls in METRICS.classes().items() if name != metric.registered_name]
    evaluator = EvaluationPlugin(metric, *others, loggers=[] if logger is None else [logger], collect_all=False)
    model.serving(model.task, engine=engine, memory_mb=None)
    strategy = make(model=model, evaluator=evaluator, **options)
    settings = Schedule(**{"edit": "all", "eval_every": 100, "score_after": "all", **schedule})
    return RunLoop(benchmark=benchmark(), strategy=strategy, schedule=settings), metric


def related(run: RunLoop, index: int) -> dict[str, list[EditRequest]]:
    assert run._unedited is not None
    request = run.benchmark.data.edits[index]
    return {
        "edited": [request],
        "holdout": [run.benchmark.data.holdout[index]],
        **{kind: [*run._unedited.probes_of([request], kind)] for kind in ("locality", "portability")},
    }


@pytest.mark.parametrize("editor", [*EDITORS_TRIED])
def test_what_is_scored_right_after_an_edit_is_what_a_run_that_stops_there_answers(
    make_model: Callable[..., EditableModel], editor: str
) -> None:
    whole, metric = loop(make_model, editor)
    whole.run()
    for index in (0, 2, 5):
        stopped, _ = loop(make_model, editor, max_edits=index + 1)
        stopped.run()
        assert stopped.strategy.n_edits == index + 1
        for stream, asked in related(stopped, index).items():
            found = metric.seen[index][stream]
            for item, alone in zip(found, stopped.strategy.model.score(asked), strict=True):
                assert (item.text, item.score, item.others) == (alone.text, alone.score, alone.others), (index, stream)
        stopped.strategy.detach()


@pytest.mark.parametrize("editor", [*EDITORS_TRIED])
def test_later_edits_change_what_an_edit_left_behind_and_not_its_own_clock(
    make_model: Callable[..., EditableModel], editor: str
) -> None:
    logger = Lines()
    run, metric = loop(make_model, editor, logger=logger)
    run.run()
    final = run.metrics()
    for stream in STREAMS:
        items = [item for seen in metric.seen for item in seen[stream]]
        assert final[f"ES/{stream}"] == pytest.approx(fmean(item.score for item in items))
        for score in ("exact_match", "token_accuracy"):
            assert final[f"ES/{stream}/{score}"] == pytest.approx(fmean(item.others[score] for item in items))
    first, *_, last = logger.records
    assert last.metrics["ES/holdout"] == final["ES/holdout"]
    assert "ES/holdout" not in first.metrics


@pytest.mark.parametrize("editor", [*EDITORS_TRIED])
def test_every_score_of_the_last_evaluation_is_that_of_the_edited_model(
    make_model: Callable[..., EditableModel], editor: str
) -> None:
    run, _ = loop(make_model, editor)
    run.run()
    final, model = run.metrics(), run.strategy.model
    assert run._unedited is not None
    asked = {
        "TRR": ("upstream", [*run.benchmark.data.upstream]),
        "Holdout": ("holdout", [*run.benchmark.data.holdout]),
        "Locality": ("locality", run._unedited.probes_of(requests(), "locality")),
        "Portability": ("portability", run._unedited.probes_of(requests(), "portability")),
    }
    for metric, (stream, items) in asked.items():
        found = {name.partition("/")[2]: value for name, value in final.items() if name.partition("/")[0] == metric}
        wanted = model.task.aggregate(model.score(items), stream=stream)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert ("agreement" in found) == (stream == "locality")


def test_only_the_target_is_scored_after_an_edit_unless_asked(make_model: Callable[..., EditableModel]) -> None:
    run, metric = loop(make_model, "grace", score_after="target")
    run.run()
    assert all(set(seen) == {"edited"} for seen in metric.seen)
    assert not any(name.startswith("ES/holdout") for name in run.metrics())


def test_a_batch_is_scored_and_evaluated_in_one_go(
    make_model: Callable[..., EditableModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, metric = loop(make_model, "together", edits_at_once=3, max_edits=3, eval_every=3)
    asked: list[int] = []
    score = Rescorer.score

    def counted(self: Rescorer, requests: Sequence[EditRequest]) -> list[ItemScore]:
        asked.append(len(requests))
        return score(self, requests)

    monkeypatch.setattr(Rescorer, "score", counted)
    steps = run.steps()
    next(steps)
    asked.clear()
    assert len([*steps]) <= 1, "one batch, and what is pending after it"
    n_related = sum(len(seen[stream]) for seen in metric.seen for stream in STREAMS)
    # The batch before its edit and after it, and all that is related to it; then every stream of the evaluation.
    assert asked[:3] == [3, 3, n_related]
    assert len(asked) - 3 <= len(STREAMS) + 2


def test_edits_of_a_batch_are_scored_after_the_batch(make_model: Callable[..., EditableModel]) -> None:
    whole, metric = loop(make_model, "together", edits_at_once=3)
    whole.run()
    stopped, _ = loop(make_model, "together", edits_at_once=3, max_edits=3)
    stopped.run()
    for index in range(3):
        for stream, asked in related(stopped, index).items():
            assert [item.text for item in metric.seen[index][stream]] == [
                item.text for item in stopped.strategy.model.score(asked)
            ]


@pytest.mark.parametrize("editor", [*EDITORS_TRIED])
def test_a_resumed_run_ends_with_the_same_scores_after_its_edits(
    make_model: Callable[..., EditableModel], editor: str
) -> None:
    whole, _ = loop(make_model, editor)
    whole.run()
    for stop in (2, 5):
        halfway, _ = loop(make_model, editor)
        for index in halfway.steps():
            if index == stop:
                break
        # A checkpoint passes through JSON but for its tensors.
        state = halfway.state_dict()
        state["answers"] = json.loads(json.dumps(state["answers"]))
        state["metrics"] = json.loads(json.dumps(state["metrics"]))
        resumed, _ = loop(make_model, editor)
        resumed.load_state_dict(state)
        resumed.run()
        assert resumed.metrics() == whole.metrics()


@pytest.mark.parametrize(("editor", "edits_at_once"), [("grace", 1), ("grace", 4), ("together", 4)])
def test_a_run_by_time_step_is_evaluated_after_each(
    make_model: Callable[..., EditableModel], editor: str, edits_at_once: int
) -> None:
    logger = Lines()
    run, _ = loop(make_model, editor, logger=logger, eval_every="step", edits_at_once=edits_at_once)
    run.run()
    assert [record.n_edits for record in logger.records] == [0, 2, 4, 6]


def test_time_steps_that_are_missing_or_mixed_are_refused(make_model: Callable[..., EditableModel]) -> None:
    by_step, good = Schedule(eval_every="step"), benchmark()
    check_steps(good, by_step)
    check_steps(good.with_data(edits=requests()[::-1]), by_step)
    mixed = good.with_data(edits=requests()[::2] + requests()[1::2])
    with pytest.raises(UserError, match="order=stream"):
        check_steps(mixed, by_step)
    check_steps(mixed, Schedule(eval_every=2))
    without = good.with_data(edits=tuple(request.model_copy(update={"step": None}) for request in requests()))
    with pytest.raises(UserError, match="'capitals' has requests without a time step"):
        check_steps(without, by_step)
