"""Runs every editor on the embedded streams with several seeds, in parallel, and prints the tables.

    python benchmarks/table.py

Editors are meta-trained first where they need it. Finished runs are reused, so an interrupted table can be resumed.
"""

import argparse
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

from rich.console import Console

from grace_bench.analysis.leaderboard import Leaderboard, print_leaderboard
from grace_bench.common.processes import side_by_side
from grace_bench.launch.compose import compose
from grace_bench.launch.meta_training import meta_train_editor
from grace_bench.launch.run_folder import folder_of, run_or_reuse
from grace_bench.registry import EDITORS, STREAMS


def main() -> None:
    """Makes the runs and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", nargs="+", default=["atlas-qa", "atlas-drift", "atlas-text"])
    parser.add_argument("--editors", nargs="+", default=list(EDITORS.entries()))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--jobs", type=int, help="parallel runs (default: the number of cores)")
    parser.add_argument("--out", type=Path, default=Path("runs"))
    options = parser.parse_args()
    pairs = [
        (stream, editor)
        for stream, editor in product(options.streams, options.editors)
        if STREAMS.get(stream).task in EDITORS.get(editor).supported_tasks
    ]
    learners = [pair for pair in pairs if EDITORS.get(pair[1]).needs_meta_training]
    side_by_side(meta_train, learners, jobs=options.jobs)
    runs = [(*pair, seed) for pair, seed in product(pairs, options.seeds)]
    folders = side_by_side(partial(run, out=str(options.out), n_edits=options.edits), runs, jobs=options.jobs)
    print_leaderboard(Leaderboard.read(folders), "markdown")


def meta_train(pair: tuple[str, str]) -> None:
    """Meta-trains an editor for a stream, unless it already is."""
    stream, editor = pair
    meta_train_editor(compose([f"stream={stream}", f"editor={editor}"]), say=lambda line: None)


def run(which: tuple[str, str, int], *, out: str, n_edits: int) -> Path:
    """Makes one run, or reuses a finished one, and returns its folder."""
    stream, editor, seed = which
    config = compose([f"stream={stream}", f"editor={editor}", f"seed={seed}", f"max_edits={n_edits}"])
    config = replace(config, out=out)
    run_or_reuse(config, say=lambda line: None, console=Console(stderr=True, force_terminal=False))
    return folder_of(config)


if __name__ == "__main__":
    main()
