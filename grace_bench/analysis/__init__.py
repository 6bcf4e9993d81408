"""Finished runs compared: leaderboard, significance, report and figures, from run folders alone."""
