"""The run folder's own files: edits, metrics and predictions."""

import io
import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from grace_bench.common.files import make_folder, remove, sync_folder, write_atomically, write_synced
from grace_bench.data.avalanche import MetricValue
from grace_bench.data.derived import edit_id
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.results.schema import PREDICTIONS, RunResult
from grace_bench.run import checkpoint
from grace_bench.run.loggers import RunLogger, RunPlan

_PARTS = "predictions"


class JsonlLogger(RunLogger):
    """Writes `edits.jsonl`, a line a candidate, and `metrics.jsonl`, a line an evaluation; each line flushed at once.

    Its state is the text of both, so that a run that goes on has them as they were, whatever became of the files, and
    what the next line of metrics begins with.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._paths = {name: folder / f"{name}.jsonl" for name in ("edits", "metrics")}
        self._values: dict[str, Any] = {}
        self._files: dict[str, TextIO] = {}
        self._texts = dict.fromkeys(self._paths, "")

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        texts = {name: path.read_text(encoding="utf-8") for name, path in self._paths.items()}
        return {**texts, "values": dict(self._values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._texts = {name: state[name] for name in self._paths}
        self._values = dict(state["values"])

    def dropped(self) -> list[str]:
        """Returns what `start` will drop from the files, or put back into them, in words."""
        said = []
        for name, path in self._paths.items():
            kept, found = self._texts[name].encode(), path.read_bytes() if path.exists() else b""
            if found.startswith(kept):
                rest = found[len(kept) :]
                lines, torn = rest.count(b"\n"), bool(rest) and not rest.endswith(b"\n")
                parts = [f"{lines} {'line' if lines == 1 else 'lines'}"] * bool(lines) + ["half a line"] * torn
                said += [f"{' and '.join(parts)} of {path.name}"] if parts else []
            else:
                said.append(f"{path.name}, which is cut or changed: it is put back as it was")
        return said

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        for name, path in self._paths.items():
            write_atomically(path, self._texts[name])
            self._files[name] = path.open("a", encoding="utf-8")

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:  # noqa: D102
        self._values[name] = value

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the candidate's line."""
        assert strategy.record is not None
        _write_line(self._files["edits"], strategy.record.model_dump_json())

    def after_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the evaluation's line."""
        # JSON knows neither NaN nor infinity.
        finite = {name: None if _is_no_number(value) else value for name, value in self._values.items()}
        _write_line(self._files["metrics"], json.dumps({"n_edits": strategy.n_edits, **finite}))
        self._values = {}

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        for file in self._files.values():
            # What a full disk did not take while the run went on it does not take now, and that was said.
            with suppress(OSError) if result is None else nullcontext():
                file.close()


class PredictionsLogger(RunLogger):
    """Writes `predictions.parquet`: a row per item and evaluation, with the answer at 0 edits and at the end.

    Until the end each evaluation is a file of its own beside the checkpoints, which names those it covers.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "predictions.parquet"
        self._checkpoints = folder / checkpoint.FOLDER
        self._parts: dict[str, str] = {}
        self._newest: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Returns the SHA-256 of the files of the evaluations so far, by path from the folder of all checkpoints."""
        return dict(self._parts)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        for name in state:
            if not re.fullmatch(rf"{_PARTS}/[0-9]+\.parquet", name):
                raise UserError(f"{self._checkpoints}: its state names '{name}', which is no file of predictions there")
        self._parts = dict(state)

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        folder = self._checkpoints / _PARTS
        make_folder(folder)
        for path in folder.iterdir():
            if f"{_PARTS}/{path.name}" not in self._parts:
                remove(path)

    def after_eval_exp(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Takes in the items of one stream."""
        stream = strategy.experience.origin_stream.name
        for request, item in zip(strategy.experience.requests, strategy.scores, strict=True):
            edit = edit_id(request)
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

    def after_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes the evaluation."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self._newest, schema=PREDICTIONS), buffer)
        self._newest = []
        name = f"{_PARTS}/{strategy.n_edits}.parquet"
        write_synced(self._checkpoints / name, buffer.getvalue())
        sync_folder(self._checkpoints / _PARTS)
        self._parts[name] = checkpoint.digest(buffer.getvalue())

    def finish(self, result: RunResult | None) -> None:
        """Puts the evaluations of a finished run together."""
        if result is None or not self._parts:
            return
        partial = self._path.with_name(f".{self._path.name}.partial")
        parts = list(self._parts)
        with pq.ParquetWriter(partial, PREDICTIONS) as writer:
            for name in parts:
                table = pq.read_table(self._checkpoints / name)
                if name not in (parts[0], parts[-1]):
                    texts = pa.nulls(len(table), pa.string())
                    table = table.set_column(table.schema.get_field_index("text"), PREDICTIONS.field("text"), texts)
                writer.write_table(table)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self._path)
        self._parts = {}


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _write_line(file: TextIO, line: str) -> None:
    file.write(line + "\n")
    file.flush()
