"""Loggers: views of a run, each a subclass of Avalanche's `BaseLogger`."""
