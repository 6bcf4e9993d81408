"""The base classes of metrics, and the rescoring of requests after edits."""
