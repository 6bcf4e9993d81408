"""Loggers: views of a run, each a subclass of Avalanche's `BaseLogger`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_bench.common.append_only import AppendOnlyFile
from grace_bench.data.avalanche import BaseLogger
from grace_bench.results.schema import EvaluationRecord, RunResult


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The description of a run that loggers receive before it starts.

    Attributes:
        run_id: The run's name.
        folder: The run folder, None if the run leaves no files.
        config: The resolved configuration.
        stream, model, editor: Names.
        n_candidates: Requests in the stream.
        max_edits: The number of edits after which the run stops, None for the whole stream.
        higher_is_better: Direction of the main score.
    """

    run_id: str
    folder: Path | None
    config: dict[str, Any] = field(default_factory=dict)
    stream: str
    model: str
    editor: str
    n_candidates: int
    max_edits: int | None
    higher_is_better: bool


class RunLogger(BaseLogger):
    """A logger that is also called at the start of a run, with the record of every evaluation, and at the end.

    It may also implement Avalanche's experience-level callbacks and `after_candidate(strategy, metric_values)`.
    """

    @property
    def files(self) -> Sequence[AppendOnlyFile]:
        """The files below the run folder that the logger appends to; a resumed run cuts them back to its checkpoint."""
        return ()

    def start(self, plan: RunPlan) -> None:
        """Called once, before the first evaluation; opens the logger's files."""

    # A name that begins with `after_` would be a callback of Avalanche's.
    def log_evaluation(self, record: EvaluationRecord) -> None:
        """Called after every evaluation, in the order of the stream."""

    def finish(self, result: RunResult | None) -> None:
        """Called at the end, possibly more than once; the result is None if the run failed."""
