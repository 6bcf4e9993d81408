"""Figures of finished runs: curves by editor, radius by block, and how the balls of a codebook come to overlap."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

from grace_bench.analysis.figures.drawing import (
    add_caption,
    editor_styles,
    file_name,
    label_numbers,
    legend_in,
    line_style,
    new_figure,
    plain,
    save,
    styled,
)
from grace_bench.analysis.leaderboard import Leaderboard, Row, Table
from grace_bench.errors import UserError
from grace_bench.results.curves import Point, mean_curve, series_of
from grace_bench.results.metric_info import MetricInfo, Metrics
from grace_bench.results.reading import RESULT_FILE, find_result_files, read_evaluations, read_result
from grace_bench.results.schema import Evaluation, Protocol, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

_SWEEP = ("TRR", "ERR", "Holdout", "n_keys")
_OVERLAP = {
    "codebook_overlap": "share of pairs of balls\nof different labels that intersect",
    "codebook_overlap/queries": "share of evaluation queries\nin balls of two labels",
}
# Above this ratio of greatest to least, a perplexity is drawn on a logarithmic axis.
_WIDE = 30


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that were measured alike and may share a figure.

    Attributes:
        table: Their leaderboard.
        evaluations: For each row of the table, the evaluations of each of its runs.
        metrics: The descriptions of all registered metrics.
    """

    table: Table
    metrics: Metrics
    evaluations: tuple[tuple[Sequence[Evaluation], ...], ...]


