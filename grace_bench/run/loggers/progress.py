"""The progress of a run in the terminal."""

import time
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grace_bench.common.text import visible
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.results.metric_info import MetricInfo, metric_infos
from grace_bench.results.schema import EditRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan


class ProgressLogger(RunLogger):
    """Shows the edits made, the metrics so far and the time left; without a terminal, one plain line per evaluation.

    Args:
        console: Where to write; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._values: dict[str, Any] = {}
        metrics = metric_infos()
        self._beside_bar = metrics.shown("bar")
        self._in_line = [info for info in metrics.shown("progress") if not info.shown("bar")]
        self._plan: RunPlan | None = None
        self._started = 0.0
        self._n_candidates = 0
        self._has_warned = False

    def start(self, plan: RunPlan) -> None:  # noqa: D102
        self._plan, self._started = plan, time.monotonic()
        if self._console.is_terminal:
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._live.start()
            self._task = self._live.add_task(escape(self._title), total=self._total, note="scoring the unedited model")

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:  # noqa: D102
        self._values[name] = value

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Moves the bar, and warns of the first edit that failed."""
        assert strategy.record is not None
        for info in self._beside_bar:
            # The record may hold a newer value than the last evaluation.
            value = getattr(strategy.record, info.name, None)
            if value is not None:
                self._values[info.name] = value
        self._n_candidates = strategy.record.index + 1
        if strategy.record.failed is not None and not self._has_warned:
            self._has_warned = True
            self._warn(strategy.record)
        if self._live is not None:
            self._live.update(self._task, completed=self._done(strategy), note=self._note(strategy))

    def after_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Prints a line if there is no bar."""
        if self._live is None:
            parts = [f"{self._done(strategy)}/{self._total}", self._note(strategy), *self._texts(self._in_line)]
            self._console.print(
                f"{self._title}: {', '.join(parts)}{self._time_left(strategy)}",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        if self._live is not None:
            if result is not None:
                # A stream may end before the most edits are made.
                self._live.update(self._task, total=self._live.tasks[self._task].completed)
            self._live.stop()

    def _warn(self, record: EditRecord) -> None:
        warning = f"edit {record.n_edits} (request '{record.id}') failed and was taken back: {record.failed}"
        self._console.print(visible(f"{self._title}: {warning}"), highlight=False, soft_wrap=True, markup=False)

    @property
    def _title(self) -> str:
        assert self._plan is not None
        return visible(f"{self._plan.editor} on {self._plan.stream}")

    @property
    def _total(self) -> int:
        assert self._plan is not None
        return self._plan.max_edits or self._plan.n_candidates

    def _done(self, strategy: EditorStrategy) -> int:
        assert self._plan is not None
        return strategy.n_edits if self._plan.max_edits else self._n_candidates

    def _note(self, strategy: EditorStrategy) -> str:
        return ", ".join([f"{strategy.n_edits} edits", *self._texts(self._beside_bar)])

    def _texts(self, metrics: Iterable[MetricInfo]) -> list[str]:
        known = [(info, info.text(self._values[info.name])) for info in metrics if info.name in self._values]
        return [f"{text} {info.header}" if info.is_count else f"{info.name} {text}" for info, text in known]

    def _time_left(self, strategy: EditorStrategy) -> str:
        assert self._plan is not None
        share = max(self._done(strategy) / self._total, self._n_candidates / max(1, self._plan.n_candidates))
        if not 0 < share < 1:
            return ""
        return f", about {(time.monotonic() - self._started) / share * (1 - share):.0f} s left"
