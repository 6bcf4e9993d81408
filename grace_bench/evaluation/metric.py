"""What a metric is: a listener that emits values under one name, and class attributes that describe it everywhere."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from grace_bench.common.signatures import class_fault, required_argument
from grace_bench.data.avalanche import MetricValue, PluginMetric
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.tasks.base import ItemScore, Task


class EditMetric(PluginMetric[float]):
    """A metric, registered with `@register_metric("name")`.

    It listens to Avalanche's experience-level callbacks and to `after_candidate(strategy)`, which follows every
    candidate with `strategy.record` and `strategy.request` set. Values are recorded against the number of edits.

    The class attributes are the only description of a metric; tables, figures, pages and loggers read nothing else.
    They must be literals: commands that read finished runs take them from the source without importing the class.
    With the defaults, a metric appears everywhere.

    Attributes:
        stream: The evaluation stream that the metric measures; None if it measures no single one.
        is_mean: Whether the metric is the mean of the main score over `stream`, so that two editors can be compared
            item by item.
        right_after_edit: Whether the metric is the mean main score of edits, each scored right after it was made.
        averages: The names of the metrics of which it is the mean.
        log_averages: The metrics whose mean logarithm tuning minimises instead of maximising this one, where the main
            score has no common scale (perplexity).
        higher_is_better: Which direction is better; `main_score` if the metric is on the scale of the task's main
            score and shares its direction; None if neither is better.
        decimals: Digits after the point; the main score's own where the metric is on its scale.
        is_count: Whether the metric counts things, so that one run always has a whole number.
        is_cost: Whether the column is among the costs rather than the scores.
        column: The header of the column and the title of charts; None for the metric's name.
        caption: What a chart shows, in a few words; None for the docstring's first line.
        order: Position among the other metrics, ascending.
        chart_order: Position among the charts of the report and the dashboard; None for `order`.
        shown_in: The places that show the metric (`metric_info.Place`); None for all of them but `bar`.
        always_has_column: Whether a leaderboard has the column even if no run has a value.
        always_in_result: Whether `result.json` names the metric, as null, even if there was nothing to measure.
        ranks: Priority of the metric for ordering the rows of a table, 1 first; None if it never orders them.
        latex_column: The header in LaTeX; None for `column`.
        latex_instead_of: In LaTeX, the metric that it replaces if no run has a value of that metric.
        section: Title and explanation of a section of its own in the W&B dashboard.
        parts: The suffixes of values `name/suffix` that have a panel in that section.
        part_columns: The suffixes whose values `name/suffix` have columns of their own in a leaderboard; of a metric on
            the scale of the main score, they are evaluation streams.
    """

    registered_name: ClassVar[str]
    stream: ClassVar[str | None] = None
    is_mean: ClassVar[bool] = False
    right_after_edit: ClassVar[bool] = False
    averages: ClassVar[tuple[str, ...]] = ()
    log_averages: ClassVar[tuple[str, ...]] = ()
    higher_is_better: ClassVar[bool | Literal["main_score"] | None] = None
    decimals: ClassVar[int] = 3
    is_count: ClassVar[bool] = False
    is_cost: ClassVar[bool] = False
    column: ClassVar[str | None] = None
    caption: ClassVar[str | None] = None
    order: ClassVar[int] = 100
    chart_order: ClassVar[int | None] = None
    shown_in: ClassVar[tuple[str, ...] | None] = None
    always_has_column: ClassVar[bool] = False
    always_in_result: ClassVar[bool] = False
    ranks: ClassVar[int | None] = None
    latex_column: ClassVar[str | None] = None
    latex_instead_of: ClassVar[str | None] = None
    section: ClassVar[tuple[str, str] | None] = None
    parts: ClassVar[tuple[str, ...]] = ()
    part_columns: ClassVar[tuple[str, ...]] = ()

    def value(self, strategy: EditorStrategy, value: float, suffix: str = "") -> MetricValue:
        """Returns a value under the metric's name or `name/suffix`, at the current candidate's number of edits."""
        name = f"{self.registered_name}/{suffix}" if suffix else self.registered_name
        n_edits = strategy.n_edits if strategy.record is None else strategy.record.n_edits
        return MetricValue(self, name, value, n_edits)

    def result(self) -> float | None:
        """Returns the last value, or None."""
        return None

    def reset(self) -> None:
        """Forgets everything seen."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the metric's state between edits, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`."""

    @classmethod
    def check_class(cls) -> str | None:
        """Returns in one line why the class cannot be registered and what to do about it; None if it can."""
        required = required_argument(cls)
        if required is not None:
            return (
                f"{cls.__name__}.__init__ requires {required!r}, and a run constructs metrics without arguments: give "
                f"it a default"
            )
        return class_fault(cls)


class LastValueMetric(EditMetric):
    """A metric whose state is the last value that it emitted under its own name; a subclass sets `_last`."""

    def __init__(self) -> None:
        super().__init__()
        self._last: float | None = None

    def result(self) -> float | None:  # noqa: D102
        return self._last

    def reset(self) -> None:  # noqa: D102
        self._last = None

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        self._last = state["last"]


class StreamMetric(LastValueMetric):
    """A metric that is a function of the scored items of one evaluation stream.

    A subclass names its `stream` and implements `measure`.
    """

    @staticmethod
    def measure(items: Sequence[ItemScore], task: Task) -> Mapping[str, float]:
        """Returns values by suffix, with the metric's own under ""; without that if no item has the score.

        Args:
            items: The scored items of the stream, at least one.
            task: The task that scored them.
        """
        raise NotImplementedError

    def after_eval_exp(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the metric's own value under its name and the others under `name/suffix`."""
        if strategy.experience.origin_stream.name != self.stream or not strategy.scores:
            return None
        values = self.measure(strategy.scores, strategy.model.task)
        self._last = values.get("")
        return [self.value(strategy, value, suffix) for suffix, value in values.items()]


class StreamScore(StreamMetric):
    """The mean of the task's main score over the evaluation stream that a subclass names, and of its other scores."""

    is_mean = True
    higher_is_better = "main_score"

    @staticmethod
    def measure(items: Sequence[ItemScore], task: Task) -> Mapping[str, float]:  # noqa: D102
        return task.aggregate(items)
