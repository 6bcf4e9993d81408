"""Texts that a model generates, put before a prompt so that an edit also holds behind other text."""

from collections.abc import Sequence

from grace_bench.common.options import check_whole
from grace_bench.editing.running_text import sample_texts
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel


def check_prefixes(model: EditableModel, n_prefixes: int, prefix_lengths: Sequence[int]) -> None:
    """Raises `UserError` if the options `n_prefixes` and `prefix_lengths` of an editor are out of range."""
    check_whole("editor.n_prefixes", n_prefixes, least=0)
    for length in prefix_lengths:
        check_whole("editor.prefix_lengths", length, least=1)
        if model.max_length is not None and length >= model.max_length:
            raise UserError(f"editor.prefix_lengths={length} should be less than the model reads ({model.max_length})")


def sample_contexts(model: EditableModel, *, n_prefixes: int, prefix_lengths: Sequence[int], seed: int) -> list[str]:
    """Samples texts to put before a prompt from a causal model, without its edits.

    Args:
        model: The model; its edits must be suspended.
        n_prefixes: The number of texts of each length.
        prefix_lengths: The lengths in tokens.
        seed: Decides every text.

    Returns:
        The texts; the first is empty.
    """
    return ["", *sample_texts(model, n_texts=n_prefixes, lengths=prefix_lengths, seed=seed)]


def behind(contexts: Sequence[str], prompt: str) -> list[str]:
    """Returns a prompt behind each context.

    >>> behind(["", "It was late"], "Paris is in")
    ['Paris is in', 'It was late. Paris is in']
    """
    return [f"{context}. {prompt}" if context else prompt for context in contexts]
