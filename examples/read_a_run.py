# %% [markdown]
# # Read a run with pandas
#
# A run folder holds plain files: a line a candidate in `edits.jsonl`, a line an evaluation in `metrics.jsonl`, a row
# an answer in `predictions.parquet`, and `result.json`. `docs/run-folder.md` explains every column.

# %%
import json
import tempfile
from pathlib import Path

import pandas as pd

from grace_bench import RunSettings, Schedule, run_benchmark

folder = Path(tempfile.mkdtemp()) / "run"
settings = RunSettings(schedule=Schedule(max_edits=30, eval_every=10, max_upstream=100))
run_benchmark("atlas-facts", editor="ft", settings=settings, folder=folder)

# %% [markdown]
# What was kept, evaluation by evaluation.

# %%
curve = pd.read_json(folder / "metrics.jsonl", lines=True).set_index("n_edits")
print(curve[["TRR", "ERR", "Holdout", "Locality"]].round(3))

# %% [markdown]
# Which edits were lost? `score` is the main score of each answer; answers are recorded before the first edit and at
# the end.

# %%
edits = pd.read_json(folder / "edits.jsonl", lines=True, dtype={"id": str})
predictions = pd.read_parquet(folder / "predictions.parquet")
last = predictions[predictions.n_edits == predictions.n_edits.max()]
answers = last[last.stream == "edited"].set_index("request_id")
edits = edits.join(answers[["score", "text"]], on="id")
lost = edits[edits.edited & (edits.score_after == 1) & (edits.score < 1)]
print(f"{len(lost)} of {edits.edited.sum()} edits were right after the edit and are wrong at the end")
print(lost[["prompt", "target", "text"]].head().to_string(index=False))

# %% [markdown]
# Do older edits suffer more? And what did it cost?

# %%
edits["age"] = pd.cut(edits.n_edits.max() - edits.n_edits, [-1, 9, 19, 29], labels=["0–9", "10–19", "20–29"])
print(edits.groupby("age", observed=True).score.mean().round(3))
result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
print(f"{edits.seconds.median():.3f} s an edit, {edits.steps.median():.0f} steps")
