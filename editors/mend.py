"""MEND: Fast Model Editing at Scale (Mitchell et al., ICLR 2022)."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.common.options import check_positive
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editors._meta.editor import MetaTrained
from grace_bench.editors._meta.gradients import edit_gradients, updated
from grace_bench.editors._meta.networks import EditorNetworks
from grace_bench.editors._meta.training import MetaTraining, divergence
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("mend")
class Mend(MetaTrained[EditorNetworks]):
    """Networks that turn an edit's gradient into an update of the weights, trained before the first edit.

    The gradient at a linear layer is a sum of outer products δ uᵀ over tokens (Mitchell et al. 2022, section 3); the
    networks map each pair (u, δ) to another. They are trained so that one update makes the model answer other wordings
    of the edit and preserves its predictions for other inputs.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers whose weights are edited (paper: the last MLPs); None for only the
            model's edited layer.
        rank: Rank of the networks' matrices.
        n_steps: Steps of meta-training.
        batch_size: Edits in a step of meta-training, each made on its own.
        lr: Learning rate of Adam in meta-training.
        edit_lr: Initial edit learning rate of each layer, which is then learned (paper: 1e-4, on larger models).
        c_edit: Weight of the edit loss in meta-training (paper: 0.1).
        c_loc: Weight of the locality loss in meta-training (paper: 1).
        meta_seed: Seeds meta-training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range or a layer is not linear, naming it.
    """

    about = About(
        source="Mitchell et al., ICLR 2022",
        changes="the layers' weights, by an update that networks compute",
        costs="meta-training once; then one pass and its gradient an edit",
        choose="if edits are few and must be instant",
    )
    # Mitchell et al. 2022, section 5: several of the last feed-forward maps together.
    layer_kind = "several"
    search_space: ClassVar = {"c_edit": (0.1, 0.3, 1.0), "edit_lr": (0.001, 0.01)}

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        rank: int = 64,
        n_steps: int = 1000,
        batch_size: int = 8,
        lr: float = 1e-3,
        edit_lr: float = 1e-3,
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        meta_seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(
            model=model,
            layers=layers,
            rank=rank,
            n_steps=n_steps,
            batch_size=batch_size,
            lr=lr,
            edit_lr=edit_lr,
            c_loc=c_loc,
            meta_seed=meta_seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_positive("editor.c_edit", c_edit)
        self.c_edit = c_edit

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Adds the update of every request, computed from the same weights, at once."""
        networks, task, encoded = self.trained, self.model.task, batch.encoded
        logits, gradients = edit_gradients(self.model, self.linear, encoded)
        with torch.no_grad():
            changes = [update.total() for update in networks(gradients)]
            if not all(bool(change.isfinite().all()) for change in changes):
                raise EditFailure("the update of the weights is not finite")
            for module, change in zip(self.linear.values(), changes, strict=True):
                _add_to_weight(module, change)
            after = float(task.loss(self.model.logits(encoded), encoded))
        return EditOutcome(loss_first=float(task.loss(logits, encoded)), loss=after, loss_after=after, steps=1)

    def new_networks(self, generator: torch.Generator) -> EditorNetworks:
        return EditorNetworks(self.sizes, rank=self.rank, edit_lr=self.edit_lr, generator=generator)

    def new_training(
        self, networks: EditorNetworks, train: Sequence[EditRequest], generator: torch.Generator
    ) -> MetaTraining[EditorNetworks]:
        return SingleEdits(
            model=self.model,
            layers=self.linear,
            networks=networks,
            train=train,
            batch_size=self.batch_size,
            lr=self.lr,
            c_edit=self.c_edit,
            c_loc=self.c_loc,
            generator=generator,
        )


class SingleEdits(MetaTraining[EditorNetworks]):
    """Trains editor networks on single edits (Mitchell et al. 2022, section 3.2).

    Args:
        model: The unedited model.
        layers: The edited linear layers, by dotted path.
        networks: The networks to train, on the model's device.
        train: The requests to learn from.
        batch_size: Edits in a step, each made on its own.
        lr: Learning rate of Adam.
        c_edit: Weight of the edit loss.
        c_loc: Weight of the locality loss.
        generator: Draws the examples.

    Raises:
        UserError: If the requests are all about one fact.
    """

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: dict[str, nn.Module],
        networks: EditorNetworks,
        train: Sequence[EditRequest],
        batch_size: int,
        lr: float,
        c_edit: float,
        c_loc: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(model=model, networks=networks, train=train, lr=lr, generator=generator)
        self.layers = layers
        self.batch_size = batch_size
        self.c_edit = c_edit
        self.c_loc = c_loc

    def step(self) -> None:
        edits, equivalents, others = zip(*(self._draw() for _ in range(self.batch_size)), strict=True)
        _, gradients = edit_gradients(self.model, self.layers, self.encoded(edits))
        self.networks.observe(gradients)
        equivalent, other = self.encoded(equivalents), self.encoded(others)
        with torch.no_grad():
            unedited = self.model.logits(other)
        with updated(self.layers, self.networks(gradients)):
            answered, kept = self.model.logits(equivalent), self.model.logits(other)
        edit_loss = self.model.task.loss(answered, equivalent)
        locality_loss = divergence(unedited, kept, other)
        loss = self.c_edit * edit_loss + self.c_loc * locality_loss
        self.check_finite(loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        success = self.success(answered, equivalent)
        self.history.append([float(edit_loss.detach()), success, float(locality_loss.detach())])

    def _draw(self) -> tuple[EditRequest, EditRequest, EditRequest]:
        """Draws an edit, an equivalent and a request about another fact."""
        edit = other = self.one_of(self.train)
        while other.fact_id == edit.fact_id:
            other = self.one_of(self.train)
        return edit, self.one_of(self.equivalents(edit)), other


def _add_to_weight(module: nn.Module, change: Tensor) -> None:
    """Adds a (D_out, D_in) change to a linear layer's weight, in float32 before it is rounded."""
    weight: Any = module.weight
    change = change.to(weight.device)
    weight.data.copy_(weight.data.float() + (change.T if isinstance(module, Conv1D) else change))
