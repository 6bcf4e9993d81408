"""How the classifier of atlas-drift is trained, apart from the stream so that reading it imports no torch."""

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

    A BERT pretrained on text carries what it read in `[SEP]` as well, and codebook editors take their query
    there. In one trained for nothing but its class, `[SEP]` keeps the place and forgets the year: an edit of
    one year answers for all. So `[SEP]` is asked for the class too and, by a head dropped afterwards, for the
    year.

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
            labels: (B, 2) class and year; `IGNORED` where one is not asked.
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
