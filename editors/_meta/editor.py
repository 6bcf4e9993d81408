"""The base classes of editors whose updates of weights are computed by networks, trained before the first edit."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

from grace_bench.common.options import check_choice, check_positive, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.artifacts import content_key, load_artifact, requests_key, save_artifact
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import check_linear
from grace_bench.editors._meta.gradients import EditTokens, linear_size, seen_gradients
from grace_bench.editors._meta.networks import AggregatingNetworks, EditorNetworks
from grace_bench.editors._meta.training import MetaTraining
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

Networks = TypeVar("Networks", bound=nn.Module)
Updaters = TypeVar("Updaters", bound=EditorNetworks)


class MetaTrainedEditor(EditorStrategy, Generic[Networks]):
    """Has networks that are trained once for a model, requests and settings, before the first edit.

    A subclass makes its networks and their training, and edits with `trained`.

    Args:
        model: The model to edit.
        n_steps: Steps of meta-training.
        batch_size: Edits in a batch of meta-training.
        lr: Learning rate of Adam in meta-training.
        meta_seed: Seeds meta-training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Attributes:
        version: The version of meta-training: networks of another version are not used.
        least_n_steps: The least number of steps.

    Raises:
        UserError: If a number is out of range, naming it.
    """

    needs_meta_training = True
    version: ClassVar[int] = 1
    least_n_steps: ClassVar[int] = 1

    def __init__(
        self,
        *,
        model: EditableModel,
        n_steps: int,
        batch_size: int,
        lr: float,
        meta_seed: int,
        plugins: Sequence[BasePlugin],
        evaluator: EvaluationPlugin | None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_steps", n_steps, least=self.least_n_steps)
        check_whole("editor.batch_size", batch_size, least=1)
        check_positive("editor.lr", lr)
        check_whole("editor.meta_seed", meta_seed, least=0)
        self.n_steps = n_steps
        self.batch_size = batch_size
        self.lr = lr
        self.meta_seed = meta_seed
        self.networks: Networks | None = None
        """The trained networks; None until they are prepared or meta-trained."""

    @abstractmethod
    def new_networks(self, generator: torch.Generator) -> Networks:
        """Makes untrained networks, whose first weights a generator draws."""

    @abstractmethod
    def new_training(
        self, networks: Networks, train: Sequence[EditRequest], generator: torch.Generator
    ) -> MetaTraining[Networks]:
        """Makes the meta-training of networks on the unedited model.

        Raises:
            UserError: If the requests are all about one fact.
        """

    def use(self, networks: Networks) -> None:
        """Edits with networks from now on."""
        self.networks = networks.requires_grad_(False)

    def stored(self, networks: Networks) -> dict[str, Tensor]:
        """Returns the weights of trained networks as they are cached: matrices as bfloat16, the rest as it is."""
        # Half the size, and more digits than what they were trained on says. Statistics of gradients keep theirs.
        weights = networks.state_dict()
        return {name: weight.bfloat16() if weight.ndim == 2 else weight for name, weight in weights.items()}

    def meta_settings(self) -> dict[str, Any]:
        """Returns the settings that meta-training depends on."""
        return self.settings()

    @property
    def place(self) -> str:
        """What the networks are trained for beside the model, for messages."""
        return ""

    @property
    def trained(self) -> Networks:
        """The trained networks.

        Raises:
            UserError: If there are none yet.
        """
        if self.networks is None:
            raise self._untrained()
        return self.networks

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        with self.suspended():
            found = load_artifact(self.registered_name, self._key(train))
        if found is None:
            raise self._untrained()
        self._adopt(found[0])

    def meta_train(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> dict[str, float]:
        """Trains the editor networks on edits of the unedited model and saves them as an artifact.

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

    def changing_state(self) -> State:
        return self.weights_state()

    def state_dict(self) -> State:
        networks = {} if self.networks is None else self.networks.state_dict()
        return {**super().state_dict(), **{f"networks.{name}": tensor for name, tensor in networks.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        networks = {name.removeprefix("networks."): state[name] for name in state if name.startswith("networks.")}
        if networks:
            self._adopt(networks)

    def _adopt(self, trained: Mapping[str, Tensor]) -> None:
        networks = self.new_networks(torch.Generator()).to(self.model.device)
        networks.load_state_dict(dict(trained))
        self.use(networks)

    def _key(self, train: Sequence[EditRequest]) -> str:
        """Returns a digest of all that decides meta-training; the model must be unedited."""
        task = self.model.task
        # Included only if there are any, so that networks trained without them keep their cache key.
        limits = {"max_input_tokens": task.max_input_tokens, "max_target_tokens": task.max_target_tokens}
        cuts = [f"{name}={limit}" for name, limit in limits.items() if limit is not None]
        cuts += [f"{name}={value}" for name, value in task.format.changed().items()]
        return content_key(
            version=self.version,
            model=self.model.fingerprint,
            task=[task.name, task.query, task.prefix_length, task.max_new_tokens, *cuts],
            train=requests_key(train),
            settings=self.meta_settings(),
        )

    def _untrained(self) -> UserError:
        return UserError(
            f"editor '{self.registered_name}' has not been meta-trained for this model, {self.place}"
            f"training data and these settings: run `grace-bench meta-train` with the same options first"
        )

    def _meta_train(self, key: str, train: Sequence[EditRequest], progress: Progress | None) -> None:
        """Trains networks, resuming an interrupted training, and saves them."""
        generator = torch.Generator().manual_seed(self.meta_seed)
        networks = self.new_networks(generator).to(self.model.device)
        training = self.new_training(networks, train, generator)
        seconds = training.run(self.n_steps, name=self.registered_name, key=key, progress=progress)
        figures = {**training.figures(), "n_steps": self.n_steps, "seconds": seconds}
        notes = {"figures": json.dumps(figures), "settings": json.dumps(self.settings()), "model": self.model.name}
        save_artifact(self.registered_name, key, self.stored(networks), notes)
        training.forget(name=self.registered_name, key=key)


class MetaTrained(MetaTrainedEditor[Updaters]):
    """Computes updates of weights by networks that are trained once for a model, layers, requests and settings.

    A subclass makes its networks and their training, and edits with `trained`.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers whose weights are edited; None for only the model's edited layer.
        rank: Rank of the networks' matrices.
        n_steps: Steps of meta-training.
        batch_size: Edits in a batch of meta-training.
        lr: Learning rate of Adam in meta-training.
        edit_lr: Initial edit learning rate of each layer, which is then learned.
        c_loc: Weight of the locality loss in meta-training.
        meta_seed: Seeds meta-training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range or a layer is not linear, naming it.
    """

    freezes_weights = False
    layer_kind = "several"

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None,
        rank: int,
        n_steps: int,
        batch_size: int,
        lr: float,
        edit_lr: float,
        c_loc: float,
        meta_seed: int,
        plugins: Sequence[BasePlugin],
        evaluator: EvaluationPlugin | None,
    ) -> None:
        super().__init__(
            model=model,
            n_steps=n_steps,
            batch_size=batch_size,
            lr=lr,
            meta_seed=meta_seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_whole("editor.rank", rank, least=1)
        for name, number in (("edit_lr", edit_lr), ("c_loc", c_loc)):
            check_positive(f"editor.{name}", number)
        if isinstance(layers, str) or (layers is not None and not layers):
            raise UserError(f"editor.layers={layers} should be a list of dotted paths, or null")
        self.layers = None if layers is None else list(layers)
        self.rank = rank
        self.edit_lr = edit_lr
        self.c_loc = c_loc
        self.linear = {path: model.find_layer(path) for path in self.layers or [model.layer_name]}
        """The edited layers, by dotted path."""
        self.sizes = [linear_size(path, module) for path, module in self.linear.items()]
        """D_in and D_out of each layer."""
        for path in self.linear:
            self.rewrite(path)

    def meta_settings(self) -> dict[str, Any]:
        return {**self.settings(), "layers": list(self.linear)}

    @property
    def place(self) -> str:
        return f"{', '.join(self.linear)}, "


class MetaTrainedOnBatches(MetaTrained[AggregatingNetworks]):
    """Makes the edits of a batch by one shift of each weight, which networks compute (Tan et al., ICLR 2024).

    The networks see the gradients of the model as edited so far.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers whose weights are edited; None for only the model's edited layer.
        tokens: The positions whose gradients the networks see.
        rank: Rank of the networks' matrices.
        n_blocks: Residual blocks of a network.
        n_steps: Steps of meta-training.
        batch_size: Edits in a batch of meta-training.
        lr: Learning rate of Adam in meta-training.
        edit_lr: Initial edit learning rate of each layer, which is then learned.
        c_loc: Weight of the locality loss in meta-training.
        max_grad_norm: The largest norm of the networks' gradient in meta-training.
        meta_seed: Seeds meta-training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear or is quantised.
    """

    edits_together = True

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None,
        tokens: EditTokens,
        rank: int,
        n_blocks: int,
        n_steps: int,
        batch_size: int,
        lr: float,
        edit_lr: float,
        c_loc: float,
        max_grad_norm: float,
        meta_seed: int,
        plugins: Sequence[BasePlugin],
        evaluator: EvaluationPlugin | None,
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
        for path in self.linear:
            check_linear(model, path, self.registered_name, option="layer" if self.layers is None else "editor.layers")
        check_choice("editor.tokens", tokens, get_args(EditTokens))
        check_whole("editor.n_blocks", n_blocks, least=1)
        check_positive("editor.max_grad_norm", max_grad_norm)
        self.tokens = tokens
        self.n_blocks = n_blocks
        self.max_grad_norm = max_grad_norm

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Adds the shifts that the networks compute for all requests together."""
        networks, task, encoded = self.trained, self.model.task, batch.encoded
        logits, gradients = seen_gradients(self.model, self.linear, encoded, self.tokens)
        with torch.no_grad():
            for path, shift in zip(self.linear, networks.shifts(gradients), strict=True):
                self.add_to_weight(path, shift)
            after = float(task.loss(self.model.logits(encoded), encoded))
        return EditOutcome(loss_first=float(task.loss(logits, encoded)), loss=after, loss_after=after, steps=1)

    def new_networks(self, generator: torch.Generator) -> AggregatingNetworks:
        return AggregatingNetworks(
            self.sizes, rank=self.rank, edit_lr=self.edit_lr, generator=generator, n_blocks=self.n_blocks
        )

    def of_training(
        self, networks: AggregatingNetworks, train: Sequence[EditRequest], generator: torch.Generator
    ) -> dict[str, Any]:
        """Returns the arguments of `BatchTraining`."""
        return {
            "model": self.model,
            "layers": self.linear,
            "networks": networks,
            "tokens": self.tokens,
            "train": train,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "c_loc": self.c_loc,
            "max_grad_norm": self.max_grad_norm,
            "generator": generator,
        }
