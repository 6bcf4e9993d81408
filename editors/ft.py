"""Fine-tuning on each edit: the baseline that forgets."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import trainable
from grace_bench.editors._training import EditTraining
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("ft")
class FineTune(EditorStrategy):
    """Fine-tunes the layer's weights on each edit until the model answers it (Hartvigsen et al. 2023, section 4.1).

    Args:
        model: The model to edit.
        n_iter: Maximum number of Adam steps per edit.
        lr: Learning rate of Adam (paper: 1e-2).
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer has no weights.
    """

    about = About(
        source="Hartvigsen et al. 2023, section 4.1; Meng et al. 2022, appendix",
        changes="the layer's weights",
        costs="up to `n_iter` passes from the layer on",
        choose="as the baseline, or for a handful of edits",
    )
    freezes_weights = False
    search_space: ClassVar = {"lr": (0.01, 0.003, 0.001, 0.0003, 0.0001, 3e-05)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 1e-2,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        if not any(True for _ in model.layer.parameters()):
            raise UserError(f"layer={model.layer_name} has no weights to fine-tune")
        self.n_iter = n_iter
        self.lr = lr

    def edit(self, batch: EditBatch) -> EditOutcome:
        training = EditTraining(self.model, batch.encoded, n_iter=self.n_iter)
        with trainable(self.model.layer.parameters()) as parameters:
            optimizer = WeightAdam(parameters, lr=self.lr)
            training.run(lambda loss: optimizer.step(loss + self.penalty(optimizer.masters)))
            return training.outcome()

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        """Returns the penalty added to the loss, given the layer's weights in the order of its parameters."""
        return 0.0


class WeightAdam:
    """Adam on a model's weights, with float32 copies of those in bfloat16 or float16.

    Without the copies, a step smaller than the rounding of such a weight would not move it at all.

    Args:
        parameters: The weights, which take the rounded values after every step.
        lr: Learning rate.

    Attributes:
        masters: The optimised tensors: float32 copies, or the parameters themselves where they are that precise.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float) -> None:
        self.parameters = list(parameters)
        self.masters = [
            parameter if torch.finfo(parameter.dtype).bits >= 32 else parameter.detach().float().requires_grad_()
            for parameter in parameters
        ]
        self._adam = torch.optim.Adam(self.masters, lr=lr)

    def step(self, loss: Tensor) -> None:
        """Takes one step down a loss of the parameters, of the masters, or of both."""
        self._adam.zero_grad()
        loss.backward()
        rounded = [pair for pair in zip(self.masters, self.parameters, strict=True) if pair[0] is not pair[1]]
        for master, parameter in rounded:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None
        self._adam.step()
        with torch.no_grad():
            for master, parameter in rounded:
                parameter.copy_(master)
