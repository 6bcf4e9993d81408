"""EMMET: facts as constraints."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_bench.data.requests import EditRequest
from grace_bench.editors.emmet import Emmet
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakePrepared = Callable[..., Any]
PassesThrough = Callable[[EditableModel, str, str], tuple[Tensor, Tensor]]

PATH, BLOCK = "transformer.h.1.mlp.c_proj", "transformer.h.1"


def matrix(model: EditableModel) -> Tensor:
    """(D_out, D_in) of the `Conv1D` at the edited layer."""
    return model.find_layer(PATH).get_parameter("weight").detach().double().T.clone()


def test_one_request_as_a_constraint_is_r_romes_update(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    (request, *_), changes = make_requests("completion"), []
    # The two differ in where decay and clamp look, and in how they weigh contexts.
    shared = {"n_iter": 10, "weight_decay": 0.0, "clamp": 50.0, "n_prefixes": 0}
    for name, own in (("emmet", {"softness": 0.0}), ("r_rome", {}), ("emmet", {"softness": 100.0})):
        model = make_causal()
        before = matrix(model)
        with make_prepared(name, model, **shared, **own) as editor:
            editor.edit_text(request.prompt, request.target, subject=request.subject)
            changes.append(matrix(model) - before)
    emmet, r_rome, soft = changes
    torch.testing.assert_close(emmet, r_rome, rtol=0, atol=1e-3 * float(r_rome.abs().max()))
    assert float(soft.norm()) < 0.5 * float(emmet.norm())


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_without_softness_every_fact_of_a_batch_gets_its_value(
    ridge: float,
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    passes_through: PassesThrough,
) -> None:
    model, requests = make_causal(), make_requests("completion")
    with make_prepared("emmet", model, softness=0.0, ridge=ridge, n_prefixes=0, n_iter=8) as editor:
        values = editor.edit_facts([editor.encode(r.prompt, r.target, r.subject) for r in requests])
        for request, value in zip(requests, values, strict=True):
            # The prompts end with the subject.
            given = passes_through(model, BLOCK, request.prompt)[1][-1]
            torch.testing.assert_close(given, value.optimised, rtol=0, atol=1e-3)


def test_the_weight_of_the_moments_alone_changes_nothing(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    requests, changes = make_requests("completion")[:3], []
    for moment_weight in (1.0, 5000.0):
        model = make_causal()
        before = matrix(model)
        with make_prepared("emmet", model, softness=0.0, moment_weight=moment_weight, n_iter=8) as editor:
            editor.edit_facts([editor.encode(r.prompt, r.target, r.subject) for r in requests])
            changes.append(matrix(model) - before)
    torch.testing.assert_close(*changes, rtol=0, atol=1e-4 * float(changes[0].abs().max()))


@pytest.mark.parametrize(
    ("option", "named"),
    [({"moment_weight": 0.0}, "moment_weight=0.0"), ({"ridge": -1}, "ridge=-1"), ({"softness": -0.1}, "softness=-0.1")],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    option: dict[str, Any], named: str, make_causal: MakeModel
) -> None:
    with pytest.raises(UserError, match=rf"^editor\.{named} should be "):
        Emmet(model=make_causal(), **option)
