"""Engines on models that share weights, write into their own tensors, or keep a state beside keys and values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.engine.engine import make_engine
from grace_bench.models.engine.pruning import cache_argument
from grace_bench.models.tasks.lookup import get_task
from grace_bench.registry import EDITORS

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
QUESTIONS = [
    ("what is the capital of Kazakhstan", "Astana"),
    ("the river in Italy is", "Tiber"),
    ("what is the currency of Peru in France", "Sol"),
]
GENERATES = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}


def llama(size: int) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=size, num_key_value_heads=1, tie_word_embeddings=True, **SIZES, **GENERATES)
    )


def gpt2(size: int) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=3, n_head=4, n_positions=64, **GENERATES)
    )


def t5(size: int) -> nn.Module:
    config = transformers.T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def falcon(size: int) -> nn.Module:
    """Adds its attention to the output of its MLP in place."""
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bias=False, **GENERATES
        )
    )


def lfm2(size: int) -> nn.Module:
    """Short convolutions, whose state its cache writes in place, and attention."""
    return transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            vocab_size=size,
            num_key_value_heads=2,
            layer_types=["conv", "full_attention", "conv"],
            block_auto_adjust_ff_dim=False,
            **SIZES,
            **GENERATES,
        )
    )


def qwen3_next(size: int) -> nn.Module:
    """Gated delta rule, whose recurrent state its cache writes in place, and attention."""
    return transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            vocab_size=size,
            num_key_value_heads=2,
            head_dim=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            mlp_only_layers=[0, 1, 2],
            **SIZES,
            **GENERATES,
        )
    )


def bert_decoder(size: int) -> nn.Module:
    """A causal model whose blocks are those of an encoder; it gets no mask where nothing is padded."""
    config = transformers.BertConfig(vocab_size=size, is_decoder=True, max_position_embeddings=64, **SIZES, **GENERATES)
    return transformers.BertLMHeadModel(config)


def switch(size: int) -> nn.Module:
    """A mixture of experts, each of which reads some of the tokens."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, num_experts=2, encoder_sparse_step=1
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def mamba(size: int) -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=size, hidden_size=32, num_hidden_layers=3, state_size=8, **GENERATES)
    )


def editable(build: Callable[[int], nn.Module], layer: str, tokenizer: Any, *, engine: str) -> EditableModel:
    torch.manual_seed(0)
    module = build(len(tokenizer))
    for weight in module.parameters():
        if weight.dim() > 1:
            nn.init.normal_(weight, std=0.25)
    task = get_task("qa" if module.config.is_encoder_decoder else "completion", max_new_tokens=3)  # type: ignore[union-attr]
    module.generation_config = transformers.GenerationConfig(decoder_start_token_id=0, do_sample=False)  # type: ignore[assignment]
    model = EditableModel(module, layer=layer, task=task, tokenizer=tokenizer)
    model.engine = make_engine(engine, model)  # type: ignore[arg-type]
    return model


def edited(model: EditableModel, editor: str, **options: Any) -> tuple[EditorStrategy, list[list[float]], list[Any]]:
    """Edits three requests, with an evaluation after each; returns the editor, the losses and the last answers."""
    made: EditorStrategy = EDITORS.get(editor)(model=model, **options)
    losses, answers = [], []
    prompts = [prompt for prompt, _ in QUESTIONS]
    for prompt, target in QUESTIONS:
        outcome = made.edit_text(prompt, target)
        losses.append([float(outcome.loss_first or 0), float(outcome.loss or 0)])
        answers = model.answer(prompts)
    return made, losses, answers


