"""Pruned tails: the answers that are scored, from less work, and the whole model wherever that would be wrong."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from grace_bench.data.requests import TaskName
from grace_bench.models.editable import EditableModel, LayerCall, Replacement
from grace_bench.models.encoding import IGNORED, EncodedBatch, PaddingSide, last_token

VOCABULARY, WIDTH = 50, 32
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.3,
}
GPT2_SIZES = {"n_embd": WIDTH, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
ROUNDING = 1e-5


@dataclass(frozen=True)
class Family:
    """An architecture, the layer edited in its block n, and a part of its last block that sees what was not pruned."""

    make: Callable[[], nn.Module]
    layer: str
    witness: str
    task: TaskName

    def model(self, *, block: int = 0, layer: str | None = None, **options: Any) -> EditableModel:
        torch.manual_seed(0)
        return EditableModel(
            with_biases(self.make()), layer=layer or self.layer.format(block), task=self.task, **options
        )


def with_biases(module: nn.Module) -> nn.Module:
    """The network with biases that are not zero, as they are at first."""
    for name, weight in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.3)
    return module


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **GPT2_SIZES))


def llama(n_key_value_heads: int) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=n_key_value_heads, **SIZES))


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(num_labels=4, **SIZES))


def mistral() -> nn.Module:
    return MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=4, **SIZES))


CLASSIFIERS = {
    "bert": Family(bert, "bert.encoder.layer.{}.output.dense", "bert.encoder.layer.2.intermediate", "classification"),
    "roberta": Family(
        lambda: RobertaForSequenceClassification(RobertaConfig(num_labels=4, **SIZES)),
        "roberta.encoder.layer.{}.output.dense",
        "roberta.encoder.layer.2.intermediate",
        "classification",
    ),
}
DECODER_LAYERS = ("model.layers.{}.mlp.down_proj", "model.layers.2.mlp", "completion")
CAUSAL = {
    "gpt2": Family(gpt2, "transformer.h.{}.mlp.c_fc", "transformer.h.2.mlp", "completion"),
    "llama": Family(lambda: llama(4), *DECODER_LAYERS),  # type: ignore[arg-type]
    "llama_grouped": Family(lambda: llama(2), *DECODER_LAYERS),  # type: ignore[arg-type]
    "qwen2_grouped": Family(
        lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **SIZES)),
        *DECODER_LAYERS,  # type: ignore[arg-type]
    ),
    "mistral_sliding": Family(mistral, *DECODER_LAYERS),  # type: ignore[arg-type]
}
SHOWN = ("bert", "gpt2", "llama_grouped", "mistral_sliding")
"""A family of each way to attend; `make test-slow` has the others."""


def each(families: Mapping[str, Family]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "family",
        [pytest.param(it, id=name, marks=() if name in SHOWN else pytest.mark.slow) for name, it in families.items()],
    )


each_classifier, each_causal, each_family = each(CLASSIFIERS), each(CAUSAL), each({**CLASSIFIERS, **CAUSAL})


def encoded(
    task: str, lengths: Sequence[int], side: PaddingSide = "right", *, n_targets: Sequence[int] = (2,), seed: int = 0
) -> EncodedBatch:
    """Rows of some lengths; in a causal batch the last tokens of each are labelled, and the query is just before."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.stack([(torch.arange(width) < length).long() for length in lengths])
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(3, VOCABULARY, mask.shape, generator=generator) * mask
    inputs, last = {"input_ids": ids, "attention_mask": mask}, last_token(mask)
    if task == "classification":
        return EncodedBatch(inputs=inputs, query=last, labels=torch.arange(len(lengths)) % 2)
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    labels = torch.full_like(ids, IGNORED)
    n_labels = torch.tensor([n_targets[row % len(n_targets)] for row in range(len(lengths))])
    for row, n in enumerate(n_labels):
        for column in range(int(last[row] - n), int(last[row])):
            labels[row, column] = ids[row, column + 1]
    return EncodedBatch(inputs=inputs, query=last - n_labels, labels=labels)


def batches(task: str) -> Iterator[EncodedBatch]:
    for lengths in ([7], [9, 6, 4], [5, 12]):
        yield encoded(task, lengths)
        if task == "completion":
            yield encoded(task, lengths, "left")
            yield encoded(task, lengths, n_targets=(1, 3))


def labels_of(batch: EncodedBatch) -> Tensor:
    assert batch.labels is not None
    return batch.labels


def scored(logits: Tensor, batch: EncodedBatch) -> Tensor:
    """(N, C) the logits that are scored; of labels, those that count."""
    labels = labels_of(batch)
    return logits if labels.dim() == 1 else logits[labels != IGNORED]


