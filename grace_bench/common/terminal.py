"""Where tables are printed, and the bars of long steps."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.markup import escape

from grace_bench.common.progress import Progress
from grace_bench.common.text import visible


def say(text: str) -> None:
    """Prints lines on standard output; what steers a terminal is shown, not obeyed."""
    print("\n".join(map(visible, text.split("\n"))), flush=True)


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Progress]:
    """Gives what long steps report to: bars, on standard error by default, while some step is under way."""
    bars: dict[str, progress.TaskID] = {}
    finished: set[str] = set()
    display = progress.Progress(console=console or Console(stderr=True))

    def report(what: str, done: int, total: int) -> None:
        if what in finished and done >= total:
            return
        if what not in bars:
            finished.discard(what)
            bars[what] = display.add_task(escape(visible(what)), total=total)
            display.start()
        display.update(bars[what], completed=done, total=total)
        if display.finished:
            # Other displays may follow. A finished bar stays on the screen, so the next display must not draw it again.
            display.stop()
            for bar in bars.values():
                display.remove_task(bar)
            finished.update(bars)
            bars.clear()

    try:
        yield report
    finally:
        if display.live.is_started:
            display.stop()


def table_console() -> Console:
    """Returns a console for tables on standard output, wide where no terminal limits it."""
    console = _TableConsole()
    # Nobody reads a pipe or a file at 80 columns.
    return console if console.is_terminal else _TableConsole(width=160)


class _TableConsole(Console):
    def on_broken_pipe(self) -> None:
        """Leaves it to the command line, where a reader that has read enough is no failure."""
        raise
