"""How a run is going, in the terminal."""

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grace_bench.common.text import visible
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.codebook import HasCodebook
from grace_bench.results.schema import EditRecord, RunResult
from grace_bench.run.loggers import RunLogger, RunPlan


class ProgressLogger(RunLogger):
    """Shows edits made, ES so far, keys and the time left; one plain line an evaluation if nobody is watching.

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
        """Moves the bar, and tells of the first edit that failed."""
        assert strategy.record is not None
        self._n_candidates = strategy.record.index + 1
        if strategy.record.failed is not None and not self._has_warned:
            self._has_warned = True
            self._warn(strategy.record)
        if self._live is not None:
            self._live.update(self._task, completed=self._done(strategy), note=self._note(strategy))

    def after_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        """Writes a line where there is no bar."""
        if self._live is None:
            scores = [f"{name} {self._values[name]:.3f}" for name in ("TRR", "ERR", "Holdout") if name in self._values]
            parts = [f"{self._done(strategy)}/{self._total}", self._note(strategy), *scores]
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
        told = f"edit {record.n_edits} (request '{record.id}') failed and was taken back: {record.failed}"
        self._console.print(visible(f"{self._title}: {told}"), highlight=False, soft_wrap=True, markup=False)

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
        parts = [f"{strategy.n_edits} edits"]
        if "ES" in self._values:
            parts.append(f"ES {self._values['ES']:.3f}")
        if isinstance(strategy, HasCodebook):
            parts.append(f"{len(strategy.codebook)} keys")
        return ", ".join(parts)

    def _time_left(self, strategy: EditorStrategy) -> str:
        assert self._plan is not None
        share = max(self._done(strategy) / self._total, self._n_candidates / max(1, self._plan.n_candidates))
        if not 0 < share < 1:
            return ""
        return f", about {(time.monotonic() - self._started) / share * (1 - share):.0f} s left"
