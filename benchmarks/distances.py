"""Runs GRACE with every distance and overlap policy on the embedded streams, and prints the scores.

    python benchmarks/distances.py

A radius means something else in each distance, so `eps_init` is chosen for each on the stream's validation split, with
the published overlap and the same number of runs, as `sweep=tune` chooses; both policies then get that radius,
and the third of those tried, at which balls meet. Everything else is the stream's tuned setting. Finished runs are
reused; the runs by which a radius was chosen are in `OUT/tuning`, the others in `OUT/runs`.
"""

import argparse
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from rich.console import Console

from grace_bench.common.processes import side_by_side
from grace_bench.launch.compose import compose
from grace_bench.launch.run_folder import run_or_reuse
from grace_bench.launch.tuning import quality
from grace_bench.results.schema import RunResult

RADII = {
    "euclidean": [0.5, 1.0, 3.0, 6.0],
    "cosine": [0.003, 0.01, 0.03, 0.1],
    "mahalanobis": [0.5, 1.0, 3.0, 6.0],
}
"""The same number for each distance, from a fraction of the distance between edits to about all of it."""
POLICIES = ["allow", "shrink"]
COLUMNS = {
    "TRR": "TRR",
    "ERR": "ERR",
    "Holdout": "Holdout",
    "n_keys": "keys",
    "codebook_overlap": "pairs of balls that overlap",
    "codebook_overlap/queries": "queries in two balls",
}


def main() -> None:
    """Makes the runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", default=["atlas-qa", "atlas-drift", "atlas-text"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--validation-edits", type=int, default=100)
    parser.add_argument("--jobs", type=int, help="parallel runs (default: the number of cores)")
    parser.add_argument("--out", type=Path, default=Path("runs/distances"))
    options = parser.parse_args()
    trials = [
        (stream, distance, "allow", radius, 0, "validation")
        for stream, (distance, radii) in product(options.streams, RADII.items())
        for radius in radii
    ]
    tried = side_by_side(
        partial(run, out=options.out / "tuning", n_edits=options.validation_edits), trials, jobs=options.jobs
    )
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for (stream, distance, _, radius, *_), result in zip(trials, tried, strict=True):
        found = quality(result), radius
        # On ties the smallest radius wins.
        if (stream, distance) not in best or found[0] > best[stream, distance][0]:
            best[stream, distance] = found
    settings = [
        (stream, distance, policy, radius)
        for stream, (distance, radii) in product(options.streams, RADII.items())
        for radius in sorted({best[stream, distance][1], radii[2]})
        for policy in POLICIES
    ]
    runs = [(*setting, seed, "edits") for setting, seed in product(settings, options.seeds)]
    results = side_by_side(partial(run, out=options.out / "runs", n_edits=options.edits), runs, jobs=options.jobs)
    print("| stream | distance | overlap | eps_init | edits | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|---|---|" + "--:|" * (len(COLUMNS) + 2))
    n_seeds = len(options.seeds)
    for number, (stream, distance, policy, radius) in enumerate(settings):
        same = results[number * n_seeds : (number + 1) * n_seeds]
        shown = f"{radius:g} (chosen)" if radius == best[stream, distance][1] else f"{radius:g}"
        cells = [spread(same, name) for name in ("n_edits", *COLUMNS)]
        print(f"| {stream} | {distance} | {policy} | {shown} | " + " | ".join(cells) + " |")


def run(which: tuple[str, str, str, float, int, str], *, out: Path, n_edits: int) -> RunResult:
    """Makes one run, or reuses a finished one."""
    stream, distance, policy, radius, seed, split = which
    config = compose(
        [
            f"stream={stream}",
            "editor=grace",
            f"editor.distance={distance}",
            f"editor.overlap={policy}",
            f"editor.eps_init={radius}",
            f"seed={seed}",
            f"split={split}",
            f"max_edits={n_edits}",
            f"eval_every={n_edits}",
            "wandb.mode=disabled",
            f"tuning_budget={'null' if split == 'validation' else f'{len(RADII[distance])} validation runs'}",
        ]
    )
    config = replace(config, out=str(out))
    return run_or_reuse(config, say=lambda line: None, console=Console(stderr=True, force_terminal=False, quiet=True))


def spread(results: list[RunResult], name: str) -> str:
    """Returns the mean of a metric over seeds, with the sample standard deviation if there are several."""
    values = [value for result in results if (value := result.metrics.get(name)) is not None]
    if not values:
        return "–"
    digits = 0 if name.startswith("n_") else 3
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) == 1 or stdev(values) == 0 else f"{mean} ± {stdev(values):.{digits}f}"


if __name__ == "__main__":
    main()
