"""Edit success: whether an edit worked, right after it was made."""

import math
from collections.abc import Mapping
from typing import Any

from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.metric import EditMetric
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


@register_metric("ES")
class EditSuccess(EditMetric):
    """ES: the mean of the main score right after each edit so far (Hartvigsen et al. 2023, section 4.2)."""

    right_after_edit = True
    higher_is_better = "main_score"
    caption = "each edit right after it was made"
    order = 40
    always_has_column = True
    shown_in = ("table", "report", "bar", "curves", "summary", "tuning", "dashboard")

    def __init__(self) -> None:
        super().__init__()
        self._mean = RunningMean()

    def after_candidate(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Adds an edit's score and emits the mean."""
        record = strategy.record
        if record is None or not record.edited:
            return None
        self._mean.update(math.nan if record.score_after is None else record.score_after)
        return self._values(strategy)

    def after_eval(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the mean again, so that every evaluation has it."""
        return self._values(strategy) if self._mean.count or self._mean.n_nan else None

    def _values(self, strategy: EditorStrategy) -> list[MetricValue]:
        values = [self.value(strategy, self._mean.compute())]
        if self._mean.n_nan:
            values.append(self.value(strategy, self._mean.n_nan, "n_nan"))
        return values

    def result(self) -> float | None:
        return self._mean.compute() if self._mean.count else None

    def reset(self) -> None:
        self._mean = RunningMean()

    def state_dict(self) -> dict[str, Any]:
        return {"total": self._mean.total, "count": self._mean.count, "n_nan": self._mean.n_nan}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._mean.total, self._mean.count, self._mean.n_nan = state["total"], state["count"], state["n_nan"]
