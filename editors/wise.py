"""WISE: rethinking the knowledge memory for lifelong model editing (Wang et al., NeurIPS 2024)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, get_args

from grace_bench.common.options import check_choice, check_flag, check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editors._wise.editor import Irrelevant, MemoryEditor
from grace_bench.editors._wise.memory import Fidelity, Sharding
from grace_bench.editors._wise.merging import MergeName
from grace_bench.editors._wise.training import Descent
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("wise")
class Wise(MemoryEditor):
    """Copies of one linear layer that are trained beside it; a prompt is answered by the one that knows it.

    An edit trains a random part of the copy, the side memory, so that the target becomes likely and the copy's output
    moves far from the layer's own for the edit, and little for an irrelevant prompt (Wang et al. 2024, equation 5).
    This distance, the activation, decides for every prompt which of the memories answers, or the layer itself
    (equation 4). Every `save_freq` edits a memory is finished, every `merge_freq` edits the finished ones are merged.

    Defaults are those of the authors' code for LLaMA-2-7B.

    Args:
        model: The model to edit.
        edit_lr: Learning rate of gradient descent.
        n_iter: Maximum number of steps on an edit.
        mask_ratio: ρ, the share of a memory's entries that its edits train.
        act_margin: α, β and γ: the largest activation of irrelevant prompts, the smallest of edits, and the smallest
            difference.
        act_ratio: A memory answers prompts whose activation is this share of the smallest among its edits.
        norm_constraint: The largest change of an entry; null for none.
        save_freq: The number of edits in a memory.
        merge_freq: The number of edits after which finished memories are merged; a multiple of `save_freq`.
        merge_alg: `ties`, `magnitude`, `magnitude_norm`, `sign`, `linear` or `slerp` (see `merging.merge`).
        density: The share of a memory's change that merging keeps.
        weight: The sum of the weights of the memories in a merge.
        retrieve: Whether each merged memory stays by itself, and the one with the largest activation answers
            (WISE-Retrieve); otherwise all are merged into one (WISE-Merge).
        replay: Whether earlier edits keep taking part in the activation loss (appendix B.3); with `retrieve` only.
        irrelevant: Where irrelevant prompts come from: requests of the stream's role `upstream`, or as in the authors'
            evaluations the `locality` probes of the very edit. The latter shows the editor its test; the result says
            so.
        prefix_lengths: The numbers of tokens by which the unedited model continues each of five beginnings; the texts
            are put before a prompt.
        fidelity: `reference` reproduces the authors' code with its mistakes (`docs/fidelity.md`).
        seed: Seeds masks and the choice of prompts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or the layer is not linear.
    """

    about = About(
        source="Wang et al., NeurIPS 2024",
        changes="what one layer returns, by the side memory that knows a prompt, or nothing",
        needs="prompts of upstream requests",
        costs="up to `n_iter` passes from the layer on, behind ten prefixes; a matrix for every `save_freq` edits; "
        "one product of the layer's size a memory and prompt",
        choose="for hundreds of edits whose rephrasings count, where other prompts must keep their answers",
    )
    supported_tasks = ("completion", "language_modelling")
    layer_kind = "mlp_output"
    search_space: ClassVar = {"edit_lr": (1.0, 3.0, 0.3), "act_ratio": (0.88, 0.6)}
    traces = "grace_bench.editors._wise.traces:replay_file"

    def __init__(
        self,
        *,
        model: EditableModel,
        edit_lr: float = 1.0,
        n_iter: int = 70,
        mask_ratio: float = 0.2,
        act_margin: Sequence[float] = (5.0, 20.0, 10.0),
        act_ratio: float = 0.88,
        norm_constraint: float | None = 1.0,
        save_freq: int = 500,
        merge_freq: int = 1000,
        merge_alg: MergeName = "ties",
        density: float = 0.53,
        weight: float = 1.0,
        retrieve: bool = True,
        replay: bool = False,
        irrelevant: Irrelevant = "upstream",
        prefix_lengths: Sequence[int] = (5, 10),
        fidelity: Fidelity = "strict",
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        for name, number in (("edit_lr", edit_lr), ("act_ratio", act_ratio), ("weight", weight)):
            check_positive(f"editor.{name}", number)
        for name, share in (("mask_ratio", mask_ratio), ("density", density)):
            check_positive(f"editor.{name}", share)
            if share > 1:
                raise UserError(f"editor.{name}={share} should be a share, at most 1")
        for name, count in (("n_iter", n_iter), ("save_freq", save_freq), ("merge_freq", merge_freq)):
            check_whole(f"editor.{name}", count, least=1)
        if merge_freq % save_freq:
            raise UserError(f"editor.merge_freq={merge_freq} should be a multiple of editor.save_freq={save_freq}")
        if not _is_margin(act_margin):
            raise UserError(f"editor.act_margin={act_margin} should be three numbers")
        if norm_constraint is not None:
            check_positive("editor.norm_constraint", norm_constraint)
        check_choice("editor.merge_alg", merge_alg, get_args(MergeName))
        check_choice("editor.irrelevant", irrelevant, get_args(Irrelevant))
        check_choice("editor.fidelity", fidelity, get_args(Fidelity))
        check_flag("editor.retrieve", retrieve)
        check_flag("editor.replay", replay)
        if replay and not retrieve:
            raise UserError("editor.replay=true works with editor.retrieve=true only")
        for length in prefix_lengths:
            check_whole("editor.prefix_lengths", length, least=1)
        check_whole("editor.seed", seed, least=0)
        self.edit_lr = edit_lr
        self.n_iter = n_iter
        self.act_margin = list(act_margin)
        self.act_ratio = act_ratio
        self.norm_constraint = norm_constraint
        self.save_freq = save_freq
        self.merge_freq = merge_freq
        self.merge_alg = merge_alg
        self.density = density
        self.weight = weight
        self.retrieve = retrieve
        self.fidelity = fidelity
        super().__init__(
            model=model,
            sharding=Sharding(
                save_freq=save_freq,
                merge_freq=merge_freq,
                merge_alg=merge_alg,
                density=density,
                weight=weight,
                retrieve=retrieve,
                act_ratio=act_ratio,
                fidelity=fidelity,
            ),
            descent=Descent(
                edit_lr=edit_lr, n_iter=n_iter, act_margin=tuple(act_margin), norm_constraint=norm_constraint
            ),
            mask_ratio=mask_ratio,
            replay=replay,
            irrelevant=irrelevant,
            prefix_lengths=prefix_lengths,
            seed=seed,
            plugins=plugins,
            evaluator=evaluator,
        )


def _is_margin(value: Any) -> bool:
    """Whether a value is a list of three finite numbers."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(("alpha", "beta", "gamma")):
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for number in value)
