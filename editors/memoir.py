"""MEMOIR: lifelong editing with minimal overwrite and informed retention (Wang et al., NeurIPS 2025)."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from grace_bench.common.options import check_positive, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, NamedEdit, State
from grace_bench.editing.running_text import sampled_running_text
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._linear import size_of
from grace_bench.editors._memoir.masks import Masks
from grace_bench.editors._memoir.memory import ResidualMemory
from grace_bench.editors._prefixes import behind, check_prefixes, sample_contexts
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.registry import register_editor

_SHARE_MARKED = 4096 / 14336
"""The authors mark 4,096 of the 14,336 inputs of Llama 3's down projections."""
_BACKGROUND_TOKENS = 16


@register_editor("memoir")
class Memoir(EditorStrategy):
    """A residual memory beside one down projection, of which each edit trains a sparse part.

    The layer gives W_0 a + W_m (mask * a), where W_m starts at zero. A prompt's feature is the mean of a over its
    tokens, less the mean of such features over background prompts; its mask marks where a fixed permutation sends the
    largest entries of the feature. A prompt uses the stored mask that has the most in common with its own, if that is
    at least a share tau, for its tokens and all that are generated after it; otherwise the memory is off.

    Args:
        model: The model to edit.
        top_k: The number of inputs that a mask marks; None for 2/7 of them, the authors' share.
        tau: The least share of a mask that a prompt has in common with a stored one (paper: 0.4 for questions, 0.9 for
            hallucinations).
        n_iter: Maximum number of steps of gradient descent.
        lr: Its learning rate; gradients are clipped at a norm of 1.
        n_prefixes: The number of texts of each length, sampled from the model, to put before a prompt while it is
            edited.
        prefix_lengths: Their lengths in tokens.
        n_background: The number of background prompts: those of the stream's training requests, or texts sampled from
            the model where it has none.
        seed: Seeds the permutation and the sampled texts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or the layer is not linear.
    """

    about = About(
        source="Wang et al., NeurIPS 2025",
        changes="what one layer returns, by a memory of which a prompt uses a sparse part, or nothing",
        needs="prompts of requests for training, or text that the model writes itself",
        costs="up to `n_iter` passes from the layer on, behind ten prefixes; one matrix in all; a lookup a prompt",
        choose="for thousands of edits that rephrasings should find, too",
    )
    supported_tasks = ("completion", "language_modelling")
    layer_kind = "mlp_output"
    search_space: ClassVar = {"tau": (0.4, 0.6, 0.9), "lr": (1.0, 0.3)}

    def __init__(
        self,
        *,
        model: EditableModel,
        top_k: int | None = None,
        tau: float = 0.4,
        n_iter: int = 70,
        lr: float = 1.0,
        n_prefixes: int = 5,
        prefix_lengths: Sequence[int] = (5, 10),
        n_background: int = 100,
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_positive("editor.tau", tau)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_prefixes(model, n_prefixes, prefix_lengths)
        check_whole("editor.n_background", n_background, least=1)
        check_whole("editor.seed", seed, least=0)
        self._size = size_of(model, model.layer_name, editor="memoir", option="layer")
        if top_k is not None:
            check_whole("editor.top_k", top_k, least=1)
            if top_k > self._size[0]:
                raise UserError(f"editor.top_k={top_k} should be at most the layer's {self._size[0]} inputs")
        self.top_k = top_k
        self.tau = tau
        self.n_iter = n_iter
        self.lr = lr
        self.n_prefixes = n_prefixes
        self.prefix_lengths = list(prefix_lengths)
        self.n_background = n_background
        self.seed = seed
        self.contexts: list[str] = []
        """Texts to put before a prompt; the first is empty. Empty before `prepare`."""
        self.background = torch.zeros(0, device=model.layer_device)
        """(D_in,) the mean feature of the background prompts; empty before `prepare`."""
        self.masks = Masks(
            self._size[0],
            k=top_k or max(1, round(_SHARE_MARKED * self._size[0])),
            seed=seed,
            device=model.layer_device,
        )
        self.memory = ResidualMemory(self._size, device=model.layer_device)
        self.intercept(self._answer)

    # --- before the first edit

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        with self.suspended():
            prompts = [request.prompt.strip() or str(request.target) for request in train]
            if not prompts:
                prompts = sampled_running_text(
                    self.model,
                    n_texts=self.n_background,
                    length=_BACKGROUND_TOKENS,
                    seed=self.seed,
                    progress=progress,
                )
            # Requests on one subject may follow each other.
            spaced = prompts[:: math.ceil(len(prompts) / self.n_background)]
            self.background = self._features(spaced).mean(dim=0)
            self.contexts = sample_contexts(
                self.model, n_prefixes=self.n_prefixes, prefix_lengths=self.prefix_lengths, seed=self.seed
            )

    def _features(self, prompts: Sequence[str]) -> Tensor:
        """(n, D_in) means over the tokens of each prompt."""
        found = []
        for chunk in self.model.query_batches(prompts):
            encoded = self.model.encode_batch([prompts[index] for index in chunk])
            found += self.model.task.by_length(
                self.model, encoded, lambda _, batch: list(_mean_over_prompt(self.model.layer_call(batch)))
            )
        return torch.stack(found)

    # --- editing

    def edit(self, batch: EditBatch) -> EditOutcome:
        if not self.contexts:
            raise UserError("editor 'memoir' must be made ready before its first edit: call prepare()")
        outcomes = [
            self._edit_one(prompt, target, self._mask(self.model.layer_call(batch.encoded.row(row)))[0])
            for row, (prompt, target) in enumerate(zip(batch.prompts, batch.targets, strict=True))
        ]
        return outcomes[-1]

    def _edit_one(self, prompt: str, target: str | int, mask: Tensor) -> EditOutcome:
        # Running text has no prompt to put anything before.
        prompts = behind(self.contexts if prompt.strip() else [""], prompt)
        encoded = self.model.encode_batch(prompts, [target] * len(prompts))
        losses = self.memory.train(self.model, encoded, mask, n_iter=self.n_iter, lr=self.lr)
        self.masks.extend(mask[None])
        last = losses[-2] if len(losses) > 1 else losses[-1]
        return EditOutcome(loss_first=losses[0], loss=last, loss_after=losses[-1], steps=len(losses) - 1)

    # --- answering

    def _mask(self, call: LayerCall) -> Tensor:
        """(B, D_in) bool, the mask of each row's prompt."""
        return self.masks.of(_mean_over_prompt(call) - self.background)

    def _answer(self, call: LayerCall) -> Tensor:
        if self.memory.is_training:
            return self.memory.added_in_training(call.input, call.output)
        if not len(self.masks):
            return call.output
        rows, masks = call.remember("memoir", lambda: self._recall(call))
        return self.memory.added(call.input, call.output, rows, masks)

    def _recall(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The (n,) rows for which the memory is on, and their (n, D_in) stored masks."""
        entry, share = self.masks.most_alike(self._mask(call))
        rows = (share >= self.tau).nonzero()[:, 0]
        return rows, self.masks.unpacked(entry[rows])

    # --- undoing and saving

    def forget(self, edit: NamedEdit, others: Sequence[NamedEdit]) -> None:
        # What was trained stays in the memory, and no prompt uses it by this mask any more.
        mask = self._mask_of(edit)
        twin = next((other for other in others if torch.equal(self._mask_of(other), mask)), None)
        if twin is not None:
            raise UserError(
                f"editor 'memoir' cannot undo edit '{edit.request_id}' alone: it has the same mask as edit "
                f"'{twin.request_id}'"
            )
        stored = self.masks.unpacked(torch.arange(len(self.masks), device=mask.device))
        found = (stored == mask).all(dim=1)
        packed = self.masks.packed[~found].clone()
        self.masks.truncate(0)
        self.masks.extend_packed(packed)

    def _mask_of(self, edit: NamedEdit) -> Tensor:
        """(D_in,) bool, the mask of an edit."""
        return self._mask(self.model.layer_call(self.model.encode_batch([edit.prompt], [edit.target])))[0]

    def undo_point(self) -> Callable[[], None]:
        n, undo_memory = len(self.masks), self.memory.undo_point()

        def undo() -> None:
            self.masks.truncate(n)
            undo_memory()

        return undo

    def changing_state(self) -> State:
        # What an edit trains is checked then; copying the memory for every edit would cost more than the edit.
        return {}

    def rollback(self) -> None:
        super().rollback()
        self.masks.truncate(0)
        self.memory.clear()

    def state_dict(self) -> State:
        state = super().state_dict()
        if self.contexts:
            state |= {"contexts": list(self.contexts), "background": self.background}
        if self.memory.matrix is not None:
            state |= {"memory": self.memory.matrix.clone(), "masks": self.masks.packed.clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rollback()
        super().load_state_dict(state)
        if "contexts" in state:
            self.contexts, self.background = list(state["contexts"]), state["background"].to(self.model.layer_device)
        if "memory" in state:
            self.memory.matrix = state["memory"].to(self.model.layer_device, copy=True)
            self.masks.extend_packed(state["masks"])

    def max_extra_parameters(self, n_edits: int) -> int:
        n_in, n_out = self._size
        return n_in + (n_in * n_out + n_edits * math.ceil(n_in / 8) if n_edits else 0)


def _mean_over_prompt(call: LayerCall) -> Tensor:
    """(B, D_in) float32 mean of what enters the layer over each row's prompt."""
    weights = call.in_prompt.float()
    return (call.input.float() * weights[..., None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
