"""Updates of several layers' weights: what they add up to, and that they survive whatever a run does with an editor."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.saving import option_names
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import RewrittenWeights, check_linear
from grace_bench.errors import EditFailure, UserError
from grace_bench.launch.compose import compose
from grace_bench.models.editable import EditableModel
from grace_bench.models.fingerprint import hash_weights
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
# Every family with every precision, and every place.
SOME = [
    ("gpt2", "bfloat16", "memory"),
    ("llama", "float32", "memory"),
    ("gpt2", "float32", "cpu"),
    ("llama", "bfloat16", "disk"),
]
some_of_each = pytest.mark.parametrize(("family", "dtype", "place"), SOME)
each_combination = pytest.mark.parametrize(
    ("family", "dtype", "place"),
    [
        pytest.param(*combination, marks=() if combination in SOME else pytest.mark.slow)
        for combination in product(LAYERS, PRECISIONS, ("memory", "cpu", "disk"))
    ],
)
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
def make_tiny(word_tokenizer: Any, tmp_path: Path) -> MakeTiny:
    """A random causal model of three blocks, a GPT-2 of `Conv1D` or a Llama of `nn.Linear`."""

    def make(family: str, dtype: str = "float32", place: str = "memory", *, engine: str = "exact") -> EditableModel:
        size, tied = len(word_tokenizer), {"tie_word_embeddings": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module: Any
            if family == "gpt2":
                sizes = {"n_embd": D_OUT, "n_inner": D_IN, "n_layer": 3, "n_head": 2, "n_positions": 48}
                module = GPT2LMHeadModel(GPT2Config(vocab_size=size, initializer_range=0.3, **sizes, **tied))
            else:
                sizes = {"hidden_size": D_OUT, "intermediate_size": D_IN, "num_hidden_layers": 3}
                module = LlamaForCausalLM(
                    LlamaConfig(vocab_size=size, num_attention_heads=2, initializer_range=0.3, **sizes, **tied)
                )
        for parameter in module.eval().parameters():
            # Buffers stay as they are, as in a model that is loaded.
            parameter.data = parameter.data.to(PRECISIONS[dtype])
        if place == "disk":
            module.save_pretrained(tmp_path / "checkpoint")
            parts = [name for name, part in module.named_modules() if name and not [*part.children()]]
            places = {name: "cpu" if "embed_tokens" in name or "wte" in name else "disk" for name in parts}
            module = AutoModelForCausalLM.from_pretrained(
                tmp_path / "checkpoint", dtype=PRECISIONS[dtype], device_map=places
            )
        elif place == "cpu":
            cpu_offload(module, execution_device=torch.device("cpu"))
        layer = LAYERS[family][-1]
        assert module.get_submodule(layer).weight.is_meta == (place != "memory")
        return EditableModel(module, layer=layer, task="completion", tokenizer=word_tokenizer, engine=cast(Any, engine))

    return make


def everything(model: EditableModel) -> dict[str, Tensor]:
    """Copies of all weights and buffers, wherever they lie."""
    found = {}
    for path, part in model.module.named_modules():
        with align_module_device(part, torch.device("cpu")):
            own = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
            found |= {f"{path}.{name}": tensor.detach().clone() for name, tensor in own}
    return found


def weights_of(model: EditableModel, family: str) -> dict[str, Tensor]:
    """Copies of the layers' weights as (D_out, D_in), read off the module itself."""
    found = everything(model)
    return {path: found[f"{path}.weight"].T if family == "gpt2" else found[f"{path}.weight"] for path in LAYERS[family]}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits_of(model: EditableModel) -> Tensor:
    with torch.no_grad():
        return model.logits(model.encode_batch(PROMPTS, ["Astana", "Tiber", "Sol"]))


def apply(editor: EditorStrategy, prompts: Sequence[str] = PROMPTS) -> None:
    for prompt in prompts:
        editor.edit_text(prompt, "Astana")


