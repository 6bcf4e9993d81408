"""Comparison of two editors score by score, on every stream where both have runs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from grace_bench.analysis.leaderboard import MISSING, TIED, Column, Format, Leaderboard, Row, Table, compare_rows
from grace_bench.analysis.significance import SIGNIFICANCE_LEVEL, Comparison, holm
from grace_bench.common.terminal import table_console
from grace_bench.common.text import Line, csv_text, latex_cells, latex_text, markdown_table, markdown_text, visible
from grace_bench.errors import UserError, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The comparison of two rows of a leaderboard in one score.

    Attributes:
        stream: The stream's name.
        models: The names of the models of the two rows.
        names: The names of the two rows.
        metric: The score.
        main_score: The score of an item that is averaged; `log perplexity` for perplexity.
        conditions: How these rows were measured, as text, if other runs on the stream were measured differently.
        comparison: The first row with the second; None where they cannot be compared.
        p_holm: Its p-value, corrected for the pairs of rows compared in this score on this stream (Holm 1979).
        not_compared: Why there is no comparison.
    """

    stream: str
    models: tuple[str, str]
    names: tuple[str, str]
    metric: str
    main_score: str
    conditions: str = ""
    comparison: Comparison | None = None
    p_holm: float | None = None
    not_compared: str | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the corrected p-value is below 0.05."""
        return self.p_holm is not None and self.p_holm < SIGNIFICANCE_LEVEL


def compare_editors(leaderboard: Leaderboard, first: str, second: str) -> list[Entry]:
    """Compares two editors wherever both have runs.

    If an editor has several rows in a table, each is compared with each row of the other editor. An editor compared
    with itself has its rows compared with each other.

    Args:
        leaderboard: The runs.
        first: An editor's name.
        second: The other's.

    Returns:
        An entry for each table, score and pair of rows.

    Raises:
        UserError: If an editor has no runs, or the two share no table.
    """
    known = sorted({row.editor for table in leaderboard.tables for row in table.rows})
    for name in (first, second):
        if name not in known:
            raise UserError(f"no run of editor '{name}'{did_you_mean(name, known)} (there are: {', '.join(known)})")
    entries = []
    for table in leaderboard.tables:
        pairs = _pairs(table, first, second)
        for column in _columns(table, pairs):
            entries += _corrected([_entry(table, one, two, column) for one, two in pairs])
    if not entries:
        raise UserError(f"no two rows of {first} and {second} were measured alike on one stream and model")
    return entries


def print_comparisons(entries: Sequence[Entry], fmt: Format = "table") -> None:
    """Prints comparisons on standard output."""
    shown = render_comparisons(entries, fmt)
    if isinstance(shown, str):
        print(shown, end="")
    else:
        table_console().print(shown)


def render_comparisons(entries: Sequence[Entry], fmt: Format = "table") -> str | RenderableType:
    """Renders comparisons.

    Args:
        entries: At least one.
        fmt: `table` gives a rich renderable, the others text; `csv` and `json` carry every figure at full precision.
    """
    if fmt == "json":
        return json.dumps(_records(entries), indent=2) + "\n"
    if fmt == "csv":
        return csv_text(_records(entries))
    headers, lines, notes = _headers(entries), [_line(entry, entries) for entry in entries], _notes(entries)
    n_names = len(headers) - _N_FIGURES
    if fmt == "markdown":
        shown = markdown_table(headers, lines, n_names=n_names)
        return shown + "".join(f"\n{markdown_text(note)}\n" for note in notes)
    if fmt == "latex":
        return _latex(headers, lines, notes, n_names)
    grid = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, header in enumerate(headers):
        is_name = index < n_names
        grid.add_column(Text(header), justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name)
    for line in lines:
        grid.add_row(*(Text(text) for text, _ in line))
    return Group(grid, *(Text(note) for note in notes))


_N_FIGURES = 7


def _pairs(table: Table, first: str, second: str) -> list[tuple[Row, Row]]:
    one, two = ([row for row in table.rows if row.editor == name] for name in (first, second))
    return list(combinations(one, 2)) if first == second else list(product(one, two))


def _columns(table: Table, pairs: Sequence[tuple[Row, Row]]) -> Iterator[Column]:
    """Yields the columns that are means over items."""
    for column in table.columns:
        if column.streams and any(column.name in row.cells for pair in pairs for row in pair):
            yield column


def _entry(table: Table, one: Row, two: Row, column: Column) -> Entry:
    main_score = table.protocol.main_score
    entry = Entry(
        stream=table.stream,
        models=(one.model, two.model),
        names=(one.name, two.name),
        metric=column.name,
        main_score=main_score if table.protocol.higher_is_better else f"log {main_score}",
        conditions=table.distinction,
    )
    try:
        return replace(entry, comparison=compare_rows(one, two, column))
    except UserError as error:
        return replace(entry, not_compared=str(error))


def _corrected(entries: Sequence[Entry]) -> list[Entry]:
    p_values = iter(holm([entry.comparison.p_value for entry in entries if entry.comparison is not None]))
    return [entry if entry.comparison is None else replace(entry, p_holm=next(p_values)) for entry in entries]


def _records(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    is_split = any(entry.conditions for entry in entries)
    return [{**_record(entry), **({"conditions": entry.conditions} if is_split else {})} for entry in entries]


def _record(entry: Entry) -> dict[str, Any]:
    figures = dict.fromkeys(Comparison.__dataclass_fields__) if entry.comparison is None else asdict(entry.comparison)
    return {
        "stream": entry.stream,
        "first_model": entry.models[0],
        "second_model": entry.models[1],
        **figures,
        "first": entry.names[0],
        "second": entry.names[1],
        "metric": entry.metric,
        "main_score": entry.main_score,
        "p_holm": entry.p_holm,
        "significant": None if entry.comparison is None else entry.is_significant,
        "not_compared": entry.not_compared,
    }


def _several_models(entries: Sequence[Entry]) -> bool:
    return len({model for entry in entries for model in entry.models}) > 1


def _headers(entries: Sequence[Entry]) -> list[str]:
    models = ["Model"] if _several_models(entries) else []
    return ["Stream", *models, "First", "Second", "Score", "first − second", "95 % interval", "p", "n", "seeds",
            "unpaired", "not finite"]  # fmt: skip


def _line(entry: Entry, entries: Sequence[Entry]) -> Line:
    models = [" / ".join(dict.fromkeys(entry.models))] if _several_models(entries) else []
    stream = f"{entry.stream} ({entry.conditions})" if entry.conditions else entry.stream
    names = [stream, *models, *entry.names, f"{entry.metric} ({entry.main_score})"]
    figures = [MISSING] * _N_FIGURES
    found = entry.comparison
    if found is not None:
        mark = "" if entry.is_significant else f"{TIED} "
        figures = [
            f"{mark}{found.difference:+.3f}",
            f"{found.low:+.3f} to {found.high:+.3f}",
            f"{entry.p_holm:.4f}",
            *(str(number) for number in (found.n_items, found.n_seeds, found.n_unpaired, found.n_nan)),
        ]
    return [(visible(text), False) for text in (*names, *figures)]


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = [
        "Paired by seed and request, bootstrap over requests; n pairs of scores over all seeds; unpaired and not "
        "finite: scores left out."
    ]
    if any(entry.comparison is not None and not entry.is_significant for entry in entries):
        notes.append(f"{TIED} not significant (p ≥ {SIGNIFICANCE_LEVEL}).")
    groups = {(entry.stream, entry.conditions, entry.models, entry.metric) for entry in entries}
    if len(groups) < len(entries):
        notes.append("p is corrected for the pairs compared in one score on one stream (Holm).")
    reasons = dict.fromkeys(entry.not_compared for entry in entries if entry.not_compared is not None)
    return [*notes, *(visible(f"{MISSING} {reason}") for reason in reasons)]


def _latex(headers: Sequence[str], lines: Sequence[Line], notes: Sequence[str], n_names: int) -> str:
    rows = [
        "% \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{'l' * n_names}{'r' * (len(headers) - n_names)}}}",
        r"\toprule",
        latex_cells([(header, False) for header in headers]),
        r"\midrule",
        *(latex_cells(line) for line in lines),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{latex_text(' '.join(notes))}}}",
        r"\end{table}",
    ]
    return "\n".join(rows) + "\n"
