"""The run folder's own files: edits, metrics and predictions."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from itertools import chain, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from grace_bench.common.append_only import AppendOnlyFile
from grace_bench.common.files import atomic_path
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.results.schema import PREDICTIONS, EvaluationRecord, RunResult
from grace_bench.run import checkpoint
from grace_bench.run.loggers import RunLogger, RunPlan


class JsonlLogger(RunLogger):
    """Writes `edits.jsonl`, a line a candidate, and `metrics.jsonl`, a line an evaluation; each is flushed at once.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._edits = AppendOnlyFile(folder / "edits.jsonl")
        self._metrics = AppendOnlyFile(folder / "metrics.jsonl")

    @property
    def files(self) -> Sequence[AppendOnlyFile]:  # noqa: D102
        return self._edits, self._metrics

    def dropped(self) -> list[str]:
        """Returns a description of the content that `start` will cut off the files."""
        words = []
        for file in self.files:
            rest = file.surplus()
            lines, torn = rest.count(b"\n"), bool(rest) and not rest.endswith(b"\n")
            parts = [f"{lines} {'line' if lines == 1 else 'lines'}"] * bool(lines) + ["half a line"] * torn
            words += [f"{' and '.join(parts)} of {file.path.name}"] if parts else []
        return words

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        for file in self.files:
            file.open()

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the candidate's line."""
        assert strategy.record is not None
        self._edits.append(f"{strategy.record.model_dump_json()}\n".encode())

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Writes the evaluation's line."""
        self._metrics.append(record.line().encode())

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        _close(self.files, result)


class PredictionsLogger(RunLogger):
    """Writes `predictions.parquet`: a row per item and evaluation, with the answer at 0 edits and at the end.

    A Parquet file cannot be appended to, so until the end every evaluation is an Arrow stream of its own in a file
    beside the checkpoints.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "predictions.parquet"
        self._evaluations = AppendOnlyFile(folder / checkpoint.FOLDER / "predictions.arrows")
        self._is_complete = False

    @property
    def files(self) -> Sequence[AppendOnlyFile]:  # noqa: D102
        return (self._evaluations,)

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        self._evaluations.open()

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Appends the evaluation's predictions."""
        table = pa.Table.from_pylist(record.predictions, schema=PREDICTIONS)
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, PREDICTIONS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as stream:
            stream.write_table(table)
        self._evaluations.append(buffer.getvalue().to_pybytes())

    def finish(self, result: RunResult | None) -> None:
        """Joins the evaluations of a finished run."""
        _close(self.files, result)
        if result is None or self._is_complete:
            return
        with atomic_path(self._path) as partial, pq.ParquetWriter(partial, PREDICTIONS) as writer:
            is_first = True
            for table, following in pairwise(chain(_tables(self._evaluations.path), [None])):
                is_last = following is None
                if not (is_first or is_last):
                    texts = pa.nulls(len(table), pa.string())
                    table = table.set_column(table.schema.get_field_index("text"), PREDICTIONS.field("text"), texts)
                writer.write_table(table)
                is_first = False
        self._is_complete = True


def _tables(path: Path) -> Iterator[pa.Table]:
    """The predictions of each evaluation in a file of concatenated Arrow streams."""
    with path.open("rb") as file:
        while file.peek(1):
            try:
                table = pa.ipc.open_stream(file).read_all()
                table.validate(full=True)
            except pa.ArrowInvalid as error:
                raise UserError(f"{path}: holds no predictions ({error})") from error
            if table.schema != PREDICTIONS:
                raise UserError(f"{path}: holds no predictions")
            yield table


def _close(files: Sequence[AppendOnlyFile], result: RunResult | None) -> None:
    for file in files:
        # In a failed run the reason is already known: a full disk refuses the same bytes again.
        with suppress(OSError) if result is None else nullcontext():
            file.close()
