"""Reads records from CSV, and reports any fault in one line."""

import csv
from collections.abc import Iterator, Sequence
from functools import partial
from io import StringIO
from typing import Any, ClassVar

from grace_bench.common.progress import Progress
from grace_bench.errors import UserError
from grace_bench.streams._lines import BOM, NO_UTF8, Parse, one_line, opened
from grace_bench.streams._records import Files, Unread


class CsvFiles(Files):
    """A CSV file, or all of a folder. The first line names the columns; every cell is text."""

    endings: ClassVar[tuple[str, ...]] = (".csv",)

    def records(self, progress: Progress | None) -> Iterator[Unread]:
        for path in map(str, self.paths):
            for place, parse in read_csv(path):
                yield Unread(path, place, parse)


def read_csv(path: str) -> Iterator[tuple[str, Parse]]:
    """Yields for every record of a CSV file its place and a function that gives its cells by the name of the column.

    Cells may be quoted, and then hold commas, doubled quotes and line breaks; a record is placed at its first line.
    Blank lines are skipped. Columns without a name are ignored.

    Args:
        path: The file, in UTF-8, with or without a byte-order mark.

    Raises:
        UserError: If the file as a whole cannot be read: its columns have no distinct names, a quote is not closed.
    """
    with opened(path) as file:
        text = file.read().removeprefix(BOM).decode(errors="surrogateescape")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}:{line}: holds a NUL character, so it is not CSV")
    columns: Sequence[str] = ()
    for place, row in _rows(path, text):
        if columns:
            yield place, partial(_cells, place, columns, row)
        else:
            columns = _columns(place, row)


def _rows(path: str, text: str) -> Iterator[tuple[str, list[str]]]:
    # Line breaks within quotes are part of a cell, so they must not be translated.
    reader = csv.reader(StringIO(text, newline=""), strict=True)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{place}: is not CSV ({error})") from error
        if row is None:
            return
        if row:
            yield place, row


def _columns(place: str, names: Sequence[str]) -> Sequence[str]:
    for number, name in enumerate(names, start=1):
        if found := NO_UTF8.search(name):
            raise UserError(f"{place}: the name of column {number} is not UTF-8 ({_byte(found[0])})")
        if name and name in names[: number - 1]:
            raise UserError(f"{place}: two columns are named '{one_line(name)}'")
    return names


def _cells(place: str, columns: Sequence[str], row: Sequence[str]) -> dict[str, Any]:
    if len(row) != len(columns):
        raise UserError(f"{place}: has {len(row)} cells for {len(columns)} columns")
    cells = {name: cell for name, cell in zip(columns, row, strict=True) if name}
    for name, cell in cells.items():
        if found := NO_UTF8.search(cell):
            raise UserError(f"{place}: field '{one_line(name)}': is not UTF-8 ({_byte(found[0])})")
    return cells


def _byte(character: str) -> str:
    return f"a byte is 0x{ord(character) - 0xDC00:02x}"
