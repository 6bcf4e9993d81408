"""Pruned tails: of a model's last part, computes only what the wanted logits depend on.

A causal model's head runs for each row's labelled positions only (transformers' `logits_to_keep`). In the last block,
a position affects others only through its key and value, so everything else is computed for the wanted positions only;
this takes one function for each family of models. Positions before the first one that changes affect a causal model
only through their keys and values; those behind a row's last label, and padding, affect nothing, so products with
weights are skipped there. The engine compares a pruned pass with a full one before it relies on any of this.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grace_bench.models.encoding import CACHES, IGNORED, EncodedBatch

BlockPruner = Callable[..., Tensor]

_FAMILIES: dict[str, BlockPruner] = {}
_TALL = 8
"""A head with more than this many tokens per dimension is run in parts."""
_PART = 512
"""Rows of weights in one part, which then fits into the processor's cache."""
_FEW = 64
"""Maximum number of rows that are multiplied as columns."""
_AS_COLUMNS = torch.backends.cpu.get_cpu_capability() != "AVX512"
"""Whether few rows are multiplied as columns: with the widest registers MKL is faster for the rows themselves."""
_COLUMNS = 16
"""Columns are padded to a multiple of this: MKL is slower for numbers in between."""


@dataclass(frozen=True)
class Tail:
    """How to run a batch for its labelled positions only.

    Attributes:
        batch: The batch, with the labels of the scored positions.
        arguments: Further arguments of the forward pass, beside the inputs.
        forwards: Replacements of modules' own forward passes (see `replay.patched`).
        start: The first position that is run; earlier ones are read from a cache of keys and values.
        end: The position behind the last one that is run, if earlier ones are read from a cache.
        scored: (B, K) the position of each of a row's logits; None for all logits of the model.
        skips: Whether products are skipped at positions that no label depends on.
    """

    batch: EncodedBatch
    arguments: Mapping[str, Any] = field(default_factory=dict)
    forwards: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)
    start: int = 0
    end: int = 0
    scored: Tensor | None = None
    skips: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the batch is run in full."""
        return not (self.arguments or self.forwards)

    def given(self, batch: EncodedBatch) -> EncodedBatch:
        """Returns the part of a batch that is run."""
        return batch.between(self.start, self.end) if self.start else batch

    def of(self, whole: Tensor) -> Tensor:
        """Returns the logits of this tail among all logits of the model."""
        return whole if self.scored is None else whole.take_along_dim(self.scored[..., None], dim=1)


def tail_of(
    module: nn.Module,
    layer: nn.Module,
    batch: EncodedBatch,
    *,
    first_changed: int = 0,
    changing: Sequence[nn.Module] = (),
) -> Tail:
    """Returns how to run a batch for its labelled positions; in full if nothing can be pruned.

    Args:
        module: The whole model.
        layer: The edited layer, whose block is not pruned.
        batch: Inputs, with labels or without.
        first_changed: The first position at which the layer's output may change between passes.
        changing: The modules whose weights edits change; editors may read what enters and leaves them, at any position.
    """
    observed = {layer, *changing}
    if isinstance(module, PreTrainedModel) and module.get_output_embeddings() in changing:
        return Tail(batch)
    block = _last_block(module)
    if block is not None and not observed.isdisjoint(block.modules()):
        block = None
    if takes_columns(module):
        has_tokens = batch.labels is not None and batch.labels.dim() == 2
        return _causal_tail(module, layer, block, batch, first_changed) if has_tokens else Tail(batch)
    if block is not None and getattr(module, "num_labels", None) and batch.n_positions > 1:
        # A classifier of this family reads its first position.
        return Tail(batch, {}, {block: partial(_pruned, torch.zeros(1, dtype=torch.long, device=batch.query.device))})
    return Tail(batch)


def _causal_tail(
    module: nn.Module, layer: nn.Module, block: nn.Module | None, batch: EncodedBatch, first_changed: int
) -> Tail:
    """The tail of a batch whose labels are tokens; `block` is the last one, if it can be pruned."""
    assert batch.labels is not None
    columns = (batch.labels != IGNORED).any(dim=0).nonzero()[:, 0]
    continues = cache_argument(module) is not None and "decoder_input_ids" not in batch.inputs
    start = first_changed if continues and len(columns) and first_changed <= columns[0] else 0
    if not start and len(columns) in {0, batch.labels.shape[1]}:
        return Tail(batch)
    head = _head(module, layer)
    is_labelled = batch.labels != IGNORED
    own, scored, chosen = batch.columns(columns), columns.expand(len(batch), -1), None
    if head is not None and not torch.equal(is_labelled, is_labelled[:1].expand_as(is_labelled)):
        own, scored = batch.at_labels()
        # A row without labels is scored anywhere.
        scored = scored.clamp(min=int(columns[0]))
        chosen = torch.searchsorted(columns, scored.contiguous())
    forwards: dict[nn.Module, Callable[..., Any]] = {} if head is None else {head: partial(_of_head, chosen)}
    if not start:
        forwards |= {} if block is None else {block: partial(_pruned, columns)}
        return Tail(own, {"logits_to_keep": columns}, forwards, scored=scored)
    # Where nothing is scored behind an edit, it is made in vain, but made.
    end = 1 + int(torch.maximum(columns[-1], batch.query.max()))
    needed = torch.arange(start, end, device=scored.device) <= scored.amax(dim=1, keepdim=True)
    # Without a row's own labels, the logits at padding are computed too.
    needed = needed & is_given(batch)[:, start:end] if head is not None else torch.ones_like(needed)
    return Tail(
        own,
        {"logits_to_keep": columns - start},
        {**_few_rows(module), **skipping(module, needed), **forwards},
        start=start,
        end=end,
        scored=scored,
        skips=not bool(needed.all()),
    )


def is_given(batch: EncodedBatch) -> Tensor:
    """Returns (B, T) bool, the positions of a decoder's input that are not padding."""
    mask = batch.inputs.get("attention_mask")
    everything = torch.ones(len(batch), batch.n_positions, dtype=torch.bool, device=batch.query.device)
    return everything if mask is None else mask.bool()


