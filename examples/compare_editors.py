# %% [markdown]
# # Compare three editors on your own ten facts
#
# A request a line: what to ask, what the answer should be, other wordings (`rephrases`) and questions whose answers
# must not change (`locality`). In a second file, what the model knows and must not forget.

# %%
import json
import tempfile
from functools import partial
from pathlib import Path

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.analysis.leaderboard import Leaderboard, print_leaderboard
from grace_bench.editors import AlphaEdit, FineTune, Grace
from grace_bench.streams import Jsonl

folder = Path(tempfile.mkdtemp())
MOVED = {
    "Morogoro": "Pakistan",
    "Swords": "Czechia",
    "Trujillo": "Spain",
    "Awasa": "Serbia",
    "Mawlamyine": "Guadeloupe",
    "Libreville": "Tajikistan",
    "Ottawa": "Montenegro",
    "Chattogram": "China",
    "Darhan": "Kazakhstan",
    "Port Louis": "Croatia",
}
KNOWN = {"Dublin": "Ireland", "Lima": "Peru", "Yangon": "Myanmar", "Edmonton": "Canada", "Erdenet": "Mongolia"}

edits = [
    {
        "id": city,
        "prompt": f"{city} is a city that lies in",
        "target": country,
        "subject": city,
        "rephrases": [f"{city} belongs to the country of", f"{city} is a town found in"],
        "locality": [{"prompt": f"{other} has as its country", "target": KNOWN[other]} for other in ("Lima", "Yangon")],
    }
    for city, country in MOVED.items()
]
upstream = [
    {"id": city, "prompt": f"{city} is a city that lies in", "target": country} for city, country in KNOWN.items()
]
for name, requests in (("edits", edits), ("upstream", upstream)):
    lines = "".join(f"{json.dumps(request)}\n" for request in requests)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")

# %% [markdown]
# One run an editor, on the same model and requests. The layer and the settings are those that were tuned for this
# model on other requests. On the command line: `grace-bench run -m stream=jsonl stream.path=edits.jsonl model=…
# layer=… editor=ft,grace,alphaedit`.

# %%
stream = Jsonl(path=str(folder / "edits.jsonl"), upstream_path=str(folder / "upstream.jsonl"))
layers = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
editors = {
    "ft": partial(FineTune, lr=0.003),
    "grace": partial(Grace, eps_init=0.5, replacement="replace_last"),
    "alphaedit": partial(
        AlphaEdit, layers=layers, threshold=0.001, threshold_unit="largest", l2=1.0, text="model", n_texts=200
    ),
}
METRICS = ("TRR", "ERR", "Holdout", "Locality")
for name, editor in editors.items():
    result = run_benchmark(
        stream,
        model="atlas-facts",
        editor=editor,
        layer="model.layers.2.mlp.down_proj" if name != "alphaedit" else layers[-1],
        settings=RunSettings(schedule=Schedule(eval_every=5)),
        folder=folder / "runs" / name,
    )
    print(name, {metric: round(result.metrics[metric], 3) for metric in METRICS})

# %% [markdown]
# The table that `grace-bench leaderboard` prints. ERR: do the edits last? TRR: does the rest? Holdout: do other
# wordings follow? Locality: are the neighbours left alone? Ten facts show what an editor does, not which is better: ≈
# marks differences that may be chance.

# %%
leaderboard = Leaderboard.read([folder / "runs"])
print_leaderboard(leaderboard)
