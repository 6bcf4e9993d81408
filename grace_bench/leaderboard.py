"""Leaderboards: finished runs side by side, a row an editor, means and deviations over seeds.

What was not measured the same way is never ranked together: runs on one stream must share its content, the protocol
(tuning budget aside, which is a column) and, for each model name, the weights.
"""

import csv
import io
import json
import math
import os
import unicodedata
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from grace_bench.errors import UserError, did_you_mean
from grace_bench.results import Protocol, RunResult, read_result
from grace_bench.terminal import table_console

Format = Literal["table", "markdown", "csv", "json", "latex"]

RESULT_FILE = "result.json"
MISSING = "–"

_SCORES = ("TRR", "ERR", "Avg", "ES", "Holdout")
_OPTIONAL_SCORES = ("ARR", "Locality", "Portability")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A measured column.

    Attributes:
        name: The metric, as results name it.
        header: What stands above the column.
        decimals: Digits after the point in formats for people.
        higher_is_better: Which end is marked as best; None for what is neither good nor bad.
    """

    name: str
    header: str
    decimals: int
    higher_is_better: bool | None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A figure over the runs that have it.

    Attributes:
        mean: Mean over the runs.
        std: Sample standard deviation (n - 1); None for a single run.
        n: How many runs have the figure.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One editor with one set of settings on one model, over its seeds.

    Attributes:
        model: The model's name.
        editor: The editor's registered name.
        settings: The settings in which it differs from other rows of the same editor and model, as `name=value`.
        tuning_budget: What its hyperparameters were chosen with.
        seeds: The runs' seeds in ascending order.
        cells: Figures by column name; a figure that no run has is left out.
        is_floor: Whether the runs left the model as it was: nothing was added to it and no score moved.
        results: The runs, by seed.
    """

    model: str
    editor: str
    settings: str
    tuning_budget: str | None
    seeds: tuple[int, ...]
    cells: Mapping[str, Cell]
    is_floor: bool
    results: tuple[RunResult, ...]

    @property
    def name(self) -> str:
        """The editor, with the settings that tell it from its neighbours."""
        return f"{self.editor} ({self.settings})" if self.settings else self.editor


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that may be compared.

    Attributes:
        stream: The stream's name.
        task: The stream's task.
        models: The names of the models in the table.
        protocol: The protocol of every run, whatever its tuning budget.
        ranked_by: The column that orders the rows: `Avg`, or `ERR` where no run has an Avg, as with perplexity.
        columns: The measured columns.
        rows: Best first; rows without the ranking figure come last.
    """

    stream: str
    task: str
    models: tuple[str, ...]
    protocol: Protocol
    ranked_by: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def best(self, column: Column) -> frozenset[int]:
        """Returns the indices of the rows to mark as best in a column.

        Figures that print alike are marked alike. Nothing is marked where only one editor has the figure. The floor
        is no competitor: an unedited model is bound to retain the most and to take the least time.
        """
        if column.higher_is_better is None:
            return frozenset()
        means = {
            index: round(row.cells[column.name].mean, column.decimals)
            for index, row in enumerate(self.rows)
            if column.name in row.cells and not row.is_floor
        }
        if len(means) < 2:
            return frozenset()
        top = max(means.values()) if column.higher_is_better else min(means.values())
        return frozenset(index for index, mean in means.items() if mean == top)


class Leaderboard:
    """Runs grouped into tables and rows.

    A row holds the runs of one editor that differ in nothing but the seed: model, layer, dtype, settings and tuning
    budget are the same. An editor's own `seed` is no setting. A run that is given twice counts once.

    Args:
        results: Finished runs, at least one.
        by_stream: Whether the models of a stream stand in one table; otherwise each model has its own, so that editors
            are compared on equal terms. Streams never share a table: their scores have no common scale.

    Attributes:
        tables: In alphabetical order of stream and model.

    Raises:
        UserError: If there are no runs, or two of them cannot stand side by side: other content of the stream, another
            protocol, other weights under one model name, or two results for one configuration and seed. Names both
            runs and the first field that differs.
    """

    def __init__(self, results: Sequence[RunResult], *, by_stream: bool = False) -> None:
        if not results:
            raise UserError("a leaderboard needs at least one finished run")
        _refuse_mixtures(results)
        groups: dict[tuple[str, ...], list[RunResult]] = {}
        for result in _without_repeats(results):
            key = (result.stream.name,) if by_stream else (result.stream.name, result.model.name)
            groups.setdefault(key, []).append(result)
        self.tables: tuple[Table, ...] = tuple(_build_table(groups[key]) for key in sorted(groups))


def find_results(paths: Iterable[Path]) -> list[RunResult]:
    """Reads the results of finished runs.

    Args:
        paths: Each a result file, a run folder, or a folder that is searched for runs at any depth. The inside of a run
            folder and folders whose name begins with a dot are not searched. A file reached twice is read once.

    Returns:
        The results in the order of `paths`, within a folder by path.

    Raises:
        UserError: If a path does not exist or holds no result, or a result is broken.
    """
    return [read_result(file) for file in find_result_files(paths)]


def find_result_files(paths: Iterable[Path]) -> list[Path]:
    """Finds the result files of finished runs, each in its run folder; looks and refuses as `find_results`."""
    files: dict[Path, Path] = {}
    for path in paths:
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = _result_files(path)
        else:
            raise UserError(f"{_shown(str(path))}: no such file or folder")
        if not found:
            raise UserError(f"{_shown(str(path))}: holds no finished run (no {RESULT_FILE} in it or below it)")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def print_leaderboard(leaderboard: Leaderboard, fmt: Format = "table") -> None:
    """Prints a leaderboard on standard output."""
    shown = render(leaderboard, fmt)
    if isinstance(shown, str):
        print(shown, end="")
    else:
        table_console().print(shown)


def render(leaderboard: Leaderboard, fmt: Format = "table") -> str | RenderableType:
    """Renders a leaderboard.

    `table`, `markdown` and `latex` are for people: means with the deviation over seeds, the number of runs where a
    figure is not from all of them, the best in bold, a dash for what is missing. `csv` and `json` are for programs: a
    record a row, with mean, deviation and number of runs in columns of their own at full precision, and an empty cell
    or `null` for what is missing. Control characters in names are shown as escapes in every format.

    Args:
        leaderboard: The leaderboard.
        fmt: `table` gives a rich renderable, the others text.

    Raises:
        UserError: If there is no such format.
    """
    renderers: dict[str, Callable[[Leaderboard], str | RenderableType]] = {
        "table": _render_rich,
        "markdown": _render_markdown,
        "csv": _render_csv,
        "json": _render_json,
        "latex": _render_latex,
    }
    if fmt not in renderers:
        known = get_args(Format)
        raise UserError(f"format={fmt!r} is not known{did_you_mean(fmt, known)} (there are: {', '.join(known)})")
    return renderers[fmt](leaderboard)


def _result_files(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{_shown(str(error.filename))}: {error.strerror}") from error

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        if RESULT_FILE in files:
            found.append(Path(where, RESULT_FILE))
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
    return found


def _refuse_mixtures(results: Sequence[RunResult]) -> None:
    """Raises if two runs on one stream were not measured alike."""
    first_on_stream: dict[str, RunResult] = {}
    first_of_model: dict[tuple[str, str], RunResult] = {}
    for result in results:
        first = first_on_stream.setdefault(result.stream.name, result)
        _refuse_difference(first, result, "stream", {"fingerprint", "task"})
        _refuse_difference(first, result, "protocol", set(Protocol.model_fields) - {"tuning_budget"})
        first = first_of_model.setdefault((result.stream.name, result.model.name), result)
        _refuse_difference(first, result, "model", {"dtype"})
        _refuse_difference(first, result, "model", {"fingerprint"})


def _refuse_difference(first: RunResult, second: RunResult, part: str, fields: set[str]) -> None:
    one, two = (getattr(run, part).model_dump(mode="json", include=fields) for run in (first, second))
    name = next((name for name in one if one[name] != two[name]), None)
    if name is not None:
        raise UserError(
            f"runs {_shown(first.run_id)} and {_shown(second.run_id)} cannot stand in one table: {part}.{name} is "
            f"{_value_text(one[name])} in the first and {_value_text(two[name])} in the second"
        )


def _without_repeats(results: Sequence[RunResult]) -> list[RunResult]:
    """Drops runs that are given twice; two different results for one configuration and seed are refused."""
    kept: dict[tuple[Any, ...], RunResult] = {}
    for result in results:
        earlier = kept.setdefault((_configuration(result), result.seed), result)
        one, two = (_flattened(run.model_dump(mode="json")) for run in (earlier, result))
        differing = next((name for name in [*one, *two] if one.get(name) != two.get(name)), None)
        if differing is not None:
            raise UserError(
                f"runs {_shown(earlier.run_id)} and {_shown(result.run_id)} share configuration and seed but differ: "
                f"{_shown(differing)} is {_value_text(one.get(differing))} in the first and "
                f"{_value_text(two.get(differing))} in the second; leave one of them out"
            )
    return list(kept.values())


def _configuration(result: RunResult) -> tuple[Any, ...]:
    """What the runs of one row share, as a key."""
    # Not as JSON: 1 and 1.0 are the same setting.
    settings = frozenset(
        (name, value if isinstance(value, Hashable) else json.dumps(value, sort_keys=True))
        for name, value in _settings(result).items()
    )
    return (result.stream.name, result.model.name, result.editor.name, settings, result.protocol.tuning_budget)


def _settings(result: RunResult) -> dict[str, Any]:
    """The settings that tell two runs of one editor on one model apart, by dotted name."""
    editor = result.editor.model_dump(mode="json", exclude={"name", "seed"})
    return {**_flattened(editor), "layer": result.model.layer}


def _flattened(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flattened(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _build_table(results: Sequence[RunResult]) -> Table:
    first = results[0]
    columns = _columns(results)
    by_configuration: dict[tuple[Any, ...], list[RunResult]] = {}
    for result in results:
        by_configuration.setdefault(_configuration(result), []).append(result)
    groups = list(by_configuration.values())
    rows = [_build_row(group, columns, _differing_settings(group[0], groups)) for group in groups]
    ranked_by = "Avg" if any("Avg" in row.cells for row in rows) else "ERR"
    sign = -1 if first.protocol.higher_is_better else 1

    def rank(row: Row) -> tuple[Any, ...]:
        figure = row.cells.get(ranked_by)
        return (figure is None, sign * figure.mean if figure else 0.0, row.model, row.editor, row.settings)

    return Table(
        stream=first.stream.name,
        task=first.stream.task,
        models=tuple(sorted({result.model.name for result in results})),
        protocol=first.protocol,
        ranked_by=ranked_by,
        columns=columns,
        rows=tuple(sorted(rows, key=rank)),
    )


def _columns(results: Sequence[RunResult]) -> tuple[Column, ...]:
    """The measured columns; scores share the direction of the main score, of costs only time has one."""
    protocol = results[0].protocol
    decimals = 2 if protocol.main_score == "perplexity" else 3
    measured = [name for name in _OPTIONAL_SCORES if any(_figure(result, name) is not None for result in results)]
    return (
        *(
            Column(name=name, header=name, decimals=decimals, higher_is_better=protocol.higher_is_better)
            for name in (*_SCORES, *measured)
        ),
        Column(name="n_edits", header="#E", decimals=1, higher_is_better=None),
        Column(name="n_keys", header="keys", decimals=1, higher_is_better=None),
        Column(name="seconds_per_edit", header="s/edit", decimals=3, higher_is_better=False),
    )


def _build_row(results: Sequence[RunResult], columns: Sequence[Column], settings: str) -> Row:
    first = results[0]
    cells = {}
    for column in columns:
        figures = [figure for result in results if (figure := _figure(result, column.name)) is not None]
        if figures:
            deviation = stdev(figures) if len(figures) > 1 else None
            cells[column.name] = Cell(mean=fmean(figures), std=deviation, n=len(figures))
    return Row(
        model=first.model.name,
        editor=first.editor.name,
        settings=settings,
        tuning_budget=first.protocol.tuning_budget,
        seeds=tuple(sorted(result.seed for result in results)),
        cells=cells,
        is_floor=all(_left_alone(result) for result in results),
        results=tuple(sorted(results, key=lambda result: result.seed)),
    )


def _figure(result: RunResult, name: str) -> float | None:
    value = result.cost.seconds_per_edit_p50 if name == "seconds_per_edit" else result.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _left_alone(result: RunResult) -> bool:
    moved = [
        result.metrics.get(name) != value
        for name, value in result.before.items()
        if name in (*_SCORES, *_OPTIONAL_SCORES) and value is not None and math.isfinite(value)
    ]
    return result.cost.extra_parameters == 0 and bool(moved) and not any(moved)


def _differing_settings(result: RunResult, groups: Sequence[Sequence[RunResult]]) -> str:
    """The settings in which a run differs from others of the same editor on the same model."""
    others = [
        _settings(group[0])
        for group in groups
        if (group[0].model.name, group[0].editor.name) == (result.model.name, result.editor.name)
    ]
    own = _settings(result)
    names = dict.fromkeys(name for settings in others for name in settings)
    differing = [
        name for name in names if any(name not in settings or settings[name] != own.get(name) for settings in others)
    ]
    return ", ".join(f"{name}={_setting_text(own, name)}" for name in differing)


def _setting_text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return MISSING
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _value_text(value: Any) -> str:
    return _shown(json.dumps(value, ensure_ascii=False))


def _shown(text: str) -> str:
    r"""Returns the text with characters that steer a terminal or a line written as escapes.

    >>> _shown("a\x1b[1m")
    'a\\x1b[1m'
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"} else c
        for c in text
    )


