"""The progress of a run, in the terminal."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grace_bench.common.text import visible
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.results.metric_info import MetricInfo, metric_infos
from grace_bench.results.schema import EditRecord, EvaluationRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan


class ProgressLogger(RunLogger):
    """Shows the edits made, the metrics so far and the time left: a bar in a terminal, elsewhere a line an evaluation.

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
        self._n_edits = 0
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

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Moves the bar, and warns about the first failed edit."""
        record = strategy.record
        assert record is not None
        self._values |= {metric.name: metric.value for metric in metric_values}
        for info in self._beside_bar:
            # The record may hold a newer value than the last evaluation.
            value = getattr(record, info.name, None)
            if value is not None:
                self._values[info.name] = value
        self._n_candidates, self._n_edits = record.index + 1, record.n_edits
        if record.failed is not None and not self._has_warned:
            self._has_warned = True
            self._warn(record)
        if self._live is not None:
            self._live.update(self._task, completed=self._done, note=self._note)

    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Writes a line where there is no bar."""
        self._values |= record.metrics
        self._n_edits = record.n_edits
        if self._live is None:
            parts = [f"{self._done}/{self._total}", self._note, *_texts(self._in_line, record.metrics)]
            self._console.print(
                f"{self._title}: {', '.join(parts)}{self._time_left}",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )

    def finish(self, result: RunResult | None) -> None:  # noqa: D102
        if self._live is not None:
            if result is not None:
                # A stream may end before `max_edits` are made.
                self._live.update(self._task, total=self._live.tasks[self._task].completed)
            self._live.stop()

    def _warn(self, record: EditRecord) -> None:
        warning = f"edit {record.n_edits} (request '{record.id}') failed and was undone: {record.failed}"
        self._console.print(visible(f"{self._title}: {warning}"), highlight=False, soft_wrap=True, markup=False)

    @property
    def _title(self) -> str:
        assert self._plan is not None
        return visible(f"{self._plan.editor} on {self._plan.stream}")

    @property
    def _total(self) -> int:
        assert self._plan is not None
        return self._plan.max_edits or self._plan.n_candidates

    @property
    def _done(self) -> int:
        assert self._plan is not None
        return self._n_edits if self._plan.max_edits else self._n_candidates

    @property
    def _note(self) -> str:
        return ", ".join([f"{self._n_edits} edits", *_texts(self._beside_bar, self._values)])

    @property
    def _time_left(self) -> str:
        assert self._plan is not None
        share = max(self._done / self._total, self._n_candidates / max(1, self._plan.n_candidates))
        if not 0 < share < 1:
            return ""
        return f", about {(time.monotonic() - self._started) / share * (1 - share):.0f} s left"


def _texts(metrics: Iterable[MetricInfo], values: Mapping[str, Any]) -> list[str]:
    known = [(info, info.text(values[info.name])) for info in metrics if info.name in values]
    return [f"{text} {info.header}" if info.is_count else f"{info.name} {text}" for info, text in known]
