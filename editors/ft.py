"""Fine-tuning on each edit: the baseline that forgets."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_positive, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.about import About
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import trainable
from grace_bench.editors._objectives import GOOD_ENOUGH, LastTokenObjective
from grace_bench.editors._prefixes import behind, check_prefixes, sample_contexts
from grace_bench.editors._training import EditTraining, check_trainable
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import register_editor

Objective = Literal["target", "last_token"]
_GENERATES_TEXT = ("completion", "language_modelling")


@register_editor("ft")
class FineTune(EditorStrategy):
    """Fine-tunes the layer's weights on each edit until the model answers it (Hartvigsen et al. 2023, section 4.1).

    Other papers call it FT-M, or FT-L with the objective `last_token` and its `norm_constraint` (Meng et al. 2022).

    Args:
        model: The model to edit.
        n_iter: Maximum number of Adam steps per edit.
        lr: Learning rate of Adam (paper: 1e-2).
        objective: What is trained: the target, each token behind those before it (`target`, FT-M), or all tokens of
            the target at the prompt's last token (`last_token`, FT-L), until their loss is below 0.01.
        norm_constraint: The most by which an edit may move any weight, in either direction (FT-L); null for no bound.
        n_prefixes: The number of texts of each length, sampled from the unedited model, to put before a prompt. The
            request is trained behind each of them, and without.
        prefix_lengths: Their lengths in tokens.
        seed: Seeds the prefixes.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range or not for the model's task, naming it, or the layer has no weights.
    """

    about = About(
        source="Hartvigsen et al. 2023, section 4.1; Meng et al. 2022, appendix",
        changes="the layer's weights",
        costs="up to `n_iter` passes from the layer on",
        choose="as the baseline, or for a handful of edits",
    )
    freezes_weights = False
    younger_options = ("objective", "norm_constraint", "n_prefixes", "prefix_lengths", "seed")
    search_space: ClassVar = {"lr": (0.01, 0.003, 0.001, 0.0003, 0.0001, 3e-05)}

    def __init__(
        self,
        *,
        model: EditableModel,
        n_iter: int = 100,
        lr: float = 1e-2,
        objective: Objective = "target",
        norm_constraint: float | None = None,
        n_prefixes: int = 0,
        prefix_lengths: Sequence[int] = (10,),
        seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, plugins=plugins, evaluator=evaluator)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_choice("editor.objective", objective, get_args(Objective))
        if norm_constraint is not None:
            check_positive("editor.norm_constraint", norm_constraint)
        check_prefixes(model, n_prefixes, prefix_lengths)
        if n_prefixes and model.task.name not in _GENERATES_TEXT:
            raise UserError(
                f"editor.n_prefixes={n_prefixes} is for {' and '.join(_GENERATES_TEXT)}, not for {model.task.name}"
            )
        check_trainable(model)
        self.n_iter = n_iter
        self.lr = lr
        self.objective: Objective = objective
        self.norm_constraint = norm_constraint
        self.n_prefixes = n_prefixes
        self.prefix_lengths = list(prefix_lengths)
        self.seed = seed
        self.contexts = [] if n_prefixes else [""]
        """Texts to put before a prompt; the first is empty. Empty before `prepare`."""

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        if self.n_prefixes:
            with self.suspended():
                self.contexts = sample_contexts(
                    self.model, n_prefixes=self.n_prefixes, prefix_lengths=self.prefix_lengths, seed=self.seed
                )

    def edit(self, batch: EditBatch) -> EditOutcome:
        training = self._training(batch)
        with trainable(self.model.layer.parameters()) as parameters:
            optimizer = WeightAdam(parameters, lr=self.lr, bound=self.norm_constraint)
            training.run(lambda loss: optimizer.step(loss + self.penalty(optimizer.masters)))
            return training.outcome()

    def _training(self, batch: EditBatch) -> EditTraining:
        if not self.contexts:
            raise UserError(f"editor '{self.registered_name}' must be made ready before its first edit: call prepare()")
        prompts, encoded = list(batch.prompts), batch.encoded
        if len(self.contexts) > 1:
            prompts = [text for prompt in batch.prompts for text in behind(self.contexts, prompt)]
            targets = [target for target in batch.targets for _ in self.contexts]
            encoded = self.model.encode_batch(prompts, targets)
        if self.objective == "target" or self.model.task.name == "classification":
            return EditTraining(self.model, encoded, n_iter=self.n_iter)
        objective = LastTokenObjective(self.model, prompts, encoded)
        return EditTraining(
            self.model,
            objective.asked,
            n_iter=self.n_iter,
            stops_when_answered=False,
            stops_below=GOOD_ENOUGH,
            loss=objective.loss,
        )

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        """Returns the penalty added to the loss, given the layer's weights in the order of its parameters."""
        return 0.0

    def state_dict(self) -> State:
        contexts: State = {"contexts": list(self.contexts)} if len(self.contexts) > 1 else {}
        return {**super().state_dict(), **contexts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.contexts = list(state.get("contexts", self.contexts))


class WeightAdam:
    """Adam on a model's weights, with float32 copies of those in bfloat16 or float16.

    Without the copies, a step smaller than the rounding of such a weight would not move it at all.

    Args:
        parameters: The weights, which take the rounded values after every step.
        lr: Learning rate.
        bound: The most by which steps may move a weight from what it is now; None for no bound.

    Attributes:
        masters: The optimised tensors: float32 copies, or the parameters themselves where they are that precise.
    """

    def __init__(self, parameters: Sequence[Tensor], *, lr: float, bound: float | None = None) -> None:
        self.parameters = list(parameters)
        self.masters = [
            parameter if torch.finfo(parameter.dtype).bits >= 32 else parameter.detach().float().requires_grad_()
            for parameter in parameters
        ]
        self._adam = torch.optim.Adam(self.masters, lr=lr)
        self._bounds = (
            []
            if bound is None
            else [(master, master.detach() - bound, master.detach() + bound) for master in self.masters]
        )

    def step(self, loss: Tensor) -> None:
        """Takes one step down a loss of the parameters, of the masters, or of both."""
        self._adam.zero_grad()
        loss.backward()
        rounded = [pair for pair in zip(self.masters, self.parameters, strict=True) if pair[0] is not pair[1]]
        for master, parameter in rounded:
            assert parameter.grad is not None
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None
        self._adam.step()
        with torch.no_grad():
            for master, lowest, highest in self._bounds:
                master.clamp_(lowest, highest)
            for master, parameter in rounded:
                parameter.copy_(master)