def assert_close(given: Tensor, expected: Tensor) -> None:
    assert given.shape == expected.shape
    assert float((given - expected).detach().abs().max()) <= ROUNDING * float(expected.detach().abs().max())


@contextmanager
def widths_at(part: nn.Module) -> Iterator[list[int]]:
    """How many positions a module is given, call by call."""
    seen: list[int] = []
    handle = part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        yield seen
    finally:
        handle.remove()


# What is scored stays what it is.


@each_family
def test_pruned_logits_are_those_of_the_whole_model_where_they_are_scored(family: Family) -> None:
    model = family.model()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for batch in batches(family.task):
            logits, aligned = model.labelled_logits(batch)
            whole = model.logits(batch)
            assert torch.equal(scored(labels_of(batch), batch), scored(labels_of(aligned), aligned))
            assert_close(scored(logits, aligned), scored(whole, batch))
            assert_close(model.task.loss(logits, aligned), model.task.loss(whole, batch))
    assert model.engine.notes == []


# Each family with each replacement, and with every second of them at each block.
PLACES = [
    pytest.param(
        *(family, block, where),
        id=f"{name}-{block}-{where}",
        marks=() if name in SHOWN or block == 1 else pytest.mark.slow,
    )
    for turn, (name, family) in enumerate({**CLASSIFIERS, **CAUSAL}.items())
    for number, where in enumerate(get_args(Replacement))
    for block in (0, 1)
    if (turn + number + block) % 2 == 0
]


@pytest.mark.parametrize(("family", "block", "where"), PLACES)
def test_pruned_gradients_are_those_of_the_whole_model(family: Family, block: int, where: Replacement) -> None:
    model = family.model(block=block)
    for batch in batches(family.task):
        width = model.layer_call(batch).output.shape[-1]
        delta = torch.randn(len(batch), width, requires_grad=True)

        def answer(call: LayerCall, delta: Tensor = delta) -> Tensor:
            return call.replace(call.output_at_query + delta, torch.ones(len(delta), dtype=torch.bool), where)

        handle = model.intercept(answer)
        repeated = model.repeated(batch)
        losses = model.task.loss(repeated(), repeated.batch), model.task.loss(model.logits(batch), batch)
        pruned, whole = (torch.autograd.grad(loss, delta)[0] for loss in losses)
        handle.remove()
        assert whole.any()
        assert_close(pruned, whole)
    assert model.engine.notes == []


@each_classifier
def test_a_classifiers_last_block_is_computed_for_the_first_position_alone(family: Family) -> None:
    model = family.model()
    batch = encoded("classification", [9, 6])
    model.labelled_logits(batch)
    model.repeated(batch)
    with widths_at(model.find_layer(family.witness)) as widths:
        model.labelled_logits(batch)
        model.repeated(batch)()
    assert set(widths) == {1}


@each_classifier
@pytest.mark.parametrize("projection", ["key", "value"])
def test_what_is_hooked_to_a_pruned_blocks_projections_is_heard(family: Family, projection: str) -> None:
    model = family.model()
    batch = encoded("classification", [9, 6])
    name = family.witness.replace("intermediate", f"attention.self.{projection}")
    handle = model.find_layer(name).register_forward_hook(lambda _, __, output: output * 1.5)
    changed = model.logits(batch)
    assert_close(model.labelled_logits(batch)[0], changed)
    handle.remove()
    assert not torch.allclose(model.labelled_logits(batch)[0], changed, atol=1e-3)
    assert not model.engine.notes


@each_causal
def test_a_causal_models_last_block_and_head_are_computed_for_the_labelled_positions_alone(family: Family) -> None:
    model = family.model()
    batch = encoded("completion", [9, 9], n_targets=(1, 3))
    model.labelled_logits(batch)
    with widths_at(model.find_layer(family.witness)) as widths, widths_at(model.find_layer("lm_head")) as heads:
        logits, aligned = model.labelled_logits(batch)
    assert widths == heads == [3]
    assert logits.shape[:2] == labels_of(aligned).shape == (2, 3)


