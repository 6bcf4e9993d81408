"""The part of SERAC that is trained: its options, how the networks are made, trained and put to use."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch

from grace_bench.common.options import check_choice, check_flag, check_text, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editors._meta.editor import MetaTrainedEditor
from grace_bench.editors._meta.training import MetaTraining
from grace_bench.editors._serac.memory import EditMemory
from grace_bench.editors._serac.networks import (
    HEAD,
    Distance,
    ScopeClassifier,
    SeracNetworks,
    content_of_folder,
    delegate_of,
    distances,
    load_classifier,
    load_counterfactual,
    new_classifier,
    new_counterfactual,
)
from grace_bench.editors._serac.training import SeracTraining
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.network import Network
from grace_bench.models.tokenizers import load_tokenizer

Fidelity = Literal["strict", "reference"]
_AT_INFERENCE = ("threshold", "mixing")


class ScopeAndCounterfactual(MetaTrainedEditor[SeracNetworks]):
    """Has a scope classifier and a counterfactual model; `Serac` documents the arguments.

    Attributes:
        scope: Embeds texts by the classifier.
        delegate: The counterfactual model, as the network that answers.
    """

    least_n_steps = 0
    scope: ScopeClassifier
    delegate: Network

    def __init__(
        self,
        *,
        model: EditableModel,
        classifier: str | None,
        counterfactual: str | None,
        width: int,
        n_layers: int,
        distance: Distance,
        dist_heads: int,
        bound_embeds: bool,
        fidelity: Fidelity,
        n_steps: int,
        batch_size: int,
        lr: float,
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
        check_text("editor.classifier", classifier, optional=True)
        check_text("editor.counterfactual", counterfactual, optional=True)
        for name, count in (("width", width), ("n_layers", n_layers), ("dist_heads", dist_heads)):
            check_whole(f"editor.{name}", count, least=1)
        check_choice("editor.distance", distance, get_args(Distance))
        check_choice("editor.fidelity", fidelity, get_args(Fidelity))
        check_flag("editor.bound_embeds", bound_embeds)
        if width % HEAD:
            raise UserError(f"editor.width={width} should be a multiple of {HEAD}")
        if not n_steps and None in (classifier, counterfactual):
            raise UserError("editor.n_steps=0 needs trained networks: see editor.classifier and editor.counterfactual")
        self.classifier = classifier
        self.counterfactual = counterfactual
        self.width = width
        self.n_layers = n_layers
        self.distance: Distance = distance
        self.dist_heads = dist_heads
        self.bound_embeds = bound_embeds
        self.fidelity: Fidelity = fidelity
        self.memory: EditMemory | None = None
        """All edits; None without trained networks."""

    @abstractmethod
    def in_context(self, prompt: str, target: str, question: str) -> str:
        """Returns what the counterfactual model reads: an edit, and a question behind it."""

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        if self.n_steps:
            super().prepare(train, progress=progress)
        else:
            self.use(self.new_networks(torch.Generator()))

    def meta_train(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> dict[str, float]:
        if not self.n_steps:
            raise UserError("editor.n_steps=0: there is nothing to train")
        return super().meta_train(train, progress=progress)

    def new_networks(self, generator: torch.Generator) -> SeracNetworks:
        seed = int(torch.randint(2**31, (), generator=generator))
        sizes = {"width": self.width, "n_layers": self.n_layers}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = SeracNetworks(
                load_classifier(self.classifier) if self.classifier else new_classifier(self.model, **sizes),
                load_counterfactual(self.counterfactual, self.model)
                if self.counterfactual
                else new_counterfactual(self.model, **sizes),
            )
        return networks.to(self.model.device)

    def use(self, networks: SeracNetworks) -> None:
        super().use(networks)
        self.scope = self._scope_of(networks)
        self.delegate = delegate_of(self.model, networks.counterfactual)
        with torch.no_grad():
            embedded_width = self.scope(["a"]).shape[1]
        if embedded_width % self.dist_heads:
            raise UserError(f"editor.dist_heads={self.dist_heads} does not divide embeddings of {embedded_width}")
        self.memory = EditMemory(
            embedded_width,
            device=self.model.device,
            distance=self.distance,
            heads=self.dist_heads,
            bound=self.bound_embeds,
        )

    def _scope_of(self, networks: SeracNetworks) -> ScopeClassifier:
        tokenizer = load_tokenizer(self.classifier) if self.classifier else self.model.tokenizer
        parses = self.fidelity == "reference"
        return ScopeClassifier(networks.classifier, tokenizer, device=self.model.device, parses=parses)

    def new_training(
        self, networks: SeracNetworks, train: Sequence[EditRequest], generator: torch.Generator
    ) -> MetaTraining[SeracNetworks]:
        return SeracTraining(
            model=self.model,
            networks=networks,
            counterfactual=delegate_of(self.model, networks.counterfactual),
            embed=self._scope_of(networks),
            apart=partial(distances, kind=self.distance, heads=self.dist_heads, bound=self.bound_embeds),
            in_context=self.in_context,
            train=train,
            batch_size=self.batch_size,
            lr=self.lr,
            generator=generator,
        )

    def meta_settings(self) -> dict[str, Any]:
        settings = {name: value for name, value in self.settings().items() if name not in _AT_INFERENCE}
        for name in ("classifier", "counterfactual"):
            if settings[name] is not None:
                settings[name] = content_of_folder(settings[name])
        return settings
