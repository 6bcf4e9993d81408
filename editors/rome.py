"""ROME: Rank-One Model Editing (Meng et al., NeurIPS 2022)."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.common.options import check_not_negative, check_positive, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.moments import MomentSource
from grace_bench.editing.running_text import sample_texts
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._rome_value import encode_at_subject, optimise_value
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch
from grace_bench.registry import register_editor

# As a share of the mean of the covariance's diagonal. Only directions that the text never takes are this small.
_RIDGE = 1e-6


@register_editor("rome")
class Rome(EditorStrategy):
    """Writes each fact into a linear layer by a rank-one update (Meng et al. 2022, section 3.1).

    The layer is read as a memory of keys (its input at the subject's last token) and values (its output there).
    `prepare` computes the covariance C of its keys over running text; an edit optimises the value v* that makes the
    model give the target, and inserts it at the key k* so that other keys move least:
    W += (v* - W k*) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*).

    Defaults are those of the authors' code for GPT-2 XL unless the paper is named. A ridge of 1e-6 of its mean
    diagonal keeps C solvable where the text is too short to take every direction.

    Args:
        model: The model to edit; the layer must be `nn.Linear` or transformers' `Conv1D`.
        n_iter: Maximum number of Adam steps on a value.
        lr: Learning rate of Adam.
        kl_weight: Weight of KL(edited || unedited) of the token after "{subject} is a", which preserves the subject.
        weight_decay: Weight of |v* - v| / |v|², where v is the layer's own output.
        clamp: The largest |v* - v|, in units of |v|.
        n_prefixes: The number of texts of each length, sampled from the model, to put before a prompt; a key is the
            mean over them and the bare prompt, and a value is optimised for all of these together.
        prefix_lengths: Their lengths in tokens.
        text_path: A file of running text, one text a line, or `.jsonl` with the field `Text` or `text`; None uses the
            requests that the stream marks for training.
        n_texts: Maximum number of texts for the covariance (paper: 100,000).
        seed: Seeds the prefixes.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If a number is out of range, naming it, or the layer is not linear.
    """

    needs_subject = True
    freezes_weights = False
    supported_tasks = ("completion", "language_modelling")
    # Meng et al. 2022, section 3.1: the last map of a feed-forward block is a memory of facts.
    layer_kind = "mlp_output"
    search_space: ClassVar = {"clamp": (4.0, 1.0), "n_prefixes": (10, 2, 0)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 20,
        lr: float = 0.5,
        kl_weight: float = 0.0625,
        weight_decay: float = 0.5,
        clamp: float = 4.0,
        n_prefixes: int = 10,
        prefix_lengths: Sequence[int] = (5, 10),
        text_path: str | None = None,
        n_texts: int = 100_000,
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_not_negative("editor.kl_weight", kl_weight)
        check_not_negative("editor.weight_decay", weight_decay)
        check_positive("editor.clamp", clamp)
        check_whole("editor.n_prefixes", n_prefixes, least=0)
        for length in prefix_lengths:
            check_whole("editor.prefix_lengths", length, least=1)
            if model.max_length is not None and length >= model.max_length:
                raise UserError(
                    f"editor.prefix_lengths={length} should be less than the model reads ({model.max_length})"
                )
        if not isinstance(model.layer, nn.Linear | Conv1D) or not model.layer.weight.is_floating_point():
            raise UserError(
                f"layer={model.layer_name} is a {type(model.layer).__name__}: editor 'rome' rewrites a linear layer "
                f"(nn.Linear or Conv1D)"
            )
        self.n_iter = n_iter
        self.lr = lr
        self.kl_weight = kl_weight
        self.weight_decay = weight_decay
        self.clamp = clamp
        self.n_prefixes = n_prefixes
        self.prefix_lengths = list(prefix_lengths)
        self.text_path = text_path
        self.n_texts = n_texts
        self.seed = seed
        self._source = MomentSource(text_path=text_path, n_texts=n_texts, seed=seed)
        self.covariance: Tensor | None = None
        """(D_in, D_in) float64, on the CPU; None before `prepare`."""
        self.prefixes: list[str] = []
        """Texts to put before a prompt; the first is empty."""
        self._factor = torch.empty(0, 0)

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        layer = self.model.layer_name
        with self.suspended():
            moments = self._source.moments(self.model, [layer], train, editor="rome", progress=progress)
            self._take(moments[layer].matrix.double())
            lengths, seed = self.prefix_lengths, self.seed
            self.prefixes = ["", *sample_texts(self.model, n_texts=self.n_prefixes, lengths=lengths, seed=seed)]

    def edit(self, batch: EditBatch) -> EditOutcome:
        if self.covariance is None:
            raise UserError("editor 'rome' must be made ready before its first edit: call prepare()")
        subjects = batch.subjects or (None,) * len(batch.prompts)
        requests = []
        for prompt, target, subject in zip(batch.prompts, batch.targets, subjects, strict=True):
            if not subject or subject not in prompt:
                raise EditFailure(f"the subject {subject!r} does not occur in the prompt")
            prompts = [f"{prefix}. {prompt}" if prefix else prompt for prefix in self.prefixes]
            encoded = encode_at_subject(self.model, prompts, subject, [target] * len(prompts))
            requests.append((encoded, encode_at_subject(self.model, [f"{subject} is a"], subject)))
        losses, steps = zip(*(self._edit_one(*request) for request in requests), strict=True)
        return EditOutcome(
            loss_first=fmean(loss[0] for loss in losses), loss=fmean(loss[-1] for loss in losses), steps=sum(steps)
        )

    def changing_state(self) -> State:
        return EditorStrategy.state_dict(self)

    def state_dict(self) -> State:
        state = super().state_dict()
        if self.covariance is not None:
            state |= {"covariance": self.covariance, "prefixes": list(self.prefixes)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "covariance" in state:
            self._take(state["covariance"].cpu())
            self.prefixes = list(state["prefixes"])

    def _take(self, covariance: Tensor) -> None:
        self.covariance = covariance
        ridge = _RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
        self._factor = torch.linalg.cholesky(covariance + ridge)

    def _edit_one(self, batch: EncodedBatch, described: EncodedBatch) -> tuple[list[float], int]:
        call = self.model.layer_call(batch)
        key, value = call.query.double().mean(dim=0).cpu(), call.output_at_query.float().mean(dim=0)
        delta, losses, steps = optimise_value(
            self.model,
            batch,
            described,
            value,
            n_iter=self.n_iter,
            lr=self.lr,
            kl_weight=self.kl_weight,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
        )
        self._insert(key, delta.double().cpu())
        return losses, steps

    def _insert(self, key: Tensor, delta: Tensor) -> None:
        """Adds (v* - v) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*) to the weight (section 3.1, equation 2)."""
        direction = torch.cholesky_solve(key[:, None], self._factor)[:, 0]
        update = torch.outer(delta, direction) / (key @ direction)
        if not bool(torch.isfinite(update).all()):
            raise EditFailure("the update is not finite")
        weight = self.model.layer.get_parameter("weight")
        with torch.no_grad():
            weight.copy_(weight.cpu().double() + (update.T if isinstance(self.model.layer, Conv1D) else update))
