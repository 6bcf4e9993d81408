"""`EditMetric`: what a metric is, on Avalanche's `PluginMetric`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from grace_bench.common.signatures import class_fault, required_argument
from grace_bench.data.avalanche import MetricValue, PluginMetric
from grace_bench.editing.strategy import EditorStrategy


class EditMetric(PluginMetric[float]):
    """A metric plugin, registered with `@register_metric("name")`.

    It listens to Avalanche's experience-level callbacks and to `after_candidate(strategy)`, which follows every
    candidate with `strategy.record` and `strategy.request` set. One name a metric; the clock is the number of edits.

    Attributes:
        higher_is_better: Direction, or None where neither is better or the task decides.
    """

    registered_name: ClassVar[str]
    higher_is_better: ClassVar[bool | None] = None

    def value(self, strategy: EditorStrategy, value: float, suffix: str = "") -> MetricValue:
        """Returns a value under the metric's name or `name/suffix`, at the clock of the candidate at hand if any."""
        name = f"{self.registered_name}/{suffix}" if suffix else self.registered_name
        clock = strategy.n_edits if strategy.record is None else strategy.record.n_edits
        return MetricValue(self, name, value, clock)

    def result(self) -> float | None:
        """Returns the last value, or None."""
        return None

    def reset(self) -> None:
        """Forgets everything seen."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what the metric keeps between edits, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `state_dict`."""

    @classmethod
    def check_class(cls) -> str | None:
        """Returns in one line what keeps the class from being registered and what to do about it; None if nothing."""
        required = required_argument(cls)
        if required is not None:
            return (
                f"{cls.__name__}.__init__ requires {required!r}, and a run constructs metrics without arguments: give "
                f"it a default"
            )
        return class_fault(cls)


class StreamScore(EditMetric):
    """The task's scores on one evaluation stream.

    Attributes:
        stream: Name of the stream.
    """

    stream: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self._last: float | None = None

    def after_eval_exp(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the main score under the metric's name and the others under `name/score`."""
        if strategy.experience.origin_stream.name != self.stream or not strategy.scores:
            return None
        means = strategy.model.task.aggregate(strategy.scores)
        self._last = means[""]
        return [self.value(strategy, mean, suffix) for suffix, mean in means.items()]

    def result(self) -> float | None:  # noqa: D102
        return self._last

    def reset(self) -> None:  # noqa: D102
        self._last = None

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._last = state["last"]