def cell_text(row: Row, column: Column) -> str:
    """Returns a row's figure as people read it: mean ± deviation, the number of runs where not all have it."""
    cell = row.cells.get(column.name)
    if cell is None:
        return MISSING
    text = _number(cell.mean, column)
    if cell.std is not None:
        text += f" ± {_number(cell.std, column)}"
    return text if cell.n == len(row.seeds) else f"{text} (n={cell.n})"


def _number(value: float, column: Column) -> str:
    text = f"{value:.{column.decimals}f}"
    return text.removesuffix(".0") if column.decimals == 1 else text


def _caption(table: Table) -> str:
    direction = "higher" if table.protocol.higher_is_better else "lower"
    models = ", ".join(table.models)
    return _shown(
        f"{table.stream} · {models} · {table.protocol.main_score}, {direction} is better · ranked by {table.ranked_by}"
    )


def _n_names(table: Table) -> int:
    """How many columns name the row: the model has one where there are several."""
    return 2 if len(table.models) > 1 else 1


def _headers(table: Table) -> list[str]:
    names = ["Model", "Editor"][-_n_names(table) :]
    return [*names, *(column.header for column in table.columns), "tuning", "runs"]


def _body(table: Table) -> list[list[tuple[str, bool]]]:
    """The rows as texts, each with whether it is marked."""
    best = {column.name: table.best(column) for column in table.columns}
    lines = []
    for index, row in enumerate(table.rows):
        names = [row.model, row.name][-_n_names(table) :]
        budget = MISSING if row.tuning_budget is None else _shown(row.tuning_budget)
        lines.append(
            [
                *((_shown(name), False) for name in names),
                *((cell_text(row, column), index in best[column.name]) for column in table.columns),
                (budget, False),
                (str(len(row.seeds)), False),
            ]
        )
    return lines


