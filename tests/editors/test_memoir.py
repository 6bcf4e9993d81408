"""MEMOIR: its masks, its training against torch's own optimiser on a whole matrix, and when the memory is on."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors._memoir import masks as masks_module
from grace_bench.editors._memoir.masks import Masks
from grace_bench.editors.memoir import Memoir
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel

MakeCausal = Callable[..., EditableModel]
MakePrepared = Callable[..., Any]

PROMPTS = ("what is the capital of Italy", "the river in France is", "what is the currency of Peru")
TARGETS = ("Rome", "Seine", "Sol")
QUICK: dict[str, Any] = {"n_iter": 6}


def batch_of(model: EditableModel, *rows: int, side: Any = "right") -> EditBatch:
    prompts, targets = [PROMPTS[row] for row in rows], [TARGETS[row] for row in rows]
    encoded = model.encode_batch(prompts, targets, side=side)
    return EditBatch(prompts=tuple(prompts), targets=tuple(targets), encoded=encoded)


@torch.no_grad()
def logits(model: EditableModel, prompt: str) -> Tensor:
    return model.logits(model.encode_batch([prompt])).clone()


def mean_input(model: EditableModel, prompt: str) -> Tensor:
    """The mean of what enters the layer over a prompt's tokens, read by a hook of the test."""
    seen: list[Tensor] = []
    handle = model.layer.register_forward_hook(lambda _, args, __: seen.append(args[0][0]))
    with torch.no_grad():
        model.module(input_ids=model.encode_batch([prompt]).inputs["input_ids"])
    handle.remove()
    return seen[0].mean(dim=0)


