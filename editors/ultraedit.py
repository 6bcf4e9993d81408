"""UltraEdit: one closed form for a batch, from its gradients alone (Gu et al. 2025)."""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_positive, check_whole
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import check_linear
from grace_bench.editors._meta.gradients import edit_gradients, linear_size
from grace_bench.editors._rome.closed_form import closed_form
from grace_bench.editors._training import repeated_passes
from grace_bench.editors._ultraedit.normaliser import LifelongNormaliser
from grace_bench.editors._ultraedit.rows import Rows, passes_of
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED, EncodedBatch
from grace_bench.models.engine.engine import Repeated
from grace_bench.registry import register_editor

Tokens = Literal["ans", "mask"]
Fidelity = Literal["strict", "reference"]
_STATE = "normaliser."


@register_editor("ultraedit")
class UltraEdit(EditorStrategy):
    """Edits several layers by a closed form of normalised keys and gradients, without training (Gu et al. 2025).

    A forward and a backward pass give for each layer and token the layer's input h and the gradient g at its output.
    Both are normalised by their running mean and deviation over the stream, and the layer's weight is changed by
    D = (HᵀH + I)⁻¹ Hᵀ V, where the rows of V are v = -lr · |ĥ|² · ĝ ("lifelong normalization" in the paper).

    Nothing of earlier requests is stored but these statistics. Layers of one shape share them.

    Args:
        model: The model to edit.
        layers: Dotted paths of the linear layers to rewrite; null for the model's layer alone.
        lr: The scale of the change.
        batch_size: Requests in a pass. The loss is the mean over all target tokens of a pass, so it scales gradients.
        tokens: The tokens of which keys and gradients are taken: those at which the target is predicted (`ans`), or all
            up to the last of these (`mask`).
        fidelity: `reference` loses the statistics, and with them every later edit, at a pass with one token, as the
            authors' code does; `strict` does not.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear.
    """

    about = About(
        source="Gu et al., TMLR 2026",
        changes="the weights of several layers, by a closed form of a batch's gradients",
        costs="one pass and its gradient a batch; a solve a layer",
        choose="for many edits in large batches, without subjects or text",
    )
    edits_together = True
    freezes_weights = False
    supported_tasks = ("completion", "language_modelling")
    layer_kind = "several"
    traces = "grace_bench.editors._ultraedit.traces:replay_file"
    search_space: ClassVar = {"lr": (1e-6, 1e-5, 0.0001, 0.001, 0.003, 0.01)}

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        lr: float = 1e-6,
        batch_size: int = 10,
        tokens: Tokens = "ans",
        fidelity: Fidelity = "strict",
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, layers=layers, plugins=plugins, evaluator=evaluator)
        check_positive("editor.lr", lr)
        check_whole("editor.batch_size", batch_size, least=1)
        check_choice("editor.tokens", tokens, get_args(Tokens))
        check_choice("editor.fidelity", fidelity, get_args(Fidelity))
        self.layers = None if layers is None else list(layers)
        self.lr = lr
        self.batch_size = batch_size
        self.tokens: Tokens = tokens
        self.fidelity: Fidelity = fidelity
        self._option = "layer" if layers is None else "editor.layers"
        self._linear = {path: model.find_layer(path) for path in layers or [model.layer_name]}
        for path in self._linear:
            check_linear(model, path, self.registered_name, option=self._option)
        self._sizes = {path: linear_size(path, module) for path, module in self._linear.items()}
        self.normalisers: dict[tuple[int, int], LifelongNormaliser] = {}
        """The statistics of the layers of each shape (D_in, D_out)."""
        self._reset()

    def edit(self, batch: EditBatch) -> EditOutcome:
        minibatches = passes_of(batch.encoded, self.batch_size)
        runs = list(repeated_passes(self.model, minibatches))
        losses, found = zip(*map(self.observe, minibatches, runs), strict=True)
        for path in self._linear:
            keys = torch.cat([rows[path].keys for rows in found])
            gradients = torch.cat([rows[path].gradients for rows in found])
            self.add_to_weight(path, self.shift(path, Rows(keys, gradients)))
        after = fmean(map(self._loss, runs))
        return EditOutcome(loss_first=fmean(losses), loss=fmean(losses), loss_after=after, steps=len(minibatches))

    @torch.no_grad()
    def _loss(self, run: Repeated) -> float:
        return float(self.model.task.loss(run(), run.batch))

    def observe(self, minibatch: EncodedBatch, run: Repeated) -> tuple[float, dict[str, Rows]]:
        """Runs a pass and adds what each layer saw to the statistics.

        Args:
            minibatch: The requests.
            run: How to run them.

        Returns:
            The loss, and what each layer saw.

        Raises:
            UserError: If a layer is not called once with every token.
        """
        labels, mask = minibatch.labels, minibatch.inputs["attention_mask"].bool()
        assert labels is not None
        chosen = labels != IGNORED if self.tokens == "ans" else mask
        logits, gradients = edit_gradients(self.model, self._linear, run)
        # From the mean over each row's own tokens to the mean over those of all rows.
        share = (labels != IGNORED).sum(dim=1) / (labels != IGNORED).sum()
        found: dict[str, Rows] = {}
        for path, gradient in zip(self._linear, gradients, strict=True):
            if gradient.u.shape[:2] != chosen.shape:
                raise UserError(f"{self._option}={path} is not called once with every token of a batch")
            found[path] = Rows(gradient.u[chosen], (gradient.delta * share[:, None, None])[chosen])
            self.normalisers[self._sizes[path]].update(found[path].joined)
        return float(self.model.task.loss(logits, run.batch)), found

    def shift(self, path: str, rows: Rows) -> Tensor:
        """Returns the (D_out, D_in) float64 change of a layer's weight."""
        size = self._sizes[path]
        keys, gradients = self.normalisers[size](rows.joined).split(size, dim=1)
        values = -self.lr * keys.square().sum(dim=1, keepdim=True) * gradients
        # Metal has no float64.
        device = "cpu" if values.device.type == "mps" else values.device
        return closed_form(rows.keys.to(device).double(), values.to(device).double(), None, softness=1.0)

    def rollback(self) -> None:
        super().rollback()
        self._reset()

    def undo_point(self) -> Callable[[], None]:
        undo, before = super().undo_point(), self._statistics()

        def undo_all() -> None:
            undo()
            self._load_statistics(before)

        return undo_all

    def changing_state(self) -> State:
        # A guard would find sums of squares of raw activations exploded, which have no natural size.
        return self.weights_state()

    def state_dict(self) -> State:
        return {**super().state_dict(), **self._statistics()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._load_statistics(state)

    def _reset(self) -> None:
        self.normalisers = {
            size: LifelongNormaliser(sum(size), self.model.device, loses_single_rows=self.fidelity == "reference")
            for size in self._sizes.values()
        }

    def _statistics(self) -> State:
        return {
            f"{_STATE}{n_in}x{n_out}.{name}": value
            for (n_in, n_out), normaliser in self.normalisers.items()
            for name, value in normaliser.state_dict().items()
        }

    def _load_statistics(self, state: Mapping[str, Any]) -> None:
        for (n_in, n_out), normaliser in self.normalisers.items():
            normaliser.load_state_dict({name: state[f"{_STATE}{n_in}x{n_out}.{name}"] for name in ("n", "mean", "var")})
