"""The private parts of SERAC: its networks, their training, and the replay of recordings."""
