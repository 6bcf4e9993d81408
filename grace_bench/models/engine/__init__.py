"""Engines: replay from the edited layer on, and passes pruned to the scored positions."""
