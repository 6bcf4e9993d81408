"""From a command line to runs: configuration, sweeps, tuning, plans and checks."""