# What updates add up to.


@each_combination
def test_updates_of_every_layer_add_up_to_their_sum(family: str, dtype: str, place: str, make_tiny: MakeTiny) -> None:
    model = make_tiny(family, dtype, place)
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


@each_combination
def test_rolling_back_gives_the_unedited_weights_and_edits_start_again_from_them(
    family: str, dtype: str, place: str, make_tiny: MakeTiny
) -> None:
    model = make_tiny(family, dtype, place)
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


@each_combination
def test_a_suspended_editor_leaves_the_unedited_model_and_then_goes_on(
    family: str, dtype: str, place: str, make_tiny: MakeTiny
) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype, place)
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


@each_combination
def test_an_edit_that_fails_at_its_second_layer_leaves_no_trace(
    family: str, dtype: str, place: str, make_tiny: MakeTiny
) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype, place)
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


@each_combination
def test_an_editor_resumes_bit_for_bit(family: str, dtype: str, place: str, make_tiny: MakeTiny) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype, place)
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


@each_combination
def test_a_saved_editor_answers_alike_and_goes_on_alike(
    family: str, dtype: str, place: str, make_tiny: MakeTiny, tmp_path: Path
) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype, place)
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
    options = {cls: option_names(cls) for cls in (Nudged, Heir, Inheriting, EDITORS.get("none"))}
    assert list(options.values()) == [["layers", "scale"]] * 2 + [[]] * 2
    assert "layers" not in option_names(EDITORS.get("ft"))
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
        (llama, "model.layers.0.mlp.up_proj", "ParametrizedLinear"),
    ):
        with pytest.raises(UserError, match=f"^editor.layers={path} is a {what}: {linear}$"):
            check_linear(model, path, "memit", option="editor.layers")
    for path in LAYERS["llama"][1:3]:
        says = f"^editor.layers={path} has quantised weights, which editor 'memit' cannot change: "
        with pytest.raises(UserError, match=says):
            check_linear(llama, path, "memit", option="editor.layers")
        weights = RewrittenWeights(llama, editor="memit")
        for rewritten in (path, path.rpartition(".")[0]):
            with pytest.raises(UserError, match=f"^editor.layers={rewritten} has quantised weights, which"):
                weights.add(rewritten, option="editor.layers")
    with pytest.raises(UserError, match=r"^layer='no.such' is not in the model"):
        check_linear(llama, "no.such", "memit")


# Where the weights lie.


def offloaded(model: EditableModel) -> set[str]:
    return {name for name, tensor in model.module.state_dict().items() if tensor.is_meta}


@each_dtype
@each_family
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_rewritten_layers_are_in_memory_until_their_editor_is_detached(
    family: str, dtype: str, place: str, make_tiny: MakeTiny, tmp_path: Path
) -> None:
    model = make_tiny(family, dtype, place)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    parts, fingerprint = offloaded(model), make_tiny(family, dtype).fingerprint
    before, edited = logits_of(model), []
    for _ in range(2):
        with Nudged(model=model, layers=LAYERS[family]) as editor:
            assert parts - offloaded(model) == {name for name in parts if name.rpartition(".")[0] in LAYERS[family]}
            apply(editor)
            edited.append(logits_of(model))
            with editor.suspended():
                assert model.fingerprint == fingerprint
        assert offloaded(model) == parts
        assert torch.equal(logits_of(model), before)
        assert hash_weights(model.module) == fingerprint
        editor.detach()
    assert torch.equal(*edited)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


@each_dtype
@each_family
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_a_model_saved_by_transformers_has_the_edited_weights(
    family: str, dtype: str, place: str, make_tiny: MakeTiny, tmp_path: Path
) -> None:
    twin, model = make_tiny(family, dtype), make_tiny(family, dtype, place)
    with Nudged(model=twin, layers=LAYERS[family]) as expected, Nudged(model=model, layers=LAYERS[family]) as editor:
        apply(expected)
        apply(editor)
        model.module.save_pretrained(tmp_path / "exported")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=PRECISIONS[dtype])
        assert same(loaded.state_dict(), dict(twin.module.state_dict()))


