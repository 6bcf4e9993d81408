"""What every room uses and no model is needed for: options, files, text, terminal, locks, signals."""
