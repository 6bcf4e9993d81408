"""One record an evaluation: every file and view of a run has the same values, those of that evaluation alone."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from grace_bench.data.avalanche import BaseLogger, EvaluationPlugin, MetricValue
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import EditMetric
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.results.schema import EvaluationRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan
from grace_bench.run.loggers.jsonl import JsonlLogger, PredictionsLogger
from grace_bench.run.loop import RunLoop
from grace_bench.run.settings import Schedule

COUNTS = ("n_edits", "n_candidates", "n_superseded", "n_failed", "n_close")


class Sometimes(EditMetric):
    """Emits at the second evaluation alone, and after every candidate up to the third."""

    registered_name = "sometimes"

    def __init__(self) -> None:
        super().__init__()
        self.n_evaluations = self.n_candidates = 0

    def after_candidate(self, strategy: EditorStrategy) -> MetricValue | None:
        self.n_candidates += 1
        return self.value(strategy, self.n_candidates, "candidate") if self.n_candidates <= 3 else None

    def after_eval(self, strategy: EditorStrategy) -> MetricValue | None:
        self.n_evaluations += 1
        return self.value(strategy, 0.5) if self.n_evaluations == 2 else None

    def state_dict(self) -> dict[str, Any]:
        return {"evaluations": self.n_evaluations, "candidates": self.n_candidates}

    def load_state_dict(self, state: Any) -> None:
        self.n_evaluations, self.n_candidates = state["evaluations"], state["candidates"]


class Heard(RunLogger):
    """Every record of a run."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[EvaluationRecord] = []

    def log_evaluation(self, record: EvaluationRecord) -> None:
        self.records.append(record)


class Plain(BaseLogger):
    """One of Avalanche's own loggers: values and callbacks, no records."""

    def __init__(self) -> None:
        super().__init__()
        self.n_values = self.n_evaluations = 0

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        self.n_values += 1

    def after_eval(self, strategy: Any, metric_values: Any) -> None:
        self.n_evaluations += 1


def start(folder: Path, *others: BaseLogger, n_edits: int = 5) -> tuple[RunLoop, list[RunLogger]]:
    """A run of five edits with evaluations at 0, 2, 4 and 5."""
    toy = STREAMS.get("toy")().load()
    files: list[RunLogger] = [JsonlLogger(folder), PredictionsLogger(folder)]
    evaluator = EvaluationPlugin(
        METRICS.get("TRR")(), METRICS.get("ES")(), Sometimes(), loggers=[*files, *others], collect_all=False
    )
    model = EditableModel.from_pretrained("toy", task="classification")
    strategy = EDITORS.get("none")(model=model, evaluator=evaluator)
    benchmark = EditBenchmark(
        name="points",
        data=StreamData(edits=toy.edits, upstream=toy.upstream[:4]),
        task="classification",
        metadata=StreamMetadata(source="this test", revision="1", license="MIT"),
        fingerprint="0" * 64,
        max_new_tokens=1,
    )
    run = RunLoop(benchmark=benchmark, strategy=strategy, schedule=Schedule(max_edits=n_edits, eval_every=2))
    plan = RunPlan(
        run_id="r",
        folder=folder,
        stream="points",
        model="toy",
        editor="none",
        n_candidates=len(toy.edits),
        max_edits=n_edits,
        higher_is_better=True,
    )
    for file in files:
        file.start(plan)
    return run, files


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def finish(files: list[RunLogger]) -> None:
    for file in files:
        file.finish(RunResult.model_construct())


def test_a_result_has_the_metrics_of_the_last_line_and_no_others(tmp_path: Path) -> None:
    run, files = start(tmp_path)
    run.run()
    finish(files)
    measured = lines(tmp_path)
    assert [line["n_edits"] for line in measured] == [0, 2, 4, 5]
    assert ["sometimes" in line for line in measured] == [False, True, False, False]
    assert ["sometimes/candidate" in line for line in measured] == [False, True, True, False]
    result = run.metrics()
    assert {name: value for name, value in result.items() if name not in COUNTS} == {
        name: value for name, value in measured[-1].items() if name != "n_edits"
    }
    assert {"TRR", "ES"} <= result.keys()


def test_every_file_is_written_from_the_same_record(tmp_path: Path) -> None:
    heard = Heard()
    run, files = start(tmp_path, heard)
    run.run()
    finish(files)
    assert [{"n_edits": record.n_edits, **record.metrics} for record in heard.records] == lines(tmp_path)
    assert [list(record.metrics) for record in heard.records] == [list(line)[1:] for line in lines(tmp_path)]
    rows = [row for record in heard.records for row in record.predictions]
    kept = [{**row, "text": row["text"] if row["n_edits"] in (0, 5) else None} for row in rows]
    assert pq.read_table(tmp_path / "predictions.parquet").to_pylist() == kept
    assert [sum(row["n_edits"] == n for row in rows) for n in (0, 2, 4, 5)] == [4, 6, 8, 9]


def test_avalanches_own_loggers_are_called_as_ever(tmp_path: Path) -> None:
    plain = Plain()
    run, files = start(tmp_path, plain)
    run.run()
    finish(files)
    assert plain.n_evaluations == 4
    # TRR 4 and ES 3 times at evaluations, ES after each edit, and what is emitted sometimes.
    n_edited = run.strategy.n_edits
    assert plain.n_values == 4 + 3 + n_edited + 1 + 3


@pytest.mark.parametrize("n_steps", [1, 2, 3, 4, 5, 6])
def test_values_that_came_before_a_checkpoint_are_in_the_line_after_it(tmp_path: Path, n_steps: int) -> None:
    whole, files = start(tmp_path / "whole")
    whole.run()
    finish(files)
    first, files = start(tmp_path / "first")
    for _, _ in zip(range(n_steps), first.steps(), strict=False):
        pass
    state = first.state_dict()
    finish(files)
    second, files = start(tmp_path / "second")
    second.load_state_dict({**state, "recorder": json.loads(json.dumps(state["recorder"]))})
    second.run()
    finish(files)
    assert [*lines(tmp_path / "first"), *lines(tmp_path / "second")] == lines(tmp_path / "whole")
    assert second.metrics() == whole.metrics()
    assert list(second.metrics()) == list(whole.metrics())


def test_a_second_run_of_an_editor_replaces_the_recorder_of_the_first(tmp_path: Path) -> None:
    run, files = start(tmp_path)
    again = RunLoop(benchmark=run.benchmark, strategy=run.strategy, schedule=run.schedule)
    recorders = [logger for logger in run.strategy.evaluator.loggers if logger in (run.recorder, again.recorder)]
    assert recorders == [again.recorder]
    finish(files)
