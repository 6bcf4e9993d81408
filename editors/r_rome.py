"""R-ROME: ROME with one key on both sides of its update (Gupta et al. 2024)."""

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from grace_bench.common.options import check_flag
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.moments import TextSource
from grace_bench.editors._rome.values import Value
from grace_bench.editors.rome import Rome
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("r_rome")
class RebuiltRome(Rome):
    """Writes each fact by a rank-one update, at one key throughout (Gupta et al. 2024, Rebuilding ROME).

    ROME's update W += (v* - W k*) uᵀ / (k*ᵀ u), u = C⁻¹ k, with k = k*, the mean over contexts. So k*ᵀ u cannot become
    small, and no single edit ruins the model. The mean of what the layer gives in the contexts becomes v*.

    Args:
        model: The model to edit; its layer must be `nn.Linear` or transformers' `Conv1D`.
        n_iter: Maximum number of passes for a value, each but the last followed by an Adam step.
        lr: Learning rate of Adam.
        kl_weight: Weight of KL(edited || unedited) of the token after the subject in "{subject} is a".
        weight_decay: Weight of |v* - v| / |v|², where v is what the layer gives without the edit.
        clamp: The largest |v* - v|, in units of |v|.
        n_prefixes: The number of texts of each length, sampled from the model, to put before a prompt.
        prefix_lengths: Their lengths in tokens.
        second_moments: Whether to use C; without, u = k, as in EasyEdit's settings.
        prompt_key: Whether the key of the bare prompt is used throughout instead of the mean.
        text: Running text for C: the requests that the stream marks for training (`train`), or texts sampled from the
            model (`model`).
        text_path: A file of running text instead, one text a line, or `.jsonl` with the field `Text` or `text`.
        moments_path: C computed before, an `.npz` file or a folder of them, instead of any text.
        n_texts: Maximum number of texts.
        seed: Seeds the prefixes and sampled texts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or the layer is not linear.
    """

    about = About(
        source="Gupta et al. 2024, Rebuilding ROME",
        changes="a layer's weights, by a rank-one update at one key",
        needs="running text",
        costs="as `rome`",
        choose="for facts that come one at a time, many of them",
    )
    search_space: ClassVar = {"n_iter": (20, 50, 100), "n_prefixes": (2, 10)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 20,
        lr: float = 0.5,
        kl_weight: float = 0.0625,
        weight_decay: float = 0.5,
        clamp: float = 4.0,
        n_prefixes: int = 10,
        prefix_lengths: Sequence[int] = (5, 10),
        second_moments: bool = True,
        prompt_key: bool = False,
        text: TextSource = "train",
        text_path: str | None = None,
        moments_path: str | None = None,
        n_texts: int = 100_000,
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(
            model=model,
            n_iter=n_iter,
            lr=lr,
            kl_weight=kl_weight,
            weight_decay=weight_decay,
            clamp=clamp,
            n_prefixes=n_prefixes,
            prefix_lengths=prefix_lengths,
            second_moments=second_moments,
            text=text,
            text_path=text_path,
            moments_path=moments_path,
            n_texts=n_texts,
            seed=seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_flag("editor.prompt_key", prompt_key)
        self.prompt_key = prompt_key

    def located(self, keys: Tensor, outputs: Tensor, value: Value) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.prompt_key:
            return keys[0], keys[0], outputs[0], outputs[0] + value.delta.double()
        key = keys.mean(dim=0)
        return key, key, outputs.mean(dim=0), value.optimised
