"""Leaderboards: finished runs side by side, one row per editor, with means and deviations over seeds.

Runs that were measured differently are never ranked together: runs that differ in the stream's content, in the protocol
(except for the tuning budget, which is a column) or in the weights under one model name get separate tables, which name
the difference. Rows that do not differ significantly from the first row of their table are marked.
"""

import json
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, get_args

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from grace_bench.analysis.reference import find_runs
from grace_bench.analysis.significance import SIGNIFICANCE_LEVEL, Comparison, compare, holm
from grace_bench.common.terminal import table_console
from grace_bench.common.text import Line, csv_text, latex_cells, latex_text, markdown_table, markdown_text, visible
from grace_bench.errors import UserError, did_you_mean
from grace_bench.results.comparability import differences, group_comparable, value_text
from grace_bench.results.metric_info import MetricInfo, Metrics, metric_infos
from grace_bench.results.reading import flattened, read_settings
from grace_bench.results.rescored import all_rescored
from grace_bench.results.schema import Protocol, RunResult

Format = Literal["table", "markdown", "csv", "json", "latex"]

MISSING = "–"
TIED = "≈"
UNCOMPARED = "?"
REFERENCE = "reference"
"""Follows the name of a row of runs that ship with grace-bench."""

# Fields in which two runs of one setting of an editor may differ.
_NO_SETTINGS = ("seed", "editor.seed", "out", "existing")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A measured column.

    Attributes:
        name: The metric, as results name it.
        header: The header.
        decimals: Digits after the point in formats for people.
        higher_is_better: Which end is best; None if neither is.
        metric: The metric's description; None for a count or a time of the run itself.
        streams: The evaluation streams whose items the metric averages; none if it is no mean of items.
        score: The score of the panel that the runs are read by; None for their main score.
    """

    name: str
    header: str
    decimals: int
    higher_is_better: bool | None
    metric: MetricInfo | None = None
    streams: tuple[str, ...] = ()
    score: str | None = None

    @property
    def is_score(self) -> bool:
        """Whether the column is a score rather than a cost."""
        return self.metric is not None and not self.metric.is_cost


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A value over the runs that have it.

    Attributes:
        mean: Mean over the runs.
        std: Sample standard deviation (n - 1); None for a single run.
        n: Number of runs that have the value.
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
        tuning_budget: The budget with which its hyperparameters were chosen.
        seeds: The runs' seeds in ascending order.
        cells: Values by column name, without the columns that no run has a value for.
        is_floor: Whether the runs did not change the model: nothing was added to it and no score changed.
        is_reference: Whether the runs ship with grace-bench.
        results: The runs, by seed.
        folders: The run folders, in the order of `seeds`; empty if unknown.
        comparison: This row against the first of its table, in the score that ranks the table; None for the first row,
            and if the two cannot be compared.
        p_holm: The comparison's p-value, corrected for the rows of the table (Holm 1979).
        not_compared: Why there is no comparison; None if there is one, and for the first row.
    """

    model: str
    editor: str
    settings: str
    tuning_budget: str | None
    seeds: tuple[int, ...]
    cells: Mapping[str, Cell]
    is_floor: bool
    is_reference: bool = False
    results: tuple[RunResult, ...]
    folders: tuple[Path, ...] = ()
    comparison: Comparison | None = None
    p_holm: float | None = None
    not_compared: str | None = None

    @property
    def name(self) -> str:
        """The editor, with what distinguishes it from other rows."""
        qualities = [text for text in (self.settings, REFERENCE if self.is_reference else "") if text]
        return f"{self.editor} ({', '.join(qualities)})" if qualities else self.editor

    @property
    def n_failed(self) -> int:
        """How many edits failed, over all runs."""
        return sum(int(result.metrics.get("n_failed") or 0) for result in self.results)

    @property
    def n_edits(self) -> int:
        """How many edits were attempted, over all runs."""
        return sum(int(result.metrics.get("n_edits") or 0) for result in self.results)

    @property
    def mark(self) -> str:
        """The mark of the ranking score: `≈` if not significantly off the first row's, `?` if that is unknown."""
        if self.not_compared is not None:
            return UNCOMPARED
        return TIED if self.p_holm is not None and self.p_holm >= SIGNIFICANCE_LEVEL else ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows that may be compared.

    Attributes:
        stream: The stream's name.
        task: The stream's task.
        models: The names of the models in the table.
        protocol: The protocol that all runs share, except for the tuning budget.
        ranked_by: The column that orders the rows: the first of `Metrics.ranking` that a run has a value of.
        columns: The measured columns.
        rows: Best first; rows without the ranking figure come last.
        missing: Editors that have runs in other tables and none in this one.
        conditions: The fields in which this table was measured differently from other tables on the stream, with its
            values.
        left_out: Runs that are in no row, each with the reason.
    """

    stream: str
    task: str
    models: tuple[str, ...]
    protocol: Protocol
    ranked_by: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    missing: tuple[str, ...] = ()
    conditions: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    @property
    def distinction(self) -> str:
        """The `conditions` as text; empty if every run on the stream was measured in the same way."""
        return ", ".join(f"{name}={value}" for name, value in self.conditions.items())

    def column(self, name: str) -> Column:
        """Returns the column of that name."""
        return next(column for column in self.columns if column.name == name)

    def best(self, column: Column) -> frozenset[int]:
        """Returns the indices of the rows to mark as best in a column.

        Values that print as the same text are marked together. Nothing is marked if only one editor has a value. The
        floor does not compete: an unedited model inevitably retains the most and takes the least time.
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

    A table contains runs that were measured in the same way (`comparability.conditions`). A row contains the runs of
    one editor that differ only in the seed: model, layer, dtype, settings and tuning budget are the same. An editor's
    own `seed` is not a setting. Reference runs have rows of their own. A run given twice counts once. Two different
    results for one setting and seed become two rows if their configurations differ, named by the differing options;
    otherwise the first is shown and the other is named below the table.

    Args:
        results: Finished runs, at least one.
        folders: The run folder of each result in the same order, None if unknown. Rows without folders are not
            compared.
        reference: For each result in the same order, whether it ships with grace-bench; by default none does.
        by_stream: Whether the models of a stream share one table; otherwise each model has its own, so that editors are
            compared on equal terms. Streams never share a table, because their scores have no common scale.
        score: The score of the panel by which the results were read (`rescored`); None for their main scores.
        left_out: Lines about runs that are not among the results, for the notes of the first table.

    Attributes:
        tables: In alphabetical order of stream and model; of several on one stream and model, the largest first.
        metrics: The descriptions of all registered metrics.

    Raises:
        UserError: If there are no runs.
    """

    def __init__(
        self,
        results: Sequence[RunResult],
        *,
        folders: Sequence[Path | None] = (),
        reference: Sequence[bool] = (),
        by_stream: bool = False,
        score: str | None = None,
        left_out: Sequence[str] = (),
    ) -> None:
        if not results:
            raise UserError("a leaderboard needs at least one finished run")
        self.metrics: Metrics = metric_infos()
        editors = sorted({result.editor.name for result in results})
        known_folders = folders or [None] * len(results)
        shipped = reference or [False] * len(results)
        runs = [_Run(*run) for run in zip(results, known_folders, shipped, strict=True)]
        tables: list[Table] = []
        for stream in sorted({result.stream.name for result in results}):
            on_stream = [run for run in runs if run.result.stream.name == stream]
            groups = list(_groups(on_stream, by_stream=by_stream))
            conditions = differences([[run.result for run in group] for group in groups])
            for group, own in zip(groups, conditions, strict=True):
                kept, not_shown = _kept_apart(group)
                table = _build_table(kept, editors, self.metrics, score)
                tables.append(replace(table, conditions=own, left_out=not_shown))
        tables[0] = replace(tables[0], left_out=(*tables[0].left_out, *left_out))
        self.tables: tuple[Table, ...] = tuple(tables)

    @classmethod
    def read(
        cls, paths: Iterable[Path], *, reference: bool = False, by_stream: bool = False, score: str | None = None
    ) -> "Leaderboard":
        """Makes a leaderboard of the runs in some folders.

        Args:
            paths: As in `find_result_files`.
            reference: As in `find_runs`.
            by_stream: As in the constructor.
            score: A score of the panel by which the runs are read instead of their main scores. Runs that did not
                record it are left out, and named.

        Raises:
            UserError: If a path contains no result, a result is broken, there are no reference runs, there is no such
                score, or no run recorded it.
        """
        found = [(run.result, run) for run in find_runs(paths, reference=reference)]
        runs, left_out = all_rescored(found, score)
        return cls(
            [result for result, _ in runs],
            folders=[run.folder for _, run in runs],
            reference=[run.is_reference for _, run in runs],
            by_stream=by_stream,
            score=score,
            left_out=left_out,
        )


def print_leaderboard(leaderboard: Leaderboard, fmt: Format = "table") -> None:
    """Prints a leaderboard on standard output."""
    shown = render(leaderboard, fmt)
    if isinstance(shown, str):
        print(shown, end="")
    else:
        table_console().print(shown)


def render(leaderboard: Leaderboard, fmt: Format = "table") -> str | RenderableType:
    """Renders a leaderboard.

    `table`, `markdown` and `latex` are for people: means with the deviation over seeds, the number of runs if not all
    of them have the figure, the best in bold, a dash for missing values. `csv` and `json` are for programs: a record
    per row, with mean, deviation and number of runs in separate columns at full precision, and an empty cell or `null`
    for missing values. Control characters in names are shown as escapes in every format.

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