def _render_rich(leaderboard: Leaderboard) -> RenderableType:
    return Group(*(_Fitted(table) for table in leaderboard.tables))


@dataclass(frozen=True)
class _Fitted:
    """A table in one grid where the console is wide enough, else in one of scores and one of costs."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        n_names = _n_names(self.table)
        n_columns = len(_headers(self.table))
        n_scores = sum(column.name in (*_SCORES, *_OPTIONAL_SCORES) for column in self.table.columns)
        names, scores, costs = range(n_names), range(n_names, n_names + n_scores), range(n_names + n_scores, n_columns)
        whole = _grid(self.table, [*names, *scores, *costs], deviation=" ±")
        unbounded = options.update(max_width=_UNBOUNDED_WIDTH)
        if Measurement.get(console, unbounded, whole).maximum <= options.max_width:
            yield whole
        else:
            yield _grid(self.table, [*names, *scores], deviation="\n±")
            yield _grid(self.table, [*names, *costs], deviation="\n±")


_UNBOUNDED_WIDTH = 10_000


def _grid(table: Table, chosen: Sequence[int], *, deviation: str) -> RichTable:
    headers, n_names = _headers(table), _n_names(table)
    grid = RichTable(
        title=Text(_caption(table)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for index in chosen:
        # Only names give way; a figure is never cut.
        is_name = index < n_names
        grid.add_column(
            Text(headers[index]), justify="left" if is_name else "right", overflow="fold", no_wrap=not is_name
        )
    for line in _body(table):
        cells = []
        for index in chosen:
            text, is_best = line[index]
            shown = text if index < n_names else text.replace(" ± ", deviation)
            cells.append(Text(shown, style="bold" if is_best else ""))
        grid.add_row(*cells)
    return grid


def _render_markdown(leaderboard: Leaderboard) -> str:
    blocks = []
    for table in leaderboard.tables:
        n_names = _n_names(table)
        headers = _headers(table)
        lines = [
            _markdown_row(_markdown_text(header) for header in headers),
            _markdown_row(":---" if index < n_names else "---:" for index in range(len(headers))),
        ]
        for line in _body(table):
            texts = ((_markdown_text(text), marked) for text, marked in line)
            lines.append(_markdown_row(f"**{text}**" if marked else text for text, marked in texts))
        blocks.append(f"{_markdown_text(_caption(table))}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(blocks)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]|~#$"} | {"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def _markdown_text(text: str) -> str:
    return text.translate(_MARKDOWN)


def _render_latex(leaderboard: Leaderboard) -> str:
    blocks = []
    for table in leaderboard.tables:
        n_names = _n_names(table)
        headers = _headers(table)
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_latex_text(_caption(table))}}}",
            rf"\begin{{tabular}}{{{'l' * n_names}{'r' * (len(headers) - n_names)}}}",
            r"\hline",
            " & ".join(_latex_text(header) for header in headers) + r" \\",
            r"\hline",
        ]
        for line in _body(table):
            texts = ((_latex_text(text), marked) for text, marked in line)
            lines.append(" & ".join(rf"\textbf{{{text}}}" if marked else text for text, marked in texts) + r" \\")
        lines += [r"\hline", r"\end{tabular}", r"\end{table}"]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


_LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': r"\textquotedbl{}",
        "±": r"$\pm$",
        "·": r"\textperiodcentered{}",
        MISSING: "--",
    }
)


def _latex_text(text: str) -> str:
    return text.translate(_LATEX)


def _records(leaderboard: Leaderboard) -> list[dict[str, Any]]:
    """A flat record a row, the same fields in each."""
    columns = dict.fromkeys(column.name for table in leaderboard.tables for column in table.columns)
    # Some tables have columns of their own; scores stay together, before the costs.
    ordered = [name for name in (*_SCORES, *_OPTIONAL_SCORES) if name in columns]
    ordered += [name for name in columns if name not in ordered]
    records = []
    for table in leaderboard.tables:
        for rank, row in enumerate(table.rows, start=1):
            record: dict[str, Any] = {
                "stream": table.stream,
                "task": table.task,
                "main_score": table.protocol.main_score,
                "higher_is_better": table.protocol.higher_is_better,
                "ranked_by": table.ranked_by,
                "rank": rank,
                "model": row.model,
                "editor": row.editor,
                "settings": row.settings,
                "tuning_budget": row.tuning_budget,
                "seeds": list(row.seeds),
                "n_runs": len(row.seeds),
            }
            for name in ordered:
                cell = row.cells.get(name)
                record[f"{name}_mean"] = cell.mean if cell else None
                record[f"{name}_std"] = cell.std if cell else None
                record[f"{name}_n"] = cell.n if cell else 0
            records.append(record)
    return records


def _render_csv(leaderboard: Leaderboard) -> str:
    records = _records(leaderboard)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    for record in records:
        record["seeds"] = " ".join(str(seed) for seed in record["seeds"])
        writer.writerow({name: _shown(v) if isinstance(v, str) else v for name, v in record.items()})
    return buffer.getvalue()


def _render_json(leaderboard: Leaderboard) -> str:
    return json.dumps(_records(leaderboard), indent=2) + "\n"
