"""The base class of editors with side memories: contexts, irrelevant prompts, undo, state, and what an edit does."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome, ProbedBatch, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import check_linear
from grace_bench.editors._wise.memory import Sharding, SideMemories
from grace_bench.editors._wise.past import PastEdits, Request
from grace_bench.editors._wise.rows import EditRows, encode_rows, greedy_contexts, official_rows
from grace_bench.editors._wise.training import Descent, MemoryTraining, Trained
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.offload import is_offloaded

Irrelevant = Literal["upstream", "locality"]
_MOST_UPSTREAM = 1024
"""Maximum number of upstream prompts; they are a part of every checkpoint."""


class MemoryEditor(EditorStrategy):
    """An editor that trains side memories beside one linear layer.

    Args:
        model: The model to edit.
        sharding: How memories are saved, merged and chosen.
        descent: How they are trained.
        mask_ratio: The share of a memory's entries that its edits train.
        replay: Whether earlier edits are replayed.
        irrelevant: Where irrelevant prompts come from.
        prefix_lengths: The numbers of tokens by which beginnings are continued.
        seed: Seeds masks and the choice of prompts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.
    """

    def __init__(
        self,
        *,
        model: EditableModel,
        sharding: Sharding,
        descent: Descent,
        mask_ratio: float,
        replay: bool,
        irrelevant: Irrelevant,
        prefix_lengths: Sequence[int],
        seed: int,
        plugins: Sequence[BasePlugin],
        evaluator: EvaluationPlugin | None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_linear(model, model.layer_name, self.registered_name)
        if is_offloaded(model.layer):
            raise UserError(
                f"layer={model.layer_name}: its weights are offloaded, where editor '{self.registered_name}' cannot "
                f"copy them; keep them on a device with device_map="
            )
        self.mask_ratio = mask_ratio
        self.replay = replay
        self.irrelevant: Irrelevant = irrelevant
        self.prefix_lengths = list(prefix_lengths)
        self.seed = seed
        self.memories = SideMemories(model, sharding)
        """The side memories."""
        self.past = PastEdits()
        """The edits to replay; none without `replay`."""
        self.contexts: list[str] = []
        """Texts to put before a prompt; the first is empty. Empty before `prepare`."""
        self._descent = descent
        self._upstream: list[str] = []
        self._training: MemoryTraining | None = None
        self.intercept(self._answer)

    # --- before the first edit

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        with self.suspended():
            self.contexts = ["", *greedy_contexts(self.model, self.prefix_lengths)]

    @property
    def needs_upstream_prompts(self) -> bool:
        return self.irrelevant == "upstream"

    @property
    def needs_locality(self) -> bool:
        return self.irrelevant == "locality"

    def read_upstream(self, prompts: Sequence[str]) -> None:
        if not self.needs_upstream_prompts:
            super().read_upstream(prompts)
        if not prompts:
            raise UserError(f"editor '{self.registered_name}' needs at least one upstream prompt")
        chosen = random.Random(self.seed).sample(range(len(prompts)), min(len(prompts), _MOST_UPSTREAM))
        self._upstream = [prompts[index] for index in chosen]

    # --- the contract

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Trains the side memory on each request in order.

        Returns:
            The outcome of the last one.

        Raises:
            EditFailure: If a loss is not finite, or a request has no locality probe where those are asked for.
            UserError: If the editor was not made ready.
        """
        if not self.contexts or (self.needs_upstream_prompts and not self._upstream):
            raise UserError(
                f"editor '{self.registered_name}' must be made ready before its first edit: call prepare()"
                + (" and read_upstream()" if self.needs_upstream_prompts else "")
            )
        outcome = EditOutcome()
        for index, (prompt, target) in enumerate(zip(batch.prompts, batch.targets, strict=True)):
            trained = self.edit_one((prompt, str(target), self._irrelevant_prompt(batch, index)))
            first, last = trained.losses[0][1], trained.losses[-1][1]
            outcome = EditOutcome(loss_first=first, loss=last, loss_after=trained.after, steps=len(trained.losses))
        return outcome

    def edit_one(self, request: Request) -> Trained:
        """Trains the side memory on a prompt with its target and an irrelevant prompt."""
        shard = self.memories.n_edits // self.memories.sharding.save_freq
        self._training = MemoryTraining(
            self.memories, self._descent, self.mask_of(shard), replayed=lambda: self._replayed(request)
        )
        try:
            trained = self._training.run(self.rows(request))
        finally:
            self._training = None
        merged = self.memories.finish(trained.weight, trained.activation)
        if self.replay:
            self.past.add(request, merged=merged)
        return trained

    def rows(self, request: Request) -> EditRows:
        """Returns an edit as the model reads it."""
        encode = official_rows if self.memories.sharding.fidelity == "reference" else encode_rows
        return encode(self.model, *request, self.contexts)

    def mask_of(self, shard: int) -> Tensor:
        """Returns which entries of the weight the edits of a memory train, bool."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + shard)
        weight = self.memories.original
        return (torch.rand(weight.shape, generator=generator) < self.mask_ratio).to(weight.device)

    def choose_present(self, n_edits: int) -> int:
        """Returns the index of the edit to replay, of those since the last merge and the present one."""
        return random.Random(f"{self.seed}/{self.memories.n_edits}/{self.past.turns}").randrange(n_edits)

    def _irrelevant_prompt(self, batch: EditBatch, index: int) -> str:
        if not isinstance(batch, ProbedBatch):
            return random.Random(f"{self.seed}/{self.memories.n_edits}").choice(self._upstream)
        if not batch.locality[index]:
            raise EditFailure("the request has no locality probe, which editor.irrelevant=locality takes")
        return batch.locality[index][0]

    def _replayed(self, request: Request) -> tuple[list[EditRows], list[EditRows]]:
        if not self.past.finished:
            return [], []
        finished = self.past.next_finished()
        present = [*self.past.present, request]
        chosen = present[self.choose_present(len(present))]
        return [self.rows(one) for one in finished], [self.rows(chosen)]

    def _answer(self, call: LayerCall) -> Tensor:
        if self._training is not None:
            return self._training.answer(call)
        if self.memories.sharding.fidelity == "reference" and call.state.step == 0:
            self.memories.merge_for_evaluation()
        return self.memories.answer(call)

    def rollback(self) -> None:
        super().rollback()
        self.memories.clear()
        self.past = PastEdits()

    # --- undoing and saving

    def undo_point(self) -> Callable[[], None]:
        undos, n_edits = (self.memories.undo_point(), self.past.undo_point()), self.n_edits

        def undo() -> None:
            for part in undos:
                part()
            self.n_edits = n_edits

        return undo

    def changing_state(self) -> State:
        # Only what the last edit trained: finished memories are not written again, and are large.
        new = self.memories.new if self.memories.new is not None else next(reversed(self.memories.saved), None)
        return {} if new is None else {"new": new}

    def state_dict(self) -> State:
        state = {**super().state_dict(), **self.memories.state_dict(), **self.past.state_dict()}
        return {**state, "contexts": list(self.contexts), "upstream": list(self._upstream)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.memories.load_state_dict(state)
        self.past.load_state_dict(state)
        self.contexts, self._upstream = list(state["contexts"]), list(state["upstream"])

    def max_extra_parameters(self, n_edits: int) -> int:
        return self.memories.most_numbers(n_edits)
