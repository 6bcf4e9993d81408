"""The run folder's own files: edits, metrics and predictions."""

import json
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq
from avalanche.evaluation.metric_results import MetricValue

from grace_bench.loggers import RunLogger, RunPlan
from grace_bench.results import PREDICTIONS, RunResult
from grace_bench.strategy import EditorStrategy


class JsonlLogger(RunLogger):
    """Writes `edits.jsonl`, a line a candidate, and `metrics.jsonl`, a line an evaluation; each line flushed at once.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._values: dict[str, Any] = {}
        self._edits: TextIO | None = None
        self._metrics: TextIO | None = None

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        self._folder.mkdir(parents=True, exist_ok=True)
        self._edits = (self._folder / "edits.jsonl").open("w", encoding="utf-8")
        self._metrics = (self._folder / "metrics.jsonl").open("w", encoding="utf-8")

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:  # noqa: D102
        self._values[name] = value

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the candidate's line."""
        assert strategy.record is not None
        _write_line(self._edits, strategy.record.model_dump_json())

    def after_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the evaluation's line."""
        finite = {name: value if value == value else None for name, value in self._values.items()}
        _write_line(self._metrics, json.dumps({"n_edits": strategy.n_edits, **finite}))
        self._values = {}

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        for file in (self._edits, self._metrics):
            if file is not None:
                file.close()


class PredictionsLogger(RunLogger):
    """Writes `predictions.parquet`: a row per item and evaluation, with the answer at 0 edits and at the end.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "predictions.parquet"
        self._partial = folder / ".predictions.parquet.partial"
        self._writer: pq.ParquetWriter | None = None
        self._newest: list[dict[str, Any]] = []

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, PREDICTIONS)

    def before_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the evaluation before, now known not to be the last."""
        self._write_newest(keep_text=bool(self._newest) and self._newest[0]["n_edits"] == 0)

    def after_eval_exp(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Takes in the items of one stream."""
        stream = strategy.experience.origin_stream.name
        for request, item in zip(strategy.experience.requests, strategy.scores, strict=True):
            edit = str(request.metadata.get("edit", request.id))
            self._newest.append(
                {
                    "n_edits": strategy.n_edits,
                    "stream": stream,
                    "request_id": edit,
                    "probe": request.id.removeprefix(edit).removeprefix("/"),
                    "score": item.score,
                    "entry": item.entry,
                    "distance": item.distance,
                    "text": item.text,
                }
            )

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        if self._writer is None:
            return
        self._write_newest(keep_text=True)
        self._writer.close()
        self._writer = None
        self._partial.replace(self._path)

    def _write_newest(self, *, keep_text: bool) -> None:
        if self._newest and self._writer is not None:
            rows = self._newest if keep_text else [{**row, "text": None} for row in self._newest]
            self._writer.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS))
        self._newest = []


def _write_line(file: TextIO | None, line: str) -> None:
    assert file is not None
    file.write(line + "\n")
    file.flush()
