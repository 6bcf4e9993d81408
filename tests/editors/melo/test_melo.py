"""MELO's blocks on a model: what they add, which one an input gets, and what goes with `detach`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors.melo import Melo
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel

MakeCausal = Callable[..., EditableModel]
MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

INDEX = {"gpt2": "transformer.h.0.mlp.c_fc", "llama": "model.layers.0.mlp.up_proj"}
QUICK: dict[str, Any] = {"n_iter": 12, "n_blocks": 60, "lr": 0.01, "init_radius": 0.05}
PROMPTS = ("what is the capital of Italy", "the river in France is", "what is the currency of Peru")
TARGETS = ("Rome", "Seine", "Sol")


def batch_of(model: EditableModel, *rows: int) -> EditBatch:
    prompts, targets = [PROMPTS[row] for row in rows], [TARGETS[row] for row in rows]
    return EditBatch(prompts=tuple(prompts), targets=tuple(targets), encoded=model.encode_batch(prompts, targets))


@torch.no_grad()
def logits(model: EditableModel, prompt: str) -> Tensor:
    return model.logits(model.encode_batch([prompt])).clone()


@torch.no_grad()
def merge(model: EditableModel, editor: Melo, block: int) -> None:
    """Writes a block into the weights of its modules."""
    for path, (a, b) in editor.blocks.block(block).items():
        module = model.module.get_submodule(path)
        update = editor.n_blocks * (a @ b)
        weight = module.get_parameter("weight")
        weight += update if isinstance(module, Conv1D) else update.T


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_input_is_answered_as_if_its_block_were_in_the_weights(family: str, make_causal: MakeCausal) -> None:
    model = make_causal(family, layer=INDEX[family])
    with Melo(model=model, **QUICK) as editor:
        assert list(editor.blocks.sizes) == [INDEX[family].replace(".0.", f".{n}.") for n in (1, 2)]
        for row in range(3):
            assert editor.edit(batch_of(model, row)).loss_after is not None
        together = model.encode_batch(PROMPTS)
        with torch.no_grad():
            found = model.logits(together)
        answers = model.answer([*PROMPTS])
        for row, prompt in enumerate(PROMPTS):
            merged = make_causal(family, layer=INDEX[family])
            merge(merged, editor, row)
            expected = logits(merged, prompt)[0, -1]
            assert torch.allclose(found[row, together.query[row]], expected, atol=1e-4)
            # The block holds for the generated tokens, too.
            assert answers[row] == merged.answer([prompt])[0]


def test_inputs_outside_every_cluster_are_answered_by_the_unedited_model(make_causal: MakeCausal) -> None:
    model = make_causal(layer=INDEX["gpt2"])
    untouched = logits(model, "in Kazakhstan")
    with Melo(model=model, **QUICK) as editor:
        editor.edit(batch_of(model, 0))
        assert torch.equal(logits(model, "in Kazakhstan"), untouched)
        assert not torch.equal(logits(model, PROMPTS[0]), logits(make_causal(layer=INDEX["gpt2"]), PROMPTS[0]))


def test_a_batch_is_one_block(make_causal: MakeCausal) -> None:
    model = make_causal(layer=INDEX["gpt2"])
    with Melo(model=model, **QUICK) as editor:
        editor.edit(batch_of(model, 0, 1, 2))
        assert (len(editor.blocks), len(editor.codebook)) == (1, 3)
        answered = editor.answered_by(model.queries([*PROMPTS]))
        assert answered is not None
        assert len({*answered.versions}) == 1
        assert None not in answered.versions


def test_what_answers_a_query_is_what_the_pass_decides(make_causal: MakeCausal) -> None:
    model = make_causal("llama", layer=INDEX["llama"])
    with Melo(model=model, **{**QUICK, "init_radius": 3.0}) as editor:
        for row in range(3):
            editor.edit(batch_of(model, row))
        asked = [*PROMPTS, "in Peru", "the capital of France is", "what is the river"]
        encoded = model.encode_batch(asked)
        with torch.no_grad():
            model.logits(encoded)
        state = model.last_state
        answered = editor.answered_by(model.queries(asked))
        assert answered is not None
        assert answered.entry is not None
        assert state.entry is not None
        assert answered.entry.tolist() == state.entry.tolist()
        assert [version is None for version in answered.versions] == (state.entry < 0).tolist()


@pytest.mark.parametrize("fidelity", ["strict", "reference"])
def test_engines_decide_alike(fidelity: str, make_causal: MakeCausal) -> None:
    found = []
    for engine in ("exact", "plain"):
        model = make_causal(layer=INDEX["gpt2"], engine=engine)
        with Melo(model=model, fidelity=fidelity, **{**QUICK, "init_radius": 3.0}) as editor:  # type: ignore[arg-type]
            outcomes = [editor.edit(batch_of(model, row)) for row in (0, 1, 0, 2)]
            found.append(([(one.op, one.key, one.n_keys) for one in outcomes], logits(model, PROMPTS[0])))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-3)


def test_blocks_in_the_decoder_are_chosen_by_the_encoder(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, request = make_model("qa"), make_requests("qa")[0]
    layers = ["encoder.block.1.layer.1.DenseReluDense.wi", "decoder.block.1.layer.2.DenseReluDense.wi"]
    with Melo(model=model, layers=layers, **{**QUICK, "n_iter": 30}) as editor:
        editor.edit_text(request.prompt, request.target)
        merged = make_model("qa")
        merge(merged, editor, 0)
        assert model.answer([request.prompt]) == merged.answer([request.prompt])
        assert model.answer([request.prompt, "in Peru"])[1] == make_model("qa").answer(["in Peru"])[0]


def test_reference_runs_out_of_blocks_and_strict_does_not(make_causal: MakeCausal) -> None:
    for fidelity in ("strict", "reference"):
        model = make_causal(layer=INDEX["gpt2"])
        with Melo(model=model, fidelity=fidelity, **{**QUICK, "n_blocks": 1}) as editor:  # type: ignore[arg-type]
            editor.edit_text(PROMPTS[0], TARGETS[0])
            if fidelity == "strict":
                editor.edit_text(PROMPTS[1], TARGETS[1])
                assert len(editor.blocks) == 2
                continue
            with pytest.raises(EditFailure, match=r"all 1 blocks are taken: set editor.n_blocks"):
                editor.edit_text(PROMPTS[1], TARGETS[1])
            assert (len(editor.blocks), len(editor.codebook)) == (1, 1)


def test_a_failed_edit_leaves_no_trace(make_causal: MakeCausal, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_causal(layer=INDEX["gpt2"])
    with Melo(model=model, **{**QUICK, "init_radius": 50.0}) as editor:
        editor.edit_text(PROMPTS[0], TARGETS[0])
        before, answered = editor.state_dict(), logits(model, PROMPTS[0])
        monkeypatch.setattr(editor, "lr", float("inf"))
        with pytest.raises(EditFailure, match=r"not finite|is nan"):
            editor.edit_text(PROMPTS[1], TARGETS[1])
        after = editor.state_dict()
        assert all(
            torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]  # type: ignore[arg-type]
            for name, value in before.items()
        )
        assert torch.equal(logits(model, PROMPTS[0]), answered)


def test_detach_leaves_no_hook_behind(make_causal: MakeCausal) -> None:
    model = make_causal(layer=INDEX["gpt2"])
    editor = Melo(model=model, **QUICK)
    assert any(part._forward_hooks for part in model.module.modules())
    editor.detach()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.module.modules())


def test_where_nothing_follows_the_index_layer_it_gets_the_blocks_itself(make_causal: MakeCausal) -> None:
    model = make_causal(layer="transformer.h.2.mlp.c_fc")
    with Melo(model=model, **QUICK) as editor:
        assert list(editor.blocks.sizes) == ["transformer.h.2.mlp.c_fc"]
        outcome = editor.edit(batch_of(model, 0))
        assert outcome.loss_after is not None
        assert outcome.loss_first is not None
        assert outcome.loss_after < outcome.loss_first


def test_a_module_before_the_index_layer_is_refused_at_the_first_edit(make_causal: MakeCausal) -> None:
    model = make_causal(layer="transformer.h.1.mlp.c_fc")
    with (
        Melo(model=model, layers=["transformer.h.0.mlp.c_fc"], **QUICK) as editor,
        pytest.raises(UserError, match=r"editor.layers=transformer.h.0.mlp.c_fc is called before layer=") as caught,
    ):
        editor.edit_text(PROMPTS[0], TARGETS[0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["transformer.h.1.ln_1"]}, "editor.layers=transformer.h.1.ln_1 is a LayerNorm"),
        ({"layers": ["transformer.h.9.mlp.c_fc"]}, "editor.layers='transformer.h.9.mlp.c_fc' is not in the model"),
        ({"layers": ["transformer.h.1.mlp.c_fc"] * 2}, "editor.layers names 'transformer.h.1.mlp.c_fc' twice"),
        ({"n_blocks": 0}, "editor.n_blocks=0"),
        ({"init_radius": -1.0}, "editor.init_radius=-1.0"),
        ({"fidelity": "exact"}, "editor.fidelity=exact"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str, make_causal: MakeCausal) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Melo(model=make_causal(layer=INDEX["gpt2"]), **options)
    assert "\n" not in str(caught.value)
