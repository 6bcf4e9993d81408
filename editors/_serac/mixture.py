"""SERAC's soft decision: the mixture of the model's and the counterfactual model's predictions (EasyEdit's default)."""

from typing import Any

import torch
from torch import Tensor

from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch, causal_batch, last_token, pad
from grace_bench.models.network import Network

_EPS = torch.finfo(torch.float32).eps


class Mixture(Network):
    """Answers one question: scores are of a mixture, log((1 - w) p + w r + ε), and free answers come from one of both.

    Of the batch, which holds the question behind an edit, r are the counterfactual model's probabilities; p are the
    edited model's without the edit. At the positions that only the former reads, r stands alone.

    Args:
        model: The model.
        counterfactual: The counterfactual model as a network.
        question: The question.
        weight: The weight w of the counterfactual model.
        answers: Whether that generates the free answer.
    """

    def __init__(
        self, model: EditableModel, counterfactual: Network, *, question: str, weight: float, answers: bool
    ) -> None:
        answering = counterfactual if answers else model
        super().__init__(answering.module, layer=answering.layer_name, tokenizer=model.tokenizer)
        # In tuples they are no parts of this module.
        self._both = (model, counterfactual)
        self._question = question
        self._weight = weight
        self._answers = answers

    def logits(self, batch: EncodedBatch, **arguments: Any) -> Tensor:
        """Runs a batch and returns the logarithms of the mixture, (B, T, V)."""
        model, counterfactual = self._both
        plain = self._plain(batch)
        ours, theirs = model.logits(plain).softmax(dim=-1), counterfactual.logits(batch).float().softmax(dim=-1)
        mixed = theirs.clone()
        for row, (n, end, own_end) in enumerate(self._spans(batch, plain)):
            both = (1 - self._weight) * ours[row, own_end - n : own_end] + self._weight * theirs[row, end - n : end]
            mixed[row, end - n : end] = both
        return (mixed + _EPS).log()

    def generation_inputs(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Returns the arguments of the module's `generate`: for the model itself, those of the question alone."""
        return super().generation_inputs(batch if self._answers else self._plain(batch))

    def _plain(self, batch: EncodedBatch) -> EncodedBatch:
        """The batch as the model reads it: the question without the edit, and what follows it."""
        model, tokens, n_rows = self._both[0], self._both[0].tokens, len(batch)
        if "decoder_input_ids" in batch.inputs:
            rows = tokens.closed_ids([self._question] * n_rows, max_length=model.max_length)
            ids, mask = (tensor.to(model.device) for tensor in pad(rows, tokens.pad_id, "right"))
            inputs = {**batch.inputs, "input_ids": ids, "attention_mask": mask}
            query = batch.query if model.layer_in_decoder else last_token(mask)
            return EncodedBatch(inputs=inputs, query=query, pad_id=batch.pad_id)
        (prompt,) = tokens.prompt_ids([self._question], max_length=model.max_length)
        answers = batch.target_ids or ((),) * n_rows
        rows = [[*prompt, *answer][-(model.max_length or 0) :] for answer in answers]
        lengths = [len(row) - len(answer) for row, answer in zip(rows, answers, strict=True)]
        return causal_batch(
            rows, lengths, [n - 1 for n in lengths], pad_id=batch.pad_id, end=None, side="left", labelled=False
        ).to(model.device)

    def _spans(self, batch: EncodedBatch, plain: EncodedBatch) -> list[tuple[int, int, int]]:
        """The number of positions of each row that are mixed, and where they end in both batches."""
        if "decoder_input_ids" in batch.inputs:
            n = batch.inputs["decoder_input_ids"].shape[1]
            return [(n, n, n)] * len(batch)
        ends, own = (last_token(one.inputs["attention_mask"]) + 1 for one in (batch, plain))
        n_read, n_own = (one.inputs["attention_mask"].sum(dim=1) for one in (batch, plain))
        return list(zip(torch.minimum(n_read, n_own).tolist(), ends.tolist(), own.tolist(), strict=True))
