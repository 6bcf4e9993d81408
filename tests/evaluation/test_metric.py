"""What is wrong with the class of a metric is one line before it is ever made."""

from grace_bench.evaluation.metric import EditMetric


class Counted(EditMetric):
    """Counts, from a number on."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.start = start


class Weighted(EditMetric):
    """Weighs."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight


def test_a_metric_is_made_without_arguments_so_each_needs_a_default() -> None:
    assert Counted.check_class() is None
    assert Weighted.check_class() == (
        "Weighted.__init__ requires 'weight', and a run constructs metrics without arguments: give it a default"
    )


def test_a_metric_needs_a_docstring() -> None:
    class Bare(EditMetric):
        pass

    assert Bare.check_class() == "Bare has no docstring: write one, its first line describes the class in listings"
