"""Memory: attention over a fixed number of learned slots at one layer."""

from collections.abc import Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from grace_bench.common.options import check_choice, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editors._adaptor import AdaptorStrategy
from grace_bench.models.editable import EditableModel, LayerCall, Replacement
from grace_bench.registry import register_editor


@register_editor("memory")
class Memory(AdaptorStrategy):
    """Attention over a fixed number of learned slots at one layer (Hartvigsen et al. 2023, after Weston et al. 2015).

    The layer's input q at the query position gives softmax(K q + b) over the slots' keys K, and the layer's output
    becomes the mean of the slots' values under these weights. Before the first edit the layer is unedited; while the
    first edit trains the memory, the layer's own output is mixed in, with a share that falls to zero at the last step.

    Args:
        model: The model to edit.
        n_iter: Adam steps per edit.
        lr: Learning rate of Adam (paper: 0.1).
        n_slots: Slots of the memory (paper: 100).
        replacement: The positions of the layer's output that the memory overwrites.
        seed: Seeds the first weights.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is not one of its choices, or a number is out of range, naming it.
    """

    about = About(
        source="Hartvigsen et al. 2023, after Weston et al., ICLR 2015",
        changes="what the layer returns, read from learned slots",
        costs="up to `n_iter` passes from the layer on; `n_slots` values in all",
        choose="as a baseline of bounded size",
    )
    search_space: ClassVar = {
        "lr": (0.1, 0.01, 0.001),
        "replacement": ("replace_all", "replace_prompt"),
    }

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 0.1,
        n_slots: int = 100,
        replacement: Replacement = "replace_all",
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, n_iter=n_iter, lr=lr, seed=seed, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_slots", n_slots, least=1)
        check_choice("editor.replacement", replacement, get_args(Replacement))
        self.n_slots = n_slots
        self.replacement: Replacement = replacement

    def build(self, n_in: int, n_out: int) -> nn.Module:
        values = nn.Linear(self.n_slots, n_out, bias=False)
        # Initialised like GRACE's cold values; nn.Linear's default would shrink with the number of slots.
        nn.init.uniform_(values.weight)
        return nn.ModuleDict({"attention": nn.Linear(n_in, self.n_slots), "slot_values": values})

    def n_parameters(self, n_in: int, n_out: int) -> int:
        return self.n_slots * (n_in + 1 + n_out)

    def respond(self, adaptor: Any, call: LayerCall) -> Tensor:
        recalled = call.remember("memory", lambda: self._recall(adaptor, call.query.float()))
        everywhere = torch.ones(len(recalled), dtype=torch.bool, device=recalled.device)
        replaced = call.replace(recalled, everywhere, self.replacement)
        if self.is_trained or self.step is None:
            return replaced
        return torch.lerp(call.output, replaced, (self.step + 1) / self.n_iter)

    @staticmethod
    def _recall(adaptor: Any, query: Tensor) -> Tensor:
        """Returns the (B, D_out) means of the slots' values."""
        recalled: Tensor = adaptor["slot_values"](torch.softmax(adaptor["attention"](query), dim=-1))
        return recalled
