"""RLEdit: Reinforced Lifelong Editing for Language Models (Li et al., ICML 2025)."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from grace_bench.common.options import check_not_negative, check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editors._meta.editor import MetaTrainedOnBatches
from grace_bench.editors._meta.gradients import EditTokens, shifted
from grace_bench.editors._meta.networks import AggregatingNetworks
from grace_bench.editors._meta.training import BatchTraining
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor

T = TypeVar("T")


@register_editor("rledit")
class RLEdit(MetaTrainedOnBatches):
    """The networks of MALMEN, trained to make a long sequence of batches one after the other.

    Editing is seen as a Markov decision process (Li et al. 2025, section 3): the state is the model as edited so far,
    an action the shift of the weights for the next batch, and the reward what the model has then kept of this batch and
    of earlier ones. The networks are trained on the return of whole trajectories, so they see the gradients of models
    that were edited before and learn to spare earlier edits.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers whose weights are edited (paper: the last MLPs); None for only the
            model's edited layer.
        tokens: The tokens whose gradients count: those from which the target is predicted (`answer`, as in the paper),
            or all that reach the edit's loss (`all`).
        rank: Rank of the networks' matrices (published: 1024, on larger models).
        n_blocks: Residual blocks of a network.
        n_steps: Steps of meta-training, each on one trajectory.
        n_batches: Batches of a trajectory.
        batch_size: Edits in a batch of a trajectory.
        back_depth: The number of last batches that a reward looks back on, the present one included.
        time_decay: The weight of a batch in the reward, relative to that of the batch after it.
        lr: Learning rate of Adam in meta-training (published: 1e-5).
        edit_lr: Initial edit learning rate of each layer, which is then learned (published: 1e-6).
        c_loc: Weight of the locality loss in meta-training.
        c_reg: Weight of |Δ|², the squared size of a shift, in meta-training.
        max_grad_norm: The largest norm of the networks' gradient in meta-training.
        meta_seed: Seeds meta-training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear or is quantised.
    """

    about = About(
        source="Li et al. 2025 (arXiv 2502.05759)",
        changes="the layers' weights, by networks trained over whole streams of edits",
        costs="meta-training once, longer than `malmen`; then as `malmen`",
        choose="as `malmen`, for batch after batch",
    )
    search_space: ClassVar = {"c_loc": (0.6, 2.0), "edit_lr": (1e-3, 1e-4, 3e-3)}

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        tokens: EditTokens = "answer",
        rank: int = 64,
        n_blocks: int = 2,
        n_steps: int = 40,
        n_batches: int = 10,
        batch_size: int = 5,
        back_depth: int = 10,
        time_decay: float = 0.95,
        lr: float = 1e-3,
        edit_lr: float = 1e-3,
        c_loc: float = 0.6,
        c_reg: float = 1e-4,
        max_grad_norm: float = 1.0,
        meta_seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(
            model=model,
            layers=layers,
            tokens=tokens,
            rank=rank,
            n_blocks=n_blocks,
            n_steps=n_steps,
            batch_size=batch_size,
            lr=lr,
            edit_lr=edit_lr,
            c_loc=c_loc,
            max_grad_norm=max_grad_norm,
            meta_seed=meta_seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_whole("editor.n_batches", n_batches, least=1)
        check_whole("editor.back_depth", back_depth, least=1)
        check_positive("editor.time_decay", time_decay)
        if time_decay > 1:
            raise UserError(f"editor.time_decay={time_decay} should be at most 1")
        check_not_negative("editor.c_reg", c_reg)
        self.n_batches = n_batches
        self.back_depth = back_depth
        self.time_decay = time_decay
        self.c_reg = c_reg

    def new_training(
        self, networks: AggregatingNetworks, train: Sequence[EditRequest], generator: torch.Generator
    ) -> "Trajectories":
        return Trajectories(
            n_batches=self.n_batches,
            back_depth=self.back_depth,
            time_decay=self.time_decay,
            c_reg=self.c_reg,
            **self.of_training(networks, train, generator),
        )


class Trajectories(BatchTraining):
    """Trains networks on trajectories: batches that a model is edited by, one after the other (Li et al. 2025).

    The loss after a batch is the sum over the last batches, j steps back, of `time_decay`ʲ times the edit loss of their
    equivalents, the locality loss, and the size of the shift. A shift counts in all later losses, since all later
    models contain it; the gradients from which later shifts are computed are observations, which nothing is
    differentiated through.

    Args:
        n_batches: Batches of a trajectory.
        back_depth: The number of last batches in a loss.
        time_decay: The weight of a batch, relative to that of the batch after it.
        c_reg: Weight of the size of a shift.
        common: The arguments of `BatchTraining`.
    """

    # A step is a whole trajectory.
    checkpoint_every = 5

    def __init__(self, *, n_batches: int, back_depth: int, time_decay: float, c_reg: float, **common: Any) -> None:
        super().__init__(**common)
        self.n_batches = n_batches
        self.back_depth = back_depth
        self.time_decay = time_decay
        self.c_reg = c_reg

    def step(self) -> None:
        drawn = self.draw(self.n_batches * self.batch_size)
        edits, equivalents, others = (_split(requests, self.batch_size) for requests in drawn)
        moved = [torch.zeros(n_out, n_in, device=self.model.device) for n_in, n_out in self.networks.sizes]
        trajectory: list[list[Tensor]] = []
        slopes: list[Sequence[Tensor]] = []
        for t in range(self.n_batches):
            with shifted(self.layers, moved):
                shifts = self.shifts(edits[t])
            moved = [(before + shift.detach()).requires_grad_() for before, shift in zip(moved, shifts, strict=True)]
            last = equivalents[max(0, t + 1 - self.back_depth) : t + 1]
            edit_loss, success = self._edit_loss(last, moved)
            locality_loss = self.locality_loss(others[t], moved)
            loss = edit_loss + self.c_loc * locality_loss
            self.check_finite(loss)
            trajectory.append(shifts)
            slopes.append(torch.autograd.grad(loss, moved))
        self.descend(list(chain(*trajectory)), list(chain(*self._returns(trajectory, slopes))))
        self.history.append([float(edit_loss.detach()), success, float(locality_loss.detach())])

    def _edit_loss(self, last: Sequence[Sequence[EditRequest]], moved: Sequence[Tensor]) -> tuple[Tensor, float]:
        """Returns the decayed sum of the losses on the equivalents of the last batches, and the share answered."""
        batch = self.encoded([request for requests in last for request in requests])
        with shifted(self.layers, moved):
            logits = self.model.logits(batch)
        rows = _split(range(len(batch)), self.batch_size)
        losses = [self.model.task.loss(logits[list(some)], batch.rows(some)) for some in rows]
        decayed = (self.time_decay**j * loss for j, loss in enumerate(reversed(losses)))
        return sum(decayed, torch.zeros_like(losses[0])), self.success(logits, batch)

    def _returns(
        self, trajectory: Sequence[Sequence[Tensor]], slopes: Sequence[Sequence[Tensor]]
    ) -> list[list[Tensor]]:
        """Returns the gradient of the sum of all losses with respect to each shift."""
        returns: list[list[Tensor]] = []
        later: Sequence[Tensor] = [torch.zeros_like(slope) for slope in slopes[0]]
        for shifts, slope in zip(reversed(trajectory), reversed(slopes), strict=True):
            later = [total + own for total, own in zip(later, slope, strict=True)]
            returns.append([g + 2 * self.c_reg * s.detach() for g, s in zip(later, shifts, strict=True)])
        return returns[::-1]


def _split(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
