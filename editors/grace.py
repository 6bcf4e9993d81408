"""GRACE: General Retrieval Adaptors for Continual Editing (Hartvigsen et al., NeurIPS 2023)."""

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editors._grace.codebook import Codebook, Distance, Fidelity, Overlap
from grace_bench.editors._grace.editor import CodebookEditor
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel, LayerCall, Replacement
from grace_bench.models.encoding import EncodedBatch
from grace_bench.registry import register_editor

ValueInit = Literal["cold", "warm"]


@register_editor("grace")
class Grace(CodebookEditor):
    """A codebook of keys, values and deferral radii in front of one layer; the weights never change.

    Args:
        model: The model to edit.
        eps_init: Deferral radius of a new entry, in the units of the distance (paper: 1.0, its QA example 3.0).
        n_iter: Steps of Adam on an entry's value.
        lr: Learning rate of Adam.
        value_init: `cold` starts a value uniformly in [0, 1), `warm` at the layer's own output.
        replacement: The positions of the layer's output that an entry overwrites: the query position, all positions, or
            those before the query.
        distance: The distance of keys and queries: `euclidean`, `cosine`, or `mahalanobis`, for which `calibrate`
            estimates the covariance of upstream activations, so that directions in which inputs differ anyway count
            less.
        fidelity: `reference` reproduces the official code step by step; `strict` corrects what
            `docs/fidelity.md` lists.
        overlap: `allow` lets balls of different labels overlap, as in the paper; with `shrink` a new or growing ball
            ends where a ball of another label begins.
        seed: Seeds cold values; every edit has its own generator, so that nothing else affects them.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is not one of its choices, or a number is out of range, naming it.
    """

    about = About(
        source="Hartvigsen et al., NeurIPS 2023",
        changes="what the layer returns near the keys of a codebook",
        costs="up to `n_iter` passes from the layer on; a key and a value an entry; a lookup a query",
        choose="if edits must hold and nothing else may change",
    )
    is_reference = True
    search_space: ClassVar = {
        "eps_init": (0.5, 1.0, 3.0),
        "replacement": ("replace_prompt", "replace_last"),
    }

    def __init__(
        self,
        *,
        model: EditableModel,
        eps_init: float = 1.0,
        n_iter: int = 100,
        lr: float = 1.0,
        value_init: ValueInit = "cold",
        replacement: Replacement = "replace_prompt",
        distance: Distance = "euclidean",
        fidelity: Fidelity = "strict",
        overlap: Overlap = "allow",
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        check_choice("editor.value_init", value_init, get_args(ValueInit))
        check_choice("editor.replacement", replacement, get_args(Replacement))
        check_choice("editor.distance", distance, get_args(Distance))
        check_choice("editor.fidelity", fidelity, get_args(Fidelity))
        check_choice("editor.overlap", overlap, get_args(Overlap))
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_whole("editor.seed", seed, least=0)
        codebook = Codebook(
            eps_init=eps_init,
            distance=distance,
            fidelity=fidelity,
            overlap=overlap,
            device=model.layer_device,
            precision=model.layer_dtype,
        )
        super().__init__(
            model=model,
            codebook=codebook,
            n_iter=n_iter,
            lr=lr,
            replacement=replacement,
            plugins=plugins,
            evaluator=evaluator,
        )
        self.eps_init = eps_init
        self.n_iter = n_iter
        self.lr = lr
        self.value_init = value_init
        self.distance = distance
        self.fidelity = fidelity
        self.overlap = overlap
        self.seed = seed

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Settles each request in order and returns the outcome of the last one.

        Values are left pending (see `RecentEdits`). After an edit whose value turns out not to be finite, no further
        edit is made until `flush` has reported it.

        Raises:
            EditFailure: If the edit cannot be made; the editor is unchanged.
            UserError: If the distance needs `calibrate`, which was not called.
        """
        if self.codebook.needs_whitening:
            raise UserError(
                "editor.distance=mahalanobis needs upstream activations before the first edit: call "
                "editor.calibrate(model.queries(prompts)) with inputs that the model is used for"
            )
        self.recent.begin()
        for index, (prompt, target) in enumerate(zip(batch.prompts, batch.targets, strict=True)):
            if self.recent.failed is not None:
                break
            self._edit_one(prompt, target, batch.encoded.row(index))
        return EditOutcome() if self.recent.failed is not None else self.recent.outcomes[-1]

    def _edit_one(self, prompt: str, target: str | int, encoded: EncodedBatch) -> None:
        call = self.model.layer_call(encoded)
        assert encoded.labels is not None
        if self.replacement == "replace_prompt" and not _has_token_before(encoded, call):
            raise EditFailure("the prompt is one token, so replace_prompt has nothing to overwrite")
        if not bool(call.query.isfinite().all()):
            raise EditFailure("what enters the layer at the query is not finite")
        settled = self.codebook.settle(
            call.query[0],
            encoded.target_ids[0],
            lambda: self.initial_value(call),
            label_mean=float(encoded.labels.float().mean()),
        )
        found = self.codebook.retrieve(call.query)
        entry = int(found.entry[0])
        outcome = EditOutcome(
            op=settled.op,
            key=entry,
            distance=settled.distance,
            n_keys=len(self.codebook),
            is_close=settled.is_close,
        )
        answering = entry if found.hit[0] else -1
        self.recent.add(
            outcome,
            settled.before,
            n_edits=self.n_edits,
            prompt=prompt,
            target=target,
            encoded=encoded,
            answering=answering,
        )
        if self.fidelity == "strict" and self.model.engine.batches_edits:
            return
        self.recent.train()
        if self.recent.failed is not None:
            raise EditFailure(self.recent.outcomes.pop().failed)

    def initial_value(self, call: LayerCall) -> Tensor:
        """Returns the (D_out,) value that a new entry starts from."""
        if self.value_init == "warm":
            return call.output_at_query[0]
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.recent.n_settled)
        return torch.rand(call.output.shape[-1], generator=generator).to(call.output.device)

    def train_value(self, entry: int, encoded: EncodedBatch) -> list[float]:
        """Trains one entry's value on one request, and returns its loss step by step (section 3.2, Equation 3).

        Raises:
            EditFailure: If a loss or the value is not finite; the value is unchanged.
        """
        self.versions.forget(entry)
        found = self.codebook.retrieve(self.model.layer_call(encoded).query)
        (training,) = self.values.train([entry], [int(found.entry[0]) if found.hit[0] else -1], encoded)
        if training.failed is not None:
            raise EditFailure(training.failed)
        return [*training.losses]


def _has_token_before(encoded: EncodedBatch, call: LayerCall) -> bool:
    """Whether any real token precedes the query."""
    mask = encoded.inputs.get("attention_mask")
    position = int(call.position[0])
    if mask is None or mask.shape[1] != call.input.shape[1]:
        return position > 0
    return bool(mask[0, :position].any())