@dataclass(frozen=True)
class _Run:
    """A result with its folder, and the options that distinguish it from runs with the same settings."""

    result: RunResult
    folder: Path | None
    is_reference: bool = False
    apart_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that distinguish runs of one editor on one model, by dotted name."""
        editor = self.result.editor.model_dump(mode="json", exclude={"name", "seed"})
        return {
            **flattened(editor),
            "layer": self.result.model.layer,
            "tuning_budget": self.result.protocol.tuning_budget,
            **self.apart_by,
        }

    @property
    def configuration(self) -> tuple[Any, ...]:
        """A key that is equal for the runs of one row."""
        # Not as JSON: 1 and 1.0 are the same setting.
        settings = frozenset(
            (name, value if isinstance(value, Hashable) else json.dumps(value, sort_keys=True))
            for name, value in self.settings.items()
        )
        return (self.result.model.name, self.result.editor.name, settings, self.is_reference)


def _groups(runs: Sequence[_Run], *, by_stream: bool) -> Iterator[list[_Run]]:
    """Yields the runs of each table of one stream."""
    run_of = {id(run.result): run for run in runs}
    by_model: dict[str, list[RunResult]] = {}
    for run in runs:
        by_model.setdefault("" if by_stream else run.result.model.name, []).append(run.result)
    for model in sorted(by_model):
        for group in group_comparable(by_model[model]):
            yield [run_of[id(result)] for result in group]


def _kept_apart(runs: Sequence[_Run]) -> tuple[list[_Run], tuple[str, ...]]:
    """Returns at most one run for each setting and seed, and why the others are left out.

    If two runs of one setting share a seed, its runs are split by the options in which the two differ.
    """
    distinct: list[_Run] = []
    for place in _by_place(runs).values():
        distinct += place
    crowded = {configuration for (configuration, _), place in _by_place(distinct).items() if len(place) > 1}
    apart: list[_Run] = []
    for configuration in dict.fromkeys(run.configuration for run in distinct):
        row = [run for run in distinct if run.configuration == configuration]
        apart += _told_apart(row) if configuration in crowded else row
    kept, left_out = [], []
    for place in _by_place(apart).values():
        kept.append(place[0])
        left_out += [_reason_left_out(place[0], other) for other in place[1:]]
    return kept, tuple(left_out)


def _by_place(runs: Sequence[_Run]) -> dict[tuple[Any, int], list[_Run]]:
    """Returns the distinct runs by configuration and seed; of equal runs the first that has a folder."""
    places: dict[tuple[Any, int], list[_Run]] = {}
    for run in runs:
        place = places.setdefault((run.configuration, run.result.seed), [])
        index = next((i for i, earlier in enumerate(place) if not _first_difference(earlier, run)), None)
        if index is None:
            place.append(run)
        elif place[index].folder is None:
            place[index] = run
    return places


def _told_apart(row: Sequence[_Run]) -> list[_Run]:
    """Returns the runs of one setting with the options that differ between two runs of one seed."""
    options = [{} if run.folder is None else read_settings(run.folder) for run in row]
    names = {
        name: None
        for i, one in enumerate(options)
        for j, two in enumerate(options[:i])
        if one and two and row[i].result.seed == row[j].result.seed
        for name in {**two, **one}
        if name not in _NO_SETTINGS and not name.startswith("wandb.") and one.get(name) != two.get(name)
    }
    return [
        replace(run, apart_by={name: found[name] for name in names if name in found})
        for run, found in zip(row, options, strict=True)
    ]


def _first_difference(one: _Run, two: _Run) -> str | None:
    """Returns the first field in which two results differ, a metric if there is one; None if they are equal."""
    first, second = (flattened(run.result.model_dump(mode="json")) for run in (one, two))
    differing = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    return next((name for name in differing if name.startswith("metrics.")), next(iter(differing), None))


def _reason_left_out(shown: _Run, other: _Run) -> str:
    name = _first_difference(shown, other) or ""
    values = [value_text(flattened(run.result.model_dump(mode="json")).get(name)) for run in (shown, other)]
    where = "" if other.folder is None else f" in {other.folder}"
    return (
        f"run {other.result.run_id}{where}: has the settings and the seed ({other.result.seed}) of "
        f"{shown.result.run_id}, but {name} is {values[1]} instead of {values[0]}"
    )


def _build_table(runs: Sequence[_Run], editors: Sequence[str], metrics: Metrics, score: str | None) -> Table:
    first = runs[0].result
    columns = _columns([run.result for run in runs], metrics, score)
    by_configuration: dict[tuple[Any, ...], list[_Run]] = {}
    for run in runs:
        by_configuration.setdefault(run.configuration, []).append(run)
    groups = list(by_configuration.values())
    rows = [_build_row(group, columns, _differing_settings(group[0], groups)) for group in groups]
    ranking = [info.name for info in metrics.ranking]
    # Some scores exist on one stream alone.
    others = [column.name for column in columns if column.streams]
    ranked_by = next((name for name in (*ranking, *others) if any(name in row.cells for row in rows)), ranking[-1])
    sign = -1 if first.protocol.higher_is_better else 1

    def rank(row: Row) -> tuple[Any, ...]:
        figure = row.cells.get(ranked_by)
        names = (row.model, row.editor, row.settings, row.is_reference)
        return (figure is None, sign * figure.mean if figure else 0.0, *names)

    ranking_column = next(column for column in columns if column.name == ranked_by)
    return Table(
        stream=first.stream.name,
        task=first.stream.task,
        models=tuple(sorted({run.result.model.name for run in runs})),
        protocol=first.protocol,
        ranked_by=ranked_by,
        columns=columns,
        rows=_compared_with_first(sorted(rows, key=rank), ranking_column),
        missing=tuple(editor for editor in editors if editor not in {row.editor for row in rows}),
    )


def _compared_with_first(rows: Sequence[Row], ranked_by: Column) -> tuple[Row, ...]:
    """Compares each ranked row with the first."""
    first, *others = rows
    compared = [first]
    for row in others:
        if ranked_by.name in row.cells:
            try:
                row = replace(row, comparison=compare_rows(row, first, ranked_by))
            except UserError as error:
                row = replace(row, not_compared=str(error))
        compared.append(row)
    indices = [index for index, row in enumerate(compared) if row.comparison is not None]
    corrected = holm([row.comparison.p_value for row in compared if row.comparison is not None])
    for index, p_value in zip(indices, corrected, strict=True):
        compared[index] = replace(compared[index], p_holm=p_value)
    return tuple(compared)


def compare_rows(first: Row, second: Row, column: Column) -> Comparison:
    """Compares two rows of a table in one score, which is a mean over items.

    Raises:
        UserError: If they cannot be compared, with the reason.
    """
    for row in (first, second):
        if not row.folders:
            raise UserError("the run folders are not known")
    names = (first.name, second.name)
    return compare(
        first.folders, second.folders, names=names, streams=column.streams, metric=column.name, score=column.score
    )


def _columns(results: Sequence[RunResult], metrics: Metrics, score: str | None) -> tuple[Column, ...]:
    """Returns the measured columns: scores, the number of edits, costs."""
    protocol = results[0].protocol
    measured = [
        Column(
            name=info.name + part,
            header=info.header + part,
            decimals=info.digits(protocol),
            higher_is_better=info.direction(protocol),
            metric=info,
            streams=() if part else metrics.streams_of(info),
            score=score,
        )
        for info in metrics.shown("table")
        for part in ("", *(f"/{stream}" for stream in info.part_columns))
        if (info.always_has_column and not part)
        or any(_figure(result, info.name + part) is not None for result in results)
    ]
    failed = Column(name="n_failed", header="failed", decimals=1, higher_is_better=None)
    return (
        *(column for column in measured if column.is_score),
        Column(name="n_edits", header="#E", decimals=1, higher_is_better=None),
        *([failed] if any(_figure(result, "n_failed") for result in results) else []),
        *(column for column in measured if not column.is_score),
        Column(name="seconds_per_edit", header="s/edit", decimals=3, higher_is_better=False),
    )


def _build_row(runs: Sequence[_Run], columns: Sequence[Column], settings: str) -> Row:
    runs = sorted(runs, key=lambda run: run.result.seed)
    results = tuple(run.result for run in runs)
    first = results[0]
    cells = {}
    for column in columns:
        figures = [figure for result in results if (figure := _figure(result, column.name)) is not None]
        if figures:
            deviation = stdev(figures) if len(figures) > 1 else None
            cells[column.name] = Cell(mean=fmean(figures), std=deviation, n=len(figures))
    main_scores = [column.name for column in columns if column.metric is not None and column.metric.is_main_score]
    return Row(
        model=first.model.name,
        editor=first.editor.name,
        settings=settings,
        tuning_budget=first.protocol.tuning_budget,
        seeds=tuple(result.seed for result in results),
        cells=cells,
        is_floor=all(_left_alone(result, main_scores) for result in results),
        is_reference=runs[0].is_reference,
        folders=tuple(run.folder for run in runs if run.folder is not None),
        results=results,
    )


def _figure(result: RunResult, name: str) -> float | None:
    value = result.cost.seconds_per_edit_p50 if name == "seconds_per_edit" else result.metrics.get(name)
    return value if value is not None and math.isfinite(value) else None


def _left_alone(result: RunResult, main_scores: Sequence[str]) -> bool:
    """Whether nothing was added to the model and no score on its scale moved."""
    moved = [
        result.metrics.get(name) != value
        for name, value in result.before.items()
        if name in main_scores and value is not None and math.isfinite(value)
    ]
    return result.cost.extra_parameters == 0 and bool(moved) and not any(moved)


def _differing_settings(run: _Run, groups: Sequence[Sequence[_Run]]) -> str:
    """Returns the settings in which a run differs from other runs of the same editor on the same model."""
    name_of = (run.result.model.name, run.result.editor.name)
    others = [
        group[0].settings for group in groups if (group[0].result.model.name, group[0].result.editor.name) == name_of
    ]
    own = run.settings
    names = dict.fromkeys(name for settings in others for name in settings)
    differing = [
        name for name in names if any(name not in settings or settings[name] != own.get(name) for settings in others)
    ]
    # The budget has its own column: it is part of the name only if nothing else distinguishes two rows.
    without_budget = [name for name in differing if name != "tuning_budget"]
    if sum(all(_setting_text(s, name) == _setting_text(own, name) for name in without_budget) for s in others) == 1:
        differing = without_budget
    return ", ".join(f"{name}={_setting_text(own, name)}" for name in differing)


def _setting_text(settings: Mapping[str, Any], name: str) -> str:
    if name not in settings:
        return MISSING
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cell_text(row: Row, column: Column) -> str:
    """Returns a row's value for people: mean ± deviation, and the number of runs if not all have it."""
    cell = row.cells.get(column.name)
    if cell is None:
        return MISSING
    text = _number(cell.mean, column)
    if cell.std is not None:
        text += f" ± {_number(cell.std, column)}"
    if cell.n != len(row.seeds):
        text += f" (n={cell.n})"
    return text


