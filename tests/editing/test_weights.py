"""Updates of several layers' weights: what they add up to, and that they survive whatever a run does with an editor."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.saving import option_names
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import check_linear
from grace_bench.errors import EditFailure, UserError
from grace_bench.launch.compose import compose
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

MakeTiny = Callable[..., EditableModel]

LAYERS = {
    "gpt2": [f"transformer.h.{i}.mlp.c_proj" for i in range(3)],
    "llama": [f"model.layers.{i}.mlp.down_proj" for i in range(3)],
}
D_OUT, D_IN = 32, 48
PROMPTS = ["what is the capital of Kazakhstan", "the river in Italy is", "what is the currency of Peru"]
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

each_family = pytest.mark.parametrize("family", list(LAYERS))
each_dtype = pytest.mark.parametrize("dtype", list(PRECISIONS))


class Nudged(EditorStrategy):
    """Adds to every layer an update that only the prompt decides."""

    registered_name = "nudged"
    freezes_weights = False
    supported_tasks: ClassVar = ("completion",)

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        scale: float = 1e-3,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, layers=layers, plugins=plugins, evaluator=evaluator)
        self.layers = None if layers is None else list(layers)
        self.scale = scale
        self.breaks_at: str | None = None
        """The layer at which an edit fails, if any."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        for path in self.layers or [self.model.layer_name]:
            if path == self.breaks_at:
                raise EditFailure("it broke")
            self.add_to_weight(path, update_of(batch.prompts[0], path, self.scale))
        return EditOutcome(loss_after=0.0)


class Inheriting(EditorStrategy):
    """Has no constructor of its own."""

    registered_name = "inheriting"
    freezes_weights = False

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome()


def update_of(prompt: str, path: str, scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, prompt + path)))
    return scale * torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)


