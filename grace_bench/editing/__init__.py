"""The contract of an editor, its safety net, and saving."""
