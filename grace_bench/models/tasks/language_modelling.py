"""Language modelling: sentences that follow a text, or running text."""

import math
from collections.abc import Sequence

from grace_bench.data.requests import EditRequest
from grace_bench.models import encoding
from grace_bench.models.encoding import IGNORED, EncodedBatch, PaddingSide
from grace_bench.models.network import Network
from grace_bench.models.tasks.base import ItemScore, Task, check_causal, mean, notes_of, token_losses

_OUTLIER = 1000.0


class LanguageModelling(Task):
    """Sentences that follow a text, or running text; scored by perplexity, the mean over texts.

    No end token follows a sentence that is edited into running text, in training or in scoring.
    """

    name = "language_modelling"
    auto_class = "AutoModelForCausalLM"
    model_kind = "a causal language model"
    main_score = "perplexity"
    higher_is_better = False

    def misfit(self, model: Network) -> str | None:  # noqa: D102
        # A transformers model has a configuration and can generate if it is causal; other modules cannot be checked.
        is_causal = callable(getattr(model.module, "generate", None)) or model.config is None
        if getattr(model.config, "is_encoder_decoder", False) or not is_causal:
            return "a causal language model"
        return "a tokenizer" if model.tokenizer is None else None

    def check_reading(self, model: Network, request: EditRequest) -> None:  # noqa: D102
        check_causal(self, model, request)

    def _encode(
        self, model: Network, prompts: Sequence[str], targets: Sequence[str | int] | None, side: PaddingSide
    ) -> EncodedBatch:
        return encoding.encode_causal(
            self.tokens(model),
            prompts,
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

        def run(encoded: EncodedBatch) -> list[ItemScore]:
            logits, batch = model.labelled_logits(encoded)
            assert batch.labels is not None
            counts = (batch.labels != IGNORED).sum(dim=1)
            totals = token_losses(logits, batch).double().sum(dim=1)
            notes = notes_of(model.last_state, len(batch))
            return [
                ItemScore(score=math.exp(min(total / count, 700.0)) if count else math.nan, n_tokens=count, **note)
                for total, count, note in zip(totals.tolist(), counts.tolist(), notes, strict=True)
            ]

        return self.by_length(model, self.encode(model, prompts, targets), run)

    def aggregate(self, items: Sequence[ItemScore]) -> dict[str, float]:
        """Adds `perplexity_weighted`, the perplexity of all tokens together, and `perplexity_outliers`.

        The latter is the share of texts whose perplexity is above 1,000.
        """
        means = super().aggregate(items)
        finite = [item for item in items if not math.isnan(item.score)]
        n_tokens = sum(item.n_tokens for item in finite)
        nll = sum(math.log(item.score) * item.n_tokens for item in finite)
        means["perplexity_weighted"] = math.exp(nll / n_tokens) if n_tokens else math.nan
        means["perplexity_outliers"] = mean(float(item.score > _OUTLIER) for item in finite)
        return means
