"""Fine-tuning on each edit: the baseline that forgets."""

from collections.abc import Sequence

import torch
from avalanche.core import BasePlugin
from avalanche.training.plugins.evaluation import EvaluationPlugin

from grace_bench.errors import UserError
from grace_bench.models import EditableModel
from grace_bench.options import check_positive, check_whole
from grace_bench.registry import register_editor
from grace_bench.strategy import EditBatch, EditorStrategy, EditOutcome, trainable


@register_editor("ft")
class FineTune(EditorStrategy):
    """Fine-tunes the layer's weights on each edit until the model answers it (Hartvigsen et al. 2023, section 4.1).

    Args:
        model: The model to edit.
        n_iter: The most steps of Adam an edit takes.
        lr: Learning rate of Adam (paper: 1e-2).
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer has no weights.
    """

    freezes_weights = False

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
        losses: list[float] = []
        steps = 0
        with (
            trainable(self.model.layer.parameters()) as parameters,
            self.model.repeated(batch.encoded) as forward,
        ):
            optimizer = torch.optim.Adam(parameters, lr=self.lr)
            for _ in range(self.n_iter):
                logits = forward()
                loss = self.model.task.loss(logits, batch.encoded)
                losses.append(float(loss.detach()))
                if self.model.task.answered(logits, batch.encoded):
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps += 1
        return EditOutcome(loss_first=losses[0], loss=losses[-1], steps=steps)
