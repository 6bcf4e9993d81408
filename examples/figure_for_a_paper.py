# %% [markdown]
# # A figure for a paper
#
# Retention of edits and of earlier knowledge over the number of edits, with the spread over seeds, in one column's
# width. `grace-bench figure curves RUNS --out FOLDER` draws curves with no code; this is the way to a figure of your
# own.

# %%
import tempfile
from functools import partial
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from grace_bench import EditableModel, RunSettings, Schedule, run_benchmark
from grace_bench.editors import FineTune, Grace
from grace_bench.results.reading import read_evaluations

folder = Path(tempfile.mkdtemp())
EDITORS = {
    "GRACE": partial(Grace, eps_init=0.5, replacement="replace_last"),
    "fine-tuning": partial(FineTune, lr=0.003),
}
SEEDS = range(2)
schedule = Schedule(max_edits=15, eval_every=5, max_upstream=30)
layer = "model.layers.2.mlp.down_proj"
model = EditableModel.from_pretrained("atlas-facts", layer=layer, task="completion", device="cpu")
for name, editor in EDITORS.items():
    for seed in SEEDS:
        settings = RunSettings(seed=seed, schedule=schedule)
        run_benchmark("atlas-facts", editor=editor, model=model, settings=settings, folder=folder / f"{name}-{seed}")

# %% [markdown]
# An evaluation has `n_edits` and the metrics by name. ERR has no value before the first edit.

# %%
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
}
METRICS = {"ERR": "edits retained (F1)", "TRR": "earlier knowledge retained (F1)"}
with plt.rc_context(STYLE):
    figure, axes = plt.subplots(1, 2, figsize=(3.4, 1.7), sharey=True, layout="constrained")
    for axis, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for name in EDITORS:
            runs = [read_evaluations(folder / f"{name}-{seed}" / "metrics.jsonl") for seed in SEEDS]
            points = [[(line.n_edits, line.metrics[metric]) for line in run if metric in line.metrics] for run in runs]
            n_edits, values = np.array(points).transpose(2, 0, 1)
            axis.plot(n_edits[0], values.mean(axis=0), label=name)
            axis.fill_between(n_edits[0], values.min(axis=0), values.max(axis=0), alpha=0.2, linewidth=0)
        axis.set(xlabel="edits", title=label, ylim=(0, 1.03))
        axis.title.set_size(7)
    axes[0].legend(loc="lower left")
    figure.savefig(folder / "retention.pdf")
    figure.savefig(folder / "retention.png", dpi=200)
print(folder / "retention.pdf")
