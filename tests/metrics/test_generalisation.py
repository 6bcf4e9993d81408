"""Portability: its probes one by one, and by groups of which one right answer is enough."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from avalanche.training.plugins.evaluation import EvaluationPlugin

from grace_bench.data.benchmark import eval_stream
from grace_bench.data.derived import probe_requests
from grace_bench.data.requests import EditRequest, Probe
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, METRICS

pytestmark = pytest.mark.filterwarnings("ignore:No loggers specified")
MakeModel = Callable[..., EditableModel]


def measured(model: EditableModel, edits: Sequence[EditRequest]) -> dict[str, Any]:
    evaluator = EvaluationPlugin(METRICS.get("Portability")(), collect_all=False)
    strategy = EDITORS.get("none")(model=model, evaluator=evaluator)
    strategy.eval(list(eval_stream("portability", probe_requests(edits, "portability"))))
    return dict(evaluator.get_last_metrics())


def edit(name: str, *probes: Probe) -> EditRequest:
    return EditRequest(id=name, prompt="the capital of Peru", target="Lima", portability=probes)


def test_a_group_is_answered_if_one_of_its_probes_is_and_other_answers_count(make_model: MakeModel) -> None:
    model = make_model("completion")
    prompts = ["the capital of Italy", "the river of France", "the currency of Peru"]
    right = [str(answer) for answer in model.answer(prompts)]
    assert all(right)
    edits = [
        edit(
            "one right",
            Probe(prompt=prompts[0], target="Tenge Tenge Tenge Tenge", group="case"),
            Probe(prompt=prompts[1], target="Tenge Tenge Tenge Tenge", answers=(right[1],), group="case"),
        ),
        # The same name for a group of another edit.
        edit("none right", Probe(prompt=prompts[2], target="Tenge Tenge Tenge Tenge", group="case")),
        edit("in no group", Probe(prompt=prompts[2], target=right[2])),
    ]
    values = measured(model, edits)
    assert values["Portability/any"] == 1 / 2
    assert values["Portability/exact_match"] == 2 / 4
    # One right answer of two is half of the probes, and all of the group.
    assert measured(model, edits[:1])["Portability/any"] == 1
    assert measured(model, edits[:1])["Portability/exact_match"] == 1 / 2


def test_without_groups_there_is_no_share_of_groups(make_model: MakeModel) -> None:
    values = measured(make_model("completion"), [edit("a", Probe(prompt="the river of Italy", target="Tiber"))])
    assert "Portability" in values
    assert "Portability/any" not in values
