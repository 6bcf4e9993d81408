"""Figures of finished runs: curves by editor, and the grouping and drawing that such figures share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_bench.analysis.figures.drawing import (
    add_caption,
    editor_styles,
    file_name,
    legend_in,
    new_figure,
    plain,
    save,
    styled,
)
from grace_bench.analysis.leaderboard import Leaderboard, Table
from grace_bench.common.scores import score_info
from grace_bench.results.curves import Point, mean_curve, series_of
from grace_bench.results.metric_info import MetricInfo, Metrics
from grace_bench.results.reading import RESULT_FILE, find_result_files, read_evaluations, read_result
from grace_bench.results.rescored import all_rescored, rescored_evaluations
from grace_bench.results.schema import Evaluation, Protocol, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# Above this ratio of greatest to least, a perplexity is drawn on a logarithmic axis.
_WIDE = 30


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that were measured in the same way and may share a figure.

    Attributes:
        table: Their leaderboard.
        evaluations: For each row of the table, the evaluations of each of its runs.
        metrics: The descriptions of all registered metrics.
    """

    table: Table
    metrics: Metrics
    evaluations: tuple[tuple[Sequence[Evaluation], ...], ...]


def draw_curves(paths: Sequence[Path], out: Path, *, score: str | None = None) -> list[Path]:
    """Draws the scores over a stream of edits, a figure for each stream and model (Hartvigsen et al. 2023, Figure 3).

    Args:
        paths: Run folders, or folders that contain some.
        out: Receives the figures.
        score: The score of the panel by which the runs are drawn; None for their main scores.

    Returns:
        The files.

    Raises:
        UserError: If there is no finished run, or none with that score.
    """
    return draw_each(read_groups(paths, score=score), out, "curves", curves_figure)


def read_groups(paths: Sequence[Path], *, score: str | None = None) -> list[Group]:
    """Reads runs, grouped as leaderboards group them: by stream and model, one protocol each.

    Args:
        paths: Run folders, or folders that contain some.
        score: As in `Leaderboard`.

    Raises:
        UserError: If there is no finished run, a file of one is broken, or no run has that score.
    """
    found = [(result := read_result(file), (file, result.protocol)) for file in find_result_files(paths)]
    runs, left_out = all_rescored(found, score)
    own = {id(result): of for result, of in runs}

    def evaluations(result: RunResult) -> Sequence[Evaluation]:
        file, protocol = own[id(result)]
        return rescored_evaluations(read_evaluations(file.parent / "metrics.jsonl"), protocol, score)

    board = Leaderboard(
        [result for result, _ in runs],
        folders=[file.parent if file.name == RESULT_FILE else None for _, (file, _) in runs],
        score=score,
        left_out=left_out,
    )
    return [
        Group(
            table=table,
            metrics=board.metrics,
            evaluations=tuple(tuple(map(evaluations, row.results)) for row in table.rows),
        )
        for table in board.tables
    ]


