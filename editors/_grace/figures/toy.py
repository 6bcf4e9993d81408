"""The paper's Figure 2: what GRACE does to a classifier of points in the plane, with the balls drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from grace_bench.analysis.figures.drawing import INK, PALETTE, add_caption, new_figure, save, styled
from grace_bench.data.requests import EditRequest
from grace_bench.editing.commands import OpenTrial
from grace_bench.errors import UserError
from grace_bench.streams.toy import EXTENT, TURNED, label_before, parse_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIXED = ("stream", "editor", "model", "out", "existing")
_RESOLUTION = 151
_BALLS = (*PALETTE, "#000000", "#A69B00")
_BELOW, _ABOVE = "#f7d9c4", "#c9dff2"


@dataclass(frozen=True, kw_only=True)
class ToyEdits:
    """GRACE on the toy stream, evaluated at every point of a grid before and after the edits.

    Attributes:
        axis: (G,) the coordinates of the grid, the same in x and y.
        before, after: (G, G) int, the class at each point, rows from bottom to top.
        entry: (G, G) int, the codebook entry that answers each point; -1 where the model's own answer is unchanged.
        outside: (K, G, G) distance of each point's activation outside each ball; negative inside.
        edited: The requests that were edited, in order.
        keys: (K, 2) the edited points whose activations became keys.
        metrics: The scores at the end of the run.
        settings: The editor's settings.
        layer: The edited layer.
        seed: The run's seed.
    """

    axis: NDArray[np.float64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    entry: NDArray[np.int64]
    outside: NDArray[np.float32]
    edited: tuple[EditRequest, ...]
    keys: NDArray[np.float64]
    metrics: dict[str, float]
    settings: dict[str, Any]
    layer: str
    seed: int

    @property
    def wanted(self) -> NDArray[np.int64]:
        """(G, G) int, the target class at each point."""
        return np.array(
            [[label_before((x, y)) ^ (TURNED.distance((x, y)) <= 0) for x in self.axis] for y in self.axis],
            dtype=np.int64,
        )


def draw_toy(overrides: Sequence[str], out: Path, open_trial: OpenTrial) -> list[Path]:
    """Runs GRACE on the toy stream and draws it.

    Args:
        overrides: Settings of the run, as `editor.eps_init=1.0`.
        out: Receives the figure.
        open_trial: Opens the run.

    Returns:
        The files.

    Raises:
        UserError: If a setting is not one of such a run.
    """
    edits = edit_toy(overrides, open_trial)
    with styled():
        figure = toy_figure(edits)
    return save(figure, out, "toy")


def edit_toy(overrides: Sequence[str], open_trial: OpenTrial, *, resolution: int = _RESOLUTION) -> ToyEdits:
    """Runs GRACE on the toy stream.

    Args:
        overrides: Settings of the run.
        open_trial: Opens the run.
        resolution: Points of the grid along each axis.

    Raises:
        UserError: If a setting is not one of such a run.
    """
    for override in overrides:
        if override.partition("=")[0] in _FIXED:
            raise UserError(f"{override}: the figure is of grace on the stream toy, and leaves no run folder")
    trial = open_trial(["stream=toy", "editor=grace", "device=cpu", *overrides])
    model = trial.model
    axis = np.linspace(-EXTENT, EXTENT, resolution).round(4)
    prompts = [f"({x:.4f}, {y:.4f})" for y in axis for x in axis]
    shape = (resolution, resolution)
    before = np.array(model.answer(prompts), dtype=np.int64).reshape(shape)
    with trial.edited() as found:
        edited, editor = found.requests, found.editor
        after = np.array(model.answer(prompts), dtype=np.int64).reshape(shape)
        codebook = editor.codebook
        queries = model.layer_call(model.encode_batch(prompts)).query
        nearest = codebook.retrieve(queries)
        outside = (codebook.distances(queries) - codebook.radii).T.reshape(-1, *shape)
        of_edits = model.layer_call(model.encode_batch([request.prompt for request in edited])).query
        points = np.array([parse_point(request.prompt) for request in edited])
        return ToyEdits(
            axis=axis,
            before=before,
            after=after,
            entry=torch.where(nearest.hit, nearest.entry, -1).numpy().reshape(shape),
            outside=outside.numpy(),
            edited=edited,
            keys=points[codebook.distances(of_edits).argmin(dim=0).numpy()],
            metrics=dict(found.metrics),
            settings=editor.settings(),
            layer=model.layer_name,
            seed=trial.seed,
        )


def toy_figure(edits: ToyEdits) -> "Figure":
    """Returns four panels: classes before, wanted and after with the edited points, and which ball answers where."""
    figure = new_figure(7.6, 2.8)
    panels = figure.subplots(1, 4)
    points = np.array([parse_point(request.prompt) for request in edits.edited])
    for axes, title, classes in zip(
        panels, ("before", "wanted", "after"), (edits.before, edits.wanted, edits.after), strict=False
    ):
        _draw_classes(axes, edits.axis, classes)
        _draw_disc(axes)
        axes.set_title(title)
    panels[0].plot(points[:, 0], points[:, 1], ".", color=INK, markersize=2.2)
    _draw_balls(panels[2], edits, linewidth=0.8)
    balls = panels[3]
    _draw_answered(balls, edits)
    _draw_balls(balls, edits, linewidth=1.0)
    _draw_disc(balls)
    balls.plot(points[:, 0], points[:, 1], ".", color=INK, markersize=2.5)
    for index, (x, y) in enumerate(edits.keys):
        balls.plot(x, y, "*", color=_ball_colour(index), markeredgecolor="white", markeredgewidth=0.4, markersize=7)
    balls.set_title("balls, enlarged")
    _frame(balls, *_window(edits))
    for axes in panels[:3]:
        _frame(axes, -EXTENT, EXTENT, -EXTENT, EXTENT)
    for axes in panels:
        axes.set_xlabel("x1")
    panels[0].set_ylabel("x2")
    settings, metrics = edits.settings, edits.metrics
    scores = ", ".join(f"{name} {metrics[name]:.3f}" for name in ("TRR", "ERR", "Holdout") if name in metrics)
    add_caption(
        figure,
        f"grace on toy, layer {edits.layer}, eps_init {settings['eps_init']:g}, {settings['distance']} distance, "
        f"{settings['replacement']}, seed {edits.seed}: {len(edits.edited)} edits, {len(edits.keys)} keys; {scores}.",
        "Balls live in the space of the layer's input: an outline bounds the points of the plane whose activation lies "
        "inside one ball; a tint says which entry answers a point (none "
        "where the nearest key's ball does not reach), "
        "a star marks the point whose activation is the key, dots are edited points. Dashed: the disc that turned.",
    )
    return figure


def _draw_classes(axes: "Axes", axis: NDArray[np.float64], classes: NDArray[np.int64]) -> None:
    axes.contourf(axis, axis, classes, levels=[-0.5, 0.5, 1.5], colors=[_BELOW, _ABOVE], antialiased=False)


def _draw_disc(axes: "Axes") -> None:
    from matplotlib.patches import Circle

    axes.add_patch(
        Circle((TURNED.x, TURNED.y), TURNED.radius, fill=False, edgecolor=INK, linestyle="--", linewidth=0.7)
    )


def _draw_balls(axes: "Axes", edits: ToyEdits, *, linewidth: float) -> None:
    for index, outside in enumerate(edits.outside):
        # A ball that contains no grid point has no outline.
        if outside.min() < 0 < outside.max():
            axes.contour(
                edits.axis, edits.axis, outside, levels=[0.0], colors=[_ball_colour(index)], linewidths=linewidth
            )


def _draw_answered(axes: "Axes", edits: ToyEdits) -> None:
    for index in np.unique(edits.entry[edits.entry >= 0]).tolist():
        mask = (edits.entry == index).astype(float)
        axes.contourf(edits.axis, edits.axis, mask, levels=[0.5, 1.5], colors=[_ball_colour(index)], alpha=0.3)


def _ball_colour(index: int) -> str:
    return _BALLS[index % len(_BALLS)]


def _window(edits: ToyEdits) -> tuple[float, float, float, float]:
    """A square around the disc and every point that a ball answers."""
    rows, columns = np.nonzero((edits.outside <= 0).any(axis=0))
    x, y = (np.append(edits.axis[found], [centre - TURNED.radius, centre + TURNED.radius])
            for found, centre in ((columns, TURNED.x), (rows, TURNED.y)))  # fmt: skip
    half = max(np.ptp(x), np.ptp(y)) / 2 + 0.15
    middle_x, middle_y = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
    return middle_x - half, middle_x + half, middle_y - half, middle_y + half


def _frame(axes: "Axes", left: float, right: float, bottom: float, top: float) -> None:
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    axes.grid(False)
    axes.spines[["top", "right"]].set_visible(True)
