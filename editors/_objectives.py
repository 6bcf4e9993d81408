"""The objective of FT-L: all tokens of the target, predicted at the last token of the prompt alone."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch

GOOD_ENOUGH = 1e-2
"""The loss below which the authors of FT-L and of LocFT-BF take no step."""


class LastTokenObjective:
    """The negative log-likelihood of every token of a target at the last prompt token.

    In an encoder-decoder it is read at the first position of the decoder, which is the first to follow the prompt.

    The end token is no part of the target here: it would be wanted where the answer begins.

    Args:
        model: The model.
        prompts: B prompts.
        encoded: The prompts with their targets, B rows.

    Attributes:
        asked: The prompts alone, labelled where the loss is read.

    Raises:
        EditFailure: If a prompt is empty.
    """

    def __init__(self, model: EditableModel, prompts: Sequence[str], encoded: EncodedBatch) -> None:
        if not all(prompt.strip() for prompt in prompts):
            raise EditFailure("the prompt is empty, at whose last token the loss would be read")
        assert encoded.labels is not None
        assert encoded.content is not None
        self._targets = [labels[content] for labels, content in zip(encoded.labels, encoded.content, strict=True)]
        asked = model.encode_batch(prompts)
        decoder = asked.inputs.get("decoder_input_ids")
        labels = torch.full_like(asked.inputs["input_ids"] if decoder is None else decoder, IGNORED)
        # Any label does: it says where logits are needed.
        labels[torch.arange(len(asked), device=labels.device), asked.query if decoder is None else 0] = 0
        self.asked = replace(asked, labels=labels)

    def loss(self, logits: Tensor, batch: EncodedBatch) -> Tensor:
        """Returns the mean over the rows of the mean over each row's target, in float32."""
        assert batch.labels is not None
        likelihoods = logits[batch.labels != IGNORED].float().log_softmax(dim=-1)
        rows = zip(likelihoods, self._targets, strict=True)
        return -torch.stack([row[target].mean() for row, target in rows]).mean()
