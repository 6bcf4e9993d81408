"""AlphaEdit: edits in the null space of what should stay (Fang et al., ICLR 2025)."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_positive
from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import content_key, load_artifact, save_artifact
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.moments import TextSource
from grace_bench.editors._rome.closed_form import closed_form
from grace_bench.editors._rome.editor import MassEditor
from grace_bench.editors._rome.facts import FactToken
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.fingerprint import hash_tensors
from grace_bench.registry import register_editor

ThresholdUnit = Literal["absolute", "largest"]


@register_editor("alphaedit")
class AlphaEdit(MassEditor):
    """Writes batches of facts into the null space of the keys that should stay (Fang et al. 2025, section 3).

    Values are optimised and spread over layers as in MEMIT. The change of a layer is projected onto the directions that
    running text hardly takes: Δ = R Kᵀ P ((K_p K_pᵀ + K Kᵀ) P + λ I)⁻¹, with P the projection, K_p the keys of earlier
    batches and K those of this one. In a basis U of the null space, P = U Uᵀ, this is MEMIT's closed form for the keys
    Uᵀ K.

    Defaults are those of the authors' code for GPT-J.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers to rewrite, in their order; null for the model's layer alone.
        threshold: Directions whose second moment is below it span the null space.
        threshold_unit: `absolute`, as published; it depends on the scale of the layer's inputs, and may leave nothing
            or everything in the null space of another model. `largest`: a share of the largest singular value.
        l2: λ, the weight of the change's own size.
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
        UserError: If an option is out of range, naming it, a layer is not linear or in no block, or the null space of
            every layer is empty.
    """

    about = About(
        source="Fang et al., ICLR 2025",
        changes="the weights of several layers, within a null space",
        needs="running text",
        costs="as `memit`, and two matrices a layer in memory",
        choose="for batches of facts that follow one another",
    )
    search_space: ClassVar = {
        "threshold": (1e-3, 1e-2),
        "threshold_unit": ("largest",),
        "n_iter": (25, 50, 100),
        "l2": (1.0,),
        "clamp": (4.0,),
    }

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        threshold: float = 0.02,
        threshold_unit: ThresholdUnit = "absolute",
        l2: float = 10.0,
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
        check_positive("editor.threshold", threshold)
        check_choice("editor.threshold_unit", threshold_unit, get_args(ThresholdUnit))
        check_positive("editor.l2", l2)
        self.threshold = threshold
        self.threshold_unit: ThresholdUnit = threshold_unit
        self.l2 = l2
        self._bases: dict[str, Tensor] = {}

    @property
    def n_matrices(self) -> int:
        # Float32 bases, and the keys of earlier batches before and after an edit.
        return 3

    def use_moments(self, moments: Mapping[str, Tensor], *, progress: Progress | None = None) -> None:
        bases = {}
        for index, (path, moment) in enumerate(moments.items(), start=1):
            bases[path] = self._null_space(moment)
            if progress is not None:
                progress("null spaces", index, len(moments))
        if not any(basis.shape[1] for basis in bases.values()):
            least = min(float(torch.linalg.eigvalsh(moment.double())[0]) for moment in moments.values())
            raise UserError(
                f"editor.threshold={self.threshold} ({self.threshold_unit}) leaves no direction to write in: the least "
                f"singular value is {least:.3g}"
            )
        self._bases = bases

    def constants(self) -> dict[str, Tensor]:
        return {f"basis.{path}": basis for path, basis in self._bases.items()}

    def use_constants(self, constants: Mapping[str, Tensor]) -> None:
        self._bases = {path: constants[f"basis.{path}"] for path in self.paths}

    def change(self, path: str, keys: Tensor, residuals: Tensor) -> Tensor:
        # A float64 basis of a wide layer takes gigabytes: it is not kept during the solve.
        coordinates = keys @ self._bases[path].double()
        change = closed_form(coordinates, residuals, self._factor_of(path), softness=1.0)
        return change @ self._bases[path].double().T

    def _factor_of(self, path: str) -> Tensor:
        """The factor of λ I and the keys of earlier batches, in the basis of the null space."""
        if path not in self.past:
            return torch.linalg.cholesky(torch.eye(self._bases[path].shape[1], dtype=torch.float64).mul_(self.l2))
        kept = self.past[path].clone()
        kept.diagonal().add_(self.l2)
        return torch.linalg.cholesky(kept)

    def remember(self, path: str, keys: Tensor) -> None:
        self.past[path] = self.added_to_past(path, keys @ self._bases[path].double())

    def _null_space(self, moment: Tensor) -> Tensor:
        """The (D_in, r) orthonormal basis of the directions below the threshold, cached by content."""
        key = content_key(moment=hash_tensors({"moment": moment}), threshold=self.threshold, unit=self.threshold_unit)
        known = load_artifact("null-spaces", key)
        if known is not None:
            return known[0]["basis"]
        values, directions = torch.linalg.eigh(moment.double())
        threshold = self.threshold * (float(values[-1]) if self.threshold_unit == "largest" else 1.0)
        basis = directions[:, values < threshold].float()
        notes = {"threshold": f"{self.threshold} {self.threshold_unit}"}
        # It is computed in seconds: a cache that cannot be written stops nobody.
        with suppress(OSError):
            save_artifact("null-spaces", key, {"basis": basis}, notes)
        return basis