@pytest.mark.parametrize("n_vocabulary", [1024, 1300])
@pytest.mark.parametrize(("n_rows", "n_labels"), [(1, 1), (3, 5), (16, 4), (13, 5)])
def test_a_head_of_many_tokens_gives_the_logits_and_gradients_of_the_whole_model(
    n_vocabulary: int, n_rows: int, n_labels: int
) -> None:
    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(initializer_range=0.3, **{**GPT2_SIZES, "vocab_size": n_vocabulary}))
    model = EditableModel(with_biases(module), layer="transformer.h.0.mlp.c_fc", task="completion")
    batch = encoded("completion", n_rows * [9], n_targets=(n_labels,))
    delta = torch.randn(n_rows, model.layer_call(batch).output.shape[-1], requires_grad=True)
    every = torch.ones(n_rows, dtype=torch.bool)
    handle = model.intercept(lambda call: call.replace(call.output_at_query + delta, every, "replace_last"))
    first = int(batch.query.min())
    for repeated in (model.repeated(batch), model.repeated(batch, first_changed=first)):
        pruned, whole = repeated(), model.logits(batch)
        assert pruned.shape == (n_rows, n_labels, n_vocabulary)
        assert_close(scored(pruned, repeated.batch), scored(whole, batch))
        losses = (model.task.loss(pruned, repeated.batch), model.task.loss(whole, batch))
        assert_close(*(torch.autograd.grad(loss, delta)[0] for loss in losses))
    handle.remove()
    assert model.engine.notes == []


@each_causal
def test_a_batch_whose_every_position_is_labelled_is_computed_whole(family: Family) -> None:
    model = family.model()
    batch = encoded("completion", [9, 6])
    everything = replace(batch, labels=torch.ones_like(batch.inputs["input_ids"]))
    logits, aligned = model.labelled_logits(everything)
    assert torch.equal(logits, model.logits(batch))
    assert labels_of(aligned).shape == (2, 9)


@each_causal
@pytest.mark.parametrize("is_first", [True, False])
def test_a_batch_in_which_nothing_is_labelled_is_no_reason_to_fail(family: Family, is_first: bool) -> None:
    model = family.model()
    batch = encoded("completion", [9, 6])
    nothing = replace(batch, labels=torch.full_like(batch.inputs["input_ids"], IGNORED))
    if not is_first:
        model.labelled_logits(batch)
    logits, aligned = model.labelled_logits(nothing)
    assert logits.shape[:2] == labels_of(aligned).shape
    assert scored(logits, aligned).numel() == 0
    assert model.labelled_logits(batch)[0].shape[1] < 9, "pruning goes on"
    assert model.engine.notes == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_family