@pytest.fixture
def make_tiny(word_tokenizer: Any) -> MakeTiny:
    """A random causal model of three blocks, a GPT-2 of `Conv1D` or a Llama of `nn.Linear`."""

    def make(family: str, dtype: str = "float32", *, seed: int = 0) -> EditableModel:
        size, tied = len(word_tokenizer), {"tie_word_embeddings": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module: Any
            if family == "gpt2":
                sizes = {"n_embd": D_OUT, "n_inner": D_IN, "n_layer": 3, "n_head": 2, "n_positions": 48}
                module = GPT2LMHeadModel(GPT2Config(vocab_size=size, initializer_range=0.3, **sizes, **tied))
            else:
                sizes = {"hidden_size": D_OUT, "intermediate_size": D_IN, "num_hidden_layers": 3}
                module = LlamaForCausalLM(
                    LlamaConfig(vocab_size=size, num_attention_heads=2, initializer_range=0.3, **sizes, **tied)
                )
        module.to(PRECISIONS[dtype]).eval()
        return EditableModel(module, layer=LAYERS[family][-1], task="completion", tokenizer=word_tokenizer)

    return make


def weights_of(model: EditableModel, family: str) -> dict[str, Tensor]:
    """Copies of the layers' weights as (D_out, D_in), read off the module itself."""
    modules = {path: model.module.get_submodule(path) for path in LAYERS[family]}
    stored = {path: module.get_parameter("weight").detach().clone() for path, module in modules.items()}
    return {path: weight.T if isinstance(modules[path], Conv1D) else weight for path, weight in stored.items()}


def everything(model: EditableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits_of(model: EditableModel) -> Tensor:
    with torch.no_grad():
        return model.logits(model.encode_batch(PROMPTS, ["Astana", "Tiber", "Sol"]))


def apply(editor: EditorStrategy, prompts: Sequence[str] = PROMPTS) -> None:
    for prompt in prompts:
        editor.edit_text(prompt, "Astana")


# What updates add up to.


@each_dtype
@each_family
def test_updates_of_every_layer_add_up_to_their_sum(family: str, dtype: str, make_tiny: MakeTiny) -> None:
    model = make_tiny(family, dtype)
    before = weights_of(model, family)
    unchanged = {name for name in everything(model) if name.removesuffix(".weight") not in LAYERS[family]}
    others = {name: tensor for name, tensor in everything(model).items() if name in unchanged}
    with Nudged(model=model, layers=LAYERS[family], scale=0.1) as editor:
        apply(editor)
        for path, weight in weights_of(model, family).items():
            expected = before[path].double() + sum(update_of(prompt, path, 0.1) for prompt in PROMPTS)
            assert torch.allclose(editor.weight_of(path).double(), expected, rtol=0, atol=1e-6)
            assert torch.equal(weight, editor.weight_of(path).to(PRECISIONS[dtype]))
        assert same({name: everything(model)[name] for name in unchanged}, others), "nothing else changes"


@each_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_smaller_than_the_rounding_of_a_weight_add_up(
    family: str, dtype: torch.dtype, make_tiny: MakeTiny
) -> None:
    model = make_tiny(family)
    model.module.to(dtype)
    path = LAYERS[family][1]
    before = weights_of(model, family)[path]
    update = torch.full((D_OUT, D_IN), 1e-5)
    in_float32, by_itself = before.float(), before.clone()
    with Nudged(model=model, layers=[path]) as editor:
        for _ in range(1000):
            editor.add_to_weight(path, update)
            in_float32 += update
            by_itself += update.to(dtype)
        after = weights_of(model, family)[path]
        assert torch.equal(editor.weight_of(path), in_float32)
        assert torch.equal(after, in_float32.to(dtype))
        moved = (after.double() - before.double()).mean().item()
        assert moved == pytest.approx(1e-2, rel=0.05)
        assert not torch.allclose(by_itself, after, rtol=0, atol=5e-3), "without a master most are lost"


@each_family
def test_a_double_update_is_rounded_once_and_only_small_dtypes_have_masters(family: str, make_tiny: MakeTiny) -> None:
    for dtype, has_master in ((torch.float64, False), (torch.float32, False), (torch.bfloat16, True)):
        model = make_tiny(family)
        model.module.to(dtype)
        path = LAYERS[family][0]
        before, update = weights_of(model, family)[path], update_of("p", path, 1.0)
        with Nudged(model=model, layers=[path]) as editor:
            assert editor.weight_of(path).dtype in (torch.float32, torch.float64)
            assert not any(name.startswith("masters.") for name in editor.state_dict()), "no update, no master"
            editor.add_to_weight(path, update)
            exact = before.double() + update
            kept = exact if dtype == torch.float64 else exact.float()
            assert torch.equal(editor.weight_of(path), kept)
            assert torch.equal(weights_of(model, family)[path], kept.to(dtype))
            assert any(name.startswith("masters.") for name in editor.state_dict()) == has_master
            assert editor.extra_parameters == 0 == editor.max_extra_parameters(10)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf")])
@each_dtype
@each_family
def test_an_update_that_is_not_finite_fails_and_changes_nothing(
    family: str, dtype: str, worst: float, make_tiny: MakeTiny
) -> None:
    model, path = make_tiny(family, dtype), LAYERS[family][0]
    with Nudged(model=model, layers=LAYERS[family]) as editor:
        apply(editor, PROMPTS[:1])
        state, update = {k: v for k, v in copy_of(editor).items() if k != "n_edits"}, torch.zeros(D_OUT, D_IN)
        update[1, 2] = worst
        with pytest.raises(EditFailure, match="the update is not finite"):
            editor.add_to_weight(path, update)
        assert same({k: v for k, v in editor.state_dict().items() if k != "n_edits"}, state)


@each_family
def test_an_update_of_another_shape_or_layer_is_a_mistake(family: str, make_tiny: MakeTiny) -> None:
    model = make_tiny(family)
    first, second, _ = LAYERS[family]
    with Nudged(model=model, layers=[first]) as editor:
        before = everything(model)
        for shape in ((D_IN, D_OUT), (D_OUT, 1), (1, D_IN), (D_IN,)):
            with pytest.raises(ValueError, match=first):
                editor.add_to_weight(first, torch.ones(shape))
        with pytest.raises(KeyError, match=second):
            editor.add_to_weight(second, torch.ones(D_OUT, D_IN))
        assert same(everything(model), before)


def test_two_layers_that_share_a_weight_share_its_master(make_tiny: MakeTiny) -> None:
    model = make_tiny("llama", "bfloat16")
    first, second, _ = LAYERS["llama"]
    model.module.get_submodule(second).weight = model.module.get_submodule(first).weight
    before = weights_of(model, "llama")[first].double()
    update = torch.full((D_OUT, D_IN), 3e-4)
    with Nudged(model=model, layers=[first, second]) as editor:
        for _ in range(50):
            editor.add_to_weight(first, update)
            editor.add_to_weight(second, update)
        assert torch.allclose(editor.weight_of(first).double(), before + 3e-2, rtol=0, atol=1e-5)
        assert torch.equal(editor.weight_of(first), editor.weight_of(second))


# What a run does with an editor.


def copy_of(editor: EditorStrategy) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in editor.state_dict().items()}


@each_dtype
@each_family
def test_rolling_back_gives_the_unedited_weights_and_edits_start_again_from_them(
    family: str, dtype: str, make_tiny: MakeTiny
) -> None:
    model = make_tiny(family, dtype)
    before = everything(model)
    with Nudged(model=model, layers=LAYERS[family]) as editor:
        apply(editor)
        once = everything(model)
        assert not same(once, before)
        editor.rollback()
        assert same(everything(model), before)
        apply(editor)
        assert same(everything(model), once)
    assert same(everything(model), before)


@each_dtype
@each_family
def test_a_suspended_editor_leaves_the_unedited_model_and_then_goes_on(
    family: str, dtype: str, make_tiny: MakeTiny
) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype)
    before = logits_of(model)
    with Nudged(model=twin, layers=LAYERS[family]) as expected, Nudged(model=model, layers=LAYERS[family]) as editor:
        for prompt in PROMPTS:
            apply(expected, [prompt])
            apply(editor, [prompt])
            with editor.suspended():
                assert torch.equal(logits_of(model), before)
                unedited = weights_of(model, family)
                assert all(torch.equal(editor.weight_of(path), weight.float()) for path, weight in unedited.items())
            assert torch.equal(logits_of(model), logits_of(twin))
        assert same_states(editor, expected)


