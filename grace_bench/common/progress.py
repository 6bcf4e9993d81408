"""How a long step reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`progress(what, done, total)`, called as a long step proceeds."""
