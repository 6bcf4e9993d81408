"""LocFT-BF: breadth-first fine-tuning of one layer on all requests so far (2025)."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from grace_bench.common.options import check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.guard import check_loss
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import trainable
from grace_bench.editors._objectives import GOOD_ENOUGH
from grace_bench.editors._training import check_trainable, repeated_passes
from grace_bench.editors.ft import WeightAdam
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor


@register_editor("ft_bf")
class FineTuneBreadthFirst(EditorStrategy):
    """Fine-tunes the layer's original weights on all requests so far, in minibatches (LocFT-BF, arXiv 2509.22072).

    Each pass over the requests takes at most one step for each of them, and no request is trained to its end before
    the next: "breadth-first" in the paper. The whole training is repeated for each batch of edits.

    A request with the prompt of an earlier one replaces it.

    Args:
        model: The model to edit.
        lr: Learning rate of Adam.
        n_epochs: Maximum number of passes over the requests; training stops after a pass with a mean loss below 0.01.
        batch_size: Requests in a step; a step is skipped where its loss is below 0.01.
        seed: Decides which requests share a step, and the order of steps.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer has no weights.
    """

    about = About(
        source="LocFT-BF, ICLR 2026 (arXiv 2509.22072)",
        changes="the layer's weights, retrained from the unedited ones",
        costs="up to `n_epochs` passes from the layer on over all requests so far, a batch of edits",
        choose="if requests may be stored, and come in large batches",
    )
    edits_together = True
    needs_replay = True
    freezes_weights = False
    search_space: ClassVar = {"lr": (0.0005, 0.0001, 0.001, 0.002, 0.005, 0.01)}

    def __init__(
        self,
        *,
        model: EditableModel,
        lr: float = 5e-4,
        n_epochs: int = 25,
        batch_size: int = 100,
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_positive("editor.lr", lr)
        check_whole("editor.n_epochs", n_epochs, least=1)
        check_whole("editor.batch_size", batch_size, least=1)
        check_whole("editor.seed", seed, least=0)
        check_trainable(model)
        self.lr = lr
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.seed = seed
        self._requests: dict[tuple[str | int, ...], tuple[str, str | int]] = {}

    @property
    def requests(self) -> list[tuple[str, str | int]]:
        """Prompts and targets of the requests so far, without those that were replaced."""
        return list(self._requests.values())

    def edit(self, batch: EditBatch) -> EditOutcome:
        for prompt, target in zip(batch.prompts, batch.targets, strict=True):
            self._remember(prompt, target)
        return self._retrain()

    def _remember(self, prompt: str, target: str | int) -> None:
        # Running text has no prompt that could be asked again.
        key = (prompt,) if prompt.strip() else (prompt, target)
        self._requests.pop(key, None)
        self._requests[key] = (prompt, target)

    def _retrain(self) -> EditOutcome:
        """Fine-tunes the original weights on all requests."""
        self.restore_weights()
        requests = self.requests
        draws = random.Random(f"{self.seed}/{len(requests)}")
        draws.shuffle(requests)
        chunks = [requests[start : start + self.batch_size] for start in range(0, len(requests), self.batch_size)]
        encoded = (self.model.encode_batch(*map(list, zip(*chunk, strict=True))) for chunk in chunks)
        minibatches = list(repeated_passes(self.model, encoded))
        means: list[float] = []
        n_steps = 0
        with trainable(self.model.layer.parameters()) as parameters:
            optimizer = WeightAdam(parameters, lr=self.lr)
            while len(means) < self.n_epochs and (not means or means[-1] >= GOOD_ENOUGH):
                draws.shuffle(minibatches)
                total = 0.0
                for repeated in minibatches:
                    loss = self.model.task.loss(repeated(), repeated.batch)
                    value = float(loss.detach())
                    check_loss(value, n_steps)
                    total += value * len(repeated.batch)
                    if value >= GOOD_ENOUGH:
                        optimizer.step(loss)
                        n_steps += 1
                means.append(total / len(requests))
        return EditOutcome(loss_first=means[0], loss=means[-1], steps=n_steps)

    def rollback(self) -> None:
        super().rollback()
        self._requests = {}

    def state_dict(self) -> State:
        return {**super().state_dict(), "requests": [list(pair) for pair in self.requests]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._requests = {}
        for prompt, target in state["requests"]:
            self._remember(prompt, target)
