"""EMMET: mass-editing under equality constraints (Gupta et al. 2024)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_not_negative, check_positive
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.moments import TextSource
from grace_bench.editors._rome.closed_form import closed_form, regularised
from grace_bench.editors._rome.editor import MassEditor
from grace_bench.editors._rome.facts import FactToken
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("emmet")
class Emmet(MassEditor):
    """Writes a batch of facts under the constraint that each key gives its value (Gupta et al. 2024).

    The objective is MEMIT's, the least change of what other keys give, but the facts are constraints as in ROME:
    Δ = R (Kᵀ C'⁻¹ K)⁻¹ Kᵀ C'⁻¹. Values are optimised and spread over layers as in MEMIT; usually there is one layer.

    Defaults are those of EasyEdit's code.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers to rewrite, in their order; null for the model's layer alone.
        moment_weight: The weight of the second moments in C'; it matters only beside the two below.
        ridge: Added to the diagonal of C' (`update_norm_lambda`).
        softness: Added to the diagonal of Kᵀ C'⁻¹ K (`emmet_lambda`); 0 for exact constraints.
        fact_token: The token at which facts are written: the subject's last or first one, or the one after it.
        n_iter: Maximum number of passes for a value, each but the last followed by an Adam step.
        lr: Learning rate of Adam.
        kl_weight: Weight of KL(edited || unedited) of the token after the subject in "{subject} is a".
        weight_decay: Weight of |z - h| / |h|², where h is what the last layer's block gives without the edit.
        clamp: The largest |z - h|, in units of |h|.
        n_prefixes: The number of texts of each length, sampled from the model, to put before a prompt.
        prefix_lengths: Their lengths in tokens.
        text: Running text for the second moments: the requests that the stream marks for training (`train`), or texts
            sampled from the model (`model`).
        text_path: A file of running text instead, one text a line, or `.jsonl` with the field `Text` or `text`.
        moments_path: Second moments computed before, an `.npz` file or a folder of them, instead of any text.
        n_texts: Maximum number of texts.
        seed: Seeds the prefixes and sampled texts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear or in no block.
    """

    about = About(
        source="Gupta et al. 2024, A Unified Framework for Model Editing",
        changes="the weights of a layer, with the facts as constraints",
        needs="running text",
        costs="as `memit`",
        choose="as `memit`, where facts come before what should stay",
    )
    search_space: ClassVar = {"softness": (0.1, 1.0), "n_iter": (25, 50, 100), "clamp": (4.0,)}

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        moment_weight: float = 20000.0,
        ridge: float = 0.0,
        softness: float = 0.1,
        fact_token: FactToken = "subject_last",
        n_iter: int = 25,
        lr: float = 0.5,
        kl_weight: float = 0.0625,
        weight_decay: float = 0.5,
        clamp: float = 0.75,
        n_prefixes: int = 5,
        prefix_lengths: Sequence[int] = (10,),
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
            layers=layers,
            fact_token=fact_token,
            n_iter=n_iter,
            lr=lr,
            kl_weight=kl_weight,
            weight_decay=weight_decay,
            clamp=clamp,
            n_prefixes=n_prefixes,
            prefix_lengths=prefix_lengths,
            text=text,
            text_path=text_path,
            moments_path=moments_path,
            n_texts=n_texts,
            seed=seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_positive("editor.moment_weight", moment_weight)
        check_not_negative("editor.ridge", ridge)
        check_not_negative("editor.softness", softness)
        self.moment_weight = moment_weight
        self.ridge = ridge
        self.softness = softness
        self._factors: dict[str, Tensor] = {}

    def use_moments(self, moments: Mapping[str, Tensor], *, progress: Progress | None = None) -> None:
        for path, moment in moments.items():
            weighted = regularised(moment).mul_(self.moment_weight)
            # Rounded to float32, as a float32 identity times the ridge is.
            weighted.diagonal().add_(float(torch.tensor(self.ridge)))
            self._factors[path] = torch.linalg.cholesky(weighted)
            del weighted

    def constants(self) -> dict[str, Tensor]:
        return {f"factor.{path}": factor for path, factor in self._factors.items()}

    def use_constants(self, constants: Mapping[str, Tensor]) -> None:
        self._factors = {path: constants[f"factor.{path}"] for path in self.paths}

    def change(self, path: str, keys: Tensor, residuals: Tensor) -> Tensor:
        return closed_form(keys, residuals, self._factors[path], softness=self.softness)
