"""The parts of MELO: its clusters, its low-rank blocks, the replay of its recordings."""
