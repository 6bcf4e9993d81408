"""The type of progress callbacks."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`, called repeatedly during a long step."""
