"""The rows of an edit: its prompt and target in several contexts, and an irrelevant prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch, causal_batch, last_token, pad
from grace_bench.models.network import Network
from grace_bench.models.tasks.continuing import generated_rows

BEGINNINGS = ("I", "You", "Because", "Yes", "Q: ")
"""The texts that the unedited model continues to make contexts (the authors' code)."""


@dataclass(frozen=True)
class EditRows:
    """One edit as the model reads it.

    Attributes:
        batch: The request in each context, with its target as labels; in the authors' code also the irrelevant prompt,
            without labels, as its last row.
        irrelevant: The irrelevant prompt as a batch of one row; None if it is in `batch`.
        inside: (R, T) bool, the positions that count for the request; None for those of its prompts.
        outside: (R, T) bool, the positions of `batch` that count for the irrelevant prompt; None if it is apart.
    """

    batch: EncodedBatch
    irrelevant: EncodedBatch | None = None
    inside: Tensor | None = None
    outside: Tensor | None = None


@torch.no_grad()
def greedy_contexts(model: EditableModel, lengths: Sequence[int]) -> list[str]:
    """Returns the continuations of some beginnings by the model's most likely tokens, beginnings included.

    Args:
        model: A causal model; it is read as it is, so its edits must be suspended.
        lengths: The numbers of new tokens; all beginnings are continued by each.

    Raises:
        UserError: If the model cannot generate.
    """
    if not callable(getattr(model.module, "generate", None)):
        raise UserError(f"model {model.name} generates no text to put before prompts")
    ids = model.tokens.text_ids(BEGINNINGS)
    sizes = [len(row) for row in ids]
    batch = causal_batch(
        ids, sizes, [n - 1 for n in sizes], pad_id=model.tokens.pad_id, end=None, side="left", labelled=False
    ).to(model.device)
    contexts: list[str] = []
    for length in lengths:

        def run(network: Network, given: EncodedBatch, length: int = length) -> list[list[int]]:
            return generated_rows(model.task, network, given, max_new_tokens=length, stops=())

        found = model.task.by_length(model, batch, run, generates=True)
        contexts += [model.tokens.decode([*row, *new]).strip() for row, new in zip(ids, found, strict=True)]
    return contexts


def encode_rows(
    model: EditableModel, prompt: str, target: str | int, irrelevant: str, contexts: Sequence[str]
) -> EditRows:
    """Encodes an edit as the task encodes requests.

    Args:
        model: The model.
        prompt: The request's prompt; empty if its target is running text.
        target: Its target.
        irrelevant: The irrelevant prompt.
        contexts: C texts to put before the prompt; an empty one for the prompt by itself.
    """
    prompts = [" ".join(filter(None, (context, prompt))) for context in contexts]
    return EditRows(model.encode_batch(prompts, [target] * len(prompts)), model.encode_batch([irrelevant]))


def official_rows(
    model: EditableModel, prompt: str, target: str | int, irrelevant: str, contexts: Sequence[str]
) -> EditRows:
    """Encodes an edit as the authors' code does: all rows padded on the left with the end token, to one length.

    The target is cut off where the longest prompt ends, counted from the left end of the padded rows, which may be
    another place than that of the target's first token. Positions count padding. If the irrelevant prompt is part of
    the prompt, its tokens count as inside, all other positions as outside.

    Raises:
        EditFailure: If the tokens of such a part are not found.
    """
    tokenizer = model.tokenizer
    asked = [" ".join(filter(None, (context, prompt))) for context in contexts]
    rows = [tokenizer(text)["input_ids"] for text in (*(f"{text} {target}" for text in asked), irrelevant)]
    ids, mask = pad(rows, tokenizer.eos_token_id, "left")
    n_asked = max(len(tokenizer(text)["input_ids"]) for text in asked)
    wanted = ids.masked_fill(mask == 0, IGNORED)
    wanted[:, :n_asked] = IGNORED
    wanted[-1] = IGNORED
    labels = torch.cat([wanted[:, 1:], torch.full_like(wanted[:, :1], IGNORED)], dim=1)
    batch = EncodedBatch(
        inputs={"input_ids": ids, "attention_mask": mask},
        query=last_token(mask),
        labels=labels,
        pad_id=tokenizer.eos_token_id,
    )
    asks = torch.arange(len(rows))[:, None].expand_as(ids) < len(asked)
    inside, outside = asks, ~asks
    if irrelevant in prompt:
        inside = _part(tokenizer, rows[:-1], irrelevant, ids.shape[1])
        outside = asks & ~inside
    return EditRows(batch.to(model.device), None, inside.to(model.device), outside.to(model.device))


def _part(tokenizer: Any, rows: Sequence[Sequence[int]], part: str, width: int) -> Tensor:
    """A mask of the first place of a part in each of the left-padded rows, and of nothing in a further row."""
    spaced, bare = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {part}", part))
    mask = torch.zeros(len(rows) + 1, width, dtype=torch.bool)
    length = len(spaced)
    for index, row in enumerate(rows):
        start = _find(row, spaced)
        if start is None:
            # From here on, the authors' code keeps this length.
            start, length = _find(row, bare), len(bare)
        if start is None:
            raise EditFailure(f"the tokens of {part!r} do not occur in the prompt")
        first = width - len(row) + start
        mask[index, first : first + length] = True
    return mask


def _find(row: Sequence[int], part: Sequence[int]) -> int | None:
    starts = range(len(row) - len(part) + 1)
    return next((start for start in starts if list(row[start : start + len(part)]) == list(part)), None)
