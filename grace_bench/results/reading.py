"""Finding and reading run folders."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel, ValidationError

from grace_bench.common.files import hash_file, readable
from grace_bench.common.text import visible
from grace_bench.common.untrusted import refuse_references
from grace_bench.errors import UserError, first_error
from grace_bench.results.schema import (
    PREDICTIONS,
    SCHEMA_VERSION,
    YOUNG_COLUMNS,
    EditRecord,
    Evaluation,
    EvaluationLine,
    RunResult,
)

RESULT_FILE = "result.json"
ITEM_COLUMNS = ("stream", "request_id", "probe")
"""The columns of `predictions.parquet` that name the item."""
ITEMS_FOLDER = "items"
"""The folder with the items of reduced runs; also the metadata of a `predictions.parquet` that names its file there."""
_NEVER_NULL = ("n_edits", *ITEM_COLUMNS)

Line = TypeVar("Line", bound=BaseModel)


def find_result_files(paths: Iterable[Path]) -> list[Path]:
    """Finds the result files of finished runs, each in its run folder.

    Args:
        paths: Result files, run folders, or folders that are searched for runs at any depth. The inside of a run folder
            and folders whose name begins with a dot are not searched. A file reached twice is named once.

    Returns:
        The files in the order of `paths`, within a folder by path.

    Raises:
        UserError: If a path does not exist or contains no result.
    """
    files: dict[str, Path] = {}
    for path in paths:
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = _result_files(path)
        else:
            raise UserError(f"{visible(str(path))}: no such file or folder")
        if not found:
            raise UserError(f"{visible(str(path))}: holds no finished run (no {RESULT_FILE} in it or below it)")
        for file in found:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def read_edits(path: Path) -> dict[str, EditRecord]:
    """Reads an `edits.jsonl` by request id.

    Raises:
        UserError: If it is missing or a line is broken, naming file, line and field.
    """
    return {record.id: record for record in _read_lines(path, EditRecord)}


def read_evaluations(path: Path) -> list[Evaluation]:
    """Reads a `metrics.jsonl`, in its order.

    Raises:
        UserError: If it is missing or a line is broken, naming file, line and field.
    """
    return [
        Evaluation(n_edits=line.n_edits, metrics=line.model_extra or {}) for line in _read_lines(path, EvaluationLine)
    ]


def read_predictions(path: Path, *, columns: Sequence[str], filters: Sequence[tuple[str, str, Any]] = ()) -> list[Any]:
    """Reads rows of a `predictions.parquet`, each as a dictionary of the given columns.

    Args:
        path: The file, of a run or of a reduced run (`results.reduced`).
        columns: The columns to read.
        filters: Conditions that all must hold, as `pyarrow.parquet.read_table` takes them.

    Raises:
        UserError: If it cannot be read, a column is missing, has another type, or lacks required values, or the items
            of a reduced run are missing.
    """
    try:
        schema = pq.read_schema(readable(path))
        items = _items_of(path, schema)
        types = {field.name: field.type for part in (schema, () if items is None else items.schema) for field in part}
        for field in PREDICTIONS:
            if field.name in YOUNG_COLUMNS and field.name not in (*types, *columns):
                continue
            if types.get(field.name) != field.type:
                raise UserError(f"{path}: column '{field.name}' should be {field.type}")
        if items is None:
            table = pq.read_table(path, columns=list(columns), filters=list(filters) or None)
        else:
            table = _with_items(path, items)
            table = table.filter(pq.filters_to_expression(list(filters))) if filters else table
            table = table.select(list(columns))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
    for name in _NEVER_NULL:
        if name in table.column_names and table[name].null_count:
            raise UserError(f"{path}: column '{name}' has rows without a value")
    return table.to_pylist()


def read_result(path: Path) -> RunResult:
    """Reads a `result.json`.

    Raises:
        UserError: If it is missing, broken or of another schema version, naming the file and the field.
    """
    try:
        text = readable(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from error
    try:
        header = _Header.model_validate_json(text)
        if header.schema_version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {header.schema_version}, this grace-bench reads {SCHEMA_VERSION}")
        return RunResult.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error)}") from error


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the `config.yaml` of a run folder as a flat record, the names of nested settings joined by dots.

    Returns:
        Empty if the file is broken or missing, as for a run started from Python.
    """
    path = folder / "config.yaml"
    try:
        refuse_references(path)
        content = yaml.safe_load(readable(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError, UserError):
        return {}
    return flattened(content) if isinstance(content, dict) else {}


def flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested record as one level, names joined by dots.

    >>> flattened({"protocol": {"query": "prefix"}, "seed": 0})
    {'protocol.query': 'prefix', 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            flat.update(flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _items_of(path: Path, schema: pa.Schema) -> pa.Table | None:
    """Returns the items of a reduced run, which runs of the same items share; None if the file has its own."""
    digest = (schema.metadata or {}).get(ITEMS_FOLDER.encode())
    if digest is None:
        return None
    if not re.fullmatch(rb"[0-9a-f]{64}", digest):
        raise UserError(f"{path}: metadata '{ITEMS_FOLDER}' should be a SHA-256 in hexadecimal digits")
    name = f"{ITEMS_FOLDER}/{digest.decode()}.parquet"
    file = next((folder / name for folder in path.absolute().parents if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{path}: lacks {name} of the folder that the run was taken from")
    if hash_file(file) != digest.decode():
        raise UserError(f"{file}: was changed; its name is the SHA-256 of what it held")
    return pq.read_table(file)


def _with_items(path: Path, items: pa.Table) -> pa.Table:
    table = pq.read_table(path)
    if len(table) != len(items):
        raise UserError(f"{path}: has {len(table)} rows, and there are {len(items)} items")
    for name in ITEM_COLUMNS:
        table = table.append_column(items.schema.field(name), items[name])
    return table


class _Header(BaseModel):
    schema_version: int


def _read_lines(path: Path, model: type[Line]) -> list[Line]:
    try:
        # Not splitlines, which also breaks at characters that may occur in a text.
        lines = readable(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not lines[-1]:
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(model.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{path}:{number}: {first_error(error)}") from error
    return records


def _result_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{visible(str(error.filename))}: {error.strerror}") from error

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        if RESULT_FILE in files:
            found.append(Path(where, RESULT_FILE))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found
