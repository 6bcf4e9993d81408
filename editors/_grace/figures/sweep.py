"""Scores of finished runs of GRACE by deferral radius and edited block (Hartvigsen et al. 2023, Figure 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from grace_bench.analysis.figures.drawing import label_numbers, line_style, new_figure
from grace_bench.analysis.figures.of_runs import Group, caption, draw_each, name_values, read_groups
from grace_bench.analysis.leaderboard import Table
from grace_bench.editors._grace.figures.layers import layer_names, layer_order, layer_pattern
from grace_bench.errors import UserError
from grace_bench.results.schema import RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SWEEP = ("TRR", "ERR", "Holdout", "n_keys")


def draw_sweep(paths: Sequence[Path], out: Path, *, score: str | None = None) -> list[Path]:
    """Draws scores by deferral radius and edited block, a figure for each stream and model (the paper's Figure 4).

    Args:
        paths: Run folders of `grace`, or folders that contain some; runs of other editors are skipped.
        out: Receives the figures.
        score: The score of the panel by which the runs are drawn; None for their main scores.

    Returns:
        The files.

    Raises:
        UserError: If there are no runs with several radii or layers, or the runs differ in other settings too.
    """
    groups = [group for group in read_groups(paths, score=score) if len(_sweep_runs(group.table)) > 1]
    if not groups:
        raise UserError(
            "no runs of grace among those given differ in editor.eps_init or layer alone: a sweep makes some, as in "
            "grace-bench run -m editor=grace editor.eps_init=0.1,1,10"
        )
    return draw_each(groups, out, "sweep", sweep_figure)


def sweep_figure(group: Group) -> "Figure":
    """Returns scores at the end of runs against the deferral radius, a line an edited layer."""
    table = group.table
    runs = _sweep_runs(table)
    layers = sorted({layer for layer, _ in runs}, key=layer_order)
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
        name_values(axes, info, table.protocol)
        axes.set_xlabel("deferral radius eps_init")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(layers), 6), handlelength=3.2)
    shared = "" if names == layers else f", layer {layer_pattern(layers[0])}"
    rows = [index for index, row in enumerate(table.rows) if row.editor == "grace"]
    distance = next(iter(runs.values()))[0].editor.model_dump().get("distance", "")
    caption(
        figure,
        table,
        rows,
        f"grace, {distance} distance{shared}. Scores at the end of the runs"
        + (": mean over seeds, bars: standard deviation." if several else "."),
    )
    return figure


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
