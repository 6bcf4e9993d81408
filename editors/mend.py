"""MEND: Fast Model Editing at Scale (Mitchell et al., ICLR 2022)."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_positive, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import content_key, load_artifact, requests_key, save_artifact
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._mend_networks import EditorNetworks, add_to_weight, edit_gradients, linear_size
from grace_bench.editors._mend_training import MetaTraining
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor

_VERSION = 1
"""The version of meta-training: networks of another version are not used."""


@register_editor("mend")
class Mend(EditorStrategy):
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
    freezes_weights = False
    needs_meta_training = True
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
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        for name, count in (("rank", rank), ("n_steps", n_steps), ("batch_size", batch_size)):
            check_whole(f"editor.{name}", count, least=1)
        for name, number in (("lr", lr), ("edit_lr", edit_lr), ("c_edit", c_edit), ("c_loc", c_loc)):
            check_positive(f"editor.{name}", number)
        check_whole("editor.meta_seed", meta_seed, least=0)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise UserError(f"editor.layers={layers} should be a list of dotted paths, or null")
        self.layers = None if layers is None else list(layers)
        self.rank = rank
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.lr = lr
        self.edit_lr = edit_lr
        self.c_edit = c_edit
        self.c_loc = c_loc
        self.meta_seed = meta_seed
        self.networks: EditorNetworks | None = None
        """The trained editor networks; None until they are prepared or meta-trained."""
        self._linear = {path: model.find_layer(path) for path in self.layers or [model.layer_name]}
        self._sizes = [linear_size(path, module) for path, module in self._linear.items()]
        for path in self._linear:
            self.rewrite(path)

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        with self.suspended():
            found = load_artifact(self.registered_name, self._key(train))
        if found is None:
            raise self._untrained()
        self._adopt(found[0])

    def meta_train(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> dict[str, float]:
        """Trains the editor networks on single edits of the unedited model and saves them as an artifact.

        An edit's equivalent is one of its rephrases or another request about the same fact, or else the edit itself.
        Locality is the KL divergence from the unedited model's predictions to the edited model's, at the labelled
        positions of a request about another fact.

        Returns:
            Mean losses and success over the first and the last steps, the number of steps, and their duration in
            seconds.

        Raises:
            UserError: If the requests are all about one fact, or training diverges.
        """
        with self.suspended():
            key = self._key(train)
            found = load_artifact(self.registered_name, key)
            if found is None:
                self._meta_train(key, train, progress)
                found = load_artifact(self.registered_name, key)
        assert found is not None
        self._adopt(found[0])
        figures: dict[str, float] = json.loads(found[1]["figures"])
        return figures

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Adds the update of every request, computed from the same weights, at once."""
        if self.networks is None:
            raise self._untrained()
        task, encoded = self.model.task, batch.encoded
        logits, gradients = edit_gradients(self.model, self._linear, encoded)
        with torch.no_grad():
            changes = [update.total() for update in self.networks(gradients)]
            if not all(bool(change.isfinite().all()) for change in changes):
                raise EditFailure("the update of the weights is not finite")
            for module, change in zip(self._linear.values(), changes, strict=True):
                add_to_weight(module, change)
            after = float(task.loss(self.model.logits(encoded), encoded))
        return EditOutcome(loss_first=float(task.loss(logits, encoded)), loss=after, loss_after=after, steps=1)

    def changing_state(self) -> State:
        return EditorStrategy.state_dict(self)

    def state_dict(self) -> State:
        networks = {} if self.networks is None else self.networks.state_dict()
        return {**super().state_dict(), **{f"networks.{name}": tensor for name, tensor in networks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        networks = {name.removeprefix("networks."): state[name] for name in state if name.startswith("networks.")}
        if networks:
            self._adopt(networks)

    def _new_networks(self, generator: torch.Generator) -> EditorNetworks:
        return EditorNetworks(self._sizes, rank=self.rank, edit_lr=self.edit_lr, generator=generator).to(
            self.model.device
        )

    def _adopt(self, trained: Mapping[str, Tensor]) -> None:
        networks = self._new_networks(torch.Generator())
        networks.load_state_dict(dict(trained))
        self.networks = networks.requires_grad_(False)

    def _key(self, train: Sequence[EditRequest]) -> str:
        """Returns a digest of all that decides meta-training; the model must be unedited."""
        task = self.model.task
        # Included only if there are any, so that networks trained without them keep their cache key.
        limits = {"max_input_tokens": task.max_input_tokens, "max_target_tokens": task.max_target_tokens}
        cuts = [f"{name}={limit}" for name, limit in limits.items() if limit is not None]
        cuts += [f"{name}={value}" for name, value in task.format.changed().items()]
        return content_key(
            version=_VERSION,
            model=self.model.fingerprint,
            task=[task.name, task.query, task.prefix_length, task.max_new_tokens, *cuts],
            train=requests_key(train),
            settings={**self.settings(), "layers": list(self._linear)},
        )

    def _untrained(self) -> UserError:
        return UserError(
            f"editor '{self.registered_name}' has not been meta-trained for this model, {', '.join(self._linear)}, "
            f"training data and these settings: run `grace-bench meta-train` with the same options first"
        )

    def _meta_train(self, key: str, train: Sequence[EditRequest], progress: Progress | None) -> None:
        """Trains networks, resuming an interrupted training, and saves them."""
        generator = torch.Generator().manual_seed(self.meta_seed)
        networks = self._new_networks(generator)
        training = MetaTraining(
            model=self.model,
            layers=self._linear,
            networks=networks,
            train=train,
            batch_size=self.batch_size,
            lr=self.lr,
            c_edit=self.c_edit,
            c_loc=self.c_loc,
            generator=generator,
        )
        seconds = training.run(self.n_steps, name=self.registered_name, key=key, progress=progress)
        figures = {**training.figures(), "n_steps": self.n_steps, "seconds": seconds}
        notes = {"figures": json.dumps(figures), "settings": json.dumps(self.settings()), "model": self.model.name}
        save_artifact(self.registered_name, key, networks.state_dict(), notes)
        training.forget(name=self.registered_name, key=key)
