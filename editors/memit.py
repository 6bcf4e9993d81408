"""MEMIT: mass-editing memory in a transformer (Meng et al., ICLR 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_flag, check_positive
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import State
from grace_bench.editing.moments import TextSource
from grace_bench.editors._rome.closed_form import closed_form, regularised
from grace_bench.editors._rome.editor import MassEditor
from grace_bench.editors._rome.facts import Fact, FactToken
from grace_bench.editors._rome.values import Value
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.memory import memory_for_matrices
from grace_bench.registry import register_editor


@register_editor("memit")
class Memit(MassEditor):
    """Writes a batch of facts at once, spread over several layers (Meng et al. 2023, algorithm 1).

    A value z is optimised for each fact at the end of the last layer's block. Layer by layer, a share R of what is
    missing there is written at the facts' keys K: Δ = R Kᵀ (λC + K Kᵀ)⁻¹, with C the second moments of the layer's
    inputs over running text (equation 14).

    Its variants are options: `history` keeps what earlier batches wrote, `rect` and `prune` limit the change of the
    weights, `ends_only` writes into the first and the last layer only.

    Defaults are those of the authors' code for GPT-J.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers to rewrite, in their order; null for the model's layer alone.
        moment_weight: λ, the weight of the second moments.
        history: Whether the keys of earlier batches are added to the second moments, so that their values stay
            (MEMIT-seq in the code of Fang et al. 2025).
        rect: The share of a change's elements that is kept, those largest relative to the weight (RECT, Gu et al. 2024:
            0.4); null for all.
        prune: Whether singular values of the whole change above the largest of the unedited weight are replaced by the
            logarithm of their excess (PRUNE, Ma et al. 2025). Edits are made on the weights that were not pruned.
        ends_only: Whether only the first and the last layer are rewritten, each with values of its own (BLUE).
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
        source="Meng et al., ICLR 2023",
        changes="the weights of several layers, by least squares over a batch",
        needs="running text",
        costs="values as for `rome`, optimised together; a solve a layer",
        choose="for many facts at once",
    )
    search_space: ClassVar = {"moment_weight": (15000.0, 1000.0), "n_iter": (25, 50, 100), "clamp": (4.0,)}

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        moment_weight: float = 15000.0,
        history: bool = False,
        rect: float | None = None,
        prune: bool = False,
        ends_only: bool = False,
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
        check_flag("editor.history", history)
        if rect is not None:
            check_positive("editor.rect", rect)
            if rect > 1:
                raise UserError(f"editor.rect={rect} should be a share, at most 1")
        check_flag("editor.prune", prune)
        check_flag("editor.ends_only", ends_only)
        self.moment_weight = moment_weight
        self.history = history
        self.rect = rect
        self.prune = prune
        self.ends_only = ends_only
        self._moments: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}
        self._unpruned: dict[str, Tensor] = {}

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        return (
            tuple((path,) for path in dict.fromkeys((self.paths[0], self.paths[-1])))
            if self.ends_only
            else (self.paths,)
        )

    @property
    def n_matrices(self) -> int:
        # Factors; with `history`, the keys of earlier batches before and after an edit instead.
        return 2 if self.history else 1

    def use_moments(self, moments: Mapping[str, Tensor], *, progress: Progress | None = None) -> None:
        self._moments = dict(moments)
        self._factors = {}

    def constants(self) -> dict[str, Tensor]:
        return {f"moments.{path}": moment for path, moment in self._moments.items()}

    def use_constants(self, constants: Mapping[str, Tensor]) -> None:
        self.use_moments({path: constants[f"moments.{path}"] for path in self.paths})

    def edit_facts(self, facts: Sequence[Fact]) -> list[Value]:
        if not self.prune:
            return super().edit_facts(facts)
        for path, weight in self._unpruned.items():
            self.add_to_weight(path, weight.double() - self.weight_of(path).double())
        values = super().edit_facts(facts)
        for path in self.paths:
            self._unpruned[path] = self.weight_of(path).clone()
            unedited = self.unedited_weight_of(path).double()
            pruned = unedited + _pruned(self._unpruned[path].double() - unedited, unedited)
            self.add_to_weight(path, pruned - self._unpruned[path].double())
        return values

    def change(self, path: str, keys: Tensor, residuals: Tensor) -> Tensor:
        change = closed_form(keys, residuals, self._factor_of(path), softness=1.0)
        return change if self.rect is None else _rectified(change, self.weight_of(path), self.rect)

    def remember(self, path: str, keys: Tensor) -> None:
        if self.history:
            self.past[path] = self.added_to_past(path, keys)

    def _factor_of(self, path: str) -> Tensor:
        """The factor of λC and the keys of earlier batches; without these it is the same for all batches."""
        past = self.past.get(path)
        if past is None and path in self._factors:
            return self._factors[path]
        weighted = regularised(self._moments[path]).mul_(self.moment_weight)
        if past is not None:
            self._factors.pop(path, None)
            return torch.linalg.cholesky(weighted.add_(past))
        factor = torch.linalg.cholesky(weighted)
        n_bytes = sum(known.nbytes for known in self._factors.values()) + factor.nbytes
        if n_bytes <= memory_for_matrices(factor.device):
            self._factors[path] = factor
        return factor

    def rollback(self) -> None:
        super().rollback()
        self._unpruned.clear()

    def changing_state(self) -> State:
        unpruned = {f"unpruned.{path}": weight for path, weight in self._unpruned.items()}
        return {**super().changing_state(), **unpruned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        kept = {name.removeprefix("unpruned."): value for name, value in state.items() if name.startswith("unpruned.")}
        self._unpruned = {path: weight.cpu() for path, weight in kept.items()}


def _rectified(change: Tensor, weight: Tensor, share: float) -> Tensor:
    """The elements of a change that are largest relative to the weight, zero elsewhere (Gu et al. 2024, section 5)."""
    relative = (change / (weight.cpu().double() + 1e-8)).abs().flatten()
    kept = relative.topk(round(share * relative.numel())).indices
    mask = torch.zeros_like(relative, dtype=torch.bool).index_fill(0, kept, True)
    return torch.where(mask.view(change.shape), change, 0.0)


def _pruned(change: Tensor, unedited: Tensor) -> Tensor:
    """A change without singular values far above those of the unedited weight (Ma et al. 2025, section 4)."""
    largest = torch.linalg.matrix_norm(unedited, 2)
    left, singular, right = torch.linalg.svd(change, full_matrices=False)
    damped = singular.log() - largest.log() + largest
    return left * torch.where(singular > largest, damped, singular) @ right
