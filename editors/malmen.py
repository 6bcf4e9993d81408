"""MALMEN: Massive Editing for Large Language Models via Meta Learning (Tan et al., ICLR 2024)."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editors._meta.editor import MetaTrainedOnBatches
from grace_bench.editors._meta.gradients import EditTokens, shifted
from grace_bench.editors._meta.networks import AggregatingNetworks
from grace_bench.editors._meta.training import BatchTraining
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("malmen")
class Malmen(MetaTrainedOnBatches):
    """Networks that turn the gradients of many edits into one shift of the weights, trained before the first edit.

    As in MEND, networks map the input u and the gradient δ of each token to another pair. Instead of adding up the
    updates of all tokens, the shift of a weight is the least-squares solution that comes closest to what each update
    alone changes at its own token (Tan et al. 2024, section 4.1). The networks are trained on whole batches.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers whose weights are edited (paper: the last MLPs); None for only the
            model's edited layer.
        tokens: The tokens whose gradients count: those from which the target is predicted (`answer`, as in the paper),
            or all that reach the edit's loss (`all`).
        rank: Rank of the networks' matrices (paper: 1920, on larger models).
        n_blocks: Residual blocks of a network.
        n_steps: Steps of meta-training.
        batch_size: Edits in a step of meta-training, made together.
        lr: Learning rate of Adam in meta-training (published: 1e-5).
        edit_lr: Initial edit learning rate of each layer, which is then learned (published: 1e-6).
        c_loc: Weight of the locality loss in meta-training, beside the edit loss of weight 1.
        max_grad_norm: The largest norm of the networks' gradient in meta-training.
        meta_seed: Seeds meta-training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear or is quantised.
    """

    about = About(
        source="Tan et al., ICLR 2024",
        changes="the layers' weights, by one least-squares update from what networks compute",
        costs="meta-training once; then one pass and its gradient a batch, and a solve a layer",
        choose="for batches of like facts, where requests to train on exist",
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
        n_steps: int = 150,
        batch_size: int = 10,
        lr: float = 1e-3,
        edit_lr: float = 1e-3,
        c_loc: float = 0.6,
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

    def new_training(
        self, networks: AggregatingNetworks, train: Sequence[EditRequest], generator: torch.Generator
    ) -> "Batches":
        return Batches(**self.of_training(networks, train, generator))


class Batches(BatchTraining):
    """Trains networks on batches of edits of the unedited model (Tan et al. 2024, section 4.2).

    The meta-loss of a batch is the edit loss of its equivalents and the locality loss.
    """

    def step(self) -> None:
        edits, equivalents, others = self.draw(self.batch_size)
        shifts = self.shifts(edits)
        trial = [shift.detach().requires_grad_() for shift in shifts]
        equivalent = self.encoded(equivalents)
        with shifted(self.layers, trial):
            answered = self.model.logits(equivalent)
        edit_loss = self.model.task.loss(answered, equivalent)
        locality_loss = self.locality_loss(others, trial)
        loss = edit_loss + self.c_loc * locality_loss
        self.check_finite(loss)
        self.descend(shifts, torch.autograd.grad(loss, trial))
        success = self.success(answered, equivalent)
        self.history.append([float(edit_loss.detach()), success, float(locality_loss.detach())])
