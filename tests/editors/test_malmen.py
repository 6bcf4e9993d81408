"""MALMEN and RLEdit against least squares and autograd end to end, and the promises of their meta-training."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from grace_bench.data.artifacts import cache_folder
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors._meta.gradients import RankOnes, edit_gradients, seen_gradients
from grace_bench.editors._meta.networks import AggregatingNetworks, least_squares
from grace_bench.editors.malmen import Batches, Malmen
from grace_bench.editors.rledit import RLEdit, Trajectories
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
BatchOf = Callable[[EditableModel, Sequence[EditRequest]], EditBatch]

FEW: dict[type, dict[str, Any]] = {
    Malmen: {"rank": 4, "n_steps": 7, "batch_size": 2, "edit_lr": 1e-2},
    RLEdit: {"rank": 4, "n_steps": 7, "batch_size": 2, "n_batches": 2, "edit_lr": 1e-2},
}
both = pytest.mark.parametrize("cls", [Malmen, RLEdit])
LAYERS = ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def disturbed(networks: AggregatingNetworks) -> AggregatingNetworks:
    """Networks away from their start, where some parameters have no effect."""
    generator = seeded(5)
    with torch.no_grad():
        for parameter in networks.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return networks


# --- the linear solve


@pytest.mark.parametrize(("n", "width"), [(3, 7), (7, 7), (12, 5)])
def test_the_shift_solves_the_stacked_least_squares_problem(n: int, width: int) -> None:
    keys, values, ridge = normal(n, width), normal(n, 4, seed=1), torch.tensor(0.3, dtype=torch.float64)
    stacked = torch.cat([keys, ridge.sqrt() * torch.eye(width, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(stacked, torch.cat([values, torch.zeros(width, 4, dtype=torch.float64)])).solution.T
    torch.testing.assert_close(least_squares(keys, values, ridge), wanted)


@pytest.mark.parametrize(("n", "width"), [(2, 4), (5, 3)])
def test_gradients_through_the_solve_are_those_of_finite_differences(n: int, width: int) -> None:
    keys, values = normal(n, width).requires_grad_(), normal(n, 2, seed=1).requires_grad_()
    log_ridge = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k, v, r: least_squares(k, v, r.exp()), (keys, values, log_ridge))


def test_a_larger_ridge_gives_a_smaller_shift_and_none_gives_every_value() -> None:
    keys, values = normal(3, 8), normal(3, 4, seed=1)
    sizes = [least_squares(keys, values, torch.tensor(ridge)).norm() for ridge in (1e-12, 0.1, 10.0)]
    assert sizes == sorted(sizes, reverse=True)
    torch.testing.assert_close(keys @ least_squares(keys, values, torch.tensor(1e-12)).T, values)


def test_untrained_networks_regress_on_steps_down_the_normalised_gradient() -> None:
    """By numpy's least squares, from the formulas of the paper."""
    u, delta = normal(2, 3, 6).float(), normal(2, 3, 4, seed=1).float()
    delta[1, 2] = 0.0
    networks = AggregatingNetworks([(6, 4)], rank=2, edit_lr=0.05, generator=seeded(), n_blocks=3)
    networks.observe([RankOnes(u, delta)])
    (shift,) = networks.shifts([RankOnes(u, delta)])
    pairs = torch.cat([u, delta], dim=-1).reshape(6, 10)[:5].double().numpy()
    normalised = (pairs - pairs.mean(axis=0)) / pairs.std(axis=0)
    keys = pairs[:, :6]
    values = -0.05 * (keys * normalised[:, :6]).sum(axis=1, keepdims=True) * normalised[:, 6:]
    wanted = torch.linalg.lstsq(
        torch.cat([torch.tensor(keys), torch.eye(6, dtype=torch.float64)]),
        torch.cat([torch.tensor(values), torch.zeros(6, 4, dtype=torch.float64)]),
    ).solution.T
    torch.testing.assert_close(shift.double(), wanted, rtol=1e-4, atol=1e-6)


def test_gradients_that_vanish_shift_nothing() -> None:
    networks = AggregatingNetworks([(6, 4)], rank=2, edit_lr=0.05, generator=seeded(), n_blocks=1)
    (shift,) = networks.shifts([RankOnes(torch.ones(2, 3, 6), torch.zeros(2, 3, 4))])
    assert torch.equal(shift, torch.zeros(4, 6))