def curves_figure(group: Group) -> "Figure":
    """Returns scores against the number of edits, a line an editor, with the range over its seeds."""
    panels = [info for info in group.metrics.shown("curves") if rows_with(group, [info.name])]
    rows = [index for index, row in enumerate(group.table.rows) if any(group.evaluations[index])]
    n_columns = 3
    n_rows = -(-len(panels) // n_columns)
    has_place = len(panels) < n_rows * n_columns
    beside = 0.0 if has_place else 1.3
    figure = new_figure(7.4 + beside + room_for_names(group, rows, spare=22), 2.1 * n_rows + 0.5)
    grid = [axes for line in figure.subplots(n_rows, n_columns, squeeze=False, sharex=True) for axes in line]
    handles: dict[int, Any] = {}
    for axes, info in zip(grid, panels, strict=False):
        handles |= draw_lines(axes, group, rows, info.name)
        name_values(axes, info, group.table.protocol)
        name_edits(axes)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    shown = [handles[index] for index in sorted(handles)]
    if has_place:
        legend_in(grid[len(panels)], shown)
    else:
        figure.legend(handles=shown, loc="outside right upper", handlelength=3.2)
    figure.suptitle(title(group.table))
    caption(figure, group.table, rows, "Lines: mean over seeds; bands: least to greatest.")
    return figure


def rows_with(group: Group, metrics: Sequence[str] | Mapping[str, str]) -> list[int]:
    """The rows of a table with a value for at least one of the metrics."""
    return [
        index
        for index, runs in enumerate(group.evaluations)
        if any(series_of(run, metric) for run in runs for metric in metrics)
    ]


def draw_lines(axes: "Axes", group: Group, rows: Sequence[int], metric: str) -> dict[int, Any]:
    """Draws a line with its band for each row that has a metric; returns the lines by row."""
    table = group.table
    handles = {}
    # The styles of all rows, so that a row looks the same in every panel.
    styles = editor_styles([table.rows[index].editor for index in rows])
    for index, style in zip(rows, styles, strict=True):
        points = mean_curve([series_of(run, metric) for run in group.evaluations[index]])
        if not points:
            continue
        x = [point.x for point in points]
        (handles[index],) = axes.plot(
            x,
            [point.mean for point in points],
            label=plain(table.rows[index].name),
            markevery=_markers(points, place=rows.index(index)),
            **style,
        )
        if any(point.n > 1 for point in points):
            low, high = [point.low for point in points], [point.high for point in points]
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return handles


def room_for_names(group: Group, rows: Sequence[int], *, spare: int) -> float:
    """The extra width, in inches, that a legend needs for long names."""
    return 0.06 * max(0, *(len(group.table.rows[index].name) - spare for index in rows))


def _markers(points: Sequence[Point], place: int) -> slice:
    """Spaces about five markers on each line; neighbouring lines have them at different points."""
    step = max(1, len(points) // 5)
    return slice(place % step, None, step)


def name_edits(axes: "Axes") -> None:
    """Labels the x axis, which counts edits."""
    axes.set_xlabel("edits")
    axes.xaxis.set_major_locator(_counts())


def _counts() -> "MaxNLocator":
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])


def title(table: Table, *, with_conditions: bool = True) -> str:
    """Returns the title of a figure.

    The conditions that set the table apart from others, if wanted, have a line of their own.
    """
    lines = [f"stream {table.stream} · model {', '.join(table.models)}", table.distinction if with_conditions else ""]
    return "\n".join(plain(line) for line in lines if line)


def name_values(axes: "Axes", info: MetricInfo, protocol: Protocol) -> None:
    """Labels the y axis and fits it to the metric."""
    axes.set_title(plain(info.header))
    if info.is_count:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1)
        axes.yaxis.set_major_locator(_counts())
    elif not info.is_main_score:
        return
    elif score_info(protocol.main_score).is_perplexity:
        drawn = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float)]
        if drawn and max(drawn) > _WIDE * min(drawn) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_ylabel(f"{protocol.main_score}, lower is better")
    else:
        axes.set_ylim(-0.03, max(1.03, 1.05 * axes.dataLim.ymax))
        axes.set_ylabel(protocol.main_score)


def caption(figure: "Figure", table: Table, rows: Sequence[int], how: str) -> None:
    """Adds below a figure how it was measured and drawn."""
    protocol = table.protocol
    seeds: dict[tuple[int, ...], list[str]] = {}
    for index in rows:
        seeds.setdefault(table.rows[index].seeds, []).append(table.rows[index].name)
    shown = [", ".join(map(str, numbers)) for numbers in seeds]
    of = shown[0] if len(seeds) == 1 else "; ".join(f"{s} ({', '.join(n)})" for s, n in zip(shown, seeds.values()))  # noqa: B905
    upstream = "all" if protocol.max_upstream is None else f"at most {protocol.max_upstream}"
    edits = "the whole stream" if protocol.max_edits is None else f"at most {protocol.max_edits} edits"
    add_caption(
        figure,
        f"{how} Stream {table.stream}, model {', '.join(table.models)}, {'seed' if of.isdecimal() else 'seeds'} {of}.",
        f"Protocol {protocol.version}: {protocol.main_score}, split {protocol.split}, {edits}, evaluated every "
        f"{protocol.eval_every}, {upstream} upstream requests, {protocol.decoding} decoding, query {protocol.query}.",
    )


def _names(table: Table) -> tuple[str, ...]:
    return (table.stream, *table.models, *([table.distinction] if table.distinction else []))


def draw_each(groups: Sequence[Group], out: Path, kind: str, make: Callable[[Group], "Figure"]) -> list[Path]:
    """Draws and saves a figure for each group, and returns the files."""
    written = []
    for group in groups:
        with styled():
            figure = make(group)
        written += save(figure, out, file_name(kind, *_names(group.table)))
    return written
