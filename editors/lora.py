"""LoRA: a low-rank adapter on one layer, trained on each edit."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.common.options import check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import Adapter
from grace_bench.editors._adaptor import AdaptorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.registry import register_editor

_NAME = "default"


@register_editor("lora")
class Lora(AdaptorStrategy):
    """One low-rank adapter on the layer, fine-tuned on each edit until the model answers it (Hu et al. 2022).

    The adapter adds (alpha / r) B A x to the layer's output at every position; `peft` creates A, B and their scale.

    Args:
        model: The model to edit.
        n_iter: Maximum number of Adam steps per edit.
        lr: Learning rate of Adam.
        r: Rank of the adapter.
        alpha: Its scale, divided by the rank.
        seed: Seeds A; B starts at zero.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer is not a linear map.
    """

    about = About(
        source="Hu et al., ICLR 2022",
        changes="what the layer returns, by a low-rank adapter",
        costs="up to `n_iter` passes from the layer on; one adapter in all",
        choose="if the result should be an adapter that others can load",
    )
    stops_when_answered = True
    search_space: ClassVar = {"lr": (0.01, 0.003, 0.001, 0.0003, 0.0001, 3e-05)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 1e-3,
        r: int = 8,
        alpha: float = 16.0,
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, n_iter=n_iter, lr=lr, seed=seed, plugins=plugins, evaluator=evaluator)
        check_whole("editor.r", r, least=1)
        check_positive("editor.alpha", alpha)
        if not isinstance(model.layer, nn.Linear | Conv1D):
            raise UserError(f"layer={model.layer_name} is a {type(model.layer).__name__}, which LoRA cannot adapt")
        self.r = r
        self.alpha = alpha

    def build(self, n_in: int, n_out: int) -> nn.Module:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=["layer"],
        )
        # peft wraps a stand-in of the layer's size, and only its A and B are used: the model itself must not change,
        # and its weights may be offloaded.
        stand_in = nn.ModuleDict({"layer": nn.utils.skip_init(nn.Linear, n_in, n_out, bias=False)})
        wrapped: Any = inject_adapter_in_model(config, stand_in, _NAME)
        self._scale = float(wrapped["layer"].scaling[_NAME])
        return nn.ModuleDict({"A": wrapped["layer"].lora_A[_NAME], "B": wrapped["layer"].lora_B[_NAME]})

    def n_parameters(self, n_in: int, n_out: int) -> int:
        return self.r * (n_in + n_out)

    def respond(self, adaptor: Any, call: LayerCall) -> Tensor:
        update = adaptor["B"](adaptor["A"](call.input.float())) * self._scale
        return call.output + update.to(call.output.dtype)

    def adapter(self) -> Adapter:
        from peft import LoraConfig

        if self.adaptor is None or not self.is_trained:
            raise UserError("editor 'lora' has no adapter before its first edit")
        path = self.model.layer_name
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            target_modules=[path],
            fan_in_fan_out=isinstance(self.model.layer, Conv1D),
        )
        weights = self.adaptor.state_dict()
        return Adapter(
            config, {f"base_model.model.{path}.lora_{name}.weight": weights[f"{name}.weight"] for name in ("A", "B")}
        )
