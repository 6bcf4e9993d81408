"""Finished runs reduced to what tables and statistics read, for runs that ship in `leaderboard/`."""

import json
import shutil
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grace_bench.common.files import atomic_path, readable, remove
from grace_bench.common.text import visible
from grace_bench.common.untrusted import check_run_folder
from grace_bench.errors import UserError
from grace_bench.results.reading import RESULT_FILE, read_predictions, read_result
from grace_bench.results.schema import PREDICTIONS, digest_of, sealed

_PREDICTIONS_FILE = "predictions.parquet"
_COPIED = ("config.yaml", "metrics.jsonl")
_EMPTIED = ("entry", "distance", "text")
"""Columns that no table reads."""
_ITEM = ("stream", "request_id", "probe")


def reduce_run(folder: Path, out: Path) -> Path:
    """Writes a finished run without its weights, its edits and its earlier predictions.

    `result.json`, `config.yaml` and `metrics.jsonl` are kept, and of `predictions.parquet` the scores of the last
    evaluation. The record says so: its `files` are those that are kept, and `reduced_from` is the digest of the run's
    own record.

    Args:
        folder: The run folder.
        out: The folder that receives the reduced run, under its `run_id`; a reduced run of that name is replaced.

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
    if target.exists():
        remove(target)
    with atomic_path(target) as partial:
        partial.mkdir()
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        # Half the size of the defaults: ids, in order, share their beginnings.
        pq.write_table(
            scores,
            partial / _PREDICTIONS_FILE,
            compression="zstd",
            compression_level=19,
            use_dictionary=[name for name in scores.column_names if name != "request_id"],
            column_encoding={"request_id": "DELTA_BYTE_ARRAY"},
            write_statistics=False,
            store_schema=False,
        )
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
    return table.take(pc.sort_indices(table, sort_keys=[(name, "ascending") for name in _ITEM]))