def marked_text(table: Table, row: Row, column: Column) -> str:
    """Returns a cell's text; in the ranking column the row's mark comes first, so that values stay aligned."""
    text = cell_text(row, column)
    return f"{row.mark} {text}" if row.mark and column.name == table.ranked_by else text


def _number(value: float, column: Column) -> str:
    text = f"{value:.{column.decimals}f}"
    return text.removesuffix(".0") if column.decimals == 1 else text


def _caption(table: Table) -> str:
    direction = "higher" if table.protocol.higher_is_better else "lower"
    parts = (
        table.stream,
        ", ".join(table.models),
        *([table.distinction] if table.distinction else []),
        f"{table.protocol.main_score}, {direction} is better",
        *([f"locality by {table.protocol.locality_score}"] if table.protocol.locality_score else []),
        f"ranked by {table.ranked_by}",
    )
    return visible(" · ".join(parts))


def _n_names(table: Table) -> int:
    """Returns the number of columns that name the row: with several models, the model has a column too."""
    return 2 if len(table.models) > 1 else 1


def _headers(table: Table) -> list[str]:
    names = ["Model", "Editor"][-_n_names(table) :]
    return [*names, *(column.header for column in table.columns), "tuning", "runs"]


def table_notes(table: Table) -> list[str]:
    """Returns the notes of a table: its marks, comparisons that could not be made, failures and missing editors."""
    notes = []
    if any(row.mark == TIED for row in table.rows):
        notes.append(
            f"{TIED} {table.ranked_by} not significantly off the first row's (paired bootstrap over requests, "
            f"p ≥ {SIGNIFICANCE_LEVEL} after Holm's correction for the table's rows)"
        )
    if any(row.is_reference for row in table.rows):
        notes.append(f"({REFERENCE}): runs that ship with grace-bench")
    reasons = dict.fromkeys(row.not_compared for row in table.rows if row.not_compared is not None)
    notes += [f"{UNCOMPARED} not compared with the first row: {reason}" for reason in reasons]
    failed = [f"{row.name} {row.n_failed} of {row.n_edits}" for row in table.rows if row.n_failed]
    if failed:
        infos = Metrics(column.metric for column in table.columns if column.metric is not None)
        scores = f"{infos.right_after_edit.header} and {infos.mean_over('edited').header}"
        notes.append(f"failed: edits that were taken back, and count in #E, {scores} all the same: {', '.join(failed)}")
    if table.missing:
        notes.append(f"{MISSING} no run here: {', '.join(table.missing)}")
    if table.conditions:
        notes.append(f"runs that differ in {', '.join(table.conditions)} stand in tables of their own")
    notes += [f"left out: {reason}" for reason in table.left_out]
    return [visible(note) for note in notes]


