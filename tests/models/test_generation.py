"""Generation after an edit: what applies is decided at the prompt and holds for the sequence, whatever the cache.

The reference is one forward pass a token, without a cache, over a prompt and what was generated so far, queried where
the prompt is queried.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch

MakeModel = Callable[..., EditableModel]
MakeEditor = Callable[..., EditorStrategy]

EDITED = "what is the capital of Kazakhstan"
TARGET = "Astana Rome Lima Tenge"
# Of several lengths, so that a batch is padded; the second is one token away from the edited one.
PROMPTS = ["the river in Italy is", EDITED, "what is the currency of Peru in Lima", "Euro of France"]
N_NEW = 6

LAYERS = {
    "gpt2": "transformer.h.0.mlp.c_fc",
    "llama": "model.layers.0.mlp.down_proj",
    "t5 encoder": "encoder.block.0.layer.1.DenseReluDense.wo",
    "t5 decoder": "decoder.block.0.layer.2.DenseReluDense.wo",
}
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "none": {"use_cache": False},
}
EDITORS: dict[str, dict[str, Any]] = {
    f"{name} {where}": {"replacement": where, **options}
    for name, options in (
        ("grace", {"eps_init": 0.1, "n_iter": 25, "lr": 0.1}),
        ("defer", {"n_iter": 25}),
        ("memory", {"n_iter": 10}),
    )
    for where in ("replace_last", "replace_all", "replace_prompt")
} | {"lora": {"n_iter": 25, "lr": 0.02}}

each_architecture = pytest.mark.parametrize("architecture", list(LAYERS))


@pytest.fixture
def make(make_model: MakeModel, word_tokenizer: Any) -> Callable[[str], EditableModel]:
    def make(architecture: str) -> EditableModel:
        layer = LAYERS[architecture]
        if architecture.startswith("t5"):
            module = make_model("qa").module
            # So that answers depend on the question, and not on the decoder's own tokens alone.
            module.shared.weight.data.mul_(0.1)  # type: ignore[union-attr, operator]
        elif architecture == "gpt2":
            module = make_model("completion").module
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                module = LlamaForCausalLM(
                    LlamaConfig(
                        hidden_size=64,
                        intermediate_size=64,
                        num_hidden_layers=2,
                        num_attention_heads=2,
                        vocab_size=len(word_tokenizer),
                        max_position_embeddings=48,
                        initializer_range=0.3,
                        pad_token_id=0,
                    )
                )
            module.generation_config = GenerationConfig(do_sample=False)  # type: ignore[assignment]
        model = EditableModel(
            module, layer=layer, task="qa" if architecture.startswith("t5") else "completion", tokenizer=word_tokenizer
        )
        model.task.max_new_tokens = N_NEW
        return model

    return make


@pytest.fixture
def edited(make: Callable[[str], EditableModel], make_editor: MakeEditor) -> Iterator[Callable[[str, str], Any]]:
    made: list[EditorStrategy] = []

    def edit(architecture: str, editor: str) -> tuple[EditableModel, EditorStrategy]:
        model = make(architecture)
        strategy = make_editor(editor.split()[0], model, **EDITORS[editor])
        made.append(strategy)
        # Before the decoder's start token there is nothing to replace.
        fails = architecture == "t5 decoder" and editor == "grace replace_prompt"
        with torch.enable_grad(), pytest.raises(EditFailure) if fails else nullcontext():
            strategy.edit_text(EDITED, TARGET)
        return model, strategy

    yield edit
    for strategy in made:
        strategy.detach()


@torch.no_grad()
def one_by_one(model: EditableModel, prompt: str) -> list[int]:
    """Greedy tokens, each from a forward pass over everything before it, up to the end token."""
    batch = model.encode_batch([prompt])
    name = "decoder_input_ids" if "decoder_input_ids" in batch.inputs else "input_ids"
    tokens: list[int] = []
    while len(tokens) < N_NEW and model.tokenizer.eos_token_id not in tokens:
        given = torch.cat([batch.inputs[name], torch.tensor([tokens], dtype=torch.long)], dim=1)
        inputs: dict[str, Tensor] = {**batch.inputs, name: given}
        if name == "input_ids":
            inputs["attention_mask"] = torch.ones_like(given)
        logits = model.logits(EncodedBatch(inputs=inputs, query=batch.query))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def answers_in(output: Tensor, model: EditableModel, n_given: int) -> list[list[int]]:
    """Generated tokens without those of a prompt of `n_given`, up to the end token."""
    end = model.tokenizer.eos_token_id
    rows = output[:, 1 if model.task.name == "qa" else n_given :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def by_the_task(model: EditableModel, prompts: Sequence[str], cache: str) -> list[list[int]]:
    """Tokens that the harness generates."""
    kept = model.module.generation_config
    settings = GenerationConfig.from_dict({**kept.to_dict(), **CACHES[cache]})  # type: ignore[union-attr, operator]
    generate: Any = model.module.generate
    outputs: list[Tensor] = []

    def watched(**given: Any) -> Tensor:
        outputs.append(generate(**given))
        return outputs[-1]

    model.module.generation_config = settings  # type: ignore[assignment]
    model.module.generate = watched  # type: ignore[assignment]
    try:
        model.answer(prompts)
    finally:
        model.module.generation_config, model.module.generate = kept, generate
    side = "right" if model.task.name == "qa" else "left"
    # Before it, the first batch with padding is compared with a row alone.
    return answers_in(outputs[-1], model, model.encode_batch(prompts, side=side).inputs["input_ids"].shape[1])


def by_the_user(model: EditableModel, prompts: Sequence[str], cache: str) -> list[list[int]]:
    """Tokens that the model's own `generate` gives, called as any user would."""
    side = "right" if model.task.name == "qa" else "left"
    inputs = model.encode_batch(prompts, side=side).inputs
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    end = model.tokenizer.eos_token_id
    output = model.module.generate(  # type: ignore[operator]
        **given, max_new_tokens=N_NEW, eos_token_id=end, pad_token_id=0, **CACHES[cache]
    )
    return answers_in(output, model, given["input_ids"].shape[1])


