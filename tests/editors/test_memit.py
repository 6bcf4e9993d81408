"""MEMIT's variants: what each of them keeps of a change."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors.memit import Memit
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakePrepared = Callable[..., Any]
BatchOf = Callable[[EditableModel, Sequence[EditRequest]], EditBatch]

LAYERS = [f"transformer.h.{block}.mlp.c_proj" for block in range(3)]
PATH = LAYERS[1]


def matrix(model: EditableModel, path: str) -> Tensor:
    """(D_out, D_in) of a `Conv1D`."""
    return model.find_layer(path).get_parameter("weight").detach().T.clone()


@pytest.fixture
def changes(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> Callable[..., dict[str, Tensor]]:
    """The (D_out, D_in) float64 change of each layer after batches of requests, given as their numbers."""

    def make(name: str, *batches: Sequence[int], paths: Sequence[str] = (PATH,), **options: Any) -> dict[str, Tensor]:
        model, requests = make_causal(), make_requests("completion")
        before = {path: matrix(model, path).double() for path in LAYERS}
        if name == "memit":
            options = {"layers": list(paths), **options}
        with make_prepared(name, model, **options) as editor:
            for batch in batches:
                editor.edit(batch_of(model, [requests[index] for index in batch]))
            return {path: matrix(model, path).double() - before[path] for path in LAYERS}

    return make


def test_with_one_layer_one_request_and_no_weight_on_other_keys_it_is_r_rome(
    changes: Callable[..., dict[str, Tensor]],
) -> None:
    # The two differ in where decay and clamp look, and in how they weigh contexts.
    shared = {"n_iter": 10, "weight_decay": 0.0, "clamp": 50.0, "n_prefixes": 0}
    memit = changes("memit", [0], moment_weight=1e-8, **shared)[PATH]
    r_rome = changes("r_rome", [0], **shared)[PATH]
    assert float((memit * r_rome).sum() / (memit.norm() * r_rome.norm())) > 1 - 1e-5
    assert float(memit.norm()) == pytest.approx(float(r_rome.norm()), rel=1e-3)
    heavier = changes("memit", [0], moment_weight=1e3, **shared)[PATH]
    assert float(heavier.norm()) < 0.1 * float(memit.norm())


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_rect_keeps_that_share_of_a_change_and_leaves_the_other_weights_as_they_were(
    share: float, changes: Callable[..., dict[str, Tensor]], make_causal: MakeModel
) -> None:
    options = {"moment_weight": 1.0, "n_iter": 8}
    whole, kept = (changes("memit", [0, 1, 2], **options, **rect)[PATH] for rect in ({}, {"rect": share}))
    changed = kept != 0
    # A few of the kept elements are too small to change a weight in float32.
    assert int(changed.sum()) == pytest.approx(share * changed.numel(), rel=0.01)
    torch.testing.assert_close(kept[changed], whole[changed], rtol=0, atol=1e-6)
    relative = (whole / matrix(make_causal(), PATH).double()).abs()
    if share < 1:
        assert float(relative[changed].min()) > 0.999 * float(relative[~changed].max())


def test_prune_keeps_the_singular_values_of_the_whole_change_near_the_unedited_weight(
    changes: Callable[..., dict[str, Tensor]], make_causal: MakeModel
) -> None:
    batches, options = ([0, 1], [2, 3], [4, 5]), {"moment_weight": 1e-4, "clamp": 60.0, "n_iter": 8}
    whole, pruned = (changes("memit", *batches, **options, prune=prune)[PATH] for prune in (False, True))
    largest = torch.linalg.svdvals(matrix(make_causal(), PATH).double())[0]
    before = torch.linalg.svdvals(whole)
    assert float(before[0]) > 1.5 * float(largest), "there is something to prune"
    # Edits are made on the weights that were not pruned, but a later value depends on what the model answers.
    left, singular, right = torch.linalg.svd(changes("memit", batches[0], **options)[PATH], full_matrices=False)
    damped = torch.where(singular > largest, singular.log() - largest.log() + largest, singular)
    first = changes("memit", batches[0], **options, prune=True)[PATH]
    torch.testing.assert_close(first, left * damped @ right, rtol=0, atol=1e-4)
    limit = largest + (before[0] * 4).log() - largest.log()
    assert float(torch.linalg.svdvals(pruned)[0]) <= float(limit)


def test_a_change_below_the_unedited_weight_is_not_pruned(
    changes: Callable[..., dict[str, Tensor]], make_causal: MakeModel
) -> None:
    options = {"moment_weight": 3000.0, "n_iter": 6}
    whole, pruned = (changes("memit", [0, 1], [2, 3], **options, prune=prune)[PATH] for prune in (False, True))
    assert float(torch.linalg.matrix_norm(whole, 2)) < float(torch.linalg.matrix_norm(matrix(make_causal(), PATH), 2))
    torch.testing.assert_close(pruned, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))


def test_ends_only_writes_the_first_and_the_last_layer_each_in_full(changes: Callable[..., dict[str, Tensor]]) -> None:
    options = {"moment_weight": 1.0, "n_iter": 8}
    ends = changes("memit", [0, 1], paths=LAYERS, ends_only=True, **options)
    assert not ends[LAYERS[1]].any()
    # The first layer has values of its own: it changes as if it were the only one.
    alone = changes("memit", [0, 1], paths=LAYERS[:1], **options)
    torch.testing.assert_close(ends[LAYERS[0]], alone[LAYERS[0]], rtol=0, atol=1e-6)
    spread = changes("memit", [0, 1], paths=LAYERS, **options)
    assert all(bool(spread[path].any()) for path in LAYERS)
    assert not torch.allclose(ends[LAYERS[2]], spread[LAYERS[2]], atol=1e-3)
    one = changes("memit", [0, 1], paths=LAYERS[1:2], ends_only=True, **options)
    plain = changes("memit", [0, 1], paths=LAYERS[1:2], **options)
    assert torch.equal(one[PATH], plain[PATH]), "one layer is both ends"


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"moment_weight": 0}, "moment_weight=0"),
        ({"moment_weight": float("inf")}, "moment_weight=inf"),
        ({"history": "yes"}, "history=yes"),
        ({"rect": 0.0}, "rect=0.0"),
        ({"rect": 1.5}, "rect=1.5"),
        ({"prune": 1}, "prune=1"),
        ({"ends_only": None}, "ends_only=None"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    option: dict[str, Any], named: str, make_causal: MakeModel
) -> None:
    with pytest.raises(UserError, match=rf"^editor\.{named} should be "):
        Memit(model=make_causal(), **option)
