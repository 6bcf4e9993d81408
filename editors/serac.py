"""SERAC: Memory-Based Model Editing at Scale (Mitchell et al., ICML 2022)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_positive
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.editing.about import About
from grace_bench.editing.batch import Answered, EditBatch, EditOutcome, NamedEdit, State
from grace_bench.editors._serac.memory import EditMemory
from grace_bench.editors._serac.mixture import Mixture
from grace_bench.editors._serac.networks import Distance
from grace_bench.editors._serac.trained import Fidelity, ScopeAndCounterfactual
from grace_bench.errors import EditFailure
from grace_bench.models.editable import EditableModel
from grace_bench.models.network import Reading
from grace_bench.registry import register_editor

Mixing = Literal["hard", "soft"]


@register_editor("serac")
class Serac(ScopeAndCounterfactual):
    """Stores edits; a counterfactual model answers, behind the edit, what a scope classifier finds to be about it.

    The similarity of a question and an edit is exp(-d), where d is the distance of their embeddings. If that of the
    most similar edit is above `threshold`, the counterfactual model reads the edit and the question, and answers in
    place of the model. The decision is made at the question and holds for the whole answer. The model never changes.

    Both networks are trained before the first edit (`SeracTraining`). By default they are small, made with the model's
    tokenizer, and trained from scratch; in the paper they start from pretrained ones, which `classifier` and
    `counterfactual` name.

    Args:
        model: The model to edit.
        classifier: The folder of a transformers encoder with safetensors weights and a tokenizer; null for a new BERT.
        counterfactual: The folder of a model of the edited one's kind and vocabulary; null for a new Llama or T5.
        width: The width of new networks, a multiple of 32.
        n_layers: The number of layers of new networks.
        distance: `squared` or plain `euclidean` distance of embeddings, or `cosine` for 1 minus the cosine.
        dist_heads: The number of equal parts of an embedding; the smallest of their distances counts.
        bound_embeds: Whether tanh bounds embeddings.
        threshold: The similarity above which a question is in an edit's scope.
        mixing: `soft` scores every question by the mixture of both models' predictions, where the similarity is the
            counterfactual model's weight; free answers are decided by `threshold` all the same.
        fidelity: `reference` cuts only the last word of an edit's target off the text that is embedded, as EasyEdit's
            code does, and ends the edit with a space before the question; `strict` embeds the prompt, and ends the edit
            with a full stop too (docs/fidelity.md).
        n_steps: Steps of training; 0 if the folders hold trained networks.
        batch_size: Edits in a step of training.
        lr: Learning rate of Adam in training.
        meta_seed: Seeds training; separate from the run's seed, so that all runs of a table share the networks.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a folder cannot be loaded.
    """

    about = About(
        source="Mitchell et al., ICML 2022",
        changes="nothing in the model: another one answers what is about an edit",
        costs="meta-training once; then an embedding an edit, and one for every question",
        choose="if the model must not change, and there are requests like the edits to train on",
    )
    supported_tasks: ClassVar = ("qa", "completion")
    traces = "grace_bench.editors._serac.traces:replay_file"
    search_space: ClassVar = {"threshold": (0.5, 0.3, 0.7), "lr": (1e-3, 3e-3)}

    def __init__(
        self,
        *,
        model: EditableModel,
        classifier: str | None = None,
        counterfactual: str | None = None,
        width: int = 128,
        n_layers: int = 2,
        distance: Distance = "squared",
        dist_heads: int = 1,
        bound_embeds: bool = False,
        threshold: float = 0.5,
        mixing: Mixing = "hard",
        fidelity: Fidelity = "strict",
        n_steps: int = 600,
        batch_size: int = 32,
        lr: float = 1e-3,
        meta_seed: int = 0,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(
            model=model,
            classifier=classifier,
            counterfactual=counterfactual,
            width=width,
            n_layers=n_layers,
            distance=distance,
            dist_heads=dist_heads,
            bound_embeds=bound_embeds,
            fidelity=fidelity,
            n_steps=n_steps,
            batch_size=batch_size,
            lr=lr,
            meta_seed=meta_seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_positive("editor.threshold", threshold)
        check_choice("editor.mixing", mixing, get_args(Mixing))
        self.threshold = threshold
        self.mixing: Mixing = mixing
        self._read: dict[str, Reading] = {}
        self.intercept_prompts(self._readings)

    def edit(self, batch: EditBatch) -> EditOutcome:
        """Stores each request, embedded by its prompt."""
        memory = self._known()
        for prompt, target in zip(batch.prompts, batch.targets, strict=True):
            if not prompt.strip():
                raise EditFailure("running text asks nothing that an edit could be about")
            memory.add(prompt, str(target), self.embed(self.text_in_scope(prompt, str(target))))
        self._read = {}
        return EditOutcome(n_keys=len(memory))

    def text_in_scope(self, prompt: str, target: str) -> str:
        """Returns the text of an edit that questions are compared with."""
        if self.fidelity == "strict":
            return prompt
        return self._sentence(prompt, target).rpartition(" ")[0] + self.scope.separator

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Returns the (D,) embedding of a text, alone: in a batch, its last bits would depend on the others."""
        return self.scope([text])[0]

    def similarities(self, question: str) -> Tensor:
        """Returns the (N,) float64 logarithms of a question's similarities to all edits."""
        return self._known().log_similarities(self.embed(self._given_back(question)))

    def in_context(self, prompt: str, target: str, question: str) -> str:
        """Returns what the counterfactual model reads: an edit, and a question behind it."""
        end = "." if self.fidelity == "strict" else ""
        return f"{self._sentence(prompt, target)}{end} {self._given_back(question)}"

    def _sentence(self, prompt: str, target: str) -> str:
        if self.fidelity == "strict":
            return self.model.tokens.joined(prompt, target)
        return self._given_back(f"{prompt} {target}")

    def _given_back(self, text: str) -> str:
        """A text as it is compared and read: in the reference what the tokenizer gives back of it."""
        if self.fidelity == "strict":
            return text
        (ids,) = self.model.tokens.text_ids([text])
        return self.model.tokens.decode(ids)

    def answered_by(self, queries: Tensor) -> Answered:
        return Answered([None] * len(queries))

    def _readings(self, prompts: Sequence[str]) -> list[Reading]:
        for prompt in prompts:
            if prompt not in self._read:
                self._read[prompt] = self._reading(prompt)
        return [self._read[prompt] for prompt in prompts]

    def _reading(self, prompt: str) -> Reading:
        if not self.memory:
            return Reading(prompt)
        similarity, index = self.memory.nearest(self.embed(self._given_back(prompt)))
        is_in_scope, text = similarity > self.threshold, self.in_context(*self.memory.facts[index], prompt)
        if self.mixing == "hard":
            return Reading(text, self.delegate) if is_in_scope else Reading(prompt)
        mixture = Mixture(self.model, self.delegate, question=prompt, weight=similarity, answers=is_in_scope)
        return Reading(text, mixture)

    def _known(self) -> EditMemory:
        if self.memory is None:
            raise self._untrained()
        return self.memory

    # --- what edits change

    def truncate(self, n: int) -> None:
        """Undoes all but the first `n` edits."""
        if self.memory is not None:
            self.memory.truncate(n)
        self._read = {}

    def forget(self, edit: NamedEdit, others: Sequence[NamedEdit]) -> None:
        memory = self._known()
        memory.keep([index for index, (prompt, _) in enumerate(memory.facts) if prompt != edit.prompt])
        self._read = {}

    def undo_point(self) -> Callable[[], None]:
        n, n_edits = len(self._known()), self.n_edits

        def undo() -> None:
            self.truncate(n)
            self.n_edits = n_edits

        return undo

    def changing_state(self) -> State:
        # Embeddings are checked when they are made.
        return {}

    def rollback(self) -> None:
        super().rollback()
        self.truncate(0)

    def state_dict(self) -> State:
        return {**super().state_dict(), **({} if self.memory is None else self.memory.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._read = {}
        if self.memory is not None:
            self.memory.load_state_dict(state)

    def max_extra_parameters(self, n_edits: int) -> int:
        return sum(weight.numel() for weight in self.trained.parameters()) + n_edits * self._known().width
