"""What papers measured, to be read beside a leaderboard; never ranked with it.

`published.jsonl` holds rows of published tables: numbers as their source has them, with the source, the place in it,
and how far the copy can be trusted. Protocols differ from paper to paper (docs/papers.md), and so do units.
"""

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import groupby
from string import ascii_lowercase
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from grace_bench.analysis.leaderboard import MISSING, Format, Leaderboard, render
from grace_bench.common.terminal import table_console
from grace_bench.common.text import csv_text, latex_cells, latex_text, markdown_table, markdown_text
from grace_bench.errors import UserError, did_you_mean

COLUMNS = {
    "reliability": "ERR",
    "efficacy": "ERR",
    "generalization": "Holdout",
    "locality": "Locality",
    "specificity": "Locality",
}
"""The metric of this package that answers the same question as a source's score."""

_NAMES = ("Model", "Editor", "#E", "at once")
_ORIGIN = ("confidence", "source", "note")


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of a published table.

    Attributes:
        papers: The names under which it is asked for.
        source: The paper, or whoever else measured it.
        where: The table in it.
        stream: The stream's name.
        model: The model as the source names it.
        editor: The editor.
        n_edits: How many edits were made.
        edits_at_once: How many at once; None if the source does not say.
        scores: The scores as the source names and prints them.
        confidence: How the numbers came here: `second-hand` if not from the paper itself.
        note: What is to be known of the scores.
    """

    papers: Sequence[str]
    source: str
    where: str
    stream: str
    model: str
    editor: str
    n_edits: int
    edits_at_once: int | None
    scores: Mapping[str, float] = field(default_factory=dict)
    confidence: str
    note: str = ""


def published_rows(paper: str) -> tuple[PublishedRow, ...]:
    """Returns the rows of a paper, in the order of its tables.

    Raises:
        UserError: If no rows are known of a paper of that name.
    """
    rows = tuple(row for row in _rows() if paper in row.papers)
    if not rows:
        known = sorted({name for row in _rows() for name in row.papers})
        raise UserError(
            f"--published {paper}: no rows of such a paper{did_you_mean(paper, known)} (there are: {', '.join(known)})"
        )
    return rows


def print_with_published(leaderboard: Leaderboard, paper: str, fmt: Format = "table") -> None:
    """Prints a leaderboard on standard output, and under the tables of each stream the rows of a paper.

    As CSV and JSON the rows of the paper follow those of the runs, and `published` tells them apart.

    Raises:
        UserError: If no rows are known of a paper of that name.
    """
    rows = published_rows(paper)
    if fmt in ("csv", "json"):
        records = _records(leaderboard, rows)
        print(_csv(records) if fmt == "csv" else json.dumps(records, indent=2) + "\n", end="")
    console = table_console()
    for stream, part in _by_stream(leaderboard):
        own = [row for row in rows if row.stream == stream]
        none = f"published: no rows of {paper} on {stream}"
        if fmt == "table":
            console.print(render(part, fmt))
            console.print(_block(stream, own) if own else Text(f"{none}\n"))
        elif fmt == "markdown":
            print(f"{render(part, fmt)}\n{_markdown(stream, own) if own else markdown_text(none)}\n")
        elif fmt == "latex":
            print(f"{render(part, fmt)}{_latex(stream, own) if own else f'% {none}'}\n", end="")
        elif not own:
            print(f"grace-bench: {none}", file=sys.stderr)


@cache
def _rows() -> tuple[PublishedRow, ...]:
    lines = (files("grace_bench.analysis") / "published.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(PublishedRow(**json.loads(line)) for line in lines)


def _by_stream(leaderboard: Leaderboard) -> Iterator[tuple[str, Leaderboard]]:
    """Yields each stream with the part of the leaderboard that has its tables."""
    for stream, tables in groupby(leaderboard.tables, key=lambda table: table.stream):
        part = copy.copy(leaderboard)
        part.tables = tuple(tables)
        yield stream, part


def _title(stream: str) -> str:
    return f"{stream} · published, not ranked: numbers as printed in the source"


def _score_names(rows: Sequence[PublishedRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def _header(score: str) -> str:
    return f"{score} ({COLUMNS[score]})" if score in COLUMNS else score


def _headers(rows: Sequence[PublishedRow]) -> list[str]:
    return [*_NAMES, *map(_header, _score_names(rows)), *_ORIGIN]


def _cells(row: PublishedRow, scores: Sequence[str]) -> list[str]:
    at_once = MISSING if row.edits_at_once is None else str(row.edits_at_once)
    numbers = (f"{row.scores[name]:g}" if name in row.scores else MISSING for name in scores)
    origin = (row.confidence, f"{row.source}, {row.where}", row.note or MISSING)
    return [row.model, row.editor, str(row.n_edits), at_once, *numbers, *origin]


def _block(stream: str, rows: Sequence[PublishedRow]) -> RenderableType:
    """The rows as a grid, with what they share below it: each origin once, by a letter."""
    grid = RichTable(
        title=Text(_title(stream)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    scores = _score_names(rows)
    for index, header in enumerate((*_NAMES, *map(_header, scores), "confidence", "from")):
        is_text = index < 2 or index >= len(_NAMES) + len(scores)
        grid.add_column(Text(header), justify="left" if is_text else "right", no_wrap=True, overflow="fold")
    origins: dict[tuple[str, str], str] = {}
    for row in rows:
        *cells, source, note = _cells(row, scores)
        letter = origins.setdefault((source, note), ascii_lowercase[len(origins) % 26])
        grid.add_row(*map(Text, (*cells, letter)))
    lines = [
        f"{letter}  {source}" + ("" if note == MISSING else f": {note}") for (source, note), letter in origins.items()
    ]
    return Group(grid, Text("\n".join([*lines, ""])))


def _markdown(stream: str, rows: Sequence[PublishedRow]) -> str:
    scores = _score_names(rows)
    lines = [[(cell, False) for cell in _cells(row, scores)] for row in rows]
    return f"{markdown_text(_title(stream))}\n\n{markdown_table(_headers(rows), lines, n_names=2)}"


def _latex(stream: str, rows: Sequence[PublishedRow]) -> str:
    scores = _score_names(rows)
    headers = _headers(rows)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{ll{'r' * (len(headers) - 2 - len(_ORIGIN))}{'l' * len(_ORIGIN)}}}",
            r"\toprule",
            latex_cells([(header, False) for header in headers]),
            r"\midrule",
            *(latex_cells([(cell, False) for cell in _cells(row, scores)]) for row in rows),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{latex_text(_title(stream))}.}}",
            r"\end{table}",
        ]
    )


def _csv(records: Sequence[Mapping[str, Any]]) -> str:
    return csv_text([{**record, "seeds": " ".join(map(str, record["seeds"] or ()))} for record in records])


def _records(leaderboard: Leaderboard, rows: Sequence[PublishedRow]) -> list[dict[str, Any]]:
    """A record for each row of the leaderboard and of the paper, with the same fields in each."""
    streams = {table.stream for table in leaderboard.tables}
    shown = [row for row in rows if row.stream in streams]
    text = render(leaderboard, "json")
    assert isinstance(text, str)
    measured: list[dict[str, Any]] = [{"published": False, **record} for record in json.loads(text)]
    own = [
        {
            "published": True,
            "stream": row.stream,
            "model": row.model,
            "editor": row.editor,
            "n_edits": row.n_edits,
            "edits_at_once": row.edits_at_once,
            "source": row.source,
            "where": row.where,
            "confidence": row.confidence,
            "note": row.note or None,
            **{f"published_{name}": value for name, value in row.scores.items()},
        }
        for row in shown
    ]
    names = dict.fromkeys(name for record in (*measured, *own) for name in record)
    return [{name: record.get(name) for name in names} for record in (*measured, *own)]