# --- the tokens whose gradients count


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokens_of_an_answer_are_those_that_predict_it(
    side: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model("completion")
    requests = make_requests("completion")[:3]
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests], side=side)
    layers = {LAYERS[0]: model.find_layer(LAYERS[0])}
    _, (seen,) = seen_gradients(model, layers, batch, "answer")
    _, (whole,) = seen_gradients(model, layers, batch, "all")
    assert batch.labels is not None
    assert torch.equal(seen.contributing(), batch.labels != -100)
    assert int(whole.contributing().sum()) > int(seen.contributing().sum())
    assert torch.equal(seen.delta[seen.contributing()], whole.delta[seen.contributing()])


def test_an_encoder_predicts_no_token_and_keeps_all_that_contribute(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model("qa")
    paths = [model.layer_name, "decoder.block.1.layer.2.DenseReluDense.wo"]
    requests = make_requests("qa")[:2]
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests])
    layers = {path: model.find_layer(path) for path in paths}
    _, seen = seen_gradients(model, layers, batch, "answer")
    _, whole = seen_gradients(model, layers, batch, "all")
    assert torch.equal(seen[0].delta, whole[0].delta)
    assert batch.labels is not None
    assert torch.equal(seen[1].contributing(), batch.labels != -100)


# --- meta-gradients, end to end


def with_shifts(model: EditableModel, shifts: Sequence[Tensor], batch: Any) -> Tensor:
    """The logits of the module itself with shifted weights, by a functional call."""
    weights = {}
    for path, shift in zip(LAYERS, shifts, strict=True):
        layer: Any = model.find_layer(path)
        weights[f"{path}.weight"] = layer.weight.detach() + (shift.T if isinstance(layer, Conv1D) else shift)
    logits: Tensor = functional_call(model.module, weights, (), batch.inputs).logits
    return logits


def mean_loss(model: EditableModel, shifts: Sequence[Tensor], requests: Sequence[EditRequest]) -> Tensor:
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests])
    assert batch.labels is not None
    return functional.cross_entropy(with_shifts(model, shifts, batch).flatten(0, 1), batch.labels.flatten())


def mean_divergence(model: EditableModel, shifts: Sequence[Tensor], requests: Sequence[EditRequest]) -> Tensor:
    batch = model.encode_batch([r.prompt for r in requests], [r.target for r in requests])
    assert batch.labels is not None
    labelled = batch.labels != -100
    with torch.no_grad():
        before = model.module(**batch.inputs).logits[labelled].softmax(dim=-1)
    after = with_shifts(model, shifts, batch)[labelled].softmax(dim=-1)
    return (before * (before / after).log()).sum(dim=-1).mean()


@contextmanager
def in_place(model: EditableModel, shifts: Sequence[Tensor]) -> Any:
    """Writes shifts into the weights themselves."""
    weights: list[Any] = [model.find_layer(path).weight for path in LAYERS]
    saved = [weight.detach().clone() for weight in weights]
    for weight, shift in zip(weights, shifts, strict=True):
        weight.data += shift.detach().T
    yield
    for weight, old in zip(weights, saved, strict=True):
        weight.data.copy_(old)


def prepared(cls: Any, model: EditableModel, train: list[EditRequest], **options: Any) -> Any:
    """A meta-training with disturbed networks that have observed something, whose gradient is never clipped."""
    given = {**FEW[cls], "layers": LAYERS, "tokens": "all", "max_grad_norm": 1e9, "lr": 1e-9, **options}
    with cls(model=model, **given) as editor:
        networks = editor.new_networks(seeded(1))
        training = editor.new_training(disturbed(networks), train, seeded(2))
    training.step()
    return training


def parameters_and_gradients(networks: AggregatingNetworks, loss: Tensor) -> dict[str, tuple[Tensor | None, Tensor]]:
    names, parameters = zip(*networks.named_parameters(), strict=True)
    wanted = torch.autograd.grad(loss, parameters)
    return {name: (p.grad, g) for name, p, g in zip(names, parameters, wanted, strict=True)}


