"""MELO: neuron-indexed dynamic LoRA (Yu et al., AAAI 2024)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.common.options import check_choice, check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import Answered, EditBatch, EditOutcome, NamedEdit, State
from grace_bench.editing.strategy import EditorStrategy, checked_paths
from grace_bench.editors._grace.codebook import Before, Fidelity
from grace_bench.editors._linear import size_of
from grace_bench.editors._melo.blocks import Blocks, later_layers
from grace_bench.editors._melo.clusters import NO_BLOCK, Assignment, Clusters
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.calls import ModuleCall
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import IGNORED
from grace_bench.registry import register_editor


@register_editor("melo")
class Melo(EditorStrategy):
    """Low-rank blocks beside later layers, one for each batch of edits, chosen by clusters of a layer's output.

    Args:
        model: The model to edit; its layer is the index layer, at whose output inputs are compared.
        layers: Dotted paths of the linear modules that get blocks, called no earlier than the index layer. None for
            the modules of its name in the two blocks behind it; for the index layer itself, where there are none.
        n_blocks: The planned number of blocks, which scales what a block adds and, as 1 / sqrt(n_blocks *
            rank_per_block), its first A. Only `reference` fails an edit that needs more.
        rank_per_block: Rank of a block.
        init_radius: Radius of a new cluster, in the units of the index layer's output.
        n_iter: Steps of Adam on a batch.
        lr: Learning rate of Adam; it is halved every 20 steps.
        fidelity: `reference` reproduces the official code step by step; `strict` corrects what `docs/fidelity.md`
            lists.
        seed: Seeds the first A of every block.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear.
    """

    about = About(
        source="Yu et al., AAAI 2024",
        changes="what later layers return, by a low-rank block that a cluster near the input chooses",
        costs="`n_iter` passes from the layer on for a batch; a block for each batch; a lookup a query",
        choose="if edits must hold and nothing else may change, few at a time",
    )
    edits_together = True
    traces = "grace_bench.editors._melo.traces:replay_file"
    search_space: ClassVar = {"init_radius": (0.5, 1.0, 3.0), "lr": (1e-3, 1e-4)}

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        n_blocks: int = 350,
        rank_per_block: int = 2,
        init_radius: float = 0.5,
        n_iter: int = 50,
        lr: float = 1e-3,
        fidelity: Fidelity = "strict",
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_blocks", n_blocks, least=1)
        check_whole("editor.rank_per_block", rank_per_block, least=1)
        check_positive("editor.init_radius", init_radius)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_choice("editor.fidelity", fidelity, get_args(Fidelity))
        check_whole("editor.seed", seed, least=0)
        self.layers = None if layers is None else [*checked_paths(layers, "editor.layers")]
        self.n_blocks = n_blocks
        self.rank_per_block = rank_per_block
        self.init_radius = init_radius
        self.n_iter = n_iter
        self.lr = lr
        self.fidelity: Fidelity = fidelity
        self.seed = seed
        self._option = "layer" if layers is None else "editor.layers"
        paths = self.layers or later_layers(model)
        self.codebook = Clusters(
            init_radius=init_radius, fidelity=fidelity, device=model.layer_device, precision=model.layer_dtype
        )
        sizes = {path: size_of(model, path, editor="melo", option=self._option) for path in paths}
        self.blocks = Blocks(sizes, rank=rank_per_block, n_planned=n_blocks, seed=seed, device=model.layer_device)
        self.settled: Sequence[Assignment] = ()
        """What was done to the clusters for each request of the last batch."""
        self.losses: Sequence[float] = ()
        """The loss of the last batch before each step, and after the last."""
        self._changes: list[tuple[int, Before]] = []
        self.intercept(self._answer)
        for path in paths:
            if path != model.layer_name:
                self.intercept_at(path, partial(self._answer_at, path), option=self._option)

    # --- editing

    def edit(self, batch: EditBatch) -> EditOutcome:
        index = len(self.blocks)
        if self.fidelity == "reference" and index >= self.n_blocks:
            raise EditFailure(f"all {self.n_blocks} blocks are taken: set editor.n_blocks")
        queries = self.key_of(self.model.layer_call(batch.encoded))
        if not bool(queries.isfinite().all()):
            raise EditFailure("what leaves the index layer is not finite")
        labels = batch.encoded.labels
        assert labels is not None
        sums = labels.masked_fill(labels == IGNORED, 0).view(len(queries), -1).sum(dim=1).double().tolist()
        self.settled = self.codebook.assign(queries, batch.encoded.target_ids, sums, index)
        self._changes.append((index, self.settled[-1].before))
        self.losses = self.blocks.train(self.model, batch.encoded, n_iter=self.n_iter, lr=self.lr)
        is_one = len(self.settled) == 1
        return EditOutcome(
            op=self.settled[0].op if is_one else None,
            key=self.settled[0].entry if is_one else None,
            distance=self.settled[0].distance if is_one else None,
            n_keys=len(self.codebook),
            loss_first=self.losses[0],
            loss=self.losses[-2],
            loss_after=self.losses[-1],
            steps=self.n_iter,
            is_close=any(one.is_close for one in self.settled),
        )

    # --- answering

    def key_of(self, call: LayerCall) -> Tensor:
        """Returns the (B, D_out) output of the index layer at the query; in `reference` at the last position."""
        return call.output[:, -1] if self.fidelity == "reference" else call.output_at_query

    def _answer(self, call: LayerCall) -> Tensor:
        if self.blocks.trained is None and not len(self.codebook):
            return call.output
        blocks = call.remember("melo", lambda: self._choose(call))
        path = self.model.layer_name
        return self.blocks.added(path, call.input, call.output, blocks) if path in self.blocks.sizes else call.output

    def _answer_at(self, path: str, call: ModuleCall) -> Tensor:
        if self.blocks.trained is None and not len(self.codebook):
            return call.output
        if "melo" not in call.state.memo:
            raise UserError(
                f"{self._option}={path} is called before layer={self.model.layer_name}, which chooses its block"
            )
        return self.blocks.added(path, call.input, call.output, call.state.memo["melo"])

    def _choose(self, call: LayerCall) -> Tensor:
        """Chooses the (B,) blocks of a call, for every module and every token generated after the prompt."""
        if self.blocks.trained is not None:
            return torch.full((len(call.position),), len(self.blocks))
        queries = self.key_of(call).detach()
        found, blocks = self.codebook.choose(queries)
        call.state.entry = torch.where(blocks != NO_BLOCK, found.entry, -1)
        call.state.distance = found.distance
        call.state.contested = self.codebook.contested(queries)
        return blocks

    def answered_by(self, queries: Tensor) -> Answered | None:
        layer = self.model.layer
        if self.fidelity == "reference" or not isinstance(layer, nn.Linear | Conv1D):
            # The key is not what leaves the layer at the query, or cannot be computed from what enters it there.
            return None
        if not len(self.codebook):
            return Answered([None] * len(queries))
        with torch.no_grad():
            # The forward pass alone: its hooks belong to passes of the model.
            keys = layer.forward(queries.to(self.model.layer_device, self.model.layer_dtype)[:, None])[:, 0]
        found, blocks = self.codebook.choose(keys)
        return Answered(
            versions=[None if block == NO_BLOCK else self.blocks.digest(block) for block in blocks.tolist()],
            entry=torch.where(blocks != NO_BLOCK, found.entry, -1),
            distance=found.distance,
            contested=self.codebook.contested(keys),
        )

    # --- undoing and saving

    def forget(self, edit: NamedEdit, others: Sequence[NamedEdit]) -> None:
        # Its point stays: other inputs near it would otherwise get the block of the next point.
        call = self.model.layer_call(self.model.encode_batch([edit.prompt], [edit.target]))
        self.codebook.unlink(self.key_of(call)[0])
        self._changes.clear()

    def undo_point(self) -> Callable[[], None]:
        changes: list[tuple[int, Before]] = []
        self._changes = changes

        def undo() -> None:
            for index, before in reversed(changes):
                self.codebook.undo(before)
                self.blocks.truncate(index)
            changes.clear()

        return undo

    def changing_state(self) -> State:
        # A block is checked when it is trained; copying all of them for every edit would cost more than the edit.
        return {}

    def rollback(self) -> None:
        super().rollback()
        self.codebook.clear()
        self.blocks.truncate(0)
        self._changes.clear()

    def state_dict(self) -> State:
        return {**super().state_dict(), **self.codebook.state_dict(), **self.blocks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.codebook.load_state_dict(state)
        self.blocks.load_state_dict(state)
        self._changes.clear()

    def max_extra_parameters(self, n_edits: int) -> int:
        # In the worst case every edit adds a block and a cluster with a point, and another cluster gets a placeholder.
        width = self.codebook.keys.shape[1]
        return n_edits * (self.blocks.n_numbers + (width + 1) + 2 * (width + 2))