class Beside(nn.Module):
    """A layer with a whole matrix beside it, which gets the masked input."""

    def __init__(self, layer: nn.Module, matrix: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.layer, self.matrix, self.mask = layer, nn.Parameter(matrix), mask

    def forward(self, given: Tensor) -> Tensor:
        output: Tensor = self.layer(given)
        return output + (given * self.mask) @ self.matrix.T


def replaced(model: EditableModel, matrix: Tensor, mask: Tensor) -> Beside:
    parent, _, name = model.layer_name.rpartition(".")
    beside = Beside(model.layer, matrix, mask)
    setattr(model.module.get_submodule(parent), name, beside)
    return beside


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_is_clipped_descent_on_the_whole_matrix(
    family: str, make_causal: MakeCausal, make_prepared: MakePrepared
) -> None:
    model = make_causal(family)
    editor = make_prepared("memoir", model, lr=0.7, **QUICK)
    for row in (0, 1):
        editor.edit(batch_of(model, row))
    edited = [logits(model, prompt) for prompt in PROMPTS[:2]]

    other = make_causal(family)
    width = editor.background.shape[0]
    matrix = torch.zeros(other.layer.weight.T.shape if isinstance(other.layer, Conv1D) else other.layer.weight.shape)
    permutation = torch.randperm(width, generator=torch.Generator().manual_seed(editor.seed))
    stored = []
    for row in (0, 1):
        feature = mean_input(other, PROMPTS[row]) - editor.background
        mask = torch.zeros(width)
        mask[permutation[feature.abs().topk(editor.masks.k).indices]] = 1
        stored.append(mask)
    for row, mask in enumerate(stored):
        fresh = make_causal(family)
        beside = replaced(fresh, matrix, mask)
        sgd = torch.optim.SGD([beside.matrix], lr=0.7)
        texts = [f"{context}. {PROMPTS[row]}" if context else PROMPTS[row] for context in editor.contexts]
        encoded = fresh.encode_batch(texts, [TARGETS[row]] * len(texts))
        assert encoded.labels is not None
        for _ in range(editor.n_iter):
            sgd.zero_grad()
            given = fresh.module(**{name: encoded.inputs[name] for name in ("input_ids", "attention_mask")}).logits
            nn.functional.cross_entropy(given.flatten(0, 1), encoded.labels.flatten()).backward()
            nn.utils.clip_grad_norm_([beside.matrix], 1.0)
            sgd.step()
        matrix = beside.matrix.detach()
    assert torch.allclose(editor.memory.matrix.T, matrix, atol=2e-5)
    assert bool(matrix.any())
    for row, mask in enumerate(stored):
        fresh = make_causal(family)
        replaced(fresh, matrix, mask)
        ids = fresh.encode_batch([PROMPTS[row]]).inputs["input_ids"]
        with torch.no_grad():
            assert torch.allclose(fresh.module(input_ids=ids).logits, edited[row], atol=1e-4)


def test_the_background_is_the_mean_feature_of_the_given_prompts(
    make_causal: MakeCausal, make_prepared: MakePrepared
) -> None:
    model = make_causal()
    texts = ["in Peru the river is", "Italy", "what is the currency"]
    editor = make_prepared("memoir", model, texts=texts)
    expected = torch.stack([mean_input(make_causal(), text) for text in texts]).mean(dim=0)
    assert torch.allclose(editor.background, expected, atol=1e-5)


def test_without_requests_for_training_the_model_writes_the_background_prompts(make_causal: MakeCausal) -> None:
    backgrounds = []
    for _ in range(2):
        editor = Memoir(model=make_causal(), n_prefixes=1, prefix_lengths=[3], n_background=4)
        editor.prepare([])
        backgrounds.append(editor.background)
    assert bool(backgrounds[0].any())
    assert torch.equal(*backgrounds)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_a_mask(side: str, make_causal: MakeCausal, make_prepared: MakePrepared) -> None:
    model = make_causal()
    editor = make_prepared("memoir", model)
    asked = [*PROMPTS, "Italy"]
    together = model.layer_call(model.encode_batch(asked, side=side))  # type: ignore[arg-type]
    alone = torch.stack([mean_input(make_causal(), prompt) for prompt in asked])
    means = (together.input * together.in_prompt[..., None]).sum(dim=1) / together.in_prompt.sum(dim=1, keepdim=True)
    assert torch.allclose(means, alone, atol=1e-5)
    assert editor.masks.of(alone).sum(dim=1).tolist() == [editor.masks.k] * 4


def test_a_prompt_with_too_little_in_common_gets_the_unedited_model(
    make_causal: MakeCausal, make_prepared: MakePrepared
) -> None:
    model = make_causal()
    untouched = [logits(model, prompt) for prompt in PROMPTS]
    editor = make_prepared("memoir", model, tau=1.0, **QUICK)
    editor.edit(batch_of(model, 0))
    assert not torch.equal(logits(model, PROMPTS[0]), untouched[0])
    assert all(torch.equal(logits(model, PROMPTS[row]), untouched[row]) for row in (1, 2))
    with torch.no_grad():
        together = model.logits(model.encode_batch(PROMPTS))
        alone = model.encode_batch(PROMPTS)
        assert torch.allclose(together[0, alone.query[0]], logits(model, PROMPTS[0])[0, -1], atol=1e-5)


def test_the_decision_at_the_prompt_holds_for_what_is_generated(
    make_causal: MakeCausal, make_prepared: MakePrepared
) -> None:
    model = make_causal()
    editor = make_prepared("memoir", model, tau=1.0, n_iter=30)
    editor.edit(batch_of(model, 0))
    encoded = model.encode_batch([PROMPTS[0], PROMPTS[1]], side="left")
    inputs = model.generation_inputs(encoded)
    rows = [
        model.module.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=use_cache, pad_token_id=0)  # type: ignore[operator]
        for use_cache in (True, False)
    ]
    assert torch.equal(*rows)
    unedited = make_causal().module.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)  # type: ignore[operator]
    assert torch.equal(rows[0][1], unedited[1])
    assert not torch.equal(rows[0][0], unedited[0])


