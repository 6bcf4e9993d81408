"""Defer: a gate and a predicted output at one layer, the simplified SERAC of the GRACE paper."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from grace_bench.common.options import check_choice, check_positive
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editors._adaptor import AdaptorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall, Replacement
from grace_bench.registry import register_editor

# On the logit scale: rounding in another batch could move a gate trained exactly to the threshold below it.
_MARGIN = 1.0


@register_editor("defer")
class Defer(AdaptorStrategy):
    """A gate that defers some inputs to a predicted layer output (Hartvigsen et al. 2023, after SERAC).

    From the layer's input q at the query position a gate g = sigmoid(w q + b) and an output p = W q + c are computed.
    Where g lies above the threshold the layer returns p, elsewhere its own output h. Both are trained together on each
    edit: on the loss of the mixture g p + (1 - g) h, and on a hinge that pushes the gate above the threshold. Without
    the hinge the gate may close on a prediction that starts out bad, and the edit is never deferred. Unlike in SERAC
    (Mitchell et al. 2022), the gate is trained on no inputs outside the scope of the edits.

    Args:
        model: The model to edit.
        n_iter: Adam steps per edit.
        lr: Learning rate of Adam (paper: 0.1).
        threshold: The gate's value above which an input is deferred.
        replacement: The positions of the layer's output that the prediction overwrites.
        seed: Seeds the first weights.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is not one of its choices, or a number is out of range, naming it.
    """

    about = About(
        source="Hartvigsen et al. 2023, after SERAC",
        changes="what the layer returns where a gate opens",
        costs="up to `n_iter` passes from the layer on; two small maps in all",
        choose="as a baseline of bounded size",
    )
    search_space: ClassVar = {"lr": (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 0.1,
        threshold: float = 0.5,
        replacement: Replacement = "replace_all",
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, n_iter=n_iter, lr=lr, seed=seed, plugins=plugins, evaluator=evaluator)
        check_positive("editor.threshold", threshold)
        if threshold >= 1:
            raise UserError(f"editor.threshold={threshold} should be below 1")
        check_choice("editor.replacement", replacement, get_args(Replacement))
        self.threshold = threshold
        self.replacement: Replacement = replacement
        self._logit = torch.zeros(0)

    def build(self, n_in: int, n_out: int) -> nn.Module:
        return nn.ModuleDict({"gate": nn.Linear(n_in, 1), "predictor": nn.Linear(n_in, n_out)})

    def n_parameters(self, n_in: int, n_out: int) -> int:
        return (n_in + 1) * (n_out + 1)

    def penalty(self) -> Tensor | float:
        """Returns how far the edit's gate is, on the logit scale, from lying `_MARGIN` above the threshold."""
        least = math.log(self.threshold / (1 - self.threshold)) + _MARGIN
        return functional.relu(least - self._logit).mean().to(self.model.device)

    def respond(self, adaptor: Any, call: LayerCall) -> Tensor:
        logit, predicted = call.remember("defer", lambda: self._predict(adaptor, call.query.float()))
        gate = torch.sigmoid(logit)
        if self.step is None:
            return call.replace(predicted, gate > self.threshold, self.replacement)
        self._logit = logit
        replaced = call.replace(predicted, torch.ones_like(gate, dtype=torch.bool), self.replacement)
        return torch.lerp(call.output, replaced, gate[:, None, None].to(call.output.dtype))

    @staticmethod
    def _predict(adaptor: Any, query: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B,) gates on the logit scale and (B, D_out) outputs."""
        return adaptor["gate"](query)[:, 0], adaptor["predictor"](query)
