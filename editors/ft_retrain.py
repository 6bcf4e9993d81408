"""Fine-tuning with periodic retraining on the edits so far."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from grace_bench.common.options import check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.weights import trainable
from grace_bench.editors.ft import FineTune, WeightAdam
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch
from grace_bench.registry import register_editor


@register_editor("ft_retrain")
class FineTuneRetrain(FineTune):
    """Fine-tunes on each edit and retrains from the original weights on the edits so far (Hartvigsen et al. 2023).

    The edits are remembered up to `memory_size`; beyond it the memory is a uniform sample of all edits (reservoir
    sampling, Vitter 1985).

    Args:
        model: The model to edit.
        n_iter: Maximum number of Adam steps per edit.
        lr: Learning rate of Adam.
        retrain_every: Retrain after every so many edits (GRACE paper: 50).
        memory_size: Maximum number of remembered edits.
        n_epochs: Maximum number of passes over the memory in a retraining; it stops once every edit is answered.
        batch_size: Edits in a step of retraining.
        seed: Seeds the reservoir and the order of retraining.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer has no weights.
    """

    about = About(
        source="Hartvigsen et al. 2023, section 4.1",
        changes="the layer's weights, retrained from the unedited ones",
        costs="as `ft`, and every `retrain_every` edits passes over all that it stores",
        choose="if edits may be stored and retrained at night",
    )
    needs_replay = True
    search_space: ClassVar = {"lr": (0.01, 0.003, 0.001, 0.0003, 0.0001, 3e-05)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 1e-2,
        retrain_every: int = 50,
        memory_size: int = 1000,
        n_epochs: int = 100,
        batch_size: int = 16,
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, n_iter=n_iter, lr=lr, plugins=plugins, evaluator=evaluator)
        sizes = {
            "retrain_every": retrain_every,
            "memory_size": memory_size,
            "n_epochs": n_epochs,
            "batch_size": batch_size,
        }
        for name, value in sizes.items():
            check_whole(f"editor.{name}", value, least=1)
        check_whole("editor.seed", seed, least=0)
        self.retrain_every = retrain_every
        self.memory_size = memory_size
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.seed = seed
        self.memory: list[tuple[str, str | int]] = []
        """The remembered edits: prompts with their targets."""
        self._n_seen = 0

    def edit(self, batch: EditBatch) -> EditOutcome:
        outcome = super().edit(batch)
        n_before = self._n_seen
        for prompt, target in zip(batch.prompts, batch.targets, strict=True):
            self._remember(prompt, target)
        if n_before // self.retrain_every == self._n_seen // self.retrain_every:
            return outcome
        return replace(outcome, loss_after=None, steps=outcome.steps + self._retrain())

    def _remember(self, prompt: str, target: str | int) -> None:
        self._n_seen += 1
        if len(self.memory) < self.memory_size:
            self.memory.append((prompt, target))
            return
        # Every edit has its own generator, so that a resumed run draws the same numbers.
        place = random.Random(f"{self.seed}/{self._n_seen}").randrange(self._n_seen)
        if place < self.memory_size:
            self.memory[place] = (prompt, target)

    def _retrain(self) -> int:
        """Fine-tunes the original weights on the memory and returns the number of steps."""
        self.restore_weights()
        steps = 0
        with trainable(self.model.layer.parameters()) as parameters:
            optimizer = WeightAdam(parameters, lr=self.lr)
            for epoch in range(self.n_epochs):
                knows_all = True
                for encoded in self._shuffled(epoch):
                    logits, labelled = self.model.labelled_logits(encoded)
                    if not self.model.task.answered(logits, labelled):
                        knows_all = False
                    loss = self.model.task.loss(logits, labelled)
                    if not bool(loss.isfinite()):
                        raise EditFailure(f"the loss is {float(loss)} after {steps} steps of retraining")
                    optimizer.step(loss)
                    steps += 1
                if knows_all:
                    break
        return steps

    def _shuffled(self, epoch: int) -> Iterator[EncodedBatch]:
        order = list(self.memory)
        random.Random(f"{self.seed}/{self._n_seen}/{epoch}").shuffle(order)
        for start in range(0, len(order), self.batch_size):
            prompts, targets = zip(*order[start : start + self.batch_size], strict=True)
            yield self.model.encode_batch(prompts, targets)

    def rollback(self) -> None:
        super().rollback()
        self.memory, self._n_seen = [], 0

    def state_dict(self) -> State:
        return {**super().state_dict(), "memory": [list(pair) for pair in self.memory], "n_seen": self._n_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.memory = [(prompt, target) for prompt, target in state["memory"]]
        self._n_seen = int(state["n_seen"])
