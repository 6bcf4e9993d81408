"""What is measured of a codebook, against plain loops over its entries."""

import math
from itertools import combinations
from statistics import median
from typing import Any

import pytest
import torch
from avalanche.evaluation.metric_results import MetricValue
from avalanche.training.plugins.evaluation import EvaluationPlugin

from grace_bench.data.benchmark import eval_stream
from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.run.loggers import RunLogger

NAMES = ("n_keys", "edits_per_key", "codebook_overlap")


class Values(RunLogger):
    """The values of the newest evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[str, Any] = {}

    def before_eval(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        self.newest = {}

    def log_single_metric(self, name: str, value: Any, x_plot: int) -> None:
        self.newest[name] = value


def start(editor: str, **options: Any) -> tuple[EditorStrategy, Values]:
    values = Values()
    strategy = EDITORS.get(editor)(
        model=EditableModel.from_pretrained("toy", task="classification"),
        evaluator=EvaluationPlugin(*(METRICS.get(name)() for name in NAMES), loggers=[values], collect_all=False),
        **options,
    )
    return strategy, values


def on_a_line(x: float) -> str:
    return f"({x:.4f}, 1.8000)"


EDITS = tuple(
    (on_a_line(x), target)
    for x, target in ((-1.6, 0), (-1.3, 1), (-1.1, 1), (-1.8, 0), (-0.7, 0), (-0.6, 1), (-0.4, 1))
)
"""A point of the other label splits a ball, and the point after it makes the new ball reach back into the old."""


def edited(n_edits: int, **options: Any) -> tuple[EditorStrategy, Values]:
    strategy, values = start("grace", replacement="replace_last", n_iter=5, **options)
    for prompt, target in EDITS[:n_edits]:
        strategy.edit_text(prompt, target)
    return strategy, values


def evaluate(strategy: EditorStrategy, requests: tuple[EditRequest, ...] = ()) -> None:
    strategy.eval(list(eval_stream("upstream", requests or STREAMS.get("toy")().load().upstream[:30])))


def query_of(strategy: EditorStrategy, prompt: str) -> torch.Tensor:
    return strategy.model.layer_call(strategy.model.encode_batch([prompt])).query[0]


@pytest.mark.parametrize("n_edits", [1, 2, 3, 7])
def test_keys_and_radii_are_those_of_the_entries(n_edits: int) -> None:
    strategy, values = edited(n_edits, eps_init=3.0)
    evaluate(strategy)
    radii = [float(radius) for radius in strategy.codebook.radii]
    assert values.newest["n_keys"] == len(radii)
    assert values.newest["edits_per_key"] == n_edits / len(radii)
    assert values.newest["n_keys/radius_min"] == min(radii)
    assert values.newest["n_keys/radius_max"] == max(radii)
    assert values.newest["n_keys/radius_median"] == pytest.approx(median(radii))


@pytest.mark.parametrize(("eps_init", "overlaps"), [(0.05, False), (3.0, True)])
def test_overlap_is_the_share_of_pairs_and_of_queries_that_two_labels_claim(eps_init: float, overlaps: bool) -> None:
    strategy, values = edited(7, eps_init=eps_init)
    requests = tuple(EditRequest(id=str(i), prompt=on_a_line(-2.0 + 0.05 * i), target=0) for i in range(40))
    evaluate(strategy, requests)
    codebook: Any = strategy.codebook
    # Keys are the queries of edited prompts, so an entry's label is the target of the prompt that made it.
    label_of = {tuple(query_of(strategy, prompt).tolist()): target for prompt, target in EDITS}
    entries = [
        (key, float(radius), label_of[tuple(key.tolist())])
        for key, radius in zip(codebook.keys, codebook.radii, strict=True)
    ]
    pairs = [(one, two) for one, two in combinations(entries, 2) if one[2] != two[2]]
    meeting = [(one, two) for one, two in pairs if math.dist(one[0], two[0]) <= one[1] + two[1]]
    assert values.newest["codebook_overlap"] == pytest.approx(len(meeting) / len(pairs))
    assert bool(meeting) == overlaps
    claims = [
        {label for key, radius, label in entries if math.dist(query_of(strategy, request.prompt), key) <= radius}
        for request in requests
    ]
    contested = sum(len(claim) > 1 for claim in claims)
    assert values.newest["codebook_overlap/queries"] == contested / len(requests)
    assert bool(contested) == overlaps


def test_an_empty_codebook_has_no_keys_and_no_ratio() -> None:
    strategy, values = start("grace")
    evaluate(strategy)
    assert values.newest["n_keys"] == 0
    assert values.newest["codebook_overlap"] == 0.0
    assert "edits_per_key" not in values.newest
    assert not [name for name in values.newest if "radius" in name]


@pytest.mark.parametrize("editor", ["none", "ft"])
def test_nothing_is_said_of_editors_without_a_codebook(editor: str) -> None:
    strategy, values = start(editor)
    evaluate(strategy)
    assert values.newest == {}
