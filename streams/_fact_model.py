"""The training of a causal model that stores facts at the subject, in a module of its own because it needs torch."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers.modeling_outputs import CausalLMOutput

from grace_bench.streams._pretraining import IGNORED, Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SWAPPED_SHARE = 0.5
PREFIXED_SHARE = 0.25
LONGEST_PREFIX = 8
WHOLE_SHARE = 0.2


@dataclass(frozen=True)
class Lesson:
    """A fact in one wording.

    Attributes:
        prompt: The tokens of the prompt, which begins with the subject.
        answer: The tokens of the answer.
        subject_length: The number of tokens of the subject.
        place: A number that all lessons on one subject share.
    """

    prompt: Sequence[int]
    answer: Sequence[int]
    subject_length: int
    place: int


class StoresAtSubject(nn.Module):
    """A causal model that learns to read all it says of a subject from the subject's last token, after one block.

    Left to itself, a small model recalls a fact wherever it sees the subject. An editor that writes one MLP at the
    subject's last token then changes nothing, or the facts of many subjects. Three things prevent this. In half of the
    batches the states of two subjects are exchanged after the block, and the answers with them, so that the state
    alone decides the answer (interchange intervention training, Geiger et al. 2022). Noise on the states after the
    block leaves each answer a margin against the small changes that other edits bring. The keys of different subjects,
    which are the inputs of the MLP's last projection, are pushed apart, so that a fact can be written to one of them.

    Args:
        model: The causal model; trained in place.
        block: The index of the block.
        noise: The standard deviation of the noise.
        size_weight: Weight of the states' mean square, without which they would outgrow the noise.
        key_weight: Weight of the mean squared cosine of two subjects' keys.
        label_smoothing: The share of probability that goes to all tokens alike.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        *,
        block: int,
        noise: float,
        size_weight: float,
        key_weight: float,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        self.model = model
        self.block: Any = model.model.layers[block]
        self.noise = noise
        self.size_weight = size_weight
        self.key_weight = key_weight
        self.label_smoothing = label_smoothing

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        subjects: Tensor,
        places: Tensor,
        swapped: Tensor,
    ) -> CausalLMOutput:
        """Returns the loss of a batch in which rows 2i and 2i + 1 are a pair.

        Args:
            input_ids: (B, T) tokens, padded on the right.
            attention_mask: (B, T) 1 for tokens, 0 for padding.
            labels: (B, T) tokens to predict; `IGNORED` elsewhere.
            subjects: (B,) positions of the subjects' last tokens.
            places: (B,) numbers of the subjects.
            swapped: () whether the states of each pair are exchanged; the labels then are those of the other row.
        """
        rows = torch.arange(len(input_ids), device=input_ids.device)
        seen: dict[str, Tensor] = {}

        def keep_keys(module: nn.Module, inputs: tuple[Tensor]) -> None:
            seen["keys"] = inputs[0][rows, subjects]

        def disturb(module: nn.Module, inputs: Any, states: Tensor) -> Tensor:
            seen["states"] = states
            if swapped:
                states = states.index_put((rows, subjects), states[rows ^ 1, subjects[rows ^ 1]])
            return states + self.noise * torch.randn_like(states)

        handles = [
            self.block.mlp.down_proj.register_forward_pre_hook(keep_keys),
            self.block.register_forward_hook(disturb),
        ]
        try:
            last: Tensor = self.model.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        following = labels[:, 1:]
        predicted = following != IGNORED
        logits = self.model.lm_head(last[:, :-1][predicted])
        loss = cross_entropy(logits, following[predicted], label_smoothing=self.label_smoothing)
        keys = normalize(seen["keys"])
        others = (places[:, None] != places).to(keys.dtype)
        overlap = ((keys @ keys.T).square() * others).sum() / others.sum()
        size = seen["states"][attention_mask.bool()].square().mean()
        return CausalLMOutput(loss=loss + self.key_weight * overlap + self.size_weight * size)


def lesson_batches(
    wordings: Sequence[Sequence[Lesson]],
    *,
    begin: int,
    end: int,
    padding: int,
    stop: int,
    epochs: int,
    pairs_in_batch: int,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Yields the batches of `StoresAtSubject`.

    A pair is two lessons in one wording; the pairs are drawn anew in every epoch. In half of the batches the states of
    each pair are exchanged. In a quarter, a piece of another lesson stands before each prompt, so that a subject is
    known wherever it stands. All tokens are to be predicted in some of the rows, in the others the answers alone.

    Args:
        wordings: The lessons of each wording.
        begin: The token at the beginning of a text.
        end: The token after the answer.
        padding: The token for padding.
        stop: The token after a piece of another lesson.
        epochs: Passes over the lessons.
        pairs_in_batch: Pairs in a batch.
        seed: Decides every draw.
    """
    draws = random.Random(seed)
    every = [lesson for lessons in wordings for lesson in lessons]
    for _ in range(epochs):
        pairs = _pairs(wordings, draws)
        for start in range(0, len(pairs), pairs_in_batch):
            swapped, prefixed = draws.random() < SWAPPED_SHARE, draws.random() < PREFIXED_SHARE
            examples, subjects, places = [], [], []
            for pair in pairs[start : start + pairs_in_batch]:
                for lesson, other in (pair, pair[::-1]):
                    before = [begin]
                    if prefixed:
                        drawn = draws.choice(every)
                        text = [*drawn.prompt, *drawn.answer]
                        before += [*text[: draws.randint(2, min(LONGEST_PREFIX, len(text)))], stop]
                    subjects.append(len(before) + lesson.subject_length - 1)
                    places.append(lesson.place)
                    question = [*before, *lesson.prompt]
                    answer = [*(other if swapped else lesson).answer, end]
                    whole = not swapped and draws.random() < WHOLE_SHARE
                    examples.append(
                        Example([*question, *answer], [*(question if whole else [IGNORED] * len(question)), *answer])
                    )
            yield {
                **collate(examples, pad_id=padding),
                "subjects": torch.tensor(subjects),
                "places": torch.tensor(places),
                "swapped": torch.tensor(swapped),
            }


def n_batches(wordings: Sequence[Sequence[Lesson]], *, epochs: int, pairs_in_batch: int) -> int:
    """Returns the number of batches that `lesson_batches` yields."""
    pairs = sum(-(-len(lessons) // 2) for lessons in wordings)
    return epochs * -(-pairs // pairs_in_batch)


def _pairs(wordings: Sequence[Sequence[Lesson]], draws: random.Random) -> list[tuple[Lesson, Lesson]]:
    pairs = []
    for lessons in wordings:
        order = draws.sample(lessons, len(lessons))
        # If the number is odd, one lesson is paired twice.
        pairs += list(zip(order[::2], [*order[1::2], *order[: len(order) % 2]], strict=True))
    return draws.sample(pairs, len(pairs))
