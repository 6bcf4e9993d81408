"""Where tables are printed."""

from rich.console import Console


def table_console() -> Console:
    """Returns a console for tables on standard output, wide where no terminal limits it."""
    console = Console()
    # Nobody reads a pipe or a file at 80 columns.
    return console if console.is_terminal else Console(width=160)