@pytest.mark.parametrize(
    ("architecture", "editor"),
    # A quarter of the pairs is a share of each editor and of each architecture.
    [
        pytest.param(architecture, editor, marks=() if (i + j) % 4 == 0 else pytest.mark.slow)
        for i, architecture in enumerate(LAYERS)
        for j, editor in enumerate(EDITORS)
    ],
)
def test_every_cache_alone_and_in_a_batch_gives_the_tokens_of_the_sequence_without_one(
    architecture: str, editor: str, edited: Callable[[str, str], Any]
) -> None:
    model, strategy = edited(architecture, editor)
    with strategy.suspended():
        unedited = [one_by_one(model, prompt) for prompt in PROMPTS]
    expected = [one_by_one(model, prompt) for prompt in PROMPTS]
    if not (architecture == "t5 decoder" and "replace_prompt" in editor):
        assert expected[1] != unedited[1], "the edit changes the answer"
        assert len(expected[1]) > 2, "the answer is long enough to go wrong after its first token"
    if editor.startswith("grace"):
        far = [i for i, prompt in enumerate(PROMPTS) if prompt != EDITED]
        assert architecture == "t5 decoder" or [expected[i] for i in far] == [unedited[i] for i in far]
    for generate in (by_the_task, by_the_user):
        for cache in CACHES:
            where = f"{generate.__name__}, cache {cache}"
            assert [generate(model, [prompt], cache)[0] for prompt in PROMPTS] == expected, where
            assert generate(model, PROMPTS, cache) == expected, f"{where}, in a batch"