def same_states(one: EditorStrategy, other: EditorStrategy) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name])) for name, value in states[0].items()
    )


@each_dtype
@each_family
def test_an_edit_that_fails_at_its_second_layer_leaves_no_trace(family: str, dtype: str, make_tiny: MakeTiny) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype)
    with Nudged(model=twin, layers=LAYERS[family]) as expected, Nudged(model=model, layers=LAYERS[family]) as editor:
        for n, prompt in enumerate(PROMPTS):
            # The first failure comes before there are any masters.
            editor.breaks_at = LAYERS[family][1 + n % 2]
            with pytest.raises(EditFailure, match="it broke"):
                apply(editor, ["of another prompt"])
            assert same_states(editor, expected)
            editor.breaks_at = None
            apply(expected, [prompt])
            apply(editor, [prompt])
        assert same_states(editor, expected)


@each_dtype
@each_family
def test_an_editor_resumes_bit_for_bit(family: str, dtype: str, make_tiny: MakeTiny) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype)
    with Nudged(model=twin, layers=LAYERS[family]) as expected, Nudged(model=model, layers=LAYERS[family]) as editor:
        apply(expected, PROMPTS[:2])
        state = copy_of(expected)
        apply(editor, ["which the checkpoint does not know"])
        editor.load_state_dict(state)
        assert same_states(editor, expected)
        apply(expected, PROMPTS[2:])
        apply(editor, PROMPTS[2:])
        assert same_states(editor, expected)
        assert torch.equal(logits_of(model), logits_of(twin))
        editor.load_state_dict(state)
        editor.rollback()
        assert torch.equal(logits_of(model), logits_of(make_tiny(family, dtype))), "a state is only read"


@each_dtype
@each_family
def test_a_saved_editor_answers_alike_and_goes_on_alike(
    family: str, dtype: str, make_tiny: MakeTiny, tmp_path: Path
) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype)
    with Nudged(model=twin, layers=LAYERS[family]) as saved:
        apply(saved, PROMPTS[:2])
        saved.save_pretrained(tmp_path)
        with Nudged.from_pretrained(tmp_path, model=model) as loaded:
            assert loaded.settings() == {"layers": LAYERS[family], "scale": 1e-3}
            assert same_states(loaded, saved)
            assert torch.equal(logits_of(model), logits_of(twin))
            for editor in (saved, loaded):
                apply(editor, PROMPTS[2:])
            assert same_states(loaded, saved)


def test_a_master_of_another_shape_is_a_damaged_state(make_tiny: MakeTiny) -> None:
    model, path = make_tiny("llama", "bfloat16"), LAYERS["llama"][0]
    with Nudged(model=model, layers=[path]) as editor:
        apply(editor)
        state = copy_of(editor)
        state[f"masters.{path}.weight"] = torch.zeros(3, 3)
        before = copy_of(editor)
        with pytest.raises(RuntimeError, match="masters"):
            editor.load_state_dict(state)
        assert same(
            {k: v for k, v in copy_of(editor).items() if k.startswith("m")},
            {k: v for k, v in before.items() if k.startswith("m")},
        )


