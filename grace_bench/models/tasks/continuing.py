"""What tasks with a decoder share: the tokens that a model predicts along a target, and its continuations."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grace_bench.models.encoding import IGNORED, EncodedBatch, PaddingSide, least
from grace_bench.models.network import Network
from grace_bench.models.tasks.base import Task
from grace_bench.models.tasks.token_scores import FLUENCY_TOKENS, fluency


def predicted_tokens(logits: Tensor, batch: EncodedBatch) -> list[list[int]]:
    """Returns the most likely token at each labelled position of each row, the end token's left out.

    Args:
        logits: (B, T, V).
        batch: The batch, its labels aligned with the logits.
    """
    return _at_content(logits.argmax(dim=-1), batch)


def labelled_tokens(batch: EncodedBatch) -> list[list[int]]:
    """Returns the tokens of each row's target, the end token left out."""
    assert batch.labels is not None
    return _at_content(batch.labels, batch)


def generated_rows(
    task: Task, model: Network, batch: EncodedBatch, *, max_new_tokens: int | None, stops: Sequence[int], **more: Any
) -> list[list[int]]:
    """Returns the tokens that a model generates greedily after each row of a batch, padding after their end included.

    Args:
        task: The task.
        model: The model.
        batch: Prompts, padded on the side from which the model generates.
        max_new_tokens: Maximum number of tokens.
        stops: The tokens that end a row.
        more: Further arguments of the model's `generate`.
    """
    inputs = model.generation_inputs(batch)
    with model.querying(batch.query), model.greedy():
        output = model.module.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=task.tokens(model).pad_id,
            **more,
        )
    rows: list[list[int]] = output[:, n_given(model, inputs) :].tolist()
    return rows


def n_given(model: Network, inputs: Mapping[str, Tensor]) -> int:
    """Returns how many tokens at the start of a generated row were given."""
    return 1 if getattr(model.config, "is_encoder_decoder", False) else inputs["input_ids"].shape[1]


def fluencies(task: Task, model: Network, prompts: Sequence[str]) -> list[dict[str, float]]:
    """Returns the fluency of the greedy continuation of each prompt; empty for a prompt without text.

    A continuation ends at the end token or after `FLUENCY_TOKENS` tokens, and not at a line break.
    """
    asked = [i for i, prompt in enumerate(prompts) if prompt.strip()]
    scores: list[dict[str, float]] = [{} for _ in prompts]
    if not asked:
        return scores
    ends = task.tokens(model).end_ids

    def run(network: Network, batch: EncodedBatch) -> list[float]:
        room = model.max_target_length
        if not getattr(model.config, "is_encoder_decoder", False):
            room = None if model.max_length is None else max(1, model.max_length - batch.n_positions)
        rows = generated_rows(task, network, batch, max_new_tokens=least(FLUENCY_TOKENS, room), stops=ends)
        return [fluency(row[: next((i for i, token in enumerate(row) if token in ends), len(row))]) for row in rows]

    side: PaddingSide = "right" if getattr(model.config, "is_encoder_decoder", False) else "left"
    batch = task.encode(model, [prompts[i] for i in asked], side=side)
    for i, value in zip(asked, task.by_length(model, batch, run, generates=True), strict=True):
        scores[i] = {"fluency": value}
    return scores


def _at_content(tokens: Tensor, batch: EncodedBatch) -> list[list[int]]:
    content = batch.content
    if content is None:
        assert batch.labels is not None
        content = batch.labels != IGNORED
    return [row[mask].tolist() for row, mask in zip(tokens, content, strict=True)]
