"""The first thing a new user runs: every editor on an embedded stream."""

from pathlib import Path

from grace_bench.jobs import compose, execute
from grace_bench.leaderboard import Leaderboard, print_leaderboard
from grace_bench.registry import EDITORS

_STREAM = "atlas-qa"


def demo(out: Path, *, n_edits: int) -> None:
    """Runs every registered editor on atlas-qa and prints the leaderboard.

    Args:
        out: Where run folders are made; finished runs there are reused.
        n_edits: Edits an editor makes.
    """
    results = []
    for editor in EDITORS.entries():
        config = compose([f"stream={_STREAM}", f"editor={editor}", f"max_edits={n_edits}"])
        # Not an override: a path may hold what the override grammar gives a meaning.
        config.out = str(out)
        results.append(execute(config, say=lambda line: None))
    print_leaderboard(Leaderboard(results))
    print(f"\nRun folders: {out}\nThe same table again: grace-bench leaderboard {out}")
