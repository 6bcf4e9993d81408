"""The kinds of figures, as `grace-bench figure` names them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.table import Table

from grace_bench.common.terminal import table_console
from grace_bench.common.text import visible
from grace_bench.errors import UserError


def draw(kind: str, given: Sequence[str], out: Path, *, say: Callable[[str], None]) -> None:
    """Draws the figures of one kind, and says where they are.

    Args:
        kind: `curves`, `sweep`, `overlap`, `toy` or `separability`.
        given: Run folders for the first three, settings of a run for the others.
        out: Receives the figures.
        say: Takes lines for the user.

    Raises:
        UserError: If there is nothing to draw, or what is given cannot be.
    """
    if kind == "toy":
        from grace_bench.analysis.figures.toy import draw_toy

        files = draw_toy(given, out)
    elif kind == "separability":
        files = _draw_separability(given, out)
    else:
        from grace_bench.analysis.figures.of_runs import draw_curves, draw_overlap, draw_sweep

        if not given:
            raise UserError(f"figure {kind} needs run folders, or folders that hold some")
        draw_runs = {"curves": draw_curves, "sweep": draw_sweep, "overlap": draw_overlap}[kind]
        files = draw_runs([Path(path) for path in given], out)
    for file in files:
        say(str(file))


def _draw_separability(overrides: Sequence[str], out: Path) -> list[Path]:
    from grace_bench.analysis.figures.separability import draw_separability

    study, files = draw_separability(overrides, out)
    table = Table(
        title=visible(f"stream {study.stream} · model {study.model}"), title_justify="left", box=None, pad_edge=False
    )
    for header in ("layer", "distance", "question"):
        table.add_column(header, no_wrap=True)
    for header in ("AUC", "95 %", "TPR at 0.1 % FPR", "positive pairs", "negative pairs"):
        table.add_column(header, justify="right", no_wrap=True)
    for curve in study.curves:
        interval = f"{curve.auc_low:.3f} to {curve.auc_high:.3f}"
        counts = f"{curve.n_positive:,}", f"{curve.n_negative:,}"
        table.add_row(
            curve.layer,
            curve.distance,
            curve.question,
            f"{curve.auc:.3f}",
            interval,
            f"{curve.strict_rate:.3f}",
            *counts,
        )
    table_console().print(table, markup=False)
    return files
