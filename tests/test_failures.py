"""An edit that goes wrong is recorded with its reason, and everything after it is as if it had never been asked for."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from avalanche.training.plugins.evaluation import EvaluationPlugin
from torch import Tensor, nn

from grace_bench.benchmark import EditBenchmark
from grace_bench.engine import make_engine
from grace_bench.errors import EditFailure, RunFailure, UserError
from grace_bench.failures import reason_of_failure
from grace_bench.loggers import RunLogger
from grace_bench.models import EditableModel
from grace_bench.registry import EDITORS, METRICS
from grace_bench.runner import Run, Schedule
from grace_bench.strategy import EditBatch, EditorStrategy, EditOutcome
from grace_bench.types import EditRequest, StreamData, StreamMetadata

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakeEditor = Callable[..., EditorStrategy]

MARK, MARK_ID = "?", 4
"""What spoils a request that holds it, and its token."""
each_editor = pytest.mark.parametrize("name", list(EDITORS.entries()))
each_engine = pytest.mark.parametrize("engine", ["exact", "plain"])


class Recorder(RunLogger):
    """Keeps every candidate's record, times aside."""

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
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="0" * 64,
        max_new_tokens=3,
    )


def carried_out(
    editor: EditorStrategy, requests: Sequence[EditRequest], recorder: Recorder, **schedule: Any
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, float]]:
    """Runs an editor over requests; returns the records, its state and the metrics."""
    run = Run(benchmark_of(requests, editor.model.task.name), editor, Schedule(**{"eval_every": 50, **schedule}))
    run.run()
    return recorder.records, dict(editor.state_dict()), run.metrics()


def with_one_more(requests: Sequence[EditRequest], place: int) -> tuple[list[EditRequest], EditRequest]:
    """The requests with another one in between, which holds the mark."""
    bad = requests[place].model_copy(update={"id": "bad", "prompt": f"{MARK} {requests[place].prompt}"})
    return [*requests[:place], bad, *requests[place:]], bad


def same_state(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two states are the same bits, the clock aside, which counts failed edits too."""
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


@each_editor
@pytest.mark.parametrize("how", ["nan", "raises"])
def test_what_follows_a_failed_edit_is_what_follows_without_it(
    name: str, how: str, make_editor: MakeEditor, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    if (name, how) == ("none", "nan"):
        pytest.skip("it trains nothing")
    # Here every candidate is edited.
    task = "language_modelling"
    requests = make_requests(task)
    more, bad = with_one_more(requests, 3)
    results = []
    for stream in (requests, more):
        model = make_model(task)
        # Batches of another size round otherwise.
        model.engine = make_engine("plain", model)
        model.task.batch_size = 1
        torch.manual_seed(0)
        recorder = Recorder()
        evaluator = EvaluationPlugin(loggers=[recorder], collect_all=False)
        cls = raising_late(name) if how == "raises" else None
        with make_editor(name, model, cls=cls, evaluator=evaluator) as editor:
            if how == "nan":
                with nan_where_marked(model.module):
                    results.append((*carried_out(editor, stream, recorder), torch.get_rng_state()))
            else:
                results.append((*carried_out(editor, stream, recorder), torch.get_rng_state()))
    (expected, state, _, drawn), (records, state_after, metrics, drawn_after) = results
    (failed,) = [record for record in records if record["id"] == bad.id]
    assert failed["edited"]
    assert failed["op"] is None
    assert "nan" in failed["failed"] if how == "nan" else failed["failed"] == "ValueError: no such island"
    assert [r["id"] for r in records if r["failed"]] == ["bad"], [r["failed"] for r in records]
    assert metrics["n_edits"] == sum(record["edited"] for record in records)
    moved = [
        {**record, "index": record["index"] - 1, "n_edits": record["n_edits"] - 1} if record["index"] > 3 else record
        for record in records
        if record is not failed
    ]
    assert moved == expected
    assert same_state(state_after, state)
    assert torch.equal(drawn_after, drawn)