@pytest.mark.parametrize("editor", [name for name in EDITORS if "replace_all" in name or name == "lora"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@torch.no_grad()
def test_decoding_by_hand_with_a_cache_goes_on_from_its_prompt(
    architecture: str, editor: str, edited: Callable[[str, str], Any]
) -> None:
    model, _ = edited(architecture, editor)
    expected = [one_by_one(model, prompt) for prompt in PROMPTS]
    outputs = [model.module(input_ids=model.encode_batch([prompt]).inputs["input_ids"]) for prompt in PROMPTS]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(N_NEW):
        # In turns, so that each must be known by its own cache.
        for i, output in enumerate(outputs):
            tokens[i].append(int(output.logits[0, -1].argmax()))
            outputs[i] = model.module(input_ids=torch.tensor([tokens[i][-1:]]), past_key_values=output.past_key_values)
    end = model.tokenizer.eos_token_id
    assert [row[: row.index(end) + 1] if end in row else row for row in tokens] == expected


@each_architecture
@torch.no_grad()
def test_a_plain_call_is_answered_as_the_harness_answers_it(
    architecture: str, edited: Callable[[str, str], Any]
) -> None:
    model, _ = edited(architecture, "grace replace_all")
    # A padded batch, the edited prompt in it, on the side that the harness pads when nothing is generated.
    batch = model.encode_batch(PROMPTS)
    assert torch.equal(model.module(**batch.inputs).logits, model.logits(batch))


@torch.no_grad()
def test_a_prompt_after_a_generation_is_a_prompt_again(edited: Callable[[str, str], Any]) -> None:
    model, _ = edited("gpt2", "grace replace_all")
    longer = f"{EDITED} {model.tokenizer.decode(one_by_one(model, EDITED)[:1])}"
    expected = [one_by_one(model, EDITED)[:1], one_by_one(model, longer)[:1]]
    assert model.encode_batch([longer]).inputs["input_ids"].shape[1] == 7, "one token more than the edited prompt"
    for cache in CACHES:
        tokens = []
        for prompt in (EDITED, longer):
            ids = model.encode_batch([prompt]).inputs["input_ids"]
            output = model.module.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, pad_token_id=0, **CACHES[cache]
            )
            tokens.append(output[0, ids.shape[1] :].tolist())
        assert tokens == expected, cache


@pytest.mark.parametrize("editor", ["grace replace_prompt", "defer replace_all", "memory replace_last"])
@torch.no_grad()
def test_a_prompt_that_is_not_read_whole_is_refused(editor: str, edited: Callable[[str, str], Any]) -> None:
    model, _ = edited("llama", editor)
    ids = model.encode_batch([EDITED]).inputs["input_ids"]
    n_tokens = ids.shape[1]
    start: Any = model.module

    def read(n: int) -> Any:
        cache = DynamicCache(config=start.config)
        start(input_ids=ids[:, :n], past_key_values=cache)
        return cache

    attempts: dict[str, Callable[[], Any]] = {
        "chunks": lambda: start.generate(ids, max_new_tokens=2, prefill_chunk_size=4, pad_token_id=0),
        "a last chunk of one token": lambda: start.generate(
            ids, max_new_tokens=2, prefill_chunk_size=n_tokens - 1, pad_token_id=0
        ),
        "a generation from a cache": lambda: start.generate(
            ids, past_key_values=read(n_tokens - 1), max_new_tokens=2, pad_token_id=0
        ),
        "several tokens after a cache": lambda: start(input_ids=ids[:, 2:], past_key_values=read(2)),
    }
    for name, attempt in attempts.items():
        with pytest.raises(UserError) as caught:
            attempt()
        assert "prompt whole" in str(caught.value), name
        assert len(str(caught.value).splitlines()) == 1, name
    # A refusal leaves nothing behind.
    assert by_the_user(model, PROMPTS, "dynamic") == [one_by_one(model, prompt) for prompt in PROMPTS]


@torch.no_grad()
def test_a_cache_that_another_model_filled_is_refused_only_where_an_editor_must_decide(
    edited: Callable[[str, str], Any],
) -> None:
    model, strategy = edited("gpt2", "grace replace_all")
    ids = model.encode_batch([EDITED]).inputs["input_ids"]
    with strategy.suspended():
        unedited = model.module(input_ids=ids)
        following = model.module(input_ids=ids[:, :1], past_key_values=unedited.past_key_values).logits
        assert following.isfinite().all()
    with pytest.raises(UserError, match="prompt whole"):
        model.module(input_ids=ids[:, :1], past_key_values=unedited.past_key_values)
