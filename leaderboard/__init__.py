"""Finished runs that ship with the package: `grace-bench leaderboard RUNS --reference` ranks others among them."""
