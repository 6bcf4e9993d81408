"""ROME: Rank-One Model Editing (Meng et al., NeurIPS 2022)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_flag
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.moments import TextSource
from grace_bench.editors._rome.closed_form import regularised
from grace_bench.editors._rome.editor import LocateThenEdit
from grace_bench.editors._rome.facts import Fact
from grace_bench.editors._rome.values import Value
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("rome")
class Rome(LocateThenEdit):
    """Writes each fact into a linear layer by a rank-one update (Meng et al. 2022, section 3.1).

    The layer is read as a memory of keys (its input at the subject's last token) and values (its output there). An edit
    optimises the value v* that makes the model give the target, and inserts it so that other keys move least:
    W += (v* - W k*) uᵀ / (k*ᵀ u), with u = C⁻¹ k and C the second moments of keys over running text.

    The official code takes k from the mean over contexts and k* from the bare prompt. Where the two differ much,
    k*ᵀ u is small and one edit ruins the model (Gupta et al. 2024, Rebuilding ROME): `r_rome` takes both alike.

    Defaults are those of the authors' code for GPT-2 XL.

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
        text: Running text for C: the requests that the stream marks for training (`train`), or texts sampled from the
            model (`model`).
        text_path: A file of running text instead, one text a line, or `.jsonl` with the field `Text` or `text`.
        moments_path: C computed before, an `.npz` file or a folder of them, instead of any text.
        n_texts: Maximum number of texts (paper: 100,000).
        seed: Seeds the prefixes and sampled texts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or the layer is not linear.
    """

    about = About(
        source="Meng et al., NeurIPS 2022",
        changes="a layer's weights, by a rank-one update",
        needs="running text",
        costs="up to `n_iter` passes from the layer on, in every context",
        choose="to compare with what was published for it",
    )
    # Meng et al. 2022, section 3.1: the last map of a feed-forward block is a memory of facts.
    layer_kind = "mlp_output"
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
            text=text,
            text_path=text_path,
            moments_path=moments_path,
            n_texts=n_texts,
            seed=seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_flag("editor.second_moments", second_moments)
        self.second_moments = second_moments
        self._factor: Tensor | None = None

    @property
    def needs_moments(self) -> bool:
        return self.second_moments

    def use_moments(self, moments: Mapping[str, Tensor], *, progress: Progress | None = None) -> None:
        self._factor = torch.linalg.cholesky(regularised(moments[self.model.layer_name]))

    def constants(self) -> dict[str, Tensor]:
        return {} if self._factor is None else {"factor": self._factor}

    def use_constants(self, constants: Mapping[str, Tensor]) -> None:
        self._factor = constants.get("factor")

    def edit_facts(self, facts: Sequence[Fact]) -> list[Value]:
        return [self._insert(fact) for fact in facts]

    def _insert(self, fact: Fact) -> Value:
        path = self.model.layer_name
        (value,) = self.optimise(path, [fact])
        keys, outputs = value.entering.double(), value.leaving.double()
        mean_key, key, output, wanted = self.located(keys, outputs, value)
        direction = self.direction(mean_key)
        self.add_to_weight(path, torch.outer(wanted - output, direction) / (key @ direction))
        return value

    def direction(self, key: Tensor) -> Tensor:
        """Returns u = C⁻¹ k for a (D_in,) key; the key itself without second moments."""
        return key if self._factor is None else torch.cholesky_solve(key[:, None], self._factor)[:, 0]

    def located(self, keys: Tensor, outputs: Tensor, value: Value) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns what an edit writes where.

        Args:
            keys: (C, D_in) what enters the layer at the fact's token in each context, the empty one first.
            outputs: (C, D_out) what leaves it there.
            value: The optimised value.

        Returns:
            (D_in,) k, the key that the direction is made from; (D_in,) k*, the key that gets the value; (D_out,) what
            it gives now; (D_out,) what it is to give.
        """
        return keys.mean(dim=0), keys[0], outputs[0], outputs[0] + value.delta.double()