def test_offloaded_weights_that_cannot_be_loaded_alone_are_refused_in_one_line(make_tiny: MakeTiny) -> None:
    tied = make_tiny("gpt2", place="cpu")
    tied.module.all_tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    around = make_tiny("llama")
    cpu_offload(around.module, execution_device=torch.device("cpu"), preload_module_classes=["LlamaMLP"])
    for model, path, why in (
        (tied, "lm_head", "and shared with another part of the model"),
        (around, LAYERS["llama"][1], "together with those of the module around it"),
    ):
        before = offloaded(model)
        with pytest.raises(UserError, match=f"^editor.layers={path}: its weights are offloaded {why}, where") as caught:
            Nudged(model=model, layers=[path])
        assert len(str(caught.value).splitlines()) == 1
        assert offloaded(model) == before


# What is recorded of passes.


@some_of_each
def test_both_engines_score_alike_whichever_layers_are_rewritten(
    family: str, dtype: str, place: str, make_tiny: MakeTiny
) -> None:
    requests = [EditRequest(id=prompt, prompt=prompt, target="Tiber") for prompt in PROMPTS[:2]]
    for layers in (LAYERS[family], [LAYERS[family][2], LAYERS[family][1]]):
        found: list[Any] = []
        for engine in ("exact", "plain"):
            model = make_tiny(family, dtype, place, engine=engine)
            model.task.max_new_tokens = 2
            with Nudged(model=model, layers=layers, scale=0.3) as editor:
                scores = []
                for prompt in PROMPTS[:2]:
                    apply(editor, [prompt])
                    for _ in range(2):
                        with model.engine.remembering():
                            scores += model.score(requests)
                    with editor.suspended(), model.engine.remembering():
                        scores += model.score(requests)
            found.append(scores)
        assert found[0] == found[1]
        assert len({score.text for score in found[0]}) > 1, "the edits change answers"


@some_of_each
def test_a_model_that_observes_a_later_layer_notices_that_earlier_ones_were_rewritten(
    family: str, dtype: str, place: str, make_tiny: MakeTiny
) -> None:
    model = make_tiny(family, dtype, place)
    given: dict[str, Any] = {"layer": LAYERS[family][1], "task": model.task, "tokenizer": model.tokenizer}
    exact = EditableModel(model.module, **given)
    plain = EditableModel(model.module, **given, engine="plain")
    batch = model.encode_batch(PROMPTS[:1], ["Tiber"])
    tolerance = 1e-4 if dtype == "float32" else 0.05

    def check() -> Tensor:
        """Compares what an engine has recorded, for a batch and between evaluations, with passes in full."""
        calls = exact.layer_call(batch), plain.layer_call(batch)
        assert torch.equal(calls[0].input, calls[1].input)
        with torch.no_grad(), exact.engine.remembering(drops_unused=False):
            losses = [model.task.loss(*observer.labelled_logits(batch)) for observer in (exact, plain)]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=tolerance)
        return calls[1].input

    exact.repeated(batch)
    unedited = check()
    for layers in (LAYERS[family][:1], LAYERS[family]):
        with Nudged(model=model, layers=layers) as editor:
            editor.add_to_weight(layers[0], update_of(PROMPTS[0], layers[0], 0.2))
            edited = check()
            assert not torch.allclose(edited, unedited, atol=0.1)
            with editor.suspended():
                assert torch.equal(check(), unedited)
            assert torch.equal(check(), edited)
            editor.rollback()
            assert torch.equal(check(), unedited)
            editor.add_to_weight(layers[0], update_of(PROMPTS[1], layers[0], 0.2))
            assert not torch.equal(check(), edited)
    assert torch.equal(check(), unedited)
