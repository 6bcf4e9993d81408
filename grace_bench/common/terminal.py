"""Terminal output: lines, tables and progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console
from rich.markup import escape

from grace_bench.common.progress import Progress
from grace_bench.common.text import visible


def say(text: str) -> None:
    """Prints lines on standard output, with terminal control characters shown as escapes."""
    print("\n".join(map(visible, text.split("\n"))), flush=True)


@contextmanager
def progress_bars(console: Console | None = None) -> Iterator[Progress]:
    """Yields a progress callback that shows bars, on standard error by default, while a step is under way."""
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
    """Returns a console for tables on standard output; without a terminal it is 160 columns wide."""
    console = _TableConsole()
    # rich assumes 80 columns for a pipe or a file, which would cut tables.
    return console if console.is_terminal else _TableConsole(width=160)


class _TableConsole(Console):
    def on_broken_pipe(self) -> None:
        """Re-raises for the command line, which does not treat a closed pipe as a failure."""
        raise