def test_a_step_of_malmen_has_the_gradient_of_the_meta_loss_end_to_end(
    make_model: MakeModel, make_train: MakeRequests
) -> None:
    model, train = make_model("completion"), make_train("completion")
    training = prepared(Malmen, model, train, c_loc=0.7)
    assert isinstance(training, Batches)
    drawing = training.generator.get_state()
    edits, equivalents, others = training.draw(2)
    training.generator.set_state(drawing)
    training.step()
    # The step has observed these gradients; it used the statistics with them.
    layers = {path: model.find_layer(path) for path in LAYERS}
    _, gradients = edit_gradients(model, layers, training.encoded(edits))
    shifts = training.networks.shifts(gradients)
    loss = mean_loss(model, shifts, equivalents) + 0.7 * mean_divergence(model, shifts, others)
    for name, (found, wanted) in parameters_and_gradients(training.networks, loss).items():
        assert found is not None, name
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6, msg=name)


def test_a_step_of_rledit_has_the_gradient_of_the_return_of_its_trajectory(
    make_model: MakeModel, make_train: MakeRequests
) -> None:
    """Three batches, looking back on two: each loss is summed by hand, and autograd goes through every shift."""
    model, train = make_model("completion"), make_train("completion")
    options = {"n_batches": 3, "batch_size": 2, "back_depth": 2, "time_decay": 0.5, "c_loc": 0.7, "c_reg": 0.01}
    training = prepared(RLEdit, model, train, **options)
    assert isinstance(training, Trajectories)
    # Statistics that no longer change: the step's observations are then no different from those below.
    for normaliser in training.networks.normalisers:
        normaliser.observe = lambda z: None  # type: ignore[assignment]
    drawing = training.generator.get_state()
    edits, equivalents, others = training.draw(6)
    training.generator.set_state(drawing)
    training.step()

    layers = {path: model.find_layer(path) for path in LAYERS}
    moved = [torch.zeros(n_out, n_in) for n_in, n_out in training.networks.sizes]
    losses: list[Tensor] = []
    for t in range(3):
        with in_place(model, moved):
            _, gradients = edit_gradients(model, layers, training.encoded(edits[2 * t : 2 * t + 2]))
        shifts = training.networks.shifts(gradients)
        moved = [before + shift for before, shift in zip(moved, shifts, strict=True)]
        now = mean_loss(model, moved, equivalents[2 * t : 2 * t + 2])
        before = 0.5 * mean_loss(model, moved, equivalents[2 * t - 2 : 2 * t]) if t else 0.0
        kept = mean_divergence(model, moved, others[2 * t : 2 * t + 2])
        losses.append(now + before + 0.7 * kept + 0.01 * sum(shift.square().sum() for shift in shifts))
    for name, (found, wanted) in parameters_and_gradients(training.networks, sum(losses)).items():  # type: ignore[arg-type]
        assert found is not None, name
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-5, msg=name)


@both
def test_a_large_gradient_is_scaled_down(cls: Any, make_model: MakeModel, make_train: MakeRequests) -> None:
    training = prepared(cls, make_model("completion"), make_train("completion"), max_grad_norm=1e-3)
    total = torch.stack([p.grad.norm() for p in training.networks.parameters()]).norm()
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


@both
def test_the_locality_of_a_step_asks_for_no_fact_that_it_edits(
    cls: Any, make_model: MakeModel, make_train: MakeRequests
) -> None:
    training = prepared(cls, make_model("completion"), make_train("completion"))
    for n in (1, 2, 9):
        edits, equivalents, others = training.draw(n)
        assert len(edits) == len(equivalents) == len(others) == n
        assert [a.fact_id for a in edits] == [b.fact_id for b in equivalents]
        assert not {r.fact_id for r in edits} & {r.fact_id for r in others}
        assert all(a.prompt != b.prompt for a, b in zip(edits, equivalents, strict=True))


# --- meta-training as a whole


