"""Parts of UltraEdit: its normaliser, and the replay of recorded runs."""
