"""MEND against autograd's full gradients, and the promises of its meta-training."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from grace_bench.data.artifacts import cache_folder
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors._meta.gradients import RankOnes, edit_gradients, updated
from grace_bench.editors._meta.networks import EditorNetworks
from grace_bench.editors.mend import Mend
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

TASKS = ("classification", "qa", "completion", "language_modelling")
each_task = pytest.mark.parametrize("task", TASKS)
FEW: dict[str, Any] = {"n_steps": 4, "batch_size": 2, "rank": 4}
OTHER_LAYERS = {
    "classification": "bert.encoder.layer.0.output.dense",
    "qa": "decoder.block.1.layer.2.DenseReluDense.wo",
    "completion": "transformer.h.1.mlp.c_proj",
    "language_modelling": "transformer.h.1.mlp.c_proj",
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))


def kept_files() -> set[str]:
    return {path.name for path in (cache_folder() / "mend").glob("*")}


def train_requests(task: str) -> list[EditRequest]:
    """Facts of neither the requests that are edited nor each other, in one or two wordings."""
    facts = [("capital", "France", "Paris", 1), ("capital", "Peru", "Lima", 2), ("river", "Kazakhstan", "Ishim", 0)]
    prompts = ("what is the {} of {}", "the {} in {} is")
    return [
        EditRequest(
            id=f"{relation}/{country}/{index}",
            prompt=prompt.format(relation, country),
            target=label if task == "classification" else answer,
            rephrases=(f"{country} the {relation}",),
            metadata={"fact": f"{relation} of {country}"},
        )
        for relation, country, answer, label in facts
        for index, prompt in enumerate(prompts)
    ]


def encoded(model: EditableModel, requests: Sequence[EditRequest], **options: Any) -> EncodedBatch:
    return model.encode_batch([r.prompt for r in requests], [r.target for r in requests], **options)


def logits_of(model: EditableModel, requests: Sequence[EditRequest]) -> Tensor:
    with torch.no_grad():
        return model.logits(encoded(model, requests))


def full_gradients(model: EditableModel, paths: Sequence[str], batch: EncodedBatch) -> list[Tensor]:
    """Autograd's gradients of the weights, (D_out, D_in), of each row's own mean loss, added up."""
    modules: list[Any] = [model.find_layer(path) for path in paths]
    weights = [module.weight.requires_grad_() for module in modules]
    assert batch.labels is not None
    losses = [
        functional.cross_entropy(row.reshape(-1, row.shape[-1]), labels.reshape(-1))
        for row, labels in zip(model.logits(batch), batch.labels, strict=True)
    ]
    gradients = torch.autograd.grad(torch.stack(losses).sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return [
        gradient.T if isinstance(module, Conv1D) else gradient
        for module, gradient in zip(modules, gradients, strict=True)
    ]


def batch_of(requests: Sequence[EditRequest], model: EditableModel) -> EditBatch:
    return EditBatch(
        prompts=tuple(r.prompt for r in requests),
        targets=tuple(r.target for r in requests),
        encoded=encoded(model, requests),
    )


def networks_of(editor: Mend) -> dict[str, Tensor]:
    assert editor.networks is not None
    return {name: tensor.clone() for name, tensor in editor.networks.state_dict().items()}


def same_tensors(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def of_unlike_lengths(task: str, make_requests: MakeRequests) -> list[EditRequest]:
    first, second, third = make_requests(task)[:3]
    return [first, second.model_copy(update={"prompt": f"{second.prompt} in the {second.prompt}"}), third]


@each_task
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_rank_one_terms_of_a_padded_batch_add_up_to_the_full_gradients(
    task: str, side: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), of_unlike_lengths(task, make_requests)
    paths = [model.layer_name, OTHER_LAYERS[task]]
    layers = {path: model.find_layer(path) for path in paths}
    batch = encoded(model, requests, side=side)
    logits, gradients = edit_gradients(model, layers, batch)
    for gradient, whole in zip(gradients, full_gradients(model, paths, batch), strict=True):
        assert gradient.total().shape == whole.shape
        torch.testing.assert_close(gradient.total(), whole, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(logits, model.logits(batch))


@each_task
def test_padding_adds_no_term_and_the_rows_of_a_batch_do_not_mix(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), of_unlike_lengths(task, make_requests)
    layers = {model.layer_name: model.layer}
    _, (together,) = edit_gradients(model, layers, encoded(model, requests))
    for row, request in enumerate(requests):
        _, (alone,) = edit_gradients(model, layers, encoded(model, [request]))
        n_terms = (alone.delta != 0).any(dim=-1).sum()
        assert (together.delta[row] != 0).any(dim=-1).sum() == n_terms
        torch.testing.assert_close(
            RankOnes(together.u[row : row + 1], together.delta[row : row + 1]).total(),
            alone.total(),
            rtol=1e-3,
            atol=1e-5,
        )


@each_task
def test_answering_with_updates_beside_the_weights_is_answering_with_updated_weights(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), of_unlike_lengths(task, make_requests)
    paths = [model.layer_name, OTHER_LAYERS[task]]
    layers = {path: model.find_layer(path) for path in paths}
    _, gradients = edit_gradients(model, layers, encoded(model, requests))
    steps = [RankOnes(gradient.u, -0.05 * gradient.delta) for gradient in gradients]
    with updated(layers, steps):
        beside = logits_of(model, requests)
    assert not torch.equal(beside, logits_of(model, requests))
    for row, request in enumerate(requests):
        fresh = make_model(task)
        for path, step in zip(paths, steps, strict=True):
            module: Any = fresh.find_layer(path)
            change = RankOnes(step.u[row : row + 1], step.delta[row : row + 1]).total()
            module.weight.data += change.T if isinstance(module, Conv1D) else change
        alone = encoded(fresh, [request])
        with torch.no_grad():
            wanted = fresh.logits(alone)[0]
        # Classes, or the logits of the positions that are not padding to the right.
        got = beside[row][: len(wanted)]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def random_gradients(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[RankOnes]:
    generator = torch.Generator().manual_seed(seed)
    return [
        RankOnes(torch.randn(2, 5, n_in, generator=generator), torch.randn(2, 5, n_out, generator=generator))
        for n_in, n_out in sizes
    ]


def make_networks(sizes: Sequence[tuple[int, int]]) -> EditorNetworks:
    return EditorNetworks(sizes, rank=3, edit_lr=0.5, generator=torch.Generator().manual_seed(0))


def test_untrained_networks_step_down_the_normalised_gradient() -> None:
    (gradient,) = random_gradients([(4, 3)])
    gradient.delta[1, 3:] = 0
    networks = make_networks([(4, 3)])
    networks.observe([gradient])
    (update,) = networks([gradient])
    real = (gradient.delta != 0).any(dim=-1)
    expected = torch.zeros(3, 4)
    u, delta = gradient.u[real], gradient.delta[real]
    for one_u, one_delta in zip(
        (u - u.mean(0)) / u.std(0, correction=0), (delta - delta.mean(0)) / delta.std(0, correction=0), strict=True
    ):
        expected -= 0.5 * torch.outer(one_delta, one_u)
    assert int(real.sum()) == 8
    torch.testing.assert_close(update.total(), expected)


def test_running_statistics_are_those_of_everything_seen() -> None:
    networks = make_networks([(4, 3)])
    seen = [random_gradients([(4, 3)], seed) for seed in range(3)]
    for gradients in seen:
        networks.observe(gradients)
    once = make_networks([(4, 3)])
    once.observe([RankOnes(torch.cat([g[0].u for g in seen]), torch.cat([g[0].delta for g in seen]))])
    for (name, one_by_one), at_once in zip(networks.state_dict().items(), once.state_dict().values(), strict=True):
        torch.testing.assert_close(one_by_one, at_once, msg=name)


def test_a_dimension_that_never_varied_is_left_out() -> None:
    (gradient,) = random_gradients([(4, 3)])
    gradient.u[..., 2] = 1.5
    networks = make_networks([(4, 3)])
    networks.observe([gradient])
    gradient.u[..., 2] = 7.0
    (update,) = networks([gradient])
    assert not update.u[..., 2].any()
    assert update.total().isfinite().all()


def test_layers_of_one_shape_share_a_network_and_differ_in_scale_shift_and_rate() -> None:
    networks = make_networks([(4, 3), (4, 3), (3, 4)])
    assert len(networks.networks) == 2
    assert networks.log_edit_lr.shape == (3,)
    gradients = random_gradients([(4, 3)]) * 2 + random_gradients([(3, 4)])
    networks.observe(gradients)
    block = networks.networks["4x3"][0]  # type: ignore[index]
    with torch.no_grad():
        before = [update.total() for update in networks(gradients)]
        torch.testing.assert_close(before[0], before[1])
        block.left.normal_(generator=torch.Generator().manual_seed(1))
        shared = [update.total() for update in networks(gradients)]
        torch.testing.assert_close(shared[0], shared[1])
        assert not torch.allclose(shared[0], before[0])
        assert torch.equal(shared[2], before[2])
        block.scale[1] *= 2
        block.shift[1] += 0.1
        own = [update.total() for update in networks(gradients)]
        assert torch.equal(own[0], shared[0])
        assert not torch.allclose(own[1], shared[1])
        networks.log_edit_lr[0] += 1
        torch.testing.assert_close(networks(gradients)[0].total(), own[0] * torch.tensor(1.0).exp())


@each_task
def test_an_edit_adds_the_networks_updates_of_every_layer_and_rolls_back(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model(task), make_requests(task)[:2]
    paths = [model.layer_name, OTHER_LAYERS[task]]
    untouched = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with Mend(model=model, layers=paths, **FEW) as editor:
        editor.meta_train(train_requests(task))
        assert same_tensors(untouched, model.module.state_dict())
        assert editor.networks is not None
        layers = {path: model.find_layer(path) for path in paths}
        _, gradients = edit_gradients(model, layers, encoded(model, requests))
        updates = editor.networks(gradients)
        before = float(model.task.loss(logits_of(model, requests), encoded(model, requests)))
        outcome = editor.edit(batch_of(requests, model))
        changed = {
            name for name, tensor in model.module.state_dict().items() if not torch.equal(tensor, untouched[name])
        }
        assert changed == {f"{path}.weight" for path in paths}
        for path, update in zip(paths, updates, strict=True):
            change = update.total().T if isinstance(layers[path], Conv1D) else update.total()
            torch.testing.assert_close(
                model.module.state_dict()[f"{path}.weight"], untouched[f"{path}.weight"] + change
            )
        assert outcome.steps == 1
        assert outcome.loss_first == pytest.approx(before, rel=1e-5)
        assert outcome.loss == pytest.approx(
            float(model.task.loss(logits_of(model, requests), encoded(model, requests))), rel=1e-5
        )
        trained = networks_of(editor)
        editor.rollback()
        assert same_tensors(untouched, model.module.state_dict())
        assert same_tensors(networks_of(editor), trained)


def test_a_bfloat16_model_is_edited_by_float32_networks(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model = make_model("completion")
    model.module.to(torch.bfloat16)
    with Mend(model=model, edit_lr=1e-2, **FEW) as editor:
        editor.meta_train(train_requests("completion"))
        request = make_requests("completion")[0]
        outcome = editor.edit_text(request.prompt, request.target)
        assert {tensor.dtype for tensor in networks_of(editor).values()} == {torch.float32}
        assert {parameter.dtype for parameter in model.module.parameters()} == {torch.bfloat16}
        assert outcome.loss is not None
        assert outcome.loss_first is not None
        assert outcome.loss < outcome.loss_first


@each_task
def test_meta_training_lowers_the_meta_loss(task: str, make_model: MakeModel) -> None:
    with Mend(model=make_model(task), n_steps=60, batch_size=4, rank=16, lr=3e-3, edit_lr=1e-2) as editor:
        figures = editor.meta_train(train_requests(task))
        untrained = editor.new_networks(torch.Generator().manual_seed(0)).state_dict()
        trained = networks_of(editor)
        assert all(not torch.equal(trained[name], tensor) for name, tensor in untrained.items()), "all of it is trained"
    first, last = (0.1 * figures[f"edit_loss_{when}"] + figures[f"locality_kl_{when}"] for when in ("first", "last"))
    assert last < 0.9 * first
    assert figures["n_steps"] == 60


def test_an_interrupted_meta_training_goes_on_to_the_same_bits(make_model: MakeModel) -> None:
    class InterruptionError(Exception):
        pass

    seen: list[int] = []

    def interrupt(what: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 53:
            raise InterruptionError

    options: dict[str, Any] = {"n_steps": 60, "batch_size": 2, "rank": 4}
    train = train_requests("classification")
    with Mend(model=make_model("classification"), **options) as editor:
        with pytest.raises(InterruptionError):
            editor.meta_train(train, progress=interrupt)
        assert editor.networks is None
        (partial,) = kept_files()
        assert partial.endswith("-partial.safetensors")
    with Mend(model=make_model("classification"), **options) as editor:
        resumed_figures = editor.meta_train(train, progress=interrupt)
        resumed = networks_of(editor)
    assert seen == [*range(1, 54), *range(51, 61)]
    (whole,) = kept_files()
    assert "partial" not in whole
    (cache_folder() / "mend" / whole).unlink()
    with Mend(model=make_model("classification"), **options) as editor:
        figures = editor.meta_train(train)
        assert same_tensors(networks_of(editor), resumed)
    assert {**figures, "seconds": 0.0} == {**resumed_figures, "seconds": 0.0}


def test_what_was_meta_trained_is_reused_by_content_whatever_is_edited(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    train, requests = train_requests("qa"), make_requests("qa")
    model = make_model("qa")
    with Mend(model=model, **FEW) as editor:
        figures = editor.meta_train(train)
        trained = networks_of(editor)
        for request in requests[:2]:
            editor.edit_text(request.prompt, request.target)
        edited = logits_of(model, requests)

        def fail(*_: object) -> None:
            raise AssertionError("trained again")

        assert editor.meta_train(train, progress=fail) == figures
        assert torch.equal(logits_of(model, requests), edited), "edits hold while the unedited model is looked up"
    assert len(kept_files()) == 1
    with Mend(model=make_model("qa"), **FEW) as fresh:
        torch.manual_seed(99)
        fresh.prepare(train)
        assert same_tensors(networks_of(fresh), trained)


def test_meta_training_after_edits_is_of_the_unedited_model_and_keeps_the_edits(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    train, request = train_requests("qa"), make_requests("qa")[0]
    with Mend(model=make_model("qa"), **FEW) as editor:
        editor.meta_train(train)
        trained = networks_of(editor)
        editor.edit_text(request.prompt, request.target)
        state = {
            name: value.clone() if isinstance(value, Tensor) else value for name, value in editor.state_dict().items()
        }
        edited = logits_of(editor.model, [request])
    (whole,) = kept_files()
    (cache_folder() / "mend" / whole).unlink()
    with Mend(model=make_model("qa"), **FEW) as again:
        again.load_state_dict(state)
        again.meta_train(train)
        assert kept_files() == {whole}
        assert same_tensors(networks_of(again), trained)
        assert torch.equal(logits_of(again.model, [request]), edited)


CHANGES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 5},
    "steps": {"n_steps": 5},
    "batch": {"batch_size": 3},
    "lr": {"lr": 2e-4},
    "edit_lr": {"edit_lr": 2e-4},
    "c_edit": {"c_edit": 0.2},
    "c_loc": {"c_loc": 0.5},
    "seed": {"meta_seed": 1},
    "layers": {"layers": [OTHER_LAYERS["qa"]]},
}


@pytest.mark.parametrize("change", list(CHANGES.values()), ids=list(CHANGES))
def test_another_setting_is_another_content(change: dict[str, Any], make_model: MakeModel) -> None:
    train = train_requests("qa")
    with Mend(model=make_model("qa"), **FEW) as editor:
        editor.meta_train(train)
    with Mend(model=make_model("qa"), **{**FEW, **change}) as editor, pytest.raises(UserError, match="meta-trained"):
        editor.prepare(train)


def test_other_weights_and_other_training_data_are_another_content(make_model: MakeModel) -> None:
    train = train_requests("qa")
    with Mend(model=make_model("qa"), **FEW) as editor:
        editor.meta_train(train)
        with pytest.raises(UserError, match="meta-trained"):
            editor.prepare(train[::-1])
    with Mend(model=make_model("qa", seed=1), **FEW) as editor, pytest.raises(UserError, match="meta-trained"):
        editor.prepare(train)


def test_the_edited_layer_by_name_and_by_default_are_one_content(make_model: MakeModel) -> None:
    model, train = make_model("qa"), train_requests("qa")
    with Mend(model=model, **FEW) as editor:
        editor.meta_train(train)
    with Mend(model=model, layers=[model.layer_name], **FEW) as editor:
        editor.prepare(train)


def test_an_editor_that_was_not_meta_trained_says_what_to_run(make_model: MakeModel) -> None:
    model = make_model("qa")
    with Mend(model=model) as editor:
        for act in (lambda: editor.prepare(train_requests("qa")), lambda: editor.edit_text("what is", "Rome")):
            with pytest.raises(UserError, match="'mend' has not been meta-trained") as caught:
                act()
            assert "grace-bench meta-train" in str(caught.value)
            assert model.layer_name in str(caught.value)
            assert "\n" not in str(caught.value)
    assert not kept_files()


def test_requests_about_one_fact_are_refused(make_model: MakeModel) -> None:
    with Mend(model=make_model("qa")) as editor, pytest.raises(UserError, match="at least two facts"):
        editor.meta_train(train_requests("qa")[:2])


def test_a_saved_editor_holds_weights_only_and_edits_on_once_prepared(
    make_model: MakeModel, make_requests: MakeRequests, tmp_path: Path
) -> None:
    model, requests, train = make_model("qa"), make_requests("qa"), train_requests("qa")
    with Mend(model=model, **FEW) as editor:
        editor.meta_train(train)
        editor.edit_text(requests[0].prompt, requests[0].target)
        editor.save_pretrained(tmp_path / "saved")
        once = logits_of(model, requests)
        assert editor.answering_state().keys() == {"n_edits", f"weights.{model.layer_name}.weight"}
        assert editor.extra_parameters == 0
        editor.edit_text(requests[1].prompt, requests[1].target)
        twice = logits_of(model, requests)
    fresh = make_model("qa")
    with Mend.from_pretrained(tmp_path / "saved", model=fresh) as loaded:
        assert torch.equal(logits_of(fresh, requests), once)
        with pytest.raises(UserError, match="meta-trained"):
            loaded.edit_text(requests[1].prompt, requests[1].target)
        loaded.prepare(train)
        loaded.edit_text(requests[1].prompt, requests[1].target)
        assert torch.equal(logits_of(fresh, requests), twice)


def test_an_update_that_is_not_finite_fails_and_leaves_the_weights(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model("qa"), make_requests("qa")[0]
    before = {name: tensor.clone() for name, tensor in model.layer.state_dict().items()}
    with Mend(model=model, **FEW) as editor:
        editor.meta_train(train_requests("qa"))
        assert editor.networks is not None
        editor.networks.log_edit_lr.fill_(1e4)
        with pytest.raises(EditFailure, match="not finite"):
            editor.edit_text(request.prompt, request.target)
        assert same_tensors(model.layer.state_dict(), before)


def test_a_training_that_diverges_says_at_which_step(make_model: MakeModel) -> None:
    with Mend(model=make_model("qa"), edit_lr=1e300, **FEW) as editor, pytest.raises(UserError, match="at step 1"):
        editor.meta_train(train_requests("qa"))


def test_a_layer_that_is_no_linear_map_is_refused_by_name(make_model: MakeModel) -> None:
    for path in ("encoder.block.0.layer.0.layer_norm", "encoder.block.0"):
        with pytest.raises(UserError, match=f"{re.escape(path)}.*not that of a linear map"):
            Mend(model=make_model("qa"), layers=[path])
    with pytest.raises(UserError, match="is not in the model"):
        Mend(model=make_model("qa"), layers=["encoder.block.9"])


@pytest.mark.parametrize(
    "option",
    [
        *({"rank": 0}, {"n_steps": 0}, {"batch_size": 0}, {"lr": 0.0}, {"edit_lr": -1.0}, {"c_edit": 0.0}),
        *({"c_loc": -1.0}, {"meta_seed": -1}, {"layers": []}, {"layers": "encoder"}),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(option: dict[str, Any], make_model: MakeModel) -> None:
    ((name, _),) = option.items()
    with pytest.raises(UserError, match=f"editor.{name}="):
        Mend(model=make_model("qa"), **option)


def test_a_layer_outside_a_sequence_is_edited_too() -> None:
    module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, points: Tensor) -> Tensor:
            out: Tensor = self.net(points)
            return out

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"points": torch.tensor([[float(number) for number in prompt.split()] for prompt in prompts])}

    model = EditableModel(Points(), layer="net.2", task="classification", encode=encode)
    train = [EditRequest(id=str(i), prompt=f"{i} {-i}", target=i % 3) for i in range(5)]
    with Mend(model=model, layers=["net.0", "net.2"], **FEW) as editor:
        editor.meta_train(train)
        assert editor.edit_text("0.5 0.5", 2).steps == 1
