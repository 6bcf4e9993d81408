"""Draws the panels of the W&B dashboard from finished run folders: python scripts/draw_wandb_panels.py RUNS OUT.

The pictures in docs/wandb.md show the same data as the panels for the same runs; they are not screenshots.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from grace_bench.results.metric_info import metric_infos
from grace_bench.results.reading import read_result
from grace_bench.results.schema import RunResult
from grace_bench.run.loggers.wandb import err_by_age

CURVES = [info.name for info in metric_infos().shown("dashboard")]
OVERLAP = ("codebook_overlap", "codebook_overlap/queries")


def main(runs: Path, out: Path) -> None:
    """Writes `wandb-curves.png` and `wandb-panels.png`.

    Args:
        runs: The folder of one stream and model, with one folder per editor.
        out: The folder for the pictures.
    """
    editors: dict[str, list[tuple[Path, RunResult]]] = defaultdict(list)
    for path in sorted(runs.glob("*/*/result.json")):
        result = read_result(path)
        editors[result.editor.name].append((path.parent, result))
    out.mkdir(parents=True, exist_ok=True)
    metrics = {
        name: pd.concat([pd.read_json(folder / "metrics.jsonl", lines=True) for folder, _ in found])
        for name, found in editors.items()
    }
    figure, axes = plt.subplots(1, len(CURVES), figsize=(15, 2.8), layout="constrained")
    for axis, metric in zip(axes, CURVES, strict=True):
        for number, (name, table) in enumerate(metrics.items()):
            _band(axis, table, "n_edits", metric, name, f"C{number}")
        axis.set(title=metric, xlabel="n_edits")
    axes[0].legend(fontsize=8)
    figure.savefig(out / "wandb-curves.png", dpi=80)

    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    for number, (name, found) in enumerate(editors.items()):
        colour = f"C{number}"
        ages = []
        for folder, result in found:
            ages += err_by_age(folder, int(result.metrics["n_edits"]))
        _band(axes[0], pd.DataFrame(ages, columns=["age", "ERR"]), "age", "ERR", name, colour)
        seconds = [result.cost.seconds_per_edit_p50 for _, result in found]
        axes[1].scatter(seconds, [result.metrics["Avg"] for _, result in found], label=name, color=colour, s=18)
        for axis, metric in zip(axes[2:], OVERLAP, strict=True):
            _band(axis, metrics[name], "n_edits", metric, name, colour)
    axes[0].set(title="ERR by age of the edit", xlabel="age (edits made since)")
    axes[1].set(title="Avg by seconds an edit", xlabel="seconds (median)", xscale="log")
    for axis, metric in zip(axes[2:], OVERLAP, strict=True):
        axis.set(title=metric, xlabel="n_edits")
    axes[1].legend(fontsize=8)
    figure.savefig(out / "wandb-panels.png", dpi=80)


def _band(axis: plt.Axes, table: pd.DataFrame, x: str, y: str, name: str, colour: str) -> None:
    """Draws the mean over seeds with a band of one standard deviation on either side."""
    if y not in table:
        return
    over_seeds = table.dropna(subset=[y]).groupby(x)[y]
    mean, spread = over_seeds.mean(), over_seeds.std().fillna(0.0)
    axis.plot(mean.index, mean, label=name, color=colour)
    axis.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
