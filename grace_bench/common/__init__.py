"""Helpers that every room uses and that need no model: options, files, text, terminal, locks, signals."""
