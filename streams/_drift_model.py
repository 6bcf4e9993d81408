"""The training loss of the atlas-drift classifier, in a module of its own so that loading the stream needs no torch."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from grace_bench.streams._pretraining import IGNORED

YEAR_WEIGHT = 0.05
YEAR_CENTRE, YEAR_SCALE = 1987.0, 15.0


class ReadAtBothEnds(nn.Module):
    """A BERT classifier whose `[SEP]` is trained along with its `[CLS]`.

    Codebook editors take their query from the state at `[SEP]`. A BERT pretrained on text encodes its whole input
    there. A BERT trained only to classify from `[CLS]` encodes the place in `[SEP]` but not the year, so an edit for
    one year would change the answer for every year. `[SEP]` is therefore also trained to predict the class and the
    year; the head that predicts the year is discarded after training.

    Args:
        model: The classifier; trained in place.
    """

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model
        self.year = nn.Linear(model.config.hidden_size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Returns the loss.

        Args:
            input_ids: (B, T) tokens, padded on the right.
            attention_mask: (B, T) 1 for tokens, 0 for padding.
            labels: (B, 2) class and year; `IGNORED` where an example has no class or no year to learn.
        """
        states = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        first = states[:, 0]
        last = states[torch.arange(len(states)), attention_mask.sum(dim=1) - 1]
        classes, years = labels[:, 0], (labels[:, 1] - YEAR_CENTRE) / YEAR_SCALE
        asked = labels[:, 1] != IGNORED
        loss = YEAR_WEIGHT * mse_loss(self.year(last)[asked, 0], years[asked])
        for state in (first, last):
            pooled = self.model.bert.pooler.dense(state).tanh()
            loss = loss + cross_entropy(self.model.classifier(pooled), classes, ignore_index=IGNORED)
        return SequenceClassifierOutput(loss=loss)