def test_a_failed_edit_leaves_no_trace(
    make_causal: MakeCausal, make_prepared: MakePrepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_causal()
    editor = make_prepared("memoir", model, **QUICK)
    monkeypatch.setattr(editor, "lr", 1e38)
    with pytest.raises(EditFailure):
        editor.edit_text(PROMPTS[0], TARGETS[0])
    assert editor.memory.matrix is None
    monkeypatch.setattr(editor, "lr", 1.0)
    editor.edit_text(PROMPTS[0], TARGETS[0])
    before = editor.memory.matrix.clone()
    undo = editor.undo_point()
    editor.edit(batch_of(model, 1))
    assert not torch.equal(editor.memory.matrix, before)
    undo()
    assert torch.equal(editor.memory.matrix, before)
    assert len(editor.masks) == 1


def test_overlaps_are_those_of_the_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks_module, "_AT_ONCE", 500)
    generator = torch.Generator().manual_seed(0)
    masks = Masks(101, k=20, seed=3, device=torch.device("cpu"))
    stored = masks.of(torch.randn(60, 101, generator=generator))
    masks.extend(stored[:35])
    masks.extend(stored[35:])
    assert torch.equal(masks.unpacked(torch.arange(60)), stored)
    asked = torch.cat([masks.of(torch.randn(9, 101, generator=generator)), stored[[4, 50]]])
    entry, share = masks.most_alike(asked)
    sets = [set(mask.nonzero()[:, 0].tolist()) for mask in stored]
    for row, mask in enumerate(asked):
        own = set(mask.nonzero()[:, 0].tolist())
        common = [len(own & other) for other in sets]
        assert share[row] == pytest.approx(max(common) / 20)
        assert int(entry[row]) == max(range(60), key=lambda i: (common[i], i))


def test_masks_take_a_bit_for_an_input() -> None:
    masks = Masks(14336, k=4096, seed=0, device=torch.device("cpu"))
    masks.extend(masks.of(torch.randn(3, 14336)))
    assert masks.packed.numel() == 3 * 14336 // 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 49}, "editor.top_k=49 should be at most the layer's 48 inputs"),
        ({"tau": 0.0}, "editor.tau=0.0"),
        ({"n_background": 0}, "editor.n_background=0"),
        ({"prefix_lengths": [0]}, "editor.prefix_lengths=0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, make_causal: MakeCausal) -> None:
    with pytest.raises(UserError, match=message):
        Memoir(model=make_causal(), **options)


def test_it_needs_a_linear_layer_and_to_be_prepared(make_causal: MakeCausal) -> None:
    with pytest.raises(
        UserError, match=r"layer=transformer.h.1.ln_1 is a LayerNorm: editor 'memoir' acts beside a linear"
    ):
        Memoir(model=make_causal(layer="transformer.h.1.ln_1"))
    model = make_causal()
    with pytest.raises(UserError, match=r"call prepare\(\)"):
        Memoir(model=model).edit(batch_of(model, 0))


def test_an_edit_ends_once_the_loss_is_small(make_causal: MakeCausal, make_prepared: MakePrepared) -> None:
    model = make_causal()
    editor = make_prepared("memoir", model, n_iter=2000)
    outcome = editor.edit(batch_of(model, 0))
    assert 1 < outcome.steps < 2000
    assert outcome.loss >= 0.02
    assert outcome.loss_after < 0.02 or abs(outcome.loss_after - outcome.loss) < 1e-4
    again = editor.edit(batch_of(model, 0))
    assert again.steps <= 1


def test_requests_about_one_subject_do_not_crowd_the_background(make_causal: MakeCausal) -> None:
    model = make_causal()
    train = [
        EditRequest(id=str(i), prompt="Italy" if i < 10 else "the river in Peru is", target="x") for i in range(20)
    ]
    editor = Memoir(model=model, n_prefixes=0, n_background=2)
    editor.prepare(train)
    expected = torch.stack([mean_input(make_causal(), text) for text in ("Italy", "the river in Peru is")]).mean(dim=0)
    assert torch.allclose(editor.background, expected, atol=1e-5)
