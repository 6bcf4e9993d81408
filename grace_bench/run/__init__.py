"""One run: opening it, the loop, checkpoints and loggers."""