def _body(table: Table) -> list[Line]:
    """Returns the cells of the rows as text, each with whether it is marked as best."""
    best = {column.name: table.best(column) for column in table.columns}
    lines: list[Line] = []
    for index, row in enumerate(table.rows):
        names = [row.model, row.name][-_n_names(table) :]
        budget = MISSING if row.tuning_budget is None else visible(row.tuning_budget)
        lines.append(
            [
                *((visible(name), False) for name in names),
                *((marked_text(table, row, column), index in best[column.name]) for column in table.columns),
                (budget, False),
                (str(len(row.seeds)), False),
            ]
        )
    return lines


def _render_rich(leaderboard: Leaderboard) -> RenderableType:
    return Group(*(_Fitted(table) for table in leaderboard.tables))


@dataclass(frozen=True)
class _Fitted:
    """A table in one grid if the console is wide enough, otherwise in a grid of scores and a grid of costs."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        n_names = _n_names(self.table)
        n_columns = len(_headers(self.table))
        n_scores = sum(column.is_score for column in self.table.columns)
        names, scores, costs = range(n_names), range(n_names, n_names + n_scores), range(n_names + n_scores, n_columns)
        whole = _grid(self.table, [*names, *scores, *costs], deviation=" ±")
        unbounded = options.update(max_width=_UNBOUNDED_WIDTH)
        if Measurement.get(console, unbounded, whole).maximum <= options.max_width:
            yield whole
        else:
            yield _grid(self.table, [*names, *scores], deviation="\n±")
            yield _grid(self.table, [*names, *costs], deviation="\n±")
        if notes := table_notes(self.table):
            yield Text("\n".join([*notes, ""]))


_UNBOUNDED_WIDTH = 10_000


def _grid(table: Table, chosen: Sequence[int], *, deviation: str) -> RichTable:
    headers, n_names = _headers(table), _n_names(table)
    grid = RichTable(
        title=Text(_caption(table)), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for index in chosen:
        # Only names are shortened; a figure is never cut.
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
        shown = markdown_table(_headers(table), _body(table), n_names=_n_names(table))
        notes = "".join(f"\n{markdown_text(note)}\n" for note in table_notes(table))
        blocks.append(f"{markdown_text(_caption(table))}\n\n{shown}{notes}")
    return "\n".join(blocks)


def _render_latex(leaderboard: Leaderboard) -> str:
    """Renders the layout of table 1 of Hartvigsen et al. 2023: a row per method, a group of columns per table."""
    tables = leaderboard.tables
    several_models = any(len(table.models) > 1 for table in tables)
    methods = list(dict.fromkeys(_method(row, several_models) for table in tables for row in table.rows))
    groups = [_paper_columns(table) for table in tables]
    titles, rules, start = [], [], 2
    for table, columns in zip(tables, groups, strict=True):
        titles.append(rf"\multicolumn{{{len(columns)}}}{{c}}{{{latex_text(_group_title(table))}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + len(columns) - 1}}}")
        start += len(columns)
    headers = ["Method", *(_paper_header(column) for columns in groups for column in columns)]
    lines = [
        "% \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (start - 2)}}}",
        r"\toprule",
        " & " + " & ".join(titles) + r" \\",
        " ".join(rules),
        latex_cells([(header, False) for header in headers]),
        r"\midrule",
    ]
    cells_of = [_paper_cells(table, columns, several_models) for table, columns in zip(tables, groups, strict=True)]
    for method in methods:
        cells = [
            cell
            for of_method, columns in zip(cells_of, groups, strict=True)
            for cell in of_method.get(method, [(MISSING, False)] * len(columns))
        ]
        lines.append(latex_cells([(visible(method), False), *cells]))
    notes = [note for table in tables for note in _paper_notes(table, several_models)]
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{latex_text(' '.join(dict.fromkeys(notes)))}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _method(row: Row, several_models: bool) -> str:
    return f"{row.model} {row.name}" if several_models else row.name


def _group_title(table: Table) -> str:
    direction = "↑" if table.protocol.higher_is_better else "↓"
    names = ", ".join([*table.models, *([table.distinction] if table.distinction else [])])
    return visible(f"{table.stream} ({names}; {table.protocol.main_score} {direction})")


def _paper_columns(table: Table) -> list[Column]:
    """Returns the columns that LaTeX shows, and the number of edits; of our own metrics, those of the paper."""
    measured = {name for row in table.rows for name in row.cells}

    def is_shown(column: Column) -> bool:
        info = column.metric
        if info is None:
            return column.name == "n_edits"
        if info.averages and info.name not in measured:
            return False
        return info.shown("latex") and info.latex_instead_of not in measured

    return [column for column in table.columns if is_shown(column)]


def _paper_header(column: Column) -> str:
    return (column.metric and column.metric.latex_column) or column.header


def _paper_cells(table: Table, columns: Sequence[Column], several_models: bool) -> dict[str, Line]:
    best = {column.name: table.best(column) for column in columns}
    return {
        _method(row, several_models): [
            (marked_text(table, row, column), index in best[column.name]) for column in columns
        ]
        for index, row in enumerate(table.rows)
    }


def _paper_notes(table: Table, several_models: bool) -> list[str]:
    seeds: dict[int, list[str]] = {}
    budgets: dict[str, list[str]] = {}
    for row in table.rows:
        method = _method(row, several_models)
        seeds.setdefault(len(row.seeds), []).append(method)
        budgets.setdefault(MISSING if row.tuning_budget is None else row.tuning_budget, []).append(method)
    return [
        visible(f"{text}.")
        for text in (
            "Mean ± standard deviation over seeds, bold the best of a column",
            f"{_paper_name(table)}: n = {_shared_by(seeds)}; tuning {_shared_by(budgets)}",
            *table_notes(replace(table, missing=())),
        )
    ]


def _paper_name(table: Table) -> str:
    return f"{table.stream} ({table.distinction})" if table.distinction else table.stream


def _shared_by(groups: Mapping[Any, Sequence[str]]) -> str:
    """Returns `3`, or `3 (grace, ft), 1 (none)` if rows differ."""
    if len(groups) == 1:
        return str(next(iter(groups)))
    return ", ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())


def _records(leaderboard: Leaderboard) -> list[dict[str, Any]]:
    """Returns a flat record for each row, with the same fields in each."""
    columns = dict.fromkeys(column.name for table in leaderboard.tables for column in table.columns)
    # Some tables have columns that others lack; scores stay together, before the costs.
    shown = [info for info in leaderboard.metrics.shown("table") if not info.is_cost]
    names = [name for i in shown for name in (i.name, *(f"{i.name}/{stream}" for stream in i.part_columns))]
    ordered = [name for name in names if name in columns]
    ordered += [name for name in columns if name not in ordered]
    is_split = any(table.conditions for table in leaderboard.tables)
    is_mixed = any(row.is_reference for table in leaderboard.tables for row in table.rows)
    records = []
    for table in leaderboard.tables:
        for rank, row in enumerate((*table.rows, *(_missing_row(table, editor) for editor in table.missing)), start=1):
            record: dict[str, Any] = {
                "stream": table.stream,
                "task": table.task,
                "main_score": table.protocol.main_score,
                "higher_is_better": table.protocol.higher_is_better,
                "ranked_by": table.ranked_by,
                **({"conditions": table.distinction} if is_split else {}),
                "rank": rank if row.seeds else None,
                "model": row.model,
                "editor": row.editor,
                "settings": row.settings,
                **({REFERENCE: row.is_reference} if is_mixed else {}),
                "tuning_budget": row.tuning_budget,
                "seeds": list(row.seeds),
                "n_runs": len(row.seeds),
            }
            for name in ordered:
                cell = row.cells.get(name)
                record[f"{name}_mean"] = cell.mean if cell else None
                record[f"{name}_std"] = cell.std if cell else None
                record[f"{name}_n"] = cell.n if cell else 0
            for name in _COMPARED:
                record[f"vs_first_{name}"] = getattr(row.comparison, name, None)
            record["vs_first_p_holm"] = row.p_holm
            record["vs_first_not_compared"] = row.not_compared
            records.append(record)
    return records


_COMPARED = ("difference", "low", "high", "p_value", "n_items", "n_seeds", "n_unpaired", "n_nan")


def _missing_row(table: Table, editor: str) -> Row:
    """Returns an empty row for an editor without a run in the table."""
    model = table.models[0] if len(table.models) == 1 else MISSING
    return Row(
        model=model, editor=editor, settings="", tuning_budget=None, seeds=(), cells={}, is_floor=False, results=()
    )


def _render_csv(leaderboard: Leaderboard) -> str:
    records = _records(leaderboard)
    return csv_text([{**record, "seeds": " ".join(str(seed) for seed in record["seeds"])} for record in records])


def _render_json(leaderboard: Leaderboard) -> str:
    return json.dumps(_records(leaderboard), indent=2) + "\n"
