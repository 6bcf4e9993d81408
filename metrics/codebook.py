"""The growth of a codebook and the overlap of its balls, GRACE's known weakness."""

from grace_bench.data.avalanche import MetricValue
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.codebook import Codebook, HasCodebook
from grace_bench.evaluation.metric import EditMetric
from grace_bench.registry import register_metric


class _CodebookMetric(EditMetric):
    """A metric of editors that have a codebook; silent for the others."""

    def measure(self, codebook: Codebook, strategy: EditorStrategy) -> dict[str, float]:
        """Returns values by suffix."""
        raise NotImplementedError

    def after_eval(self, strategy: EditorStrategy) -> list[MetricValue] | None:
        """Emits the values of the current codebook."""
        if not isinstance(strategy, HasCodebook):
            return None
        values = self.measure(strategy.codebook, strategy)
        return [self.value(strategy, value, suffix) for suffix, value in values.items()]


@register_metric("n_keys")
class Keys(_CodebookMetric):
    """n_keys: entries in the codebook, with the smallest, median and largest deferral radius."""

    is_count = True
    is_cost = True
    column = "keys"
    caption = "entries of the codebook"
    order = 90
    chart_order = 50
    always_has_column = True
    shown_in = ("table", "report", "bar", "curves", "summary", "tuning", "dashboard")

    def measure(self, codebook: Codebook, strategy: EditorStrategy) -> dict[str, float]:
        values: dict[str, float] = {"": len(codebook)}
        if len(codebook):
            radii = codebook.radii
            values |= {
                "radius_min": float(radii.min()),
                "radius_median": float(radii.quantile(0.5)),
                "radius_max": float(radii.max()),
            }
        return values


@register_metric("edits_per_key")
class EditsPerKey(_CodebookMetric):
    """edits_per_key: how many edits share an entry on average."""

    order = 91
    shown_in = ()

    def measure(self, codebook: Codebook, strategy: EditorStrategy) -> dict[str, float]:
        return {"": strategy.n_edits / len(codebook)} if len(codebook) else {}


@register_metric("codebook_overlap")
class CodebookOverlap(_CodebookMetric):
    """codebook_overlap: share of pairs of entries with different labels whose balls intersect.

    `codebook_overlap/queries` is the share of evaluation queries that fall into two such balls.
    """

    order = 92
    shown_in = ()
    section = (
        "Codebook overlap",
        "Share of pairs of different labels whose balls intersect, and of evaluation queries that fall into two.",
    )
    parts = ("queries",)

    def __init__(self) -> None:
        super().__init__()
        self._contested: list[bool] = []

    def before_eval(self, strategy: EditorStrategy) -> None:
        """Resets the count."""
        self._contested = []

    def after_eval_exp(self, strategy: EditorStrategy) -> None:
        """Counts the queries that fall into two balls."""
        self._contested += [item.contested for item in strategy.scores if item.contested is not None]

    def measure(self, codebook: Codebook, strategy: EditorStrategy) -> dict[str, float]:
        values = {"": codebook.overlap()}
        if self._contested:
            values["queries"] = sum(self._contested) / len(self._contested)
        return values
