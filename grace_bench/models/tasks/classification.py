"""Classification: one label per text."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.models import encoding
from grace_bench.models.encoding import EncodedBatch, PaddingSide, least
from grace_bench.models.network import Network
from grace_bench.models.tasks.base import ItemScore, Task, is_language_model, notes_of


class Classification(Task):
    """One label per text; scored by accuracy."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    model_kind = "a classifier"
    main_score = "accuracy"
    panel = ("accuracy",)

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        if is_language_model(model):
            return "a classification head"
        return "a tokenizer or encode=" if model.tokenizer is None and model.encode is None else None

    def _encode(
        self,
        model: Network,
        texts: Sequence[str],
        targets: Sequence[str | int] | None,
        side: PaddingSide,
        *,
        prompts: Sequence[str],
    ) -> EncodedBatch:
        labels = None if targets is None else [self._label_of(model, prompts[0], target) for target in targets]
        if model.encode is not None:
            return EncodedBatch(
                inputs=model.encode(texts),
                query=torch.full((len(texts),), -1),
                labels=None if labels is None else torch.tensor(labels),
                target_ids=() if labels is None else tuple((label,) for label in labels),
            )
        return encoding.encode_classification(
            self.tokens(model),
            texts,
            labels,
            side=side,
            max_length=least(model.max_length, self.max_input_tokens),
            questions=prompts,
        )

    def size(self, model: Network, prompt: str, targets: Iterable[str | int] = ()) -> int:  # noqa: D102
        return super().size(model, prompt)

    def score_batch(self, model: Network, requests: Sequence[EditRequest]) -> list[ItemScore]:  # noqa: D102
        chosen = self._labels(model, [request.prompt for request in requests])
        return [
            ItemScore(
                score=float(label == request.target),
                text=self.named(label),
                correct=label == request.target,
                **note,
            )
            for request, (label, note) in zip(requests, chosen, strict=True)
        ]

    def answers(self, model: Network, prompts: Sequence[str]) -> list[str | int]:  # noqa: D102
        return [label for label, _ in self._labels(model, prompts)]

    def count_labels(self, model: Network, prompt: str) -> int:
        """Returns the width of the logits, counted in one pass of the unedited model and then cached.

        Raises:
            UserError: If the model scores tokens, not classes.
        """
        if model.n_labels is None:
            with torch.no_grad(), model.bypassing():
                logits = model.logits(self.encode(model, [prompt]))
            if logits.dim() != 2:
                raise UserError(f"model {model.name} is no classifier: its logits have {logits.dim()} dimensions")
            model.n_labels = logits.shape[-1]
        return model.n_labels

    def check_targets(self, model: Network, requests: Iterable[EditRequest]) -> None:
        """Compares label ids with the number of labels."""
        for request in requests:
            try:
                self._label_of(model, request.prompt, request.target)
            except UserError as error:
                raise UserError(f"request '{request.id}': field 'target': {error}") from error

    def _label_of(self, model: Network, prompt: str, target: str | int) -> int:
        """The label id of a target.

        Raises:
            UserError: If it is not one of the model's labels.
        """
        n_labels = self.count_labels(model, prompt)
        try:
            label = int(target) if isinstance(target, str) else operator.index(target)
        except (TypeError, ValueError):
            raise UserError(f"label {target!r} should be a whole number (0 to {n_labels - 1})") from None
        if not 0 <= label < n_labels:
            raise UserError(f"label {label} is none of the model's {n_labels} (0 to {n_labels - 1})")
        return label

    def _labels(self, model: Network, prompts: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
        """The most likely label of each prompt, with the records of hooks."""

        def run(network: Network, batch: EncodedBatch) -> list[tuple[int, dict[str, Any]]]:
            logits, _ = network.labelled_logits(batch)
            return list(zip(logits.argmax(dim=-1).tolist(), notes_of(network.last_state, len(batch)), strict=True))

        return self.by_length(model, self.encode(model, prompts), run)