@both
@pytest.mark.parametrize("killed_after", [1, 5, 6])
def test_an_interrupted_meta_training_goes_on_to_the_same_bits(
    cls: Any, killed_after: int, make_model: MakeModel, make_train: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        if done == killed_after:
            raise InterruptionError

    monkeypatch.setattr(Batches, "checkpoint_every", 5)
    model, train = make_model("completion"), make_train("completion")
    states = []
    for progress in (None, interrupt):
        monkeypatch.setenv("GRACE_BENCH_CACHE", str(cache_folder() / "next"))
        with cls(model=model, **FEW[cls]) as editor:
            if progress is not None:
                with pytest.raises(InterruptionError):
                    editor.meta_train(train, progress=progress)
        with cls(model=model, **FEW[cls]) as editor:
            figures = editor.meta_train(train)
            states.append((editor.networks.state_dict(), {**figures, "seconds": 0.0}))
        (kept,) = (cache_folder() / cls.registered_name).iterdir()
        assert "partial" not in kept.name
    (whole, figures), (resumed, again) = states
    assert figures == again
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@both
def test_meta_training_lowers_the_meta_loss(cls: Any, make_model: MakeModel, make_train: MakeRequests) -> None:
    model, train = make_model("completion"), make_train("completion")
    more = {Malmen: {"n_steps": 120}, RLEdit: {"n_steps": 110}}[cls]
    with cls(model=model, **{**FEW[cls], "lr": 3e-3, **more}) as editor:
        figures = editor.meta_train(train)
        untrained = editor.new_networks(seeded()).state_dict()
        assert all(not torch.equal(editor.networks.state_dict()[name], tensor) for name, tensor in untrained.items())
    first, last = (figures[f"edit_loss_{when}"] + 0.6 * figures[f"locality_kl_{when}"] for when in ("first", "last"))
    assert last < 0.9 * first


# --- edits


@both
def test_the_order_of_a_batch_makes_no_difference(
    cls: Any, make_model: MakeModel, make_requests: MakeRequests, make_train: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_model("completion"), make_requests("completion")[:4]
    weights = []
    with cls(model=model, **FEW[cls]) as editor:
        editor.meta_train(make_train("completion"))
        for order in (requests, requests[::-1]):
            editor.edit(batch_of(model, order))
            weights.append(editor.weight_of(model.layer_name).clone())
            editor.rollback()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)


@both
def test_an_edit_starts_from_the_model_as_edited_so_far(
    cls: Any, make_model: MakeModel, make_requests: MakeRequests, make_train: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_model("completion"), make_requests("completion")
    with cls(model=model, **FEW[cls]) as editor:
        editor.meta_train(make_train("completion"))
        editor.edit(batch_of(model, requests[:2]))
        before, batch = editor.weight_of(model.layer_name).clone(), batch_of(model, requests[2:4])
        _, gradients = seen_gradients(model, editor.linear, batch.encoded, "answer")
        (shift,) = editor.trained.shifts(gradients)
        editor.edit(batch)
        torch.testing.assert_close(editor.weight_of(model.layer_name), before + shift)


@both
def test_small_edits_of_bfloat16_weights_add_up(
    cls: Any, make_model: MakeModel, make_requests: MakeRequests, make_train: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_model("completion", dtype=torch.bfloat16), make_requests("completion")
    with cls(model=model, **{**FEW[cls], "edit_lr": 1e-6}) as editor:
        editor.meta_train(make_train("completion"))
        unedited = editor.weight_of(model.layer_name).clone()
        batch = batch_of(model, requests[:2])
        editor.edit(batch)
        once = editor.weight_of(model.layer_name) - unedited
        editor.edit(batch)
        twice = editor.weight_of(model.layer_name) - unedited
        assert once.any()
        assert float(twice.norm()) == pytest.approx(2 * float(once.norm()), rel=0.05)


@both
def test_a_shift_that_is_not_finite_fails_and_leaves_the_weights(
    cls: Any, make_model: MakeModel, make_requests: MakeRequests, make_train: MakeRequests
) -> None:
    model, request = make_model("completion"), make_requests("completion")[0]
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with cls(model=model, layers=LAYERS, **FEW[cls]) as editor:
        editor.meta_train(make_train("completion"))
        editor.trained.log_edit_lr[1] = 1e4
        with pytest.raises(EditFailure, match="not finite"):
            editor.edit_text(request.prompt, request.target)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "option"),
    [
        *((Malmen, option) for option in ({"tokens": "some"}, {"n_blocks": 0}, {"max_grad_norm": 0.0}, {"c_loc": 0})),
        *((RLEdit, option) for option in ({"n_batches": 0}, {"back_depth": 0}, {"time_decay": 1.5}, {"c_reg": -1.0})),
        *((cls, {"layers": ["transformer.h.0.ln_1"]}) for cls in (Malmen, RLEdit)),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    cls: Any, option: dict[str, Any], make_model: MakeModel
) -> None:
    ((name, _),) = option.items()
    with pytest.raises(UserError, match=f"editor.{name}|layer='transformer.h.0.ln_1'"):
        cls(model=make_model("completion"), **option)