@pytest.mark.parametrize(
    ("build", "layer", "editor", "options"),
    [
        (llama, "lm_head", "ft", {"n_iter": 8}),
        pytest.param(gpt2, "lm_head", "ft", {"n_iter": 8}, marks=pytest.mark.slow),
        (t5, "lm_head", "ft", {"n_iter": 8}),
        (falcon, "transformer.h.1.mlp.dense_4h_to_h", "grace", {"replacement": "replace_last", "value_init": "warm"}),
        pytest.param(falcon, "transformer.h.1.mlp.dense_4h_to_h", "ft", {"n_iter": 8}, marks=pytest.mark.slow),
        pytest.param(
            lfm2, "model.layers.1.feed_forward.w2", "grace", {"replacement": "replace_last"}, marks=pytest.mark.slow
        ),
        (lfm2, "model.layers.0.feed_forward.w2", "grace", {"replacement": "replace_all"}),
        (qwen3_next, "model.layers.1.mlp.down_proj", "grace", {"replacement": "replace_last"}),
        pytest.param(
            qwen3_next, "model.layers.0.mlp.down_proj", "grace", {"replacement": "replace_last"}, marks=pytest.mark.slow
        ),
        pytest.param(
            bert_decoder,
            "bert.encoder.layer.0.output.dense",
            "grace",
            {"replacement": "replace_all"},
            marks=pytest.mark.slow,
        ),
        (bert_decoder, "bert.encoder.layer.0.output.dense", "ft", {"n_iter": 8}),
        (mamba, "backbone.layers.1.mixer.out_proj", "grace", {"replacement": "replace_last"}),
        pytest.param(mamba, "backbone.layers.1.mixer.out_proj", "ft", {"n_iter": 8}, marks=pytest.mark.slow),
    ],
    ids=lambda given: given.__name__ if callable(given) else str(given) if isinstance(given, str) else "",
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_engines_edit_alike(
    build: Callable[[int], nn.Module], layer: str, editor: str, options: dict[str, Any], word_tokenizer: Any
) -> None:
    if editor == "grace":
        options = {"n_iter": 8, "eps_init": 0.5, **options}
    exact, plain = (
        edited(editable(build, layer, word_tokenizer, engine=name), editor, **options) for name in ("exact", "plain")
    )
    assert exact[2] == plain[2]
    assert torch.tensor(exact[1]).allclose(torch.tensor(plain[1]), rtol=1e-3, atol=1e-3)
    assert exact[1][0][0] > 0


@pytest.mark.parametrize("engine", ["exact", "plain"])
def test_the_observed_output_of_a_layer_is_its_own_whatever_the_model_adds_to_it(
    engine: str, word_tokenizer: Any
) -> None:
    model = editable(falcon, "transformer.h.1.mlp.dense_4h_to_h", word_tokenizer, engine=engine)
    call = model.layer_call(model.encode_batch([QUESTIONS[0][0]]))
    assert torch.equal(call.output, model.layer(call.input))


class Writer(nn.Module):
    """Leaves its states in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        states["first"] = self.inner(hidden)
        return states["first"].tanh()


class Reader(nn.Module):
    """Reads the states that another module left."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, hidden: torch.Tensor, states: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.inner(hidden) + states["first"]


class Sharing(nn.Module):
    """Hands states on past the outputs of its modules, as Gemma 3n does with keys and values."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(size, 16), nn.Linear(16, size)
        self.writer, self.reader = Writer(), Reader()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        states: dict[str, torch.Tensor] = {}
        logits: torch.Tensor = self.head(self.reader(self.writer(self.embed(input_ids), states), states))
        return logits


def test_states_that_modules_hand_on_past_their_outputs_are_computed_in_each_pass(word_tokenizer: Any) -> None:
    model = EditableModel(
        Sharing(len(word_tokenizer)), layer="reader.inner", task="language_modelling", tokenizer=word_tokenizer
    )
    batch = model.encode_batch([QUESTIONS[0][0]], [QUESTIONS[0][1]])
    with torch.no_grad(), model.engine.remembering():
        with pytest.warns(RuntimeWarning, match="needs more than the outputs"):
            first = model.labelled_logits(batch)[0]
        again = model.labelled_logits(batch)[0]
    assert torch.equal(first, again)
    assert torch.equal(first, model.logits(batch))


def test_a_layer_that_is_called_with_some_of_the_tokens_is_refused(word_tokenizer: Any) -> None:
    layer = "encoder.block.1.layer.1.mlp.experts.expert_0.wo"
    model = editable(switch, layer, word_tokenizer, engine="exact")
    with pytest.raises(UserError, match=rf"^layer={layer} is called with a part of the tokens"):
        model.layer_call(model.encode_batch([QUESTIONS[2][0]]))


def test_a_mamba_decodes_by_hand_from_its_cache_as_it_generates(word_tokenizer: Any) -> None:
    model = editable(mamba, "backbone.layers.1.mixer.out_proj", word_tokenizer, engine="exact")
    editor: EditorStrategy = EDITORS.get("grace")(model=model, n_iter=12, eps_init=0.5)
    prompt, target = QUESTIONS[0]
    editor.edit_text(prompt, target)
    ids = word_tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = model.module.generate(ids, max_new_tokens=3, min_new_tokens=3)[0, ids.shape[1] :].tolist()  # type: ignore[operator]
    name, cache, given, found = str(cache_argument(model.module)), None, ids, []
    for _ in range(3):
        step = model.module(given, use_cache=True, **{name: cache})
        cache, given = step[name], step.logits[:, -1:].argmax(dim=-1)
        found.append(int(given))
    assert found == whole
