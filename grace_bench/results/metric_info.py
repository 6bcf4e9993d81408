"""The declarations of metric classes, read without importing torch.

Everything that shows or compares metrics uses these descriptions and knows no metric by name.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Literal

from grace_bench.common.scores import score_info
from grace_bench.errors import UserError
from grace_bench.registry import METRICS
from grace_bench.results.schema import Protocol

Place = Literal["table", "latex", "report", "curves", "progress", "bar", "summary", "tuning", "dashboard"]
"""Where a metric can be shown.

`table` the leaderboard with its CSV and JSON; `latex` its LaTeX; `report` the charts of the report; `curves` the panels
of `figure curves`; `progress` the line printed at an evaluation; `bar` the note beside the progress bar, which is also
the beginning of that line; `summary` the line printed at the end of a run; `tuning` the table of trials; `dashboard`
the W&B workspace.
"""

_DEFAULT_PLACES: frozenset[Place] = frozenset(
    ("table", "latex", "report", "curves", "progress", "summary", "tuning", "dashboard")
)


@dataclass(frozen=True, kw_only=True)
class MetricInfo:
    """A metric's class attributes, which `EditMetric` documents.

    Attributes:
        name: The registered name, as results have it.
        summary: The first line of the docstring, without the name.
    """

    name: str
    summary: str
    stream: str | None
    is_mean: bool
    right_after_edit: bool
    averages: tuple[str, ...]
    log_averages: tuple[str, ...]
    higher_is_better: bool | Literal["main_score"] | None
    decimals: int
    is_count: bool
    is_cost: bool
    column: str | None
    caption: str | None
    order: int
    chart_order: int | None
    shown_in: tuple[Place, ...] | None
    always_has_column: bool
    always_in_result: bool
    ranks: int | None
    latex_column: str | None
    latex_instead_of: str | None
    section: tuple[str, str] | None
    parts: tuple[str, ...]

    @property
    def header(self) -> str:
        """The header of the metric's column, and the title of its charts."""
        return self.column or self.name

    @property
    def is_main_score(self) -> bool:
        """Whether the metric is on the scale of the task's main score."""
        return self.higher_is_better == "main_score"

    def shown(self, place: Place) -> bool:
        """Returns whether a place shows the metric."""
        return place in (_DEFAULT_PLACES if self.shown_in is None else self.shown_in)

    def direction(self, protocol: Protocol) -> bool | None:
        """Returns whether higher is better under a protocol; None if neither direction is."""
        return protocol.higher_is_better if self.higher_is_better == "main_score" else self.higher_is_better

    def digits(self, protocol: Protocol) -> int:
        """Returns the digits after the point of a mean over runs."""
        if self.is_count:
            return 1
        return score_info(protocol.main_score).decimals if self.is_main_score else self.decimals

    def text(self, value: float) -> str:
        """Returns the value of one run as text, without the name."""
        return f"{value:.0f}" if self.is_count else f"{value:.{self.decimals}f}"


_DECLARED = tuple(field.name for field in fields(MetricInfo) if field.name not in ("name", "summary"))


class Metrics(tuple[MetricInfo, ...]):
    """Descriptions of metrics, in order."""

    def shown(self, place: Place) -> "Metrics":
        """Returns the metrics that a place shows: charts in the order of charts, elsewhere scores before costs."""
        found = (info for info in self if info.shown(place))
        if place in ("report", "dashboard"):
            return Metrics(sorted(found, key=lambda info: info.order if info.chart_order is None else info.chart_order))
        return Metrics(sorted(found, key=lambda info: info.is_cost))

    def get(self, name: str) -> MetricInfo | None:
        """Returns the description of a metric; None if it is not registered."""
        return next((info for info in self if info.name == name), None)

    def mean_over(self, stream: str) -> MetricInfo:
        """Returns the first metric that is the mean of the main score over an evaluation stream.

        Raises:
            LookupError: If there is none.
        """
        return _first(info for info in self if info.is_mean and info.stream == stream)

    @property
    def right_after_edit(self) -> MetricInfo:
        """The metric that scores each edit right after it was made."""
        return _first(info for info in self if info.right_after_edit)

    @property
    def ranking(self) -> "Metrics":
        """The metrics that order the rows of a table, the preferred first."""
        return Metrics(sorted((info for info in self if info.ranks is not None), key=lambda info: info.ranks or 0))

    def streams_of(self, info: MetricInfo) -> tuple[str, ...]:
        """Returns the streams whose items a metric averages; none if it is not a mean of items."""
        if info.averages:
            parts = [self.get(name) for name in info.averages]
            return tuple(part.stream for part in parts if part is not None and part.stream is not None)
        return (info.stream,) if info.is_mean and info.stream is not None else ()


def metric_infos() -> Metrics:
    """Returns the descriptions of all registered metrics, in their order.

    The package's own metrics are read from source; classes defined in this process or in an installed package are
    imported. A metric whose package cannot be imported is left out.
    """
    found = []
    for name, entry in METRICS.entries().items():
        with suppress(UserError):
            attributes = {attribute: METRICS.attribute(name, attribute) for attribute in _DECLARED}
            summary = entry.summary.removeprefix(f"{name}:").strip()
            found.append(MetricInfo(name=name, summary=summary, **attributes))
    return Metrics(sorted(found, key=lambda info: info.order))


def _first(found: Iterable[MetricInfo]) -> MetricInfo:
    info = next(iter(found), None)
    if info is None:
        raise LookupError("no registered metric is declared so")
    return info
