"""Dot plots of finished runs, a row an editor: what each ends at, and how far the scores of one run lie apart."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from grace_bench.analysis.figures.drawing import file_name, line_style, new_figure, plain, save, styled
from grace_bench.analysis.figures.of_runs import Group, caption, draw_each, read_groups, title
from grace_bench.analysis.leaderboard import Table
from grace_bench.analysis.scorings import Scorings, scorings
from grace_bench.common.scores import score_info
from grace_bench.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Dots = Mapping[str, Mapping[str, float]]
"""The values of each series of dots, by the name of the row that they stand in."""

# Of the height of a row.
_SPREAD = 0.6


def draw_editors(paths: Sequence[Path], out: Path, *, score: str | None = None) -> list[Path]:
    """Draws what each editor ends at: a figure for each stream and model, with a panel for each protocol.

    Args:
        paths: Run folders, or folders that contain some.
        out: Receives the figures.
        score: The score of the panel by which the runs are drawn; None for their main scores.

    Returns:
        The files.

    Raises:
        UserError: If there is no finished run, or none with that score.
    """
    written = []
    groups = read_groups(paths, score=score)
    for (stream, models), found in groupby(groups, key=lambda group: (group.table.stream, group.table.models)):
        with styled():
            figure = editors_figure(list(found))
        written += save(figure, out, file_name("editors", stream, *models))
    return written


def draw_scores(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws edits by every score that their runs recorded: a figure for each stream, model and protocol.

    Args:
        paths: Run folders, or folders that contain some.
        out: Receives the figures.

    Returns:
        The files.

    Raises:
        UserError: If there is no finished run, or none that recorded two scores between 0 and 1.
    """
    groups = [group for group in read_groups(paths) if _scorings_of_edits(group)]
    if not groups:
        raise UserError("figure scores: no run recorded two scores between 0 and 1 of its edits")
    return draw_each(groups, out, "scores", scores_figure)


def editors_figure(groups: Sequence[Group]) -> "Figure":
    """Returns the scores at the end of the runs of one stream and model, a panel for each protocol."""
    names = list(dict.fromkeys(row.name for group in groups for row in group.table.rows))
    figure, panels = _panels(names, len(groups))
    for axes, group in zip(panels, groups, strict=True):
        table = group.table
        shown = [info for info in group.metrics.shown("curves") if info.is_main_score]
        dots = {
            info.header: {row.name: row.cells[info.name].mean for row in table.rows if info.name in row.cells}
            for info in shown
        }
        draw_dots(axes, names, {header: values for header, values in dots.items() if values})
        axes.set_title(
            "\n".join(f"{name.removeprefix('protocol.')}={plain(value)}" for name, value in table.conditions.items()),
            fontsize=7,
        )
        axes.set_xlabel(_axis_label(axes, table))
    _legend(figure, panels)
    first = groups[0].table
    figure.suptitle(title(first, with_conditions=False))
    how = "Dots: mean over seeds, at the end of the runs."
    if len(groups) > 1:
        how += " The panels' titles name what differs; the protocol below is that of the first."
    caption(figure, first, range(len(first.rows)), how)
    return figure


def scores_figure(group: Group) -> "Figure":
    """Returns the edits of each run by every score, right after they were made and at the end."""
    found = _scorings_of_edits(group)
    names = [row.name for row in group.table.rows]
    figure, panels = _panels(names, len(found))
    for axes, of in zip(panels, found, strict=True):
        columns = zip(of.scores, zip(*of.values, strict=True), strict=True)
        dots = {
            score: {name: value for name, value in zip(names, values, strict=True) if value is not None}
            for score, values in columns
            if score_info(score).is_share
        }
        draw_dots(axes, names, dots)
        axes.set_title(plain(of.metric.header))
    _legend(figure, panels)
    figure.suptitle(title(group.table))
    caption(figure, group.table, range(len(names)), "Dots: the same answers by each score, mean over seeds.")
    return figure


def draw_dots(axes: "Axes", names: Sequence[str], dots: Dots) -> None:
    """Draws a row for each name, the first on top, with a dot of each series, joined by a line."""
    places = {name: place for place, name in enumerate(names)}
    for name, place in places.items():
        values = [series[name] for series in dots.values() if name in series]
        if values:
            axes.plot([min(values), max(values)], [place, place], color="#bbbbbb", linewidth=1, zorder=1)
    for index, (label, series) in enumerate(dots.items()):
        style = line_style(index) | {"linestyle": "none"}
        # Equal values do not hide each other.
        shift = _SPREAD * ((index + 0.5) / len(dots) - 0.5)
        axes.plot(list(series.values()), [places[name] + shift for name in series], label=plain(label), **style)


def _scorings_of_edits(group: Group) -> list[Scorings]:
    """How edits score by several shares, right after they were made and at the end, as far as that was recorded."""
    metrics = group.metrics
    wanted = (metrics.right_after_edit.name, metrics.mean_over("edited").name)
    found = {of.metric.name: of for of in scorings([row.results for row in group.table.rows], metrics)}
    several = {name for name, of in found.items() if sum(score_info(score).is_share for score in of.scores) > 1}
    return [found[name] for name in wanted if name in several]


def _panels(names: Sequence[str], n: int) -> tuple["Figure", list["Axes"]]:
    """Returns a figure with panels side by side, whose rows are named on the left."""
    figure = new_figure(2.6 + 2.7 * n + 0.05 * max(map(len, names)), 1.6 + 0.19 * len(names))
    panels = list(figure.subplots(1, n, squeeze=False, sharey=True)[0])
    panels[0].set_yticks(range(len(names)), list(map(plain, names)))
    panels[0].invert_yaxis()
    return figure, panels


def _axis_label(axes: "Axes", table: Table) -> str:
    """Labels the axis of scores; perplexities get a logarithmic one."""
    score = table.protocol.main_score
    if not score_info(score).is_perplexity:
        return score
    axes.set_xscale("log")
    return f"{score}, lower is better"


def _legend(figure: "Figure", panels: Sequence["Axes"]) -> None:
    """Puts one legend for all panels beside them."""
    handles = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