def skipping(module: nn.Module, needed: Tensor) -> dict[nn.Module, Callable[..., Any]]:
    """Returns replacements that compute products with weights at some positions only, and give zeros elsewhere.

    Args:
        module: The model.
        needed: (B, T) bool, the positions.
    """
    if bool(needed.all()):
        return {}
    rows = needed.flatten().nonzero()[:, 0]
    return dict.fromkeys(_products(module), partial(_at_rows, rows, needed.shape))


def takes_columns(module: nn.Module) -> bool:
    """Returns whether a model's forward pass can be told for which positions to return logits."""
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def cache_argument(module: nn.Module) -> str | None:
    """Returns the name of the keys and values among the arguments of a model's forward pass; None if it takes none."""
    names = inspect.signature(module.forward).parameters
    return next((name for name in CACHES if name in names), None)


def _last_block(module: nn.Module) -> nn.Module | None:
    blocks = [part for part in module.modules() if type(part).__name__ in _FAMILIES]
    return blocks[-1] if blocks else None


def _products(module: nn.Module) -> Iterator[nn.Module]:
    """The products with weights."""
    return (part for part in module.modules() if type(part) in (nn.Linear, Conv1D))


def _few_rows(module: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """A replacement for each product with weights, faster for few rows in float32 on the CPU."""
    return {part: _of_few_rows for part in _products(module) if _is_float32_on_cpu(part)}


def _head(module: nn.Module, layer: nn.Module) -> nn.Linear | None:
    """The head, if it can be run for some of its input only; what is hooked to it may depend on all."""
    head = module.get_output_embeddings() if isinstance(module, PreTrainedModel) else None
    return None if type(head) is not nn.Linear or head is layer or head._forward_hooks else head


def _is_float32_on_cpu(part: nn.Module) -> bool:
    """Whether a part's weights are float32 in main memory."""
    weight = part.weight
    return isinstance(weight, Tensor) and weight.is_cpu and weight.dtype is torch.float32


def _of_head(chosen: Tensor | None, head: nn.Linear, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
    """The head's output, at (B, K) chosen positions of each row if not at all of (B, C, D) hidden states.

    Most of the memory that a step reads is the head's weights, and MKL takes up to twice as long for their product with
    many rows at once: the output of a tall head is computed a few hundred tokens of the vocabulary at a time.
    """
    if chosen is not None:
        hidden = hidden.take_along_dim(chosen.to(hidden.device)[..., None], dim=1)
    is_tall = head.out_features > _TALL * head.in_features
    if head.bias is not None or not is_tall or not _is_float32_on_cpu(head):
        return forward(hidden)
    if _are_few(hidden):
        return _of_few_rows(head, forward, hidden)
    return torch.cat([functional.linear(hidden, part) for part in head.weight.split(_PART)], dim=-1)


def _at_rows(
    rows: Tensor, shape: torch.Size, part: nn.Linear | Conv1D, forward: Callable[..., Any], hidden: Tensor
) -> Tensor:
    """A product with weights at some of the rows of hidden states of a shape, zero at the others."""
    if hidden.shape[:-1] != shape or _is_patched(part, forward):
        return forward(hidden)
    rows = rows.to(hidden.device)
    given = hidden.flatten(0, 1).index_select(0, rows)
    product = _of_few_rows(part, forward, given) if _is_float32_on_cpu(part) else forward(given)
    return product.new_zeros(shape.numel(), product.shape[-1]).index_copy(0, rows, product).unflatten(0, shape)


def _is_patched(part: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a part's forward pass has another patch, such as a replay's, which stays in effect."""
    return getattr(forward, "__func__", None) is not type(part).forward


def _of_few_rows(part: nn.Linear | Conv1D, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
    """A product with weights; for few rows, as weights times columns."""
    if _is_patched(part, forward) or not _are_few(hidden) or part.weight.requires_grad:
        return forward(hidden)
    weight = part.weight.T if isinstance(part, Conv1D) else part.weight
    product = _WeightsTimesColumns.apply(hidden.flatten(0, -2), weight).view(*hidden.shape[:-1], -1)
    return product if part.bias is None else product + part.bias


def _are_few(hidden: Tensor) -> bool:
    return _AS_COLUMNS and 1 < hidden.shape[:-1].numel() <= _FEW


class _WeightsTimesColumns(torch.autograd.Function):
    """(R, D) rows times the transpose of (N, D) weights, as weights times columns.

    MKL takes up to twice as long for few rows times weights as for the reverse, and less still if the weights are a
    batch of parts that each fit into a processor's cache.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        columns = _columns(rows)
        n_whole = len(weight) // _PART * _PART
        product = rows.new_empty(len(weight), columns.shape[1])
        if n_whole:
            parts = weight[:n_whole].unflatten(0, (-1, _PART))
            torch.bmm(parts, columns.expand(len(parts), -1, -1), out=product[:n_whole].view(len(parts), _PART, -1))
        torch.mm(weight[n_whole:], columns, out=product[n_whole:])
        return product.T[: len(rows)].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return (weight.T @ _columns(gradient)).T[: len(gradient)].contiguous(), None


def _columns(rows: Tensor) -> Tensor:
    """(D, R) rows as columns, padded with zeros."""
    return functional.pad(rows, (0, 0, 0, -len(rows) % _COLUMNS)).T.contiguous()


def _pruned(columns: Tensor, block: nn.Module, _: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The block's output at some columns, zero elsewhere."""
    rows = _FAMILIES[type(block).__name__](block, hidden, columns, *args, **kwargs)
    return torch.zeros_like(hidden).index_copy(1, columns, rows)


def _family(*names: str) -> Callable[[BlockPruner], BlockPruner]:
    """Registers a function that computes blocks of these classes at some columns only."""

    def register(function: BlockPruner) -> BlockPruner:
        _FAMILIES.update(dict.fromkeys(names, function))
        return function

    return register


@_family("BertLayer", "RobertaLayer")
def _bert(
    block: Any, hidden: Tensor, columns: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    attention, rows = block.attention.self, hidden[:, columns]
    size = attention.attention_head_size
    query = _heads(attention.query(rows), size)
    if getattr(attention, "is_causal", False):
        mask: Tensor | None = _causal_rows(attention_mask, columns, hidden)
    else:
        mask = None if attention_mask is None else _rows_of(attention_mask, columns)
    if _is_bare(attention.key) and _is_bare(attention.value):
        context = _attended_by_few(query, hidden, attention.key, attention.value, mask)
    else:
        key, value = (_heads(project(hidden), size) for project in (attention.key, attention.value))
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    attended = block.attention.output(_joined(context), rows)
    return block.output(block.intermediate(attended), attended)


@_family("GPT2Block")
def _gpt2(
    block: Any, hidden: Tensor, columns: Tensor, _: Any, attention_mask: Tensor | None = None, *__: Any, **___: Any
) -> Tensor:
    attention, rows = block.attn, hidden[:, columns]
    query, key, value = attention.c_attn(block.ln_1(hidden)).split(attention.split_size, dim=2)
    context = functional.scaled_dot_product_attention(
        _heads(query[:, columns], attention.head_dim),
        _heads(key, attention.head_dim),
        _heads(value, attention.head_dim),
        attn_mask=_causal_rows(attention_mask, columns, hidden),
        scale=attention.scaling,
    )
    rows = attention.c_proj(_joined(context)) + rows
    return rows + block.mlp(block.ln_2(rows))


@_family("LlamaDecoderLayer", "Qwen2DecoderLayer", "MistralDecoderLayer")
def _llama(
    block: Any,
    hidden: Tensor,
    columns: Tensor,
    *_: Any,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor],
    **__: Any,
) -> Tensor:
    attention, rows = block.self_attn, hidden[:, columns]
    normed, (cos, sin) = block.input_layernorm(hidden), position_embeddings
    query = _heads(attention.q_proj(normed[:, columns]), attention.head_dim)
    key, value = (_heads(project(normed), attention.head_dim) for project in (attention.k_proj, attention.v_proj))
    context = functional.scaled_dot_product_attention(
        _rotated(query, cos[:, columns], sin[:, columns]),
        _rotated(key, cos, sin).repeat_interleave(attention.num_key_value_groups, dim=1),
        value.repeat_interleave(attention.num_key_value_groups, dim=1),
        attn_mask=_causal_rows(attention_mask, columns, hidden),
        scale=attention.scaling,
    )
    rows = rows + attention.o_proj(_joined(context))
    return rows + block.mlp(block.post_attention_layernorm(rows))


def _attended_by_few(query: Tensor, hidden: Tensor, key: nn.Linear, value: nn.Linear, mask: Tensor | None) -> Tensor:
    """Attention of R rows to T positions without the keys and values, which cost the most if the rows are few.

    q.(W h + b) = (W'q).h + q.b, where q.b is the same for every position and so drops out of the softmax. Attention
    weights sum to 1, so the weighted sum over W h + b is W times the weighted sum over h, plus b.

    Args:
        query: (B, H, R, size).
        hidden: (B, T, D).
        key: The projection to keys, (H * size, D).
        value: The projection to values, (H * size, D).
        mask: (B, 1, R or 1, T), or None.

    Returns:
        (B, H, R, size).
    """
    n, heads, rows, size = query.shape
    asked = query @ key.weight.view(heads, size, -1)
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, heads, 1)
    # All heads attend to the same positions, so they are rows of one head.
    summed = functional.scaled_dot_product_attention(
        asked.reshape(n, 1, heads * rows, -1), hidden[:, None], hidden[:, None], attn_mask=mask, scale=size**-0.5
    ).view(n, heads, rows, -1)
    bias = 0 if value.bias is None else value.bias.view(heads, 1, size)
    return summed @ value.weight.view(heads, size, -1).transpose(1, 2) + bias


def _is_bare(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer without hooks."""
    return type(module) is nn.Linear and not (module._forward_hooks or module._forward_pre_hooks)


def _heads(states: Tensor, size: int) -> Tensor:
    """(B, T, H * size) to (B, H, T, size)."""
    return states.view(*states.shape[:2], -1, size).transpose(1, 2)


def _joined(context: Tensor) -> Tensor:
    """(B, H, T, size) to (B, T, H * size)."""
    return context.transpose(1, 2).flatten(2)


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of (B, H, T, size) states (Su et al. 2021)."""
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def _rows_of(mask: Tensor, columns: Tensor) -> Tensor:
    return mask[:, :, columns] if mask.shape[2] > 1 else mask


def _causal_rows(mask: Tensor | None, columns: Tensor, hidden: Tensor) -> Tensor:
    """The mask of the wanted positions; a causal model gets no mask if nothing is padded."""
    if mask is not None:
        return _rows_of(mask, columns)
    return (columns[:, None] >= torch.arange(hidden.shape[1], device=hidden.device))[None, None]
