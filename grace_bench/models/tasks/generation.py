"""Tasks whose answers are generated freely and compared as text: question answering and completion."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.data.requests import EditRequest
from grace_bench.models import encoding
from grace_bench.models.encoding import EncodedBatch, PaddingSide, least
from grace_bench.models.network import Network
from grace_bench.models.tasks.base import ItemScore, Task, notes_of, token_losses
from grace_bench.models.tasks.text_scores import exact_match, reference_f1, token_f1


class GenerationTask(Task):
    """Free answers, scored by the token F1 of SQuAD."""

    main_score = "f1"
    generates = True
    other_scores = ("exact_match", "token_accuracy", "reference_f1")
    carried_scores = ("contrast",)
    _generation_side: ClassVar[PaddingSide]

    def score_batch(self, model: Network, requests: Sequence[EditRequest]) -> list[ItemScore]:  # noqa: D102
        prompts, targets = [request.prompt for request in requests], [str(request.target) for request in requests]
        generated = self._generate(model, prompts)
        forced = self.encode(model, prompts, targets)
        accuracies = self.by_length(model, forced, partial(_token_accuracies, model))
        contrasts = self._contrasts(model, requests)
        items = []
        for i, (request, (text, ids, note)) in enumerate(zip(requests, generated, strict=True)):
            accepted = self._accepted(model, request)
            match = exact_match(text, accepted, normalise=self.normalise)
            items.append(
                ItemScore(
                    score=token_f1(text, accepted, normalise=self.normalise),
                    text=text,
                    correct=match == 1.0,
                    others={
                        "exact_match": match,
                        "token_accuracy": accuracies[i],
                        "reference_f1": reference_f1(ids, forced.target_ids[i]),
                        **contrasts[i],
                    },
                    **note,
                )
            )
        return items

    def size(self, model: Network, prompt: str, targets: Iterable[str | int] = ()) -> int:  # noqa: D102
        room = least(self._count(model, prompt) + self.max_new_tokens, model.max_length) or 1
        return max(super().size(model, prompt, targets), room)

    def _accepted(self, model: Network, request: EditRequest) -> list[str]:
        """The accepted answers, cut like targets in training."""
        accepted = [str(request.target), *request.answers]
        longest = least(self.max_target_tokens, model.max_target_length)
        if longest is None:
            return accepted
        ids = self.encode(model, [request.prompt] * len(accepted), accepted).target_ids
        return [
            model.tokenizer.decode(kept, skip_special_tokens=True) if len(kept) == longest else text
            for text, kept in zip(accepted, ids, strict=True)
        ]

    def _contrasts(self, model: Network, requests: Sequence[EditRequest]) -> list[dict[str, float]]:
        """For each request with a contrast: whether its first answer is likelier (Meng et al. 2022)."""
        pairs = [request.contrast or () for request in requests]
        carrying = [i for i, pair in enumerate(pairs) if pair]
        scores: list[dict[str, float]] = [{} for _ in requests]
        if carrying:
            prompts = [requests[i].prompt for i in carrying]
            first, second = (self._losses(model, prompts, [pairs[i][side] for i in carrying]) for side in (0, 1))
            for i, likelier, less_likely in zip(carrying, first, second, strict=True):
                scores[i] = {"contrast": float(likelier < less_likely)}
        return scores

    @torch.no_grad()
    def _losses(self, model: Network, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The mean negative log-likelihoods per token of answers to prompts, without the end token."""
        return self.by_length(model, self.encode(model, prompts, answers), partial(_mean_losses, model))

    def answers(self, model: Network, prompts: Sequence[str]) -> list[str | int]:  # noqa: D102
        return [text for text, _ in self.generate(model, prompts)]

    @torch.no_grad()
    def generate(self, model: Network, prompts: Sequence[str]) -> list[tuple[str, list[int]]]:
        """Answers prompts greedily up to the end token or a newline, with at most `max_new_tokens`.

        Returns:
            For each prompt the text, up to the newline, and the generated token ids with the end token.
        """
        return [(text, ids) for text, ids, _ in self._generate(model, prompts)]

    def _generate(self, model: Network, prompts: Sequence[str]) -> list[tuple[str, list[int], dict[str, Any]]]:
        """Does what `generate` does; adds the records of hooks."""
        batch = self.encode(model, prompts, side=self._generation_side)
        return self.by_length(model, batch, partial(self._generate_batch, model), generates=True)

    def _generate_batch(self, model: Network, batch: EncodedBatch) -> list[tuple[str, list[int], dict[str, Any]]]:
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        tokenizer = model.tokenizer
        stops = [tokenizer.eos_token_id, *_newline_ids(tokenizer)]
        with model.querying(batch.query), model.greedy():
            output = model.module.generate(  # type: ignore[operator]
                **inputs,
                max_new_tokens=least(self.max_new_tokens, self._room(model, inputs)),
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
            )
        results = []
        notes = notes_of(model.last_state, len(batch))
        for row, note in zip(output[:, self._n_given(inputs) :].tolist(), notes, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            ids = row[:end]
            results.append((tokenizer.decode(ids, skip_special_tokens=True).partition("\n")[0].strip(), ids, note))
        return results

    @abstractmethod
    def _room(self, model: Network, inputs: Mapping[str, Tensor]) -> int | None:
        """Returns how many tokens the model can write after its inputs; None without a limit."""

    @abstractmethod
    def _n_given(self, inputs: Mapping[str, Tensor]) -> int:
        """Returns how many tokens at the start of a generated row were given."""


class QuestionAnswering(GenerationTask):
    """Short answers of an encoder-decoder model; scored by the token F1 of SQuAD on free generation."""

    name = "qa"
    auto_class = "AutoModelForSeq2SeqLM"
    model_kind = "an encoder-decoder"
    _generation_side = "right"

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        if not getattr(model.config, "is_encoder_decoder", False) or not callable(
            getattr(model.module, "generate", None)
        ):
            return "an encoder-decoder that generates"
        return "a tokenizer" if model.tokenizer is None else None

    def _encode(
        self, model: Network, prompts: Sequence[str], targets: Sequence[str | int] | None, side: PaddingSide
    ) -> EncodedBatch:
        return encoding.encode_seq2seq(
            model.tokenizer,
            prompts,
            None if targets is None else [str(target) for target in targets],
            side=side,
            max_length=least(model.max_length, self.max_input_tokens),
            max_target_length=least(model.max_target_length, self.max_target_tokens),
            decoder_start=model.decoder_start,
            query_in_decoder=model.layer_in_decoder,
        )

    def _room(self, model: Network, inputs: Mapping[str, Tensor]) -> int | None:
        return model.max_target_length

    def _n_given(self, inputs: Mapping[str, Tensor]) -> int:
        return 1


class Completion(GenerationTask):
    """The continuation of a prompt by a causal language model; scored by the token F1 of SQuAD on free generation."""

    name = "completion"
    auto_class = "AutoModelForCausalLM"
    model_kind = "a causal language model"
    _generation_side = "left"

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        if getattr(model.config, "is_encoder_decoder", False) or not callable(getattr(model.module, "generate", None)):
            return "a causal language model that generates"
        return "a tokenizer" if model.tokenizer is None else None

    def _encode(
        self, model: Network, prompts: Sequence[str], targets: Sequence[str | int] | None, side: PaddingSide
    ) -> EncodedBatch:
        return encoding.encode_causal(
            model.tokenizer,
            prompts,
            None if targets is None else [str(target) for target in targets],
            side=side,
            max_length=model.max_length,
            max_prompt_length=least(
                None if model.max_length is None else max(1, model.max_length - self.max_new_tokens),
                self.max_input_tokens,
            ),
            max_target_length=self.max_target_tokens,
        )

    def _room(self, model: Network, inputs: Mapping[str, Tensor]) -> int | None:
        return None if model.max_length is None else max(1, model.max_length - self._n_given(inputs))

    def _n_given(self, inputs: Mapping[str, Tensor]) -> int:
        return inputs["input_ids"].shape[1]


@torch.no_grad()
def _token_accuracies(model: Network, encoded: EncodedBatch) -> list[float]:
    """The share of each row's target tokens, without the end token, that are the most likely ones."""
    logits, batch = model.labelled_logits(encoded)
    assert batch.content is not None
    hits = (logits.argmax(dim=-1) == batch.labels) & batch.content
    accuracies: list[float] = (hits.sum(dim=1) / batch.content.sum(dim=1)).tolist()
    return accuracies


def _mean_losses(model: Network, encoded: EncodedBatch) -> list[float]:
    """The mean negative log-likelihood of each row's target tokens, without the end token."""
    logits, batch = model.labelled_logits(encoded)
    assert batch.content is not None
    losses: list[float] = ((token_losses(logits, batch) * batch.content).sum(dim=1) / batch.content.sum(dim=1)).tolist()
    return losses


@lru_cache(maxsize=8)
def _newline_ids(tokenizer: Any) -> tuple[int, ...]:
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return tuple(i for i, text in enumerate(texts) if "\n" in text)
