"""Finished runs reduced to what tables and statistics read, for runs that ship in `leaderboard/`."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grace_bench.common.files import atomic_path, readable, remove, write_synced
from grace_bench.common.text import visible
from grace_bench.common.untrusted import check_run_folder
from grace_bench.errors import UserError
from grace_bench.results.reading import ITEM_COLUMNS, ITEMS_FOLDER, RESULT_FILE, read_predictions, read_result
from grace_bench.results.schema import PREDICTIONS, digest_of, sealed

_PREDICTIONS_FILE = "predictions.parquet"
_COPIED = ("config.yaml", "metrics.jsonl")
_EMPTIED = ("entry", "distance", "text")
"""Columns that no table reads."""


def reduce_run(folder: Path, out: Path) -> Path:
    """Writes a finished run without its weights, its edits and its earlier predictions.

    `result.json`, `config.yaml` and `metrics.jsonl` are kept, and of `predictions.parquet` the scores of the last
    evaluation. The record says so: its `files` are those that are kept, and `reduced_from` is the digest of the run's
    own record. The columns that name the items would be more than half of `predictions.parquet`, and many runs of a
    stream have them in common: they stand once, in `items/`, and `predictions.parquet` names the file there by its
    digest.

    Args:
        folder: The run folder.
        out: The folder that receives the reduced run, under its `run_id`; a reduced run of that name is replaced. Its
            `items/` receives the items.

    Returns:
        The folder of the reduced run.

    Raises:
        UserError: If the run is not finished, a file of it is broken, or it is itself a reduced run.
    """
    check_run_folder(folder)
    path = folder / RESULT_FILE
    result = read_result(path)
    if result.is_reduced:
        raise UserError(f"{path}: is the result of a run that was reduced before")
    place = PurePosixPath(result.run_id)
    if place.is_absolute() or not place.parts or any(part.startswith(".") for part in place.parts):
        raise UserError(f"{path}: field 'run_id': '{visible(result.run_id)}' cannot name a folder")
    origin = result.digest or digest_of(json.loads(path.read_bytes()))
    target = out / place
    if (target / RESULT_FILE).is_file() and read_result(target / RESULT_FILE).reduced_from == origin:
        return target
    scores = _final_scores(folder / _PREDICTIONS_FILE)
    digest = _write_items(scores.select(ITEM_COLUMNS), out / ITEMS_FOLDER)
    if target.exists():
        remove(target)
    with atomic_path(target) as partial:
        partial.mkdir()
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        _write_table(scores.drop_columns(ITEM_COLUMNS), partial / _PREDICTIONS_FILE, {ITEMS_FOLDER: digest})
        reduced = sealed(result.model_copy(update={"reduced_from": origin}), partial)
        (partial / RESULT_FILE).write_text(reduced.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return target


def _final_scores(path: Path) -> pa.Table:
    """Returns the rows of the last evaluation, ordered by item."""
    # Raises if the file is not what a run writes.
    last = max((row["n_edits"] for row in read_predictions(path, columns=["n_edits"])), default=0)
    table = pq.read_table(readable(path), filters=[("n_edits", "=", last)])
    for name in _EMPTIED:
        field = PREDICTIONS.field(name)
        table = table.set_column(table.schema.get_field_index(name), field, pa.nulls(len(table), field.type))
    return table.take(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in ITEM_COLUMNS]))


def _write_items(items: pa.Table, folder: Path) -> str:
    """Writes items into a folder unless they are there, and returns the digest by which the file is named."""
    buffer = pa.BufferOutputStream()
    # Ids, in order, share their beginnings.
    columns = [name for name in items.column_names if name != "request_id"]
    _write_table(items, buffer, use_dictionary=columns, column_encoding={"request_id": "DELTA_BYTE_ARRAY"})
    content = buffer.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()
    path = folder / f"{digest}.parquet"
    if not path.exists():
        with atomic_path(path, shared=True) as partial:
            write_synced(partial, content)
    return digest


def _write_table(
    table: pa.Table, where: Path | pa.BufferOutputStream, metadata: Mapping[str, str] | None = None, **settings: Any
) -> None:
    # Not compressed: the wheel compresses all runs together, which finds what they have in common.
    small = {"compression": "none", "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(where, table.schema, **small, **settings) as writer:
        writer.write_table(table)
        # Without a schema of Arrow's own, the table's metadata would not be written.
        writer.add_key_value_metadata(dict(metadata or {}))
