"""Edit success: whether an edit worked, right after it was made."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grace_bench.common.scores import score_info
from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import EditMetric
from grace_bench.models.tasks.base import ItemScore, Task
from grace_bench.registry import register_metric


class RunningMean:
    """The mean of the numbers seen so far; NaN is left out and counted.

    >>> mean = RunningMean()
    >>> mean.update(1.0); mean.update(0.0); mean.update(float("nan"))
    >>> mean.compute(), mean.n_nan
    (0.5, 1)
    """

    def __init__(self) -> None:
        self.total, self.count, self.n_nan = 0.0, 0, 0

    def update(self, value: float) -> None:
        """Adds one number."""
        if math.isnan(value):
            self.n_nan += 1
        else:
            self.total += value
            self.count += 1

    def compute(self) -> float:
        """Returns the mean; NaN before the first number."""
        return self.total / self.count if self.count else math.nan


class RunningPanel:
    """All scores of the items seen so far; NaN is left out.

    Args:
        sums: The weighted sum and the sum of weights by score, from `state_dict`.
    """

    def __init__(self, sums: Mapping[str, Sequence[float]] | None = None) -> None:
        self._sums = {name: (float(total), float(weight)) for name, (total, weight) in (sums or {}).items()}

    def update(self, items: Sequence[ItemScore], task: Task, *, stream: str) -> None:
        """Adds items of an evaluation stream."""
        for item in items:
            columns = task.columns(item, stream=stream)
            for name in task.panel:
                info = score_info(name)
                value = columns.get(info.column, math.nan)
                if name in task.scores and not math.isnan(value):
                    part, weight = info.part(value, item.n_tokens)
                    total, weights = self._sums.get(name, (0.0, 0.0))
                    self._sums[name] = total + part * weight, weights + weight

    def compute(self) -> dict[str, float]:
        """Returns the scores by name."""
        return {
            name: score_info(name).of_mean(total / weight) for name, (total, weight) in self._sums.items() if weight
        }

    def state_dict(self) -> dict[str, list[float]]:
        """Returns the sums as JSON values."""
        return {name: list(sums) for name, sums in self._sums.items()}


@register_metric("ES")
class EditSuccess(EditMetric):
    """ES: the mean of the main score right after each edit so far (Hartvigsen et al. 2023, section 4.2).

    With `score_after=all`, `ES/holdout`, `ES/locality` and `ES/portability` are the means over the other wordings and
    the probes of each edit, scored at the same time.
    """

    right_after_edit = True
    higher_is_better = "main_score"
    caption = "each edit right after it was made"
    order = 40
    always_has_column = True
    shown_in = ("table", "report", "bar", "curves", "summary", "tuning", "dashboard")

    def __init__(self) -> None:
        super().__init__()
        self._mean = RunningMean()
        self._panels: dict[str, RunningPanel] = {}

    def after_candidate(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Adds an edit's scores and emits the mean of the main one."""
        record = strategy.record
        if record is None or not record.edited:
            return None
        self._mean.update(math.nan if record.score_after is None else record.score_after)
        for stream, items in strategy.scored_after.items():
            self._panels.setdefault(stream, RunningPanel()).update(items, strategy.model.task, stream=stream)
        return self._values(strategy)

    def after_eval(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the mean again, so that every evaluation has it, with the other scores and streams."""
        if not self._mean.count and not self._mean.n_nan:
            return None
        return [*self._values(strategy), *self._others(strategy)]

    def _values(self, strategy: EditorStrategy) -> list[MetricValue]:
        values = [self.value(strategy, self._mean.compute())]
        if self._mean.n_nan:
            values.append(self.value(strategy, self._mean.n_nan, "n_nan"))
        return values

    def _others(self, strategy: EditorStrategy) -> list[MetricValue]:
        """The other scores as `ES/score`; those of other streams as `ES/stream` and `ES/stream/score`."""
        values = []
        for stream, panel in self._panels.items():
            main = strategy.model.task.main_of(stream)
            for name, value in panel.compute().items():
                parts = [*(() if stream == "edited" else (stream,)), *(() if name == main else (name,))]
                if parts:
                    values.append(self.value(strategy, value, "/".join(parts)))
        return values

    def result(self) -> float | None:
        return self._mean.compute() if self._mean.count else None

    def reset(self) -> None:
        self._mean, self._panels = RunningMean(), {}

    def state_dict(self) -> dict[str, Any]:
        panels = {stream: panel.state_dict() for stream, panel in self._panels.items()}
        return {"total": self._mean.total, "count": self._mean.count, "n_nan": self._mean.n_nan, "panels": panels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean.total, self._mean.count, self._mean.n_nan = state["total"], state["count"], state["n_nan"]
        # Checkpoints made before other scores were emitted have none.
        self._panels = {stream: RunningPanel(sums) for stream, sums in state.get("panels", {}).items()}
