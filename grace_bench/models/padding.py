"""Padding: a token that the embedding has and that a classifier finds the end of its texts by."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from grace_bench.models.encoding import last_token

BEGIN_TOKENS = ("bos_token_id", "cls_token_id")
"""The names under which tokenizers have the token that begins a text."""


def embedding_of(module: Any) -> nn.Module | None:
    """Returns the table of a module's token embeddings; None if it has none, as models of characters."""
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def with_known_padding(tokenizer: Any, module: nn.Module) -> Any:
    """Returns a tokenizer whose padding token the module has an embedding for.

    Returns:
        The tokenizer itself; a copy with another padding token if its own was added without resizing the embedding.
    """
    n_rows, pad = _n_embeddings(module), getattr(tokenizer, "pad_token_id", None)
    if pad is None or _is_known(pad, n_rows):
        return tokenizer
    fitted = deepcopy(tokenizer)
    others = (getattr(tokenizer, name, None) for name in ("eos_token_id", *BEGIN_TOKENS, "unk_token_id"))
    fitted.pad_token = tokenizer.convert_ids_to_tokens(next((token for token in others if _is_known(token, n_rows)), 0))
    return fitted


def padded_for(
    module: nn.Module, inputs: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], AbstractContextManager[None]]:
    """Pads a classifier's inputs with the token that its configuration names.

    Classifiers on a causal model answer at each row's last token that is not the padding of the configuration. If it
    names none, they take batches of one text only; so it names one for the time of a pass: a token that ends no row.

    Returns:
        The inputs, and a context for the pass. Neither changes anything for models that generate or have no
        configuration.
    """
    config, ids, mask = getattr(module, "config", None), inputs.get("input_ids"), inputs.get("attention_mask")
    if config is None or callable(getattr(module, "generate", None)):
        return inputs, nullcontext()
    if ids is None or mask is None or mask.shape != ids.shape:
        return inputs, nullcontext()
    pad: Any = getattr(_text_config(config), "pad_token_id", None)
    context: AbstractContextManager[None] = nullcontext()
    if not _is_known(pad, _n_embeddings(module)):
        ends = ids[torch.arange(len(ids), device=ids.device), last_token(mask)].tolist()
        pad = next(token for token in count() if token not in {*ends, *_end_tokens(config)})
        context = _naming(config, pad)
    return {**inputs, "input_ids": ids.masked_fill(mask == 0, pad)}, context


def _n_embeddings(module: nn.Module) -> int | None:
    """The number of tokens that a module has an embedding for; None if it has no table of them."""
    weight = getattr(embedding_of(module), "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def _is_known(token: int | None, n_rows: int | None) -> bool:
    return token is not None and token >= 0 and (n_rows is None or token < n_rows)


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _end_tokens(config: Any) -> list[int]:
    end = getattr(_text_config(config), "eos_token_id", None)
    return end if isinstance(end, list) else [] if end is None else [end]


@contextmanager
def _naming(config: Any, pad: int) -> Iterator[None]:
    """Lets a configuration name a padding token inside the context."""
    places = (config, _text_config(config))
    own = [getattr(place, "pad_token_id", None) for place in places]
    for place in places:
        place.pad_token_id = pad
    try:
        yield
    finally:
        for place, before in zip(places, own, strict=True):
            place.pad_token_id = before
