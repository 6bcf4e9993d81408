"""The overlap of a codebook's balls over the edits of finished runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grace_bench.analysis.figures.drawing import new_figure
from grace_bench.analysis.figures.of_runs import (
    Group,
    caption,
    draw_each,
    draw_lines,
    name_edits,
    read_groups,
    room_for_names,
    rows_with,
    title,
)
from grace_bench.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OVERLAP = {
    "codebook_overlap": "share of pairs of balls\nof different labels that intersect",
    "codebook_overlap/queries": "share of evaluation queries\nin balls of two labels",
}


def draw_overlap(paths: Sequence[Path], out: Path) -> list[Path]:
    """Draws the overlap of codebooks' balls, one figure for each stream and model that has a codebook.

    Args:
        paths: Run folders, or folders that contain some.
        out: Receives the figures.

    Returns:
        The files.

    Raises:
        UserError: If no run has a codebook, or runs were measured differently.
    """
    groups = [group for group in read_groups(paths) if rows_with(group, _OVERLAP)]
    if not groups:
        raise UserError("no run given has 'codebook_overlap', which takes an editor with a codebook")
    return draw_each(groups, out, "overlap", overlap_figure)


def overlap_figure(group: Group) -> "Figure":
    """Returns the shares of balls and of queries in conflict against the number of edits, a line a codebook."""
    from matplotlib.ticker import PercentFormatter

    rows = rows_with(group, _OVERLAP)
    figure = new_figure(7.4 + room_for_names(group, rows, spare=8), max(2.9, 1.0 + 0.16 * len(rows)))
    handles: dict[int, Any] = {}
    for axes, (metric, meaning) in zip(figure.subplots(1, 2, sharex=True), _OVERLAP.items(), strict=True):
        handles |= draw_lines(axes, group, rows, metric)
        axes.set_title(meaning)
        name_edits(axes)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    figure.legend(handles=[handles[index] for index in rows], loc="outside right center", handlelength=3.2)
    figure.suptitle(title(group.table))
    caption(figure, group.table, rows, "Lines: mean over seeds; bands: least to greatest.")
    return figure
