"""The one place where token ids become tensors: shifts, masks, padding and the query position.

Labels are aligned with logits: `logits[b, t]` is scored against `labels[b, t]`, whatever the architecture, so one
cross-entropy serves every task and no other module shifts anything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from grace_bench.errors import UserError
from grace_bench.models.tokens import PromptTokenizer

IGNORED = -100
CACHES = ("cache", "past_key_values")
"""The names of the keys and values among a model's arguments, since transformers 5.24 and before."""
PaddingSide = Literal["left", "right"]
_SHOWN = 40
"""Maximum number of characters of a text in an error."""


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """A batch of B inputs of the model.

    Attributes:
        inputs: Keyword arguments of the model's forward pass.
        query: (B,) long, each row's query position in the edited layer's sequence.
        labels: (B,) class ids, or (B, T) token ids aligned with the logits; `IGNORED` positions carry no loss.
        target_ids: The wanted answer of each row, without padding; editors compare labels by it.
        content: (B, T) bool, the labelled positions that are text rather than the end token; None without labels.
        pad_id: The token that fills up the rows.
        networks: The network that answers each row, None for the one that is given the batch; empty if that answers
            all.
    """

    inputs: dict[str, Tensor]
    query: Tensor
    labels: Tensor | None = None
    target_ids: tuple[tuple[int, ...], ...] = ()
    content: Tensor | None = None
    pad_id: int = 0
    networks: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self.query)

    @property
    def n_positions(self) -> int:
        """The longest sequence of the batch, padding included."""
        return max((tensor.shape[1] for tensor in self.inputs.values() if tensor.dim() > 1), default=1)

    def to(self, device: torch.device) -> "EncodedBatch":
        """Returns the batch on `device`."""
        return replace(
            self,
            inputs={name: tensor.to(device) for name, tensor in self.inputs.items()},
            query=self.query.to(device),
            labels=None if self.labels is None else self.labels.to(device),
            content=None if self.content is None else self.content.to(device),
        )

    def columns(self, columns: Tensor) -> "EncodedBatch":
        """Returns the batch with its labels restricted to (K,) columns; the inputs are not cut."""
        assert self.labels is not None
        content = None if self.content is None else self.content[:, columns]
        return replace(self, labels=self.labels[:, columns], content=content)

    def at_labels(self) -> tuple["EncodedBatch", Tensor]:
        """Returns the batch with each row's own labels alone, and their (B, K) positions; the inputs are not cut.

        A row with fewer than K labels is filled up with its first labelled position, which is ignored there.
        """
        assert self.labels is not None
        is_labelled = self.labels != IGNORED
        n_labels = is_labelled.sum(dim=1, keepdim=True)
        positions = is_labelled.byte().argsort(dim=1, descending=True, stable=True)[:, : int(n_labels.max())]
        is_own = torch.arange(positions.shape[1], device=positions.device) < n_labels
        positions = torch.where(is_own, positions, positions[:, :1])
        labels = self.labels.gather(1, positions).masked_fill(~is_own, IGNORED)
        content = None if self.content is None else self.content.gather(1, positions) & is_own
        return replace(self, labels=labels, content=content), positions

    def until(self, position: int) -> "EncodedBatch":
        """Returns a decoder's inputs before a position, without labels."""
        inputs = {name: tensor[:, :position] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, query=self.query.clamp(max=position - 1), labels=None, content=None)

    def between(self, start: int, end: int) -> "EncodedBatch":
        """Returns a decoder's inputs at positions, to follow a cache of those before them; the labels are not cut."""
        # The mask also covers the cached positions.
        inputs = {
            name: tensor[:, :end] if name == "attention_mask" else tensor[:, start:end]
            for name, tensor in self.inputs.items()
        }
        return replace(self, inputs=inputs, query=self.query - start)

    def row(self, index: int) -> "EncodedBatch":
        """Returns row `index` as a batch, with its padding."""
        return self.rows([index])

    def rows(self, indices: Sequence[int]) -> "EncodedBatch":
        """Returns some rows as a batch, with their padding."""
        chosen = list(indices)
        return replace(
            self,
            inputs={name: tensor[chosen] for name, tensor in self.inputs.items()},
            query=self.query[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            target_ids=tuple(self.target_ids[index] for index in chosen) if self.target_ids else (),
            content=None if self.content is None else self.content[chosen],
            networks=tuple(self.networks[index] for index in chosen) if self.networks else (),
        )

    @property
    def own(self) -> "EncodedBatch":
        """The batch, with every row answered by the network that is given it."""
        return replace(self, networks=()) if self.networks else self

    def by_network(self) -> list[tuple[Any, list[int]]]:
        """Returns each network with the rows that it answers."""
        groups: dict[int, tuple[Any, list[int]]] = {}
        for row, network in enumerate(self.networks):
            groups.setdefault(id(network), (network, []))[1].append(row)
        return list(groups.values())

    def aligned_at_query(self) -> "EncodedBatch":
        """Returns a causal model's right-padded batch, padded on the left until all queries are at one position."""
        shifts = self.query.max() - self.query
        mask = self.inputs["attention_mask"]
        width = int((mask.sum(dim=1) + shifts).max())
        sources = torch.arange(width, device=shifts.device) - shifts[:, None]
        is_inside = (sources >= 0) & (sources < mask.shape[1])
        sources = sources.clamp(0, mask.shape[1] - 1)

        def shifted(tensor: Tensor, value: int) -> Tensor:
            return torch.where(is_inside, tensor.gather(1, sources), value)

        inputs = {
            "input_ids": shifted(self.inputs["input_ids"], self.pad_id),
            "attention_mask": shifted(mask, 0),
            "position_ids": sources,
        }
        return replace(
            self,
            inputs=inputs,
            query=self.query + shifts,
            labels=None if self.labels is None else shifted(self.labels, IGNORED),
            content=None if self.content is None else shifted(self.content, 0).bool(),
        )

    @property
    def is_padded(self) -> bool:
        """Whether a row of the input has padding."""
        return not bool(self.inputs.get("attention_mask", torch.ones(1)).all())

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Each row's number of tokens that are not padding: of the input, and of the decoder's input (0 without)."""
        n_rows = len(self)
        mask = self.inputs.get("attention_mask")
        given = [0] * n_rows if mask is None else mask.sum(dim=1).tolist()
        has_answers = "decoder_input_ids" in self.inputs and self.labels is not None
        answers = (self.labels != IGNORED).sum(dim=1).tolist() if has_answers else [0] * n_rows  # type: ignore[union-attr]
        return list(zip(given, answers, strict=True))

    @property
    def equally_long(self) -> list[list[int]]:
        """The rows, grouped by length; a single group if no row is padded."""
        groups: dict[tuple[int, int], list[int]] = {}
        for index, length in enumerate(self.lengths):
            groups.setdefault(length, []).append(index)
        return list(groups.values())

    def unpadded(self, indices: Sequence[int]) -> "EncodedBatch":
        """Returns rows of one length as a batch without padding."""
        batch = self.rows(indices)
        _, n_decoder = batch.lengths[0]
        columns = batch.inputs["attention_mask"][0].nonzero()[:, 0]
        answers = torch.arange(n_decoder or 1, device=columns.device)

        def cut(name: str, tensor: Tensor) -> Tensor:
            return tensor if tensor.dim() < 2 else tensor[:, answers if name.startswith("decoder") else columns]

        scored = "decoder" if n_decoder else "labels"
        return replace(
            batch,
            inputs={name: cut(name, tensor) for name, tensor in batch.inputs.items()},
            query=batch.query - columns[0],
            labels=None if batch.labels is None else cut(scored, batch.labels),
            content=None if batch.content is None else cut(scored, batch.content),
        )


def pad(rows: Sequence[Sequence[int]], value: int, side: PaddingSide) -> tuple[Tensor, Tensor]:
    """Pads token rows to one length.

    Returns:
        The (B, T) ids and the (B, T) mask, 1 at real tokens.

    >>> pad([[5, 6], [7]], 0, "left")[0].tolist()
    [[5, 6], [0, 7]]
    """
    width = max(1, max(len(row) for row in rows))
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, start : start + len(row)] = 1
    return ids, mask


def stack(batches: Sequence[EncodedBatch]) -> EncodedBatch:
    """Concatenates right-padded batches, padded to the longest."""
    if len(batches) == 1:
        return batches[0]

    def joined(tensors: Sequence[Tensor | None], value: int) -> Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        if not given or given[0].dim() == 1:
            return torch.cat(given) if given else None
        width = max(tensor.shape[1] for tensor in given)
        return torch.cat([functional.pad(tensor, (0, width - tensor.shape[1]), value=value) for tensor in given])

    inputs = {
        # Some models find padding by its token.
        name: joined([batch.inputs[name] for batch in batches], batches[0].pad_id if name.endswith("input_ids") else 0)
        for name in batches[0].inputs
    }
    return EncodedBatch(
        inputs={name: tensor for name, tensor in inputs.items() if tensor is not None},
        query=torch.cat([batch.query for batch in batches]),
        labels=joined([batch.labels for batch in batches], IGNORED),
        target_ids=tuple(ids for batch in batches for ids in batch.target_ids),
        content=joined([batch.content for batch in batches], 0),
        pad_id=batches[0].pad_id,
    )


def last_token(mask: Tensor) -> Tensor:
    """Returns the position of each row's last real token, for either padding side.

    >>> last_token(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist()
    [1, 2]
    """
    return mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)


def encode_classification(
    tokens: PromptTokenizer,
    prompts: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    side: PaddingSide = "right",
    max_length: int | None = None,
    questions: Sequence[str] | None = None,
) -> EncodedBatch:
    """Encodes texts for a sequence classifier, cut as in `closed_ids`; the query is the last real token."""
    rows = tokens.closed_ids(prompts, max_length=max_length, questions=questions)
    ids, mask = pad(rows, tokens.pad_id, side)
    return EncodedBatch(
        inputs={"input_ids": ids, "attention_mask": mask},
        query=last_token(mask),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.long),
        target_ids=() if labels is None else tuple((int(label),) for label in labels),
        pad_id=tokens.pad_id,
    )


def encode_seq2seq(
    tokens: PromptTokenizer,
    prompts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    side: PaddingSide = "right",
    max_length: int | None = None,
    max_target_length: int | None = None,
    decoder_start: int,
    query_in_decoder: bool = False,
    questions: Sequence[str] | None = None,
) -> EncodedBatch:
    """Encodes questions, cut as in `closed_ids`, and answers followed by the end token, for an encoder-decoder model.

    The query is the last real encoder token. If the edited layer is in the decoder, it is the decoder's start token,
    which has read the whole question by cross-attention and comes before every answer token.
    """
    rows = tokens.closed_ids(prompts, max_length=max_length, questions=questions)
    ids, mask = pad(rows, tokens.pad_id, side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    query = torch.zeros(len(rows), dtype=torch.long) if query_in_decoder else last_token(mask)
    if targets is None:
        inputs["decoder_input_ids"] = torch.full((len(rows), 1), decoder_start, dtype=torch.long)
        return EncodedBatch(inputs=inputs, query=query, pad_id=tokens.pad_id)
    answers = [tokens.with_end(answer, max_target_length) for answer in tokens.answer_ids(targets)]
    return seq2seq_batch(inputs, query, answers, end=tokens.end_id, pad_id=tokens.pad_id, decoder_start=decoder_start)


def seq2seq_batch(
    inputs: dict[str, Tensor],
    query: Tensor,
    answers: Sequence[Sequence[int]],
    *,
    end: int | None,
    pad_id: int,
    decoder_start: int,
) -> EncodedBatch:
    """Adds labels and the decoder inputs, which are the labels shifted right, to encoded questions."""
    labels, given = pad(answers, pad_id, "right")
    decoder_inputs = torch.cat([torch.full((len(answers), 1), decoder_start), labels[:, :-1]], dim=1)
    labels = labels.masked_fill(given == 0, IGNORED)
    return EncodedBatch(
        inputs={**inputs, "decoder_input_ids": decoder_inputs},
        query=query,
        labels=labels,
        target_ids=tuple(tuple(answer) for answer in answers),
        content=(given == 1) & (labels != (IGNORED if end is None else end)),
        pad_id=pad_id,
    )


def encode_causal(
    tokens: PromptTokenizer,
    prompts: Sequence[str],
    targets: Sequence[str] | None = None,
    *,
    side: PaddingSide = "right",
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_target_length: int | None = None,
    end_token: bool = True,
    prefix_length: int | None = None,
) -> EncodedBatch:
    """Encodes prompts, and targets after them, for a causal language model.

    Args:
        tokens: The tokenizer, which also decides about the space between a prompt and its target.
        prompts: B texts. An empty one makes its target running text.
        targets: B texts that follow them, or None.
        side: The padding side; left for generation.
        max_length: Longest sequence in tokens. Longer ones are cut at the prompt's start, down to one token, then at
            the target's end; running text is cut at its end. In a chat only the user's text is cut, not the template.
        max_prompt_length: Longest prompt in tokens, with and without a target, so that both query the same position.
        max_target_length: Longest target in tokens, end token included; for running text, the longest text.
        end_token: Whether the end token follows the target.
        prefix_length: For running text, the number of tokens that are read as its prompt and not scored. None scores
            everything after the first token and queries the last token, as the official GRACE code does.

    Returns:
        The batch; the query is the last prompt token.
    """
    rows: list[list[int]] = []
    prompt_lengths: list[int] = []
    query_offsets: list[int] = []
    for i, prompt in enumerate(prompts):
        if targets is None:
            (ids,) = tokens.prompt_ids([prompt], max_length=max_prompt_length or max_length)
            rows.append(ids)
            prompt_lengths.append(len(ids))
            query_offsets.append(len(ids) - 1)
            continue
        if not prompt.strip():
            text_ids = tokens.text_ids([targets[i]])[0][: least(max_length, max_target_length)]
            cut = min(prefix_length or 1, max(1, len(text_ids) - 1))
            rows.append(text_ids)
            prompt_lengths.append(cut)
            query_offsets.append(len(text_ids) - 1 if prefix_length is None else cut - 1)
            continue
        ((prompt_ids, target_ids),) = tokens.split([prompt], [targets[i]])
        prompt_ids = tokens.cut(prompt, prompt_ids, max_prompt_length)
        # Answering cuts prompts to max_prompt_length too, so a target may not shorten them further.
        kept = len(prompt_ids) if max_prompt_length is not None else 1
        room = None if max_length is None else max_length - kept
        target_ids = tokens.with_end(target_ids, least(room, max_target_length), end_token=end_token)
        prompt_ids = tokens.cut(
            prompt, prompt_ids, None if max_length is None else max(1, max_length - len(target_ids))
        )
        rows.append(prompt_ids + target_ids)
        prompt_lengths.append(len(prompt_ids))
        query_offsets.append(len(prompt_ids) - 1)
    return causal_batch(
        rows,
        prompt_lengths,
        query_offsets,
        pad_id=tokens.pad_id,
        end=tokens.end_id if end_token else None,
        side=side,
        labelled=targets is not None,
    )


def causal_batch(
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    query_offsets: Sequence[int],
    *,
    pad_id: int,
    end: int | None,
    side: PaddingSide = "right",
    labelled: bool = True,
) -> EncodedBatch:
    """Pads whole sequences and aligns their labels: the logits at t are scored against the token at t + 1."""
    ids, mask = pad(rows, pad_id, side)
    starts = torch.tensor([ids.shape[1] - len(row) if side == "left" else 0 for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        inputs["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    query = starts + torch.tensor(query_offsets)
    if not labelled:
        return EncodedBatch(inputs=inputs, query=query, pad_id=pad_id)
    labels = torch.full_like(ids, IGNORED)
    for i, (row, n_prompt) in enumerate(zip(rows, prompt_lengths, strict=True)):
        first = int(starts[i]) + n_prompt - 1
        labels[i, first : first + len(row) - n_prompt] = torch.tensor(row[n_prompt:], dtype=torch.long)
    return EncodedBatch(
        inputs=inputs,
        query=query,
        labels=labels,
        pad_id=pad_id,
        target_ids=tuple(tuple(row[n:]) for row, n in zip(rows, prompt_lengths, strict=True)),
        content=(labels != IGNORED) & (labels != (IGNORED if end is None else end)),
    )


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Makes sure that an argument is a sequence of texts.

    Args:
        name: The argument's name.
        texts: Its value.

    Raises:
        UserError: If it is a single text, which would be read letter by letter, or holds anything but texts.
    """
    if isinstance(texts, str):
        shown = texts if len(texts) <= _SHOWN else f"{texts[:_SHOWN]}…"
        raise UserError(f"{name} should be a list of texts, not a single text: write [{shown!r}]")
    kinds = (type(text).__name__ for text in texts if not isinstance(text, str))
    if kind := next(kinds, None):
        raise UserError(f"{name} should be a list of texts, but holds a value of type {kind}")


def least(*limits: int | None) -> int | None:
    """Returns the smallest limit that is not None; None if there is none.

    >>> least(None, 5, 3)
    3
    """
    return min((limit for limit in limits if limit is not None), default=None)
