"""The progress of a run, in the terminal."""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grace_bench.common.text import visible
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.results.schema import EditRecord, EvaluationRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan


class ProgressLogger(RunLogger):
    """Shows edits made, ES so far, keys and the time left: a bar in a terminal, elsewhere a plain line an evaluation.

    Args:
        console: Where to write; standard error by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._console = console or Console(stderr=True)
        self._live: Progress | None = None
        self._values: dict[str, Any] = {}
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
        if record.n_keys is not None:
            self._values["n_keys"] = record.n_keys
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
            scores = [
                f"{name} {record.metrics[name]:.3f}" for name in ("TRR", "ERR", "Holdout") if name in record.metrics
            ]
            parts = [f"{self._done}/{self._total}", self._note, *scores]
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
        parts = [f"{self._n_edits} edits"]
        if "ES" in self._values:
            parts.append(f"ES {self._values['ES']:.3f}")
        if "n_keys" in self._values:
            parts.append(f"{self._values['n_keys']} keys")
        return ", ".join(parts)

    @property
    def _time_left(self) -> str:
        assert self._plan is not None
        share = max(self._done / self._total, self._n_candidates / max(1, self._plan.n_candidates))
        if not 0 < share < 1:
            return ""
        return f", about {(time.monotonic() - self._started) / share * (1 - share):.0f} s left"
