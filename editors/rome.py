"""ROME: Rank-One Model Editing (Meng et al., NeurIPS 2022)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from grace_bench.common.options import check_not_negative, check_positive, check_text, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.guard import check_loss
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors._running_text import key_covariance, read_texts, sample_texts
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import EncodedBatch, subject_position
from grace_bench.registry import register_editor

# A share of the mean of the covariance's diagonal. Only directions that never occur in the text are this small.
_RIDGE = 1e-6
# The loss at which the authors stop optimising a value.
_GOOD_ENOUGH = 5e-2


@register_editor("rome")
class Rome(EditorStrategy):
    """Writes each fact into a linear layer by a rank-one update (Meng et al. 2022, section 3.1).

    The layer is read as a memory of keys (its input at the subject's last token) and values (its output there).
    `prepare` computes the covariance C of its keys over running text; an edit optimises the value v* that makes the
    model give the target, and inserts it at the key k* so that other keys move least:
    W += (v* - W k*) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*).

    The defaults are those of the authors' code for GPT-2 XL unless the paper is named. A ridge of 1e-6 of its mean
    diagonal keeps C invertible if the text is too short to cover every direction.

    Args:
        model: The model to edit; the layer must be `nn.Linear` or transformers' `Conv1D`.
        n_iter: Maximum number of Adam steps on a value.
        lr: Learning rate of Adam.
        kl_weight: Weight of KL(edited || unedited) of the token after "{subject} is a", which keeps the model's notion
            of the subject.
        weight_decay: Weight of |v* - v| / |v|², where v is the layer's own output.
        clamp: The largest |v* - v|, in units of |v|.
        n_prefixes: Number of prefixes of each length, sampled from the model and put before prompts; a key is the mean
            over all of them and the bare prompt, and a value is optimised for all of these together.
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
        check_text("editor.text_path", text_path, optional=True)
        check_whole("editor.n_texts", n_texts, least=1)
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
        self.covariance: Tensor | None = None
        """(D_in, D_in) float64, on the CPU; None before `prepare`."""
        self.prefixes: list[str] = []
        """The prefixes put before prompts; the first is empty."""
        self._factor = torch.empty(0, 0)

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        if self.text_path is not None:
            texts = read_texts(self.text_path, most=self.n_texts)
        else:
            texts = [f"{request.prompt.rstrip()} {request.target}".strip() for request in train[: self.n_texts]]
        if not texts:
            raise UserError("editor 'rome' needs running text for its key covariance: give editor.text_path=FILE")
        with self.suspended():
            self._take(key_covariance(self.model, texts, progress=progress))
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
            encoded = self._at_subject(prompts, subject, [target] * len(prompts))
            requests.append((encoded, self._at_subject([f"{subject} is a"], subject)))
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

    def _at_subject(
        self, prompts: Sequence[str], subject: str, targets: Sequence[str | int] | None = None
    ) -> EncodedBatch:
        """Encodes prompts with the query at the subject's last token rather than the prompt's."""
        encoded = self.model.encode_batch(prompts, targets)
        tokenizer, stems = self.model.tokenizer, [prompt.rstrip(" ") for prompt in prompts]
        # Counted back from the prompt's last token, because padding and cutting shift the positions before it.
        back = [subject_position(tokenizer, stem, stem) - subject_position(tokenizer, stem, subject) for stem in stems]
        query = encoded.query - torch.tensor(back, device=encoded.query.device)
        mask = encoded.inputs["attention_mask"]
        if not bool(((query >= 0) & mask.gather(1, query.clamp(min=0)[:, None])[:, 0].bool()).all()):
            raise EditFailure(f"the prompt is too long: the subject {subject!r} was cut off")
        return replace(encoded, query=query)

    def _edit_one(self, batch: EncodedBatch, described: EncodedBatch) -> tuple[list[float], int]:
        call = self.model.layer_call(batch)
        key, value = call.query.double().mean(dim=0).cpu(), call.output_at_query.float().mean(dim=0)
        delta, losses, steps = self._optimise(batch, described, value)
        self._insert(key, delta.double().cpu())
        return losses, steps

    def _optimise(self, batch: EncodedBatch, described: EncodedBatch, value: Tensor) -> tuple[Tensor, list[float], int]:
        """Finds v* - v (section 3.1, equation 4).

        Args:
            batch: The prompts with their target, queried at the subject.
            described: "{subject} is a", queried at the subject.
            value: (D_out,) v, the layer's output at the subject.

        Returns:
            (D_out,) v* - v, the loss of the target at every step, and the number of steps.
        """
        delta = torch.zeros_like(value, requires_grad=True)
        largest = self.clamp * value.norm()

        def add(call: LayerCall) -> Tensor:
            rows = torch.ones(len(call.position), dtype=torch.bool, device=call.position.device)
            return call.replace(call.output_at_query + delta, rows, "replace_last")

        losses: list[float] = []
        steps = 0
        optimizer = torch.optim.Adam([delta], lr=self.lr)
        handle = self.model.intercept(add)
        try:
            repeated, describe = self.model.repeated(batch), self.model.repeated(described)
            unedited: Tensor | None = None
            for _ in range(self.n_iter):
                loss = self.model.task.loss(repeated(), repeated.batch)
                essence = describe()[:, -1].float().log_softmax(dim=-1)
                unedited = essence.detach() if unedited is None else unedited
                drift = functional.kl_div(unedited, essence, log_target=True, reduction="sum")
                decay = (delta.norm() / value.norm() ** 2).to(loss.device)
                total = loss + self.kl_weight * drift + self.weight_decay * decay
                losses.append(float(loss.detach()))
                check_loss(losses[-1], steps)
                if float(total.detach()) < _GOOD_ENOUGH:
                    break
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                steps += 1
                with torch.no_grad():
                    delta.mul_((largest / delta.norm()).clamp(max=1.0))
        finally:
            handle.remove()
        return delta.detach(), losses, steps

    def _insert(self, key: Tensor, delta: Tensor) -> None:
        """Adds (v* - v) (C⁻¹ k*)ᵀ / (k*ᵀ C⁻¹ k*) to the weight (section 3.1, equation 2)."""
        direction = torch.cholesky_solve(key[:, None], self._factor)[:, 0]
        update = torch.outer(delta, direction) / (key @ direction)
        if not bool(torch.isfinite(update).all()):
            raise EditFailure("the update is not finite")
        weight = self.model.layer.get_parameter("weight")
        with torch.no_grad():
            weight.copy_(weight.cpu().double() + (update.T if isinstance(self.model.layer, Conv1D) else update))
