"""Loggers: views of a run, each a subclass of Avalanche's `BaseLogger`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_bench.data.avalanche import BaseLogger
from grace_bench.results.schema import RunResult


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a logger may know of a run before it starts.

    Attributes:
        run_id: The run's name.
        folder: The run folder, None if the run leaves no files.
        config: The resolved configuration.
        stream, model, editor: Names.
        n_candidates: Requests in the stream.
        max_edits: Where the run stops, None for the stream's end.
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
    """A logger that also hears when a run starts and ends.

    Beside Avalanche's experience-level callbacks it may implement `after_candidate(strategy, metric_values)`.
    """

    def state_dict(self) -> dict[str, Any]:
        """Returns what the logger needs to go on in another process, as JSON values; asked for at every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `state_dict`; called before `start` where a run goes on from a checkpoint."""

    def start(self, plan: RunPlan) -> None:
        """Called once, before the first evaluation."""

    def finish(self, result: RunResult | None) -> None:
        """Called at the end, once or again; the result is None if the run failed."""
