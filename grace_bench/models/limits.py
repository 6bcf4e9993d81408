"""Limits of length: how many tokens a model can read, and how many its decoder can write."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from grace_bench.models.encoding import least

_CONFIGURED = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "max_target_positions",
)
"""The fields in which configurations state a limit."""
_NO_LIMIT = 1e6
"""The model_max_length of a tokenizer without a limit is 1e30."""


def longest_input(module: nn.Module, tokenizer: Any) -> int | None:
    """Returns the longest input in tokens: the least limit of configuration, position tables and tokenizer.

    Args:
        module: The model. In an encoder-decoder that generates, only the encoder reads the input; one that classifies
            feeds it to both sides.
        tokenizer: Its tokenizer, or None.
    """
    stated = _whole(getattr(tokenizer, "model_max_length", None))
    if not _is_encoder_decoder(module):
        return least(stated, _limit(module, is_decoder=True))
    generates = callable(getattr(module, "generate", None))
    return least(stated, _limit_of_encoder(module), None if generates else _limit_of_decoder(module))


def longest_target(module: nn.Module) -> int | None:
    """Returns the longest target of an encoder-decoder in tokens, end token included; None for other models.

    The decoder reads the start token and all tokens but the last, so its own limit is that of the target.
    """
    return _limit_of_decoder(module) if _is_encoder_decoder(module) else None


def first_position(module: nn.Module) -> int:
    """Returns the position of the first token of a text: RoBERTa and its kin number the tokens from padding_idx + 1."""
    tables = (part for name, part in _text_parts(module) if _is_position_table(name, part))
    return next((int(table.padding_idx) + 1 for table in tables if table.padding_idx is not None), 0)


def _is_encoder_decoder(module: nn.Module) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _limit_of_encoder(module: Any) -> int | None:
    return _limit(module.get_encoder(), is_decoder=False)


def _limit_of_decoder(module: Any) -> int | None:
    return _limit(module.get_decoder(), is_decoder=True)


def _limit(module: nn.Module, *, is_decoder: bool) -> int | None:
    """The least limit of a module's configuration and position tables."""
    config = getattr(module, "config", None)
    return least(*_configured(config), *_position_tables(module, config, is_decoder=is_decoder))


def _configured(config: Any) -> Iterator[int | None]:
    # T5 has an n_positions that its relative attention does not obey.
    if config is None or hasattr(config, "relative_attention_num_buckets"):
        return
    for part in (config, config.get_text_config()) if hasattr(config, "get_text_config") else (config,):
        yield from (_whole(getattr(part, name, None)) for name in _CONFIGURED)


def _position_tables(module: nn.Module, config: Any, *, is_decoder: bool) -> Iterator[int]:
    """The number of tokens for which each table of absolute positions has rows."""
    # A decoder that predicts several tokens at a time reads the next position too.
    ahead = int(is_decoder and getattr(config, "ngram", None) is not None)
    for name, part in _text_parts(module):
        if not _is_position_table(name, part):
            continue
        weight = part.weight
        if part.padding_idx is not None:
            # RoBERTa and its kin number the tokens from padding_idx + 1, and padding stays at padding_idx.
            yield len(weight) - int(part.padding_idx) - 1 - ahead
        else:
            limit = len(weight) - int(getattr(part, "offset", 0)) - ahead
            step = _padded_to(config, is_decoder=is_decoder)
            yield limit - limit % step if limit >= step else limit


def _is_position_table(name: str, part: Any) -> bool:
    weight = getattr(part, "weight", None)
    is_table = hasattr(part, "padding_idx") and isinstance(weight, Tensor) and weight.dim() == 2
    return is_table and "position" in name and "relative" not in name


def _text_parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """A module and all of its parts by their own names, but for models of images and sound."""
    yield name, module
    for child_name, child in module.named_children():
        if getattr(child, "main_input_name", "input_ids") == "input_ids":
            yield from _text_parts(child, child_name)


def _padded_to(config: Any, *, is_decoder: bool) -> int:
    """The multiple of tokens to which sparse attention pads its input before it numbers the positions."""
    if getattr(config, "attention_type", None) == "block_sparse" and not config.is_encoder_decoder:
        return int(config.block_size)
    window = None if is_decoder else getattr(config, "attention_window", None)
    return max(window) if isinstance(window, list | tuple) else window or 1


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and 0 < value < _NO_LIMIT else None
