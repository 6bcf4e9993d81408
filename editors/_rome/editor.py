"""The base classes of ROME's family: where a fact is located, and how its value is spread over layers."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor

from grace_bench.common.options import check_choice, check_not_negative, check_positive, check_whole
from grace_bench.common.progress import Progress
from grace_bench.data.avalanche import BasePlugin, EvaluationPlugin
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome, State
from grace_bench.editing.moments import MomentSource, TextSource
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editing.weights import check_linear
from grace_bench.editors._prefixes import check_prefixes, sample_contexts
from grace_bench.editors._rome.facts import Fact, FactToken, at_facts, encode_fact, mean_keys
from grace_bench.editors._rome.values import Optimisation, Value, optimise_values
from grace_bench.errors import UserError
from grace_bench.models.architecture import block_of
from grace_bench.models.editable import EditableModel


class LocateThenEdit(EditorStrategy):
    """An editor that writes facts where they are recalled: into linear layers, at the subject's token.

    Args:
        model: The model to edit.
        layers: Dotted paths of the layers to rewrite (`nn.Linear` or transformers' `Conv1D`), in their order; None for
            the model's layer.
        n_iter: Maximum number of passes for a value, each but the last followed by an Adam step.
        lr: Learning rate of Adam.
        kl_weight: Weight of KL(edited || unedited) of the token after the subject in "{subject} is a".
        weight_decay: Weight of |v* - v| / |v|², where v is what the layer gives without the edit.
        clamp: The largest |v* - v|, in units of |v|.
        n_prefixes: The number of texts of each length, sampled from the model, to put before a prompt.
        prefix_lengths: Their lengths in tokens.
        text: Running text for the second moments: the requests that the stream marks for training (`train`), or texts
            sampled from the model (`model`).
        text_path: A file of running text instead, one text a line, or `.jsonl` with the field `Text` or `text`.
        moments_path: Second moments computed before, an `.npz` file or a folder of them, instead of any text.
        n_texts: Maximum number of texts.
        seed: Seeds the prefixes and sampled texts.
        plugins: Avalanche plugins.
        evaluator: Avalanche's evaluation plugin.

    Raises:
        UserError: If an option is out of range, naming it, or a layer is not linear.
    """

    needs_subject = True
    freezes_weights = False
    supported_tasks = ("completion", "language_modelling")
    traces = "grace_bench.editors._rome.traces:replay_file"

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None = None,
        n_iter: int,
        lr: float,
        kl_weight: float,
        weight_decay: float,
        clamp: float,
        n_prefixes: int,
        prefix_lengths: Sequence[int],
        text: TextSource,
        text_path: str | None,
        moments_path: str | None,
        n_texts: int,
        seed: int,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(model=model, layers=layers, plugins=plugins, evaluator=evaluator)
        self._option = "layer" if layers is None else "editor.layers"
        self.paths = tuple(layers or (model.layer_name,))
        """The layers that edits rewrite."""
        for path in self.paths:
            check_linear(model, path, self.registered_name, option=self._option)
        check_whole("editor.n_iter", n_iter, least=1)
        check_positive("editor.lr", lr)
        check_not_negative("editor.kl_weight", kl_weight)
        check_not_negative("editor.weight_decay", weight_decay)
        check_positive("editor.clamp", clamp)
        check_prefixes(model, n_prefixes, prefix_lengths)
        self.n_iter = n_iter
        self.lr = lr
        self.kl_weight = kl_weight
        self.weight_decay = weight_decay
        self.clamp = clamp
        self.n_prefixes = n_prefixes
        self.prefix_lengths = list(prefix_lengths)
        self.text = text
        self.text_path = text_path
        self.moments_path = moments_path
        self.n_texts = n_texts
        self.seed = seed
        self._source = MomentSource(
            text=text, text_path=text_path, moments_path=moments_path, n_texts=n_texts, seed=seed
        )
        self.contexts: list[str] = []
        """Texts to put before a prompt; the first is empty. Empty before `prepare`."""
        self._models: dict[str, EditableModel] = {}

    # --- what an editor adds

    @property
    def needs_moments(self) -> bool:
        """Whether the editor, with its options, uses second moments."""
        return True

    @abstractmethod
    def use_moments(self, moments: Mapping[str, Tensor], *, progress: Progress | None = None) -> None:
        """Receives the (D_in, D_in) second moments of each rewritten layer's inputs, before the first edit."""

    @abstractmethod
    def constants(self) -> dict[str, Tensor]:
        """Returns what the editor made of the second moments, by name: a part of its state that edits never change."""

    @abstractmethod
    def use_constants(self, constants: Mapping[str, Tensor]) -> None:
        """Receives what `constants` returned."""

    @abstractmethod
    def edit_facts(self, facts: Sequence[Fact]) -> list[Value]:
        """Writes facts into the model and returns their optimised values."""

    @property
    def n_matrices(self) -> int:
        """How many float64 matrices of (D_in, D_in) the editor keeps of each layer, at most."""
        return 1

    # --- the contract

    def matrix_bytes(self) -> Mapping[str, int]:
        if not self.needs_moments:
            return {}
        sizes = [self.weight_of(path).shape[1] ** 2 for path in self.paths]
        # While one layer is solved: the matrix, its factor, and a solver's copy of that.
        solves = torch.float64.itemsize * (self.n_matrices * sum(sizes) + 2 * max(sizes))
        return {"second moments": torch.float32.itemsize * sum(sizes), "factors and projections": solves}

    def prepare(self, train: Sequence[EditRequest], *, progress: Progress | None = None) -> None:
        with self.suspended():
            if self.needs_moments:
                found = self._source.moments(
                    self.model, self.paths, train, editor=self.registered_name, progress=progress
                )
                dead = next((path for path, moment in found.items() if not bool(moment.matrix.any())), None)
                if dead is not None:
                    raise UserError(f"{self._option}={dead} gets nothing but zeros over the text for second moments")
                self.use_moments({path: moment.matrix for path, moment in found.items()}, progress=progress)
            self.contexts = sample_contexts(
                self.model, n_prefixes=self.n_prefixes, prefix_lengths=self.prefix_lengths, seed=self.seed
            )

    def edit(self, batch: EditBatch) -> EditOutcome:
        if not self.contexts:
            raise UserError(f"editor '{self.registered_name}' must be made ready before its first edit: call prepare()")
        subjects = batch.subjects or (None,) * len(batch.prompts)
        requests = zip(batch.prompts, batch.targets, subjects, strict=True)
        values = self.edit_facts([self.encode(*request) for request in requests])
        for model in self._models.values():
            model.engine.forget()
        return EditOutcome(
            loss_first=fmean(value.losses[0][1] for value in values),
            loss=fmean(value.losses[-1][1] for value in values),
            steps=sum(len(value.losses) - 1 for value in values),
        )

    def changing_state(self) -> State:
        return self.weights_state()

    def state_dict(self) -> State:
        state = {**super().state_dict(), **self.changing_state()}
        if self.contexts:
            state |= {"contexts": list(self.contexts), **self.constants()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "contexts" in state:
            self.contexts = list(state["contexts"])
            self.use_constants({name: value.cpu() for name, value in state.items() if isinstance(value, Tensor)})

    # --- parts for the editors

    def encode(self, prompt: str, target: str | int, subject: str | None) -> Fact:
        """Encodes a request behind each context.

        Raises:
            EditFailure: If the subject does not occur in the prompt, or was cut off.
        """
        return encode_fact(self.model, prompt, target, subject, contexts=self.contexts)

    def model_at(self, path: str, *, rewritten: Sequence[str] = ()) -> EditableModel:
        """Returns the model with another edited layer, at which to read activations and optimise values.

        Args:
            path: The layer.
            rewritten: The layers whose weights change between its passes.
        """
        name = ",".join([path, *rewritten])
        if name not in self._models:
            model = self.model
            found = self._models[name] = EditableModel(
                model.module, layer=path, task=model.task, tokenizer=model.tokenizer, engine=model.engine.name
            )
            found.engine.rewrites([model.find_layer(rewritten_path) for rewritten_path in rewritten])
        return self._models[name]

    def optimise(self, path: str, facts: Sequence[Fact]) -> list[Value]:
        """Optimises what the module at a dotted path gives at each fact."""
        settings = Optimisation(
            n_iter=self.n_iter,
            lr=self.lr,
            kl_weight=self.kl_weight,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
        )
        return optimise_values(self.model_at(path), facts, settings)


class MassEditor(LocateThenEdit):
    """An editor that writes many facts at once, spread over several layers (Meng et al. 2023, section 4).

    Args:
        layers: As in `LocateThenEdit`; values are optimised at the output of the last one's block.
        fact_token: The token at which facts are written: the subject's last or first one, or the one after it.
    """

    edits_together = True
    layer_kind = "mlp_outputs"

    def __init__(
        self,
        *,
        model: EditableModel,
        layers: Sequence[str] | None,
        fact_token: FactToken,
        n_iter: int,
        lr: float,
        kl_weight: float,
        weight_decay: float,
        clamp: float,
        n_prefixes: int,
        prefix_lengths: Sequence[int],
        text: TextSource,
        text_path: str | None,
        moments_path: str | None,
        n_texts: int,
        seed: int,
        plugins: Sequence[BasePlugin] = (),
        evaluator: EvaluationPlugin | None = None,
    ) -> None:
        super().__init__(
            model=model,
            layers=layers,
            n_iter=n_iter,
            lr=lr,
            kl_weight=kl_weight,
            weight_decay=weight_decay,
            clamp=clamp,
            n_prefixes=n_prefixes,
            prefix_lengths=prefix_lengths,
            text=text,
            text_path=text_path,
            moments_path=moments_path,
            n_texts=n_texts,
            seed=seed,
            plugins=plugins,
            evaluator=evaluator,
        )
        check_choice("editor.fact_token", fact_token, get_args(FactToken))
        self.layers = None if layers is None else list(layers)
        self.fact_token: FactToken = fact_token
        self.past: dict[str, Tensor] = {}
        """What the editor keeps of the keys of earlier batches, by layer."""
        for path in self.paths:
            self._check_adds_to_hidden_state(path)

    # --- what an editor adds

    @abstractmethod
    def change(self, path: str, keys: Tensor, residuals: Tensor) -> Tensor:
        """Returns the change of a layer's weight that adds residuals to the values of keys.

        Args:
            path: The layer.
            keys: (N, D_in) float64.
            residuals: (N, D_out) float64.

        Returns:
            (D_out, D_in) float64.
        """

    def remember(self, path: str, keys: Tensor) -> None:
        """Receives the (N, D_in) keys of a batch that has been written into a layer."""

    def added_to_past(self, path: str, keys: Tensor) -> Tensor:
        """Returns `past` of a layer with the (D, D) second moment of a batch's (N, D) keys added, as a new matrix."""
        summed = keys.T @ keys
        return summed.add_(self.past[path]) if path in self.past else summed

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """Groups of layers: values are optimised at the last layer of a group and spread over the group."""
        return (self.paths,)

    # --- the contract

    def encode(self, prompt: str, target: str | int, subject: str | None) -> Fact:
        return encode_fact(self.model, prompt, target, subject, contexts=self.contexts, token=self.fact_token)

    def edit_facts(self, facts: Sequence[Fact]) -> list[Value]:
        values: list[Value] = []
        keys: dict[str, Tensor] = {}
        for group in self.groups:
            block = self._block_of(group[-1])
            values = self.optimise(block, facts)
            wanted = torch.stack([value.optimised for value in values])
            reader = self.model_at(block, rewritten=group)
            # What comes before the first of these layers is computed once.
            with reader.engine.remembering():
                for index, path in enumerate(group):
                    found, given = at_facts(reader, path, facts)
                    keys[path] = mean_keys(found)
                    residuals = (wanted - given[:, 0]) / (len(group) - index)
                    self.add_to_weight(path, self.change(path, keys[path], residuals))
        for path in keys:
            self.remember(path, keys[path])
        return values

    def rollback(self) -> None:
        super().rollback()
        self.past.clear()

    def undo_point(self) -> Callable[[], None]:
        # An edit replaces the matrices of earlier batches and changes none: they need not be copied.
        past, self.past = self.past, {}
        undo = super().undo_point()
        self.past = dict(past)

        def undo_all() -> None:
            undo()
            self.past = dict(past)

        return undo_all

    def changing_state(self) -> State:
        kept = {f"past.{path}": history for path, history in self.past.items()}
        return {**super().changing_state(), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        kept = {name.removeprefix("past."): value for name, value in state.items() if name.startswith("past.")}
        self.past = {path: past.cpu() for path, past in kept.items()}

    def _check_adds_to_hidden_state(self, path: str) -> None:
        """Raises `UserError` unless a layer may be the last of its block's feed-forward network."""
        self._block_of(path)
        width = getattr(self.model.config, "hidden_size", None)
        n_out = len(self.weight_of(path))
        if width is not None and n_out != width:
            raise UserError(
                f"{self._option}={path} gives {n_out} numbers a token, where the hidden state has {width}: editor "
                f"'{self.registered_name}' rewrites the last layer of a block's feed-forward network"
            )

    def _block_of(self, path: str) -> str:
        try:
            return block_of(path)
        except ValueError as error:
            raise UserError(
                f"{self._option}={path} is in no numbered block, at whose end editor '{self.registered_name}' would "
                f"optimise values"
            ) from error
