"""Where tables are printed."""

from rich.console import Console


def table_console() -> Console:
    """Returns a console for tables on standard output, wide where no terminal limits it."""
    console = _TableConsole()
    # Nobody reads a pipe or a file at 80 columns.
    return console if console.is_terminal else _TableConsole(width=160)


class _TableConsole(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the command line, where a reader that has read enough is no failure."""
        raise
