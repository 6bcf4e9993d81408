"""The base class of editors that train a small network in front of one layer."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grace_bench.common.options import check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._training import EditTraining
from grace_bench.models.editable import EditableModel, LayerCall


class AdaptorStrategy(EditorStrategy):
    """An adaptor that is trained on each edit and changes the layer's output; the model's weights never change.

    The adaptor is built at the first edit, in float32, from a generator seeded by `seed`. Until then, and after a
    rollback, the layer's own output is used.

    Args:
        model: The model to edit.
        n_iter: Maximum number of Adam steps per edit.
        lr: Learning rate of Adam.
        seed: Seeds the adaptor's first weights.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it.
    """

    stops_when_answered = False
    """Whether an edit ends once the model gives the target, rather than after `n_iter` steps."""

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int,
        lr: float,
        seed: int,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_whole("editor.seed", seed, least=0)
        self.n_iter = n_iter
        self.lr = lr
        self.seed = seed
        self.adaptor: nn.Module | None = None
        """The trained network; None before the first edit."""
        self.step: int | None = None
        """The step of the training in progress, from 0; None outside training."""
        self.is_trained = False
        """Whether at least one edit is finished."""
        self._size: tuple[int, ...] = (0, 0)
        self.intercept(self._answer)

    @abstractmethod
    def build(self, n_in: int, n_out: int) -> nn.Module:
        """Returns a new adaptor for a layer of D_in inputs and D_out outputs, drawn from torch's own generator."""

    @abstractmethod
    def respond(self, adaptor: Any, call: LayerCall) -> Tensor:
        """Returns the (B, T, D_out) output of the layer with the adaptor."""

    def penalty(self) -> Tensor | float:
        """Returns the penalty added to the loss of the current step."""
        return 0.0

    def edit(self, batch: EditBatch) -> EditOutcome:
        encoded = batch.encoded
        call = self.model.layer_call(encoded)
        self._size = (call.input.shape[-1], call.output.shape[-1])
        adaptor = self._ready()
        optimizer = torch.optim.Adam(adaptor.parameters(), lr=self.lr)
        training = EditTraining(self.model, encoded, n_iter=self.n_iter, stops_when_answered=self.stops_when_answered)

        def descend(loss: Tensor) -> None:
            assert self.step is not None
            optimizer.zero_grad()
            (loss + self.penalty()).backward()
            optimizer.step()
            self.step += 1

        with self._training():
            training.run(descend)
        self.is_trained = True
        return training.outcome()

    def rollback(self) -> None:
        super().rollback()
        self.adaptor, self.is_trained = None, False

    def state_dict(self) -> State:
        if self.adaptor is None:
            return super().state_dict()
        tensors = self.adaptor.state_dict(prefix="adaptor.")
        return {**super().state_dict(), **tensors, "layer_size": list(self._size)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.adaptor, self.is_trained = None, "layer_size" in state
        if self.is_trained:
            self._size = tuple(state["layer_size"])
            prefix = "adaptor."
            tensors = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            self._ready().load_state_dict(tensors)

    def max_extra_parameters(self, n_edits: int) -> int:
        return self.n_parameters(*self._size) if n_edits else 0

    @abstractmethod
    def n_parameters(self, n_in: int, n_out: int) -> int:
        """Returns the size of the adaptor of a layer of D_in inputs and D_out outputs."""

    def _ready(self) -> nn.Module:
        """Returns the adaptor, built if there is none yet."""
        if self.adaptor is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.adaptor = self.build(*self._size)
            self.adaptor.to(device=self.model.layer_device, dtype=torch.float32).requires_grad_(False)
        return self.adaptor

    @contextmanager
    def _training(self) -> Iterator[None]:
        assert self.adaptor is not None
        self.step = 0
        self.adaptor.requires_grad_(True)
        try:
            yield
        finally:
            self.step = None
            self.adaptor.requires_grad_(False)
            self.adaptor.zero_grad()

    def _answer(self, call: LayerCall) -> Tensor:
        if self.adaptor is None or not (self.is_trained or self.step is not None):
            return call.output
        return self.respond(self.adaptor, call)
