"""Avg: there where TRR and ERR have a common scale, and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from avalanche.training.plugins.evaluation import EvaluationPlugin

from grace_bench.data.benchmark import eval_stream
from grace_bench.data.requests import EditRequest
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, METRICS

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")
MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]


def averaged(model: EditableModel, *evaluations: Mapping[str, Sequence[EditRequest]]) -> list[dict[str, Any]]:
    """The last metrics of a strategy after each evaluation, of the streams given by name."""
    evaluator = EvaluationPlugin(*(METRICS.get(name)() for name in ("TRR", "ERR", "Avg")), collect_all=False)
    strategy = EDITORS.get("none")(model=model, evaluator=evaluator)
    seen = []
    for streams in evaluations:
        evaluator.reset_last_metrics()
        strategy.eval([experience for name, requests in streams.items() for experience in eval_stream(name, requests)])
        seen.append(dict(evaluator.get_last_metrics()))
    return seen


def right_and_wrong(model: EditableModel, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Requests for labels, every other of which the model answers."""
    labels = model.answer([request.prompt for request in requests])
    return [
        request.model_copy(update={"target": int(label) if index % 2 else (int(label) + 1) % 4})
        for index, (request, label) in enumerate(zip(requests, labels, strict=True))
    ]


def test_it_is_the_mean_of_trr_and_err_of_the_newest_evaluation(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model("classification")
    requests = right_and_wrong(model, make_requests("classification"))
    first, second = averaged(
        model, {"upstream": requests[:4], "edited": requests[4:5]}, {"upstream": requests[1:2], "edited": requests[:4]}
    )
    assert (first["TRR"], first["ERR"], first["Avg"]) == (0.5, 0.0, 0.25)
    assert (second["TRR"], second["ERR"], second["Avg"]) == (1.0, 0.5, 0.75)


@pytest.mark.parametrize("missing", ["upstream", "edited"])
def test_it_is_absent_where_one_of_the_two_is_even_if_it_was_there_before(
    missing: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    requests = make_requests("qa")
    streams = {"upstream": requests[:2], "edited": requests[2:3], "holdout": requests[3:]}
    rest = {name: stream for name, stream in streams.items() if name != missing}
    whole, partial = averaged(make_model("qa"), streams, rest)
    assert "Avg" in whole
    assert "Avg" not in partial


def test_it_is_absent_for_perplexity(make_model: MakeModel, make_requests: MakeRequests) -> None:
    requests = make_requests("language_modelling")
    (values,) = averaged(make_model("language_modelling"), {"upstream": requests[:2], "edited": requests[2:]})
    assert {"TRR", "ERR"} <= values.keys()
    assert "Avg" not in values
