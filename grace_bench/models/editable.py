"""The editable model: a network with a task and an engine, as editors, runs and users see it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.errors import UserError
from grace_bench.models.calls import LayerCall, Replacement
from grace_bench.models.encoding import EncodedBatch, PaddingSide, check_texts
from grace_bench.models.engine.engine import Engine, EngineName, Repeated, make_engine
from grace_bench.models.fingerprint import hash_configuration, hash_weights
from grace_bench.models.loading import DeviceMap, Quantisation, load_pretrained
from grace_bench.models.network import Network, TextEncoder
from grace_bench.models.tasks.base import ItemScore, Task
from grace_bench.models.tasks.lookup import get_task
from grace_bench.models.tokens import PromptTokenizer

__all__ = ["DeviceMap", "EditableModel", "LayerCall", "Quantisation", "Replacement"]


class EditableModel(Network):
    """A model whose answers can be edited at one layer.

    The module is put into eval mode and its weights stop requiring gradients. Hooks are installed only when an editor
    intercepts the layer, and removed by `editor.detach()` or `release()`. So several models can share one module, say
    one for each layer of a study. An editor acts on the module: until it is detached, all of them answer as edited.

    Args:
        module: The network. Its forward pass takes what `encode` returns, and returns logits or an object with
            `logits`.
        layer: Dotted path of the module to edit, such as `transformer.h.8.mlp.c_fc`.
        task: The task, by name or as a `Task`.
        tokenizer: A Hugging Face tokenizer; None if `encode` is given.
        encode: For models without a tokenizer: turns B texts into keyword arguments of the forward pass.
        name: The name used in results.
        engine: `exact`, or `plain` to compute every pass in full.

    Attributes:
        hub_id: The hub id that `from_pretrained` loaded the model by; None for a folder and for a caller's own module.
        generation_config: The checkpoint's own settings of generation, which `from_pretrained` puts aside, or else the
            module's.

    Raises:
        UserError: If there is no such layer; names the closest one.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        layer: str,
        task: TaskName | Task,
        tokenizer: Any = None,
        encode: TextEncoder | None = None,
        name: str | None = None,
        engine: EngineName = "exact",
    ) -> None:
        super().__init__(module, layer=layer, tokenizer=tokenizer, encode=encode, name=name)
        self.task: Task = get_task(task) if isinstance(task, str) else task
        self.engine: Engine = make_engine(engine, self)
        self.hub_id: str | None = None
        self.generation_config: Any = getattr(module, "generation_config", None)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        layer: str | None = None,
        task: TaskName | Task,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "auto",
        device_map: DeviceMap | None = None,
        load_in: Quantisation | None = None,
        tokenizer: bool = True,
        engine: EngineName = "exact",
    ) -> Self:
        """Loads a Hugging Face model by short name, hub id or folder.

        Args:
            name_or_path: A short name (`grace-bench list models`), a hub id, or a folder.
            layer: Dotted path of the layer to edit; None for the layer known for the model.
            task: The use of the model; determines which head is loaded.
            dtype: `float32`, `bfloat16` or `float16`.
            device: `cpu`, `cuda`, `mps`, or `auto` for the fastest available.
            device_map: Spreads the weights over several devices and the disk instead: an argument of transformers'
                `from_pretrained`, such as `auto`. Needs accelerate.
            load_in: `8bit` or `4bit` to quantise linear modules while loading; computing is in `dtype`. Needs
                bitsandbytes. A checkpoint that is quantised already loads as it is.
            tokenizer: Whether to load the tokenizer; without it the model takes token ids only.
            engine: `exact`, or `plain` to compute every pass in full.

        Raises:
            UserError: If the model cannot be found or loaded, or the layer is missing or unknown.
        """
        chosen = get_task(task) if isinstance(task, str) else task
        loaded = load_pretrained(
            str(name_or_path),
            layer=layer,
            task=chosen,
            dtype=dtype,
            device=device,
            device_map=device_map,
            load_in=load_in,
            tokenizer=tokenizer,
        )
        model = cls(
            loaded.module,
            layer=loaded.layer,
            task=chosen,
            tokenizer=loaded.tokenizer,
            encode=loaded.encode,
            name=loaded.name,
            engine=engine,
        )
        model.hub_id, model.generation_config = loaded.hub_id, loaded.generation_config
        return model

    @contextmanager
    def serving(self, task: Task, *, engine: EngineName, memory_mb: int | None = None) -> Iterator[Self]:
        """Gives the model another task and engine inside the context; restores its own afterwards.

        Args:
            task: The task.
            engine: The engine's name.
            memory_mb: Memory limit for recordings between evaluations; None for a quarter of the free memory.

        Raises:
            UserError: If the model cannot serve the task, naming both tasks and what it lacks.
        """
        lacking = task.misfit(self)
        if lacking is not None:
            raise UserError(f"model {self.name}, made for {self.task.name}, cannot serve {task.name}: needs {lacking}")
        before = self.task, self.engine
        self.task, self.engine = task, make_engine(engine, self, memory_mb=memory_mb)
        try:
            yield self
        finally:
            self.task, self.engine = before

    # Answers and scores.

    def answer(self, prompts: Sequence[str]) -> list[str | int]:
        """Returns the model's answers, as edited so far, in one batch: texts, or label ids.

        Raises:
            UserError: For language modelling, which has no questions.
        """
        check_texts("prompts", prompts)
        with torch.no_grad():
            return self.task.answers(self, prompts) if prompts else []

    def ask(self, prompts: Sequence[str], *, progress: Progress | None = None) -> list[str | int]:
        """Like `answer`, for any number of prompts, batched as in `score`.

        Args:
            prompts: The questions.
            progress: Called after every batch.

        Raises:
            UserError: For language modelling, which has no questions.
        """
        check_texts("prompts", prompts)
        return self.task.ask(self, prompts, progress=progress)

    def score(self, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests, in the order given; batches hold inputs of similar length."""
        _check_requests(requests)
        return self.task.score(self, requests)

    def score_batch(self, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests of similar length, in one batch."""
        _check_requests(requests)
        return self.task.score_batch(self, requests) if requests else []

    def score_batches(self, requests: Sequence[EditRequest]) -> Iterator[list[int]]:
        """Yields the indices of the requests that `score` puts into one batch."""
        _check_requests(requests)
        return self.task.together(self, requests)

    @property
    def tokens(self) -> PromptTokenizer:
        """The tokenizer, used in the task's format.

        Raises:
            UserError: If the format needs a chat template that the tokenizer does not have.
        """
        return self.task.tokens(self)

    def size(self, prompt: str, targets: Iterable[str | int] = ()) -> int:
        """Returns the maximum number of tokens in a forward pass of a prompt with any of the targets."""
        return self.task.size(self, prompt, targets)

    def count_labels(self, prompt: str) -> int | None:
        """Returns the number of labels that the model has for a prompt; None for tasks that answer in text."""
        return self.task.count_labels(self, prompt)

    def check_targets(self, requests: Iterable[EditRequest]) -> None:
        """Makes sure that the model can give every target.

        Raises:
            UserError: If a target is a class that the model does not have, naming the request.
        """
        self.task.check_targets(self, requests)

    # Batches and passes.

    def encode_batch(
        self, prompts: Sequence[str], targets: Sequence[str | int] | None = None, *, side: PaddingSide = "right"
    ) -> EncodedBatch:
        """Encodes prompts as the task does, on the model's device.

        Args:
            prompts: B texts, at least one.
            targets: B texts or label ids, for losses; None for answering.
            side: The padding side.

        Raises:
            UserError: If the prompts are not a list of texts, or a target is a class that the model does not have.
        """
        return self.task.encode(self, prompts, targets, side=side)

    def pads(self, batch: EncodedBatch, *, generates: bool = False) -> bool:  # noqa: D102
        pads = super().pads(batch, generates=generates)
        if not pads:
            self.engine.note("batches hold texts of equal length: padding would change the answers")
        return pads

    def labelled_logits(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:
        """Runs a batch and computes only what its labels need.

        Returns:
            Logits that cover all labelled positions, and the batch with labels aligned to them.
        """
        return super().labelled_logits(batch) if batch.networks else self.engine.labelled(batch)

    def repeated(self, batch: EncodedBatch, *, first_changed: int = 0, records: bool = True) -> Repeated:
        """Prepares many runs of a batch, between which only the edited layer's output or weights change.

        The model itself answers every row.

        Args:
            batch: The inputs and their labels.
            first_changed: The first position at which the layer's output may change; 0 if its weights do.
            records: Whether there is memory to record what lies before the layer.
        """
        return self.engine.repeated(batch.own, first_changed=first_changed, records=records)

    @torch.no_grad()
    def layer_call(self, batch: EncodedBatch) -> LayerCall:
        """Runs a batch and returns the input and output of the layer itself, before any editor changed it.

        Raises:
            UserError: If the layer is never called, or does not map activations to activations.
        """
        seen: list[LayerCall] = []

        def observe(call: LayerCall) -> Tensor:
            # The rest of a pass may write into either tensor: Falcon adds its attention to the output of its MLP.
            seen.append(replace(call, input=call.input.clone(), output=call.output.clone()))
            return call.output

        interceptor = self.intercept(observe, first=True)
        try:
            self.engine.reach_layer(batch.own)
        finally:
            interceptor.remove()
        if not seen:
            raise UserError(f"layer={self.layer_name} is never called: name a module inside it")
        return seen[0]

    def queries(self, prompts: Sequence[str], targets: Sequence[str | int] | None = None) -> Tensor:
        """Returns the (n, D_in) float32 inputs of the edited layer at the queries of n prompts.

        Args:
            prompts: n texts, at least one.
            targets: n texts that follow them; needed only for empty prompts, whose targets are running text.

        Raises:
            UserError: If there are no prompts, or as in `layer_call`.
        """
        check_texts("prompts", prompts)
        if not prompts:
            raise UserError("prompts=[] should hold at least one text")
        rows: dict[int, Tensor] = {}
        for chunk in self.query_batches(prompts, targets):
            chosen = [prompts[index] for index in chunk], targets and [targets[index] for index in chunk]
            found = self.task.by_length(
                self, self.encode_batch(*chosen).own, lambda _, batch: list(self.layer_call(batch).query.float())
            )
            rows.update(zip(chunk, found, strict=True))
        return torch.stack([rows[index] for index in range(len(prompts))])

    def query_batches(self, prompts: Sequence[str], targets: Sequence[str | int] | None = None) -> Iterator[list[int]]:
        """Yields the indices of the prompts that `queries` puts into one batch."""
        sizes = [self.size(prompt, targets[i : i + 1] if targets else ()) for i, prompt in enumerate(prompts)]
        return self.task.batches(sizes)

    # What the model is.

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all weights and buffers, computed at first use: the identity of the unedited model."""
        return hash_weights(self.module)

    @cached_property
    def config_fingerprint(self) -> str:
        """SHA-256 of the configuration and the tokenizer, which also determine the answers."""
        return hash_configuration(self.config, self.tokenizer)


def _check_requests(requests: Sequence[EditRequest]) -> None:
    if not isinstance(requests, Sequence) or not all(isinstance(request, EditRequest) for request in requests):
        raise UserError("requests should be a list of EditRequest")