def draw_curves(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws the scores over a stream of edits, a figure for each stream and model (Hartvigsen et al. 2023, Figure 3).

    Args:
        paths: Run folders, or folders that hold some.
        out: Receives the figures.

    Returns:
        The files.

    Raises:
        UserError: If there is no finished run.
    """
    return _draw_each(read_groups(paths), out, "curves", curves_figure)


def draw_overlap(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws how the balls of codebooks come to overlap, a figure for each stream and model that has any.

    Args:
        paths: Run folders, or folders that hold some.
        out: Receives the figures.

    Returns:
        The files.

    Raises:
        UserError: If no run has a codebook.
    """
    groups = [group for group in read_groups(paths) if _rows_with(group, _OVERLAP)]
    if not groups:
        raise UserError("no run given has 'codebook_overlap', which takes an editor with a codebook")
    return _draw_each(groups, out, "overlap", overlap_figure)


def draw_sweep(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws scores by deferral radius and edited block, a figure for each stream and model (the paper's Figure 4).

    Args:
        paths: Run folders of `grace`, or folders that hold some; runs of other editors are passed over.
        out: Receives the figures.

    Returns:
        The files.

    Raises:
        UserError: If there are no runs of several radii or layers, or they differ in other settings as well.
    """
    groups = [group for group in read_groups(paths) if len(_sweep_runs(group.table)) > 1]
    if not groups:
        raise UserError(
            "no runs of grace among those given differ in editor.eps_init or layer alone: a sweep makes some, as in "
            "grace-bench run -m editor=grace editor.eps_init=0.1,1,10"
        )
    return _draw_each(groups, out, "sweep", sweep_figure)


def read_groups(paths: Sequence[Path]) -> list[Group]:
    """Reads runs, grouped as leaderboards group them: by stream and model, one protocol each.

    Raises:
        UserError: If there is no finished run, or a file of one is broken.
    """
    files = find_result_files(paths)
    results = [read_result(file) for file in files]
    folders = {id(result): file.parent for result, file in zip(results, files, strict=True)}

    def evaluations(row: Row) -> tuple[Sequence[Evaluation], ...]:
        return tuple(read_evaluations(folders[id(result)] / "metrics.jsonl") for result in row.results)

    board = Leaderboard(results, folders=[file.parent if file.name == RESULT_FILE else None for file in files])
    return [
        Group(table=table, metrics=board.metrics, evaluations=tuple(evaluations(row) for row in table.rows))
        for table in board.tables
    ]


def curves_figure(group: Group) -> "Figure":
    """Returns scores against the number of edits, a line an editor, with the range over its seeds."""
    panels = [info for info in group.metrics.shown("curves") if _rows_with(group, [info.name])]
    rows = [index for index, row in enumerate(group.table.rows) if any(group.evaluations[index])]
    n_columns = 3
    n_rows = -(-(len(panels) + 1) // n_columns)
    figure = new_figure(7.4 + _room_for_names(group, rows, spare=22), 2.1 * n_rows + 0.5)
    grid = [axes for line in figure.subplots(n_rows, n_columns, squeeze=False, sharex=True) for axes in line]
    handles: dict[int, Any] = {}
    for axes, info in zip(grid, panels, strict=False):
        handles |= _draw_lines(axes, group, rows, info.name)
        _name_values(axes, info, group.table.protocol)
        _name_edits(axes)
        axes.tick_params(labelbottom=True)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    legend_in(grid[len(panels)], [handles[index] for index in sorted(handles)])
    figure.suptitle(_title(group.table))
    _caption(figure, group.table, rows, "Lines: mean over seeds; bands: least to greatest.")
    return figure


def overlap_figure(group: Group) -> "Figure":
    """Returns the shares of balls and of queries in conflict against the number of edits, a line a codebook."""
    from matplotlib.ticker import PercentFormatter

    rows = _rows_with(group, _OVERLAP)
    figure = new_figure(7.4 + _room_for_names(group, rows, spare=8), max(2.9, 1.0 + 0.16 * len(rows)))
    handles: dict[int, Any] = {}
    for axes, (metric, title) in zip(figure.subplots(1, 2, sharex=True), _OVERLAP.items(), strict=True):
        handles |= _draw_lines(axes, group, rows, metric)
        axes.set_title(title)
        _name_edits(axes)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    figure.legend(handles=[handles[index] for index in rows], loc="outside right center", handlelength=3.2)
    figure.suptitle(_title(group.table))
    _caption(figure, group.table, rows, "Lines: mean over seeds; bands: least to greatest.")
    return figure


def sweep_figure(group: Group) -> "Figure":
    """Returns scores at the end of runs against the deferral radius, a line an edited layer."""
    table = group.table
    runs = _sweep_runs(table)
    layers = sorted({layer for layer, _ in runs}, key=_depth)
    radii = sorted({radius for _, radius in runs})
    names = layer_names(layers)
    known = [info for info in group.metrics if info.name in _SWEEP]
    panels = [info for info in known if any(_final(results, info.name) for results in runs.values())]
    several = any(len(results) > 1 for results in runs.values())
    figure = new_figure(7.4, 2.75)
    for axes, info in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, layer in enumerate(layers):
            found = {radius: _final(runs.get((layer, radius), ()), info.name) for radius in radii}
            points = {radius: figures for radius, figures in found.items() if figures}
            axes.errorbar(
                list(points),
                [fmean(figures) for figures in points.values()],
                yerr=[stdev(figures) if len(figures) > 1 else 0.0 for figures in points.values()] if several else None,
                label=names[index],
                capsize=2,
                elinewidth=0.8,
                **line_style(index),
            )
        label_numbers(axes, radii)
        _name_values(axes, info, table.protocol)
        axes.set_xlabel("deferral radius eps_init")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(layers), 6), handlelength=3.2)
    shared = "" if names == layers else f", layer {_pattern(layers[0])}"
    rows = [index for index, row in enumerate(table.rows) if row.editor == "grace"]
    distance = next(iter(runs.values()))[0].editor.model_dump().get("distance", "")
    _caption(
        figure,
        table,
        rows,
        f"grace, {distance} distance{shared}. Scores at the end of the runs"
        + (": mean over seeds, bars: standard deviation." if several else "."),
    )
    return figure


def layer_names(layers: Sequence[str]) -> list[str]:
    """Returns short names of layers: their blocks' numbers where they differ in nothing else, else their paths.

    >>> layer_names(["encoder.block.0.wo", "encoder.block.4.wo"])
    ['block 0', 'block 4']
    >>> layer_names(["first", "second"])
    ['first', 'second']
    """
    if len({_pattern(layer) for layer in layers}) == 1 and "*" in _pattern(layers[0]):
        return [f"block {_depth(layer)[0]}" for layer in layers]
    return [plain(layer) for layer in layers]


def _depth(layer: str) -> tuple[int, str]:
    """A layer's place: the number of its block, the first in its path."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), -1), layer


def _pattern(layer: str) -> str:
    """The path with the block's number left open."""
    parts = layer.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join("*" if index == number else part for index, part in enumerate(parts))


def _sweep_runs(table: Table) -> dict[tuple[str, float], list[RunResult]]:
    """The table's runs of grace by layer and radius.

    Raises:
        UserError: If they differ in other settings.
    """
    runs: dict[tuple[str, float], list[RunResult]] = {}
    first: RunResult | None = None
    for row in table.rows:
        for result in row.results if row.editor == "grace" else ():
            first = first or result
            one, two = (_other_settings(run) for run in (first, result))
            name = next((name for name in {**one, **two} if one.get(name) != two.get(name)), None)
            if name is not None:
                raise UserError(
                    f"runs {first.run_id} and {result.run_id} differ in editor.{name}: "
                    "the runs of a sweep may differ in editor.eps_init and layer alone"
                )
            radius = float(result.editor.model_dump()["eps_init"])
            runs.setdefault((result.model.layer, radius), []).append(result)
    return runs


def _other_settings(result: RunResult) -> Mapping[str, Any]:
    return result.editor.model_dump(exclude={"name", "seed", "eps_init"})


def _final(results: Sequence[RunResult], metric: str) -> list[float]:
    return [value for result in results if (value := result.metrics.get(metric)) is not None]


def _rows_with(group: Group, metrics: Sequence[str] | Mapping[str, str]) -> list[int]:
    """The rows of a table some of whose runs have one of some metrics."""
    return [
        index
        for index, runs in enumerate(group.evaluations)
        if any(series_of(run, metric) for run in runs for metric in metrics)
    ]


def _draw_lines(axes: "Axes", group: Group, rows: Sequence[int], metric: str) -> dict[int, Any]:
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


def _room_for_names(group: Group, rows: Sequence[int], *, spare: int) -> float:
    """Inches that a legend needs for names of more letters than there is room for."""
    return 0.06 * max(0, *(len(group.table.rows[index].name) - spare for index in rows))


def _markers(points: Sequence[Point], place: int) -> slice:
    """About five markers a line, those of neighbours at different points."""
    step = max(1, len(points) // 5)
    return slice(place % step, None, step)


def _name_edits(axes: "Axes") -> None:
    axes.set_xlabel("edits")
    axes.xaxis.set_major_locator(_counts())


def _counts() -> "MaxNLocator":
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])


def _title(table: Table) -> str:
    parts = (f"stream {table.stream}", f"model {', '.join(table.models)}", table.distinction)
    return plain(" · ".join(part for part in parts if part))


def _name_values(axes: "Axes", info: MetricInfo, protocol: Protocol) -> None:
    axes.set_title(plain(info.header))
    if info.is_count:
        axes.set_ylim(0, 1.05 * axes.dataLim.ymax or 1)
        axes.yaxis.set_major_locator(_counts())
    elif not info.is_main_score:
        return
    elif protocol.main_score == "perplexity":
        drawn = [float(value) for line in axes.lines for value in np.asarray(line.get_ydata(), dtype=float)]
        if drawn and max(drawn) > _WIDE * min(drawn) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_ylabel("perplexity, lower is better")
    else:
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel(protocol.main_score)


def _caption(figure: "Figure", table: Table, rows: Sequence[int], how: str) -> None:
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


def _draw_each(groups: Sequence[Group], out: Path, kind: str, make: Callable[[Group], "Figure"]) -> list[Path]:
    written = []
    for group in groups:
        with styled():
            figure = make(group)
        written += save(figure, out, file_name(kind, *_names(group.table)))
    return written
