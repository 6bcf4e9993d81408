"""Fine-tuning held back by elastic weight consolidation."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.weights import trainable
from grace_bench.editors.ft import FineTune
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch
from grace_bench.registry import register_editor


@register_editor("ft_ewc")
class FineTuneEwc(FineTune):
    """Fine-tunes on each edit, penalising changes to weights that mattered to the last edits (Kirkpatrick et al. 2017).

    The penalty (elastic weight consolidation) is lambda / 2 * sum_i F_i (w_i - a_i)^2 (their Equation 3), where the
    anchor a is the layer after the previous edit and F the diagonal of the empirical Fisher information there: the mean
    over the last edits of the squared gradient of the target's log-likelihood. Both are recomputed after every edit,
    which makes this the online variant.

    Args:
        model: The model to edit.
        n_iter: Maximum number of Adam steps per edit.
        lr: Learning rate of Adam.
        ewc_lambda: Weight of the penalty (GRACE paper: 0.1).
        n_samples: Number of the last edits from which the Fisher information is computed (GRACE paper: 10).
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer has no weights.
    """

    about = About(
        source="Kirkpatrick et al., PNAS 2017",
        changes="the layer's weights, held near what the last edits need",
        costs="as `ft`, and a gradient for each of the last edits",
        choose="as a baseline of continual learning",
    )
    needs_replay = True
    search_space: ClassVar = {"lr": (0.001, 0.0003, 3e-05), "ewc_lambda": (0.1, 10000.0)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 1e-2,
        ewc_lambda: float = 0.1,
        n_samples: int = 10,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, n_iter=n_iter, lr=lr, plugins=plugins, evaluator=evaluator)
        check_positive("editor.ewc_lambda", ewc_lambda)
        check_whole("editor.n_samples", n_samples, least=1)
        self.ewc_lambda = ewc_lambda
        self.n_samples = n_samples
        self._recent: list[tuple[str, str | int]] = []
        self._fisher: list[Tensor] = []
        self._anchor: list[Tensor] = []

    def edit(self, batch: EditBatch) -> EditOutcome:
        outcome = super().edit(batch)
        self._recent = [*self._recent, *zip(batch.prompts, batch.targets, strict=True)][-self.n_samples :]
        self._fisher = self.fisher([self.model.encode_batch([prompt], [target]) for prompt, target in self._recent])
        self._anchor = [parameter.detach().float().clone() for parameter in self.model.layer.parameters()]
        return outcome

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        terms = zip(self._fisher, weights, self._anchor, strict=True) if self._fisher else ()
        return self.ewc_lambda / 2 * sum((f * (w - a) ** 2).sum().to(self.model.device) for f, w, a in terms)

    def fisher(self, samples: Sequence[EncodedBatch]) -> list[Tensor]:
        """Returns the diagonal of the empirical Fisher information, one float32 tensor per parameter of the layer.

        Args:
            samples: Requests with their targets, one row each.
        """
        with trainable(self.model.layer.parameters()) as parameters:
            totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
            for sample in samples:
                assert sample.labels is not None
                n_tokens = int((sample.labels != IGNORED).sum())
                # The task's loss is the mean over the target's tokens; the log-likelihood is their sum.
                loss = self.model.task.loss(*self.model.labelled_logits(sample)) * n_tokens
                for total, gradient in zip(totals, torch.autograd.grad(loss, parameters), strict=True):
                    total += gradient.float() ** 2
        return [total / len(samples) for total in totals]

    def rollback(self) -> None:
        super().rollback()
        self._recent, self._fisher, self._anchor = [], [], []

    def state_dict(self) -> State:
        tensors = {f"fisher.{i}": tensor for i, tensor in enumerate(self._fisher)}
        tensors |= {f"anchor.{i}": tensor for i, tensor in enumerate(self._anchor)}
        return {**super().state_dict(), **tensors, "recent": [list(pair) for pair in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._recent = [(prompt, target) for prompt, target in state["recent"]]
        n_parameters = len(list(self.model.layer.parameters())) if self._recent else 0
        self._fisher = [state[f"fisher.{i}"].to(self.model.layer_device).clone() for i in range(n_parameters)]
        self._anchor = [state[f"anchor.{i}"].to(self.model.layer_device).clone() for i in range(n_parameters)]