# Which layers.


@each_family
def test_no_layers_are_the_models_own(family: str, make_tiny: MakeTiny) -> None:
    for cls in (Nudged, Inheriting):
        model = make_tiny(family)
        with cls(model=model) as editor:
            weights = [name for name in editor.state_dict() if name.endswith(".weight")]
            assert weights == [f"weights.{model.layer_name}.weight"]


def test_layers_are_an_option_only_of_an_editor_that_takes_them() -> None:
    assert Nudged.check_class() is None
    assert Inheriting.check_class() is None

    class Forgetful(EditorStrategy):
        """Takes layers and does not store them."""

        def __init__(self, *, model: Any, layers: Any = None, plugins: Any = (), evaluator: Any = None) -> None:
            super().__init__(model=model, layers=layers, plugins=plugins, evaluator=evaluator)

        def edit(self, batch: EditBatch) -> EditOutcome:
            return EditOutcome()

    class Heir(Nudged):
        """Inherits the constructor of an editor that takes layers."""

    assert (
        Forgetful.check_class() == "Forgetful.__init__ does not keep its argument 'layers': set `self.layers = layers`"
    )
    assert Heir.check_class() is None
    options = {cls: option_names(cls) for cls in (Nudged, Heir, Inheriting, EDITORS.get("none"), EDITORS.get("ft"))}
    assert list(options.values()) == [["layers", "scale"]] * 2 + [[]] * 2 + [["n_iter", "lr"]]
    with pytest.raises(UserError, match="layers"):
        compose(["stream=toy", "editor=none", "editor.layers=[a]"])


def test_settings_of_an_editor_without_a_constructor_are_empty(make_tiny: MakeTiny) -> None:
    with Inheriting(model=make_tiny("llama")) as editor:
        assert editor.settings() == {}


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (["model.layers.1.mlp.down_prj"], r"editor.layers='model.layers.1.mlp.down_prj' is not .* did you mean"),
        (["model.layers.1.mlp.down_proj.weight"], r"editor.layers=.* names a parameter; name its module"),
        ([LAYERS["llama"][0]] * 2, r"editor.layers names 'model.layers.0.mlp.down_proj' twice"),
        ([], r"editor.layers=\[\] should be a list of dotted paths, or null"),
        (LAYERS["llama"][0], r"editor.layers=model.layers.0.mlp.down_proj should be a list of dotted paths, or null"),
        ([3], r"editor.layers=\[3\] should be a list of dotted paths, or null"),
    ],
)
def test_layers_that_cannot_be_are_named_with_their_option(layers: Any, says: str, make_tiny: MakeTiny) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Nudged(model=make_tiny("llama"), layers=layers)
    assert len(str(caught.value).splitlines()) == 1


def test_a_layer_is_linear_or_named_with_what_it_is(make_tiny: MakeTiny) -> None:
    gpt2, llama = make_tiny("gpt2", "bfloat16"), make_tiny("llama")
    for model, family in ((gpt2, "gpt2"), (llama, "llama")):
        for path in LAYERS[family]:
            check_linear(model, path, "memit")
    quantised: Any = llama.module.get_submodule(LAYERS["llama"][1])
    quantised.weight = nn.Parameter(torch.zeros(D_OUT, D_IN // 2, dtype=torch.uint8), requires_grad=False)
    float8: Any = llama.module.get_submodule(LAYERS["llama"][2])
    float8.weight = nn.Parameter(float8.weight.to(torch.float8_e4m3fn), requires_grad=False)
    normed: Any = llama.module.get_submodule("model.layers.0.mlp.up_proj")
    torch.nn.utils.parametrizations.weight_norm(normed)
    linear = r"editor 'memit' rewrites a linear layer \(nn.Linear or Conv1D\)"
    for model, path, what in (
        (gpt2, "transformer.h.0.mlp", "GPT2MLP"),
        (gpt2, "transformer.ln_f", "LayerNorm"),
        (gpt2, "transformer.wte", "Embedding"),
        (llama, LAYERS["llama"][1], "Linear with quantised weights"),
        (llama, LAYERS["llama"][2], "Linear with quantised weights"),
        (llama, "model.layers.0.mlp.up_proj", "ParametrizedLinear"),
    ):
        with pytest.raises(UserError, match=f"^editor.layers={path} is a {what}: {linear}$"):
            check_linear(model, path, "memit", option="editor.layers")
    with pytest.raises(UserError, match=r"^layer='no.such' is not in the model"):
        check_linear(llama, "no.such", "memit")