def test_a_model_of_less_precision_is_pruned_too(family: Family, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = EditableModel(family.make().to(dtype), layer=family.layer.format(0), task=family.task)
    for batch in batches(family.task):
        logits, aligned = model.labelled_logits(batch)
        whole = scored(model.logits(batch), batch).float()
        differs = (scored(logits, aligned).float() - whole).abs().max()
        assert float(differs) <= 16 * torch.finfo(dtype).eps * float(whole.abs().max())
    assert model.engine.notes == []


# Where pruning would be wrong.


class PoolsTheMean(nn.Module):
    """A classifier that reads every position of its encoder, though it looks like one that reads the first."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = bert().bert
        self.num_labels = 4
        self.classifier = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(states.dtype)
        return self.classifier((states * weights).sum(dim=1) / weights.sum(dim=1))


class PoolsTheLast(BertForSequenceClassification):
    """BERT's own class with another forward pass."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids, attention_mask).last_hidden_state
        return self.classifier(states[torch.arange(len(states)), last_token(attention_mask)])


class BertLayer(nn.Module):
    """A block of another make under a family's name."""

    def __init__(self, error: type[Exception] | None) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.error = error

    @property
    def attention(self) -> nn.Module:
        if self.error:
            raise self.error("of another make")
        return bert().bert.encoder.layer[2].attention

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dense(hidden).tanh()


class OfAnotherMake(nn.Module):
    def __init__(self, error: type[Exception] | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([BertLayer(error) for _ in range(3)])
        self.num_labels = 4
        self.classifier = nn.Linear(WIDTH, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.classifier(hidden[:, 0])


def pools_the_last() -> nn.Module:
    return PoolsTheLast(BertConfig(num_labels=4, **SIZES))


def classifies_tokens() -> nn.Module:
    return BertForTokenClassification(BertConfig(num_labels=4, **SIZES))


def gpt2_classifier() -> nn.Module:
    return GPT2ForSequenceClassification(GPT2Config(num_labels=4, initializer_range=0.3, pad_token_id=0, **GPT2_SIZES))


BERT_LAYER, GPT2_LAYER = "bert.encoder.layer.0.output.dense", "transformer.h.0.mlp.c_fc"
each_that_reads_more = pytest.mark.parametrize(
    ("make", "layer"),
    [
        (PoolsTheMean, BERT_LAYER),
        (pools_the_last, BERT_LAYER),
        (classifies_tokens, BERT_LAYER),
        (gpt2_classifier, GPT2_LAYER),
        (OfAnotherMake, "layers.0.dense"),
        *((lambda error=error: OfAnotherMake(error), "layers.0.dense") for error in (IndexError, KeyError, TypeError)),
    ],
    ids=["mean", "last", "tokens", "gpt2", "block", "IndexError", "KeyError", "TypeError"],
)


def assert_whole_and_said_once(model: EditableModel, given: Sequence[EncodedBatch]) -> None:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for batch in given:
            for _ in range(2):
                whole = model.logits(batch)
                for logits in (model.labelled_logits(batch)[0], model.repeated(batch)()):
                    assert torch.equal(logits, whole)
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert said == [f"{model.name}: {note}" for note in model.engine.notes]
    assert len(said) == 1
    assert "pruned to what is scored they would differ" in said[0]


@each_that_reads_more
def test_a_model_that_reads_more_than_is_pruned_answers_as_a_whole_and_says_so_once(
    make: Callable[[], nn.Module], layer: str
) -> None:
    torch.manual_seed(0)
    model = EditableModel(make(), layer=layer, task="classification")
    assert_whole_and_said_once(model, list(batches("classification")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [PoolsTheMean, pools_the_last])
def test_a_wrong_pruning_shows_in_less_precision_too(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = EditableModel(make().to(dtype), layer=BERT_LAYER, task="classification")
    assert_whole_and_said_once(model, list(batches("classification")))


@each_that_reads_more
def test_a_row_of_one_token_does_not_vouch_for_longer_ones(make: Callable[[], nn.Module], layer: str) -> None:
    torch.manual_seed(0)
    model = EditableModel(make(), layer=layer, task="classification")
    one_token = encoded("classification", [1, 1])
    assert_whole_and_said_once(model, [one_token, *batches("classification")])


@each_family
@pytest.mark.parametrize("pruned_before", [False, True])
def test_in_training_mode_nothing_is_pruned_and_that_is_said_once(family: Family, pruned_before: bool) -> None:
    model = family.model()
    batch = encoded(family.task, [9, 6])
    if pruned_before:
        model.labelled_logits(batch)
    model.module.train()
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for seed in range(2):
            torch.manual_seed(seed)
            dropped_out = model.labelled_logits(batch)[0]
            torch.manual_seed(seed)
            assert torch.equal(dropped_out, model.logits(batch))
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert said == [f"{model.name}: {note}" for note in model.engine.notes]
    assert len(said) == 1
    assert "training mode" in said[0]
    model.module.eval()
    logits, aligned = model.labelled_logits(batch)
    assert_close(scored(logits, aligned), scored(model.logits(batch), batch))


# The edited layer.


@each_causal
def test_the_block_of_the_edited_layer_stays_whole(family: Family) -> None:
    model = family.model(block=2)
    batch = encoded("completion", [9, 6])
    value = torch.randn(model.layer_call(batch).output.shape[-1])
    rows = torch.ones(2, dtype=torch.bool)
    handle = model.intercept(lambda call: call.replace(value.expand(2, -1), rows, "replace_all"))
    with torch.no_grad(), widths_at(model.find_layer(family.witness)) as widths:
        logits, aligned = model.labelled_logits(batch)
        assert_close(scored(logits, aligned), scored(model.logits(batch), batch))
    handle.remove()
    assert set(widths) == {9}
    assert labels_of(aligned).shape[1] < 9


@each_classifier
def test_the_edited_layer_in_a_classifiers_last_block_sees_every_position(family: Family) -> None:
    model = family.model(block=2)
    batch = encoded("classification", [9, 6])
    with torch.no_grad(), widths_at(model.find_layer(family.witness)) as widths:
        assert torch.equal(model.labelled_logits(batch)[0], model.logits(batch))
        assert torch.equal(model.repeated(batch)(), model.logits(batch))
    assert set(widths) == {9}
    assert model.engine.notes == []


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        (CAUSAL["gpt2"], "transformer.ln_f"),
        (CAUSAL["gpt2"], "lm_head"),
        (CAUSAL["llama"], "model.norm"),
        (CAUSAL["llama"], "lm_head"),
        (CLASSIFIERS["bert"], "bert.pooler.dense"),
        (CLASSIFIERS["bert"], "classifier"),
        (CLASSIFIERS["roberta"], "classifier.dense"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("where", ["replace_last", "replace_prompt", "replace_all"])
def test_an_edit_behind_the_last_block_acts_where_it_acts_in_the_whole_model(
    family: Family, layer: str, where: Replacement
) -> None:
    model = family.model(layer=layer)
    batch = encoded(family.task, [9, 6])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", RuntimeWarning)
        model.labelled_logits(batch)
        values = torch.randn(2, model.layer_call(batch).output.shape[-1])
        handle = model.intercept(lambda call: call.replace(values, torch.ones(2, dtype=torch.bool), where))
        expected = scored(model.logits(batch), batch)
        logits, aligned = model.labelled_logits(batch)
        assert_close(scored(logits, aligned), expected)
        again = replace(batch)
        model.layer_call(again)
        repeated = model.repeated(again)
        for _ in range(2):
            assert_close(scored(repeated(), repeated.batch), expected)
        handle.remove()


# What comes before the first position that changes is computed once.

EACH_BLOCK = pytest.mark.parametrize("block", [0, 1, 2])


@each_causal
@EACH_BLOCK
def test_gradients_behind_cached_keys_and_values_are_those_of_the_whole_model(family: Family, block: int) -> None:
    model = family.model(block=block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(family.task):
            delta = torch.randn(len(batch), model.layer_call(batch).output.shape[-1], requires_grad=True)

            def answer(call: LayerCall, delta: Tensor = delta) -> Tensor:
                every = torch.ones(len(delta), dtype=torch.bool)
                return call.replace(call.output_at_query + delta, every, "replace_last")

            handle = model.intercept(answer)
            repeated = model.repeated(batch, first_changed=int(batch.query.min()))
            first, second = (model.task.loss(repeated(), repeated.batch) for _ in range(2))
            whole = model.task.loss(model.logits(batch), batch)
            gradients = [torch.autograd.grad(loss, delta)[0] for loss in (first, second, whole)]
            handle.remove()
            assert torch.equal(gradients[0], gradients[1])
            assert torch.equal(first, second)
            assert gradients[2].any()
            assert_close(gradients[0], gradients[2])
            assert_close(first, whole)


@each_causal
def test_what_comes_before_the_first_changed_position_runs_once(family: Family) -> None:
    model = family.model()
    for lengths in ([9, 6, 4], [12]):
        batch = encoded(family.task, lengths)
        first = int(batch.query.min())
        model.repeated(batch, first_changed=first)
        with widths_at(model.find_layer(family.witness)) as widths:
            repeated = model.repeated(batch, first_changed=first)
            assert widths == [first], "the cache is filled"
            for _ in range(3):
                repeated()
            assert widths == [first] + 3 * [max(lengths) - first]


@pytest.mark.parametrize("first_changed", [0, 8])
def test_a_model_that_cannot_start_behind_what_changes_is_run_from_its_start(first_changed: int) -> None:
    family = CAUSAL["gpt2"]
    model, batch = family.model(), encoded(family.task, [9])
    assert int((batch.labels != IGNORED).any(dim=0).nonzero()[0]) < 8, "a label lies before the position"
    with torch.no_grad():
        repeated = model.repeated(batch, first_changed=first_changed)
        assert_close(scored(repeated(), repeated.batch), scored(model.logits(batch), batch))
    assert model.engine.notes == []


class ForgetsItsCache(GPT2LMHeadModel):
    def forward(self, *args: Any, past_key_values: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


class RefusesACache(GPT2LMHeadModel):
    def forward(self, *args: Any, past_key_values: Any = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        if past_key_values is not None:
            raise NotImplementedError
        return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)


@pytest.mark.parametrize("make", [ForgetsItsCache, RefusesACache])
def test_a_model_that_cannot_go_on_from_a_cache_is_pruned_without_one_and_says_so_once(
    make: type[GPT2LMHeadModel],
) -> None:
    torch.manual_seed(0)
    module = make(GPT2Config(initializer_range=0.3, **GPT2_SIZES))
    model, batch = EditableModel(module, layer=GPT2_LAYER, task="completion"), encoded("completion", [9])
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            repeated = model.repeated(batch, first_changed=int(batch.query.min()))
            assert_close(scored(repeated(), repeated.batch), scored(model.logits(batch), batch))
            assert repeated().shape[1] == 2, "the head is still asked for the labelled positions alone"
    assert [str(warning.message) for warning in caught if warning.category is RuntimeWarning] == [
        f"{model.name}: {note}" for note in model.engine.notes
    ]
    assert len(model.engine.notes) == 1
    assert "behind cached keys and values they would differ" in model.engine.notes[0]
