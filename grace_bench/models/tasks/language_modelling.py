"""Language modelling: sentences that follow a text, or running text."""

from collections.abc import Sequence
from typing import Any

from grace_bench.data.requests import DerivedRequest, EditRequest, Unedited
from grace_bench.models import encoding
from grace_bench.models.encoding import IGNORED, EncodedBatch, PaddingSide
from grace_bench.models.network import Network
from grace_bench.models.tasks.base import ItemScore, Task, check_causal, notes_of, token_losses
from grace_bench.models.tasks.continuing import fluencies, predicted_tokens
from grace_bench.models.tasks.token_scores import perplexity, token_agreement


class LanguageModelling(Task):
    """Sentences that follow a text, or running text; scored by perplexity, the mean over texts.

    No end token follows a sentence that is edited into running text, in training or in scoring.
    """

    name = "language_modelling"
    auto_class = "AutoModelForCausalLM"
    model_kind = "a causal language model"
    reads_running_text = True
    main_score = "perplexity"
    panel = ("perplexity", "perplexity_weighted", "perplexity_outliers", "token_agreement", "fluency")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.generates = "fluency" in self.scores

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        # A transformers model has a configuration and can generate if it is causal; other modules cannot be checked.
        is_causal = callable(getattr(model.module, "generate", None)) or model.config is None
        if getattr(model.config, "is_encoder_decoder", False) or not is_causal:
            return "a causal language model"
        return "a tokenizer" if model.tokenizer is None else None

    def check_reading(self, model: Network, request: EditRequest) -> None:  # noqa: D102
        check_causal(self, model, request)

    def _encode(
        self,
        model: Network,
        texts: Sequence[str],
        targets: Sequence[str | int] | None,
        side: PaddingSide,
        *,
        prompts: Sequence[str],
    ) -> EncodedBatch:
        return encoding.encode_causal(
            self.tokens(model),
            texts,
            None if targets is None else [str(target) for target in targets],
            side=side,
            max_length=model.max_length,
            max_prompt_length=self.max_input_tokens,
            max_target_length=self.max_target_tokens,
            end_token=False,
            prefix_length=self.prefix_length if self.query == "prefix" else None,
        )

    def score_batch(self, model: Network, requests: Sequence[EditRequest]) -> list[ItemScore]:  # noqa: D102
        prompts, targets = [request.prompt for request in requests], [str(request.target) for request in requests]
        compares = any(_unedited_tokens(request) is not None for request in requests)

        def run(network: Network, encoded: EncodedBatch) -> list[tuple[float, int, list[int], dict[str, Any]]]:
            logits, batch = network.labelled_logits(encoded)
            assert batch.labels is not None
            counts = (batch.labels != IGNORED).sum(dim=1)
            totals = token_losses(logits, batch).double().sum(dim=1)
            notes = notes_of(network.last_state, len(batch))
            predicted: list[list[int]] = predicted_tokens(logits, batch) if compares else [[] for _ in notes]
            return [*zip(totals.tolist(), counts.tolist(), predicted, notes, strict=True)]

        rows = self.by_length(model, self.encode(model, prompts, targets), run)
        fluent = fluencies(self, model, prompts) if "fluency" in self.scores else [{} for _ in requests]
        return [
            self.item(
                request,
                {"perplexity": perplexity(total, count), **_agreement(request, tokens), **more},
                n_tokens=count,
                **note,
            )
            for request, (total, count, tokens, note), more in zip(requests, rows, fluent, strict=True)
        ]

    def unedited_batch(self, model: Network, requests: Sequence[DerivedRequest]) -> list[Unedited]:  # noqa: D102
        def run(network: Network, encoded: EncodedBatch) -> list[list[int]]:
            return predicted_tokens(*network.labelled_logits(encoded))

        prompts, targets = [request.prompt for request in requests], [str(request.target) for request in requests]
        rows = self.by_length(model, self.encode(model, prompts, targets), run)
        return [Unedited(tokens=tuple(tokens)) for tokens in rows]


def _agreement(request: EditRequest, predicted: Sequence[int]) -> dict[str, float]:
    unedited = _unedited_tokens(request)
    return {} if unedited is None else {"token_agreement": token_agreement(predicted, unedited)}


def _unedited_tokens(request: EditRequest) -> tuple[int, ...] | None:
    """What the unedited model predicted along a locality probe; None for requests that are not compared with it."""
    unedited = request.unedited if isinstance(request, DerivedRequest) else None
    return None if unedited is None else unedited.tokens
