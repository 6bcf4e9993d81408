"""Editable models: a network, its tokenizer, the layer to edit, and the way editors act on that layer."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grace_bench.models.encoding import EncodedBatch, last_token
from grace_bench.models.engine.engine import Engine, EngineName, Repeated, make_engine
from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.common.untrusted import check_model_folder
from grace_bench.models.engine.pruning import CACHES
from grace_bench.models.tasks.base import ItemScore, Task, get_task
from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest, TaskName
from grace_bench.models.zoo import default_layer, resolve_model

Replacement = Literal["replace_last", "replace_all", "replace_prompt"]
DeviceMap = str | Mapping[str, str | int]
Decision = TypeVar("Decision")
TextEncoder = Callable[[Sequence[str]], dict[str, Tensor]]

_TINY_MODEL_PARAMETERS = 20_000_000
_PASSING = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"})
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass
class QueryState:
    """What is known of a prompt and the tokens generated after it, and what the editor's hook noted of them.

    Attributes:
        query: (B,) positions in the edited layer's sequence, -1 for the last; None until a prompt is read whose query
            nobody named.
        is_open: Whether the forward passes that follow belong to it: those of one generation, or of the harness.
        step: 0 while the prompt is read, n at the n-th forward pass after it.
        length: Length of the prompt in the edited layer's sequence; 0 until the layer was called.
        n_given: Tokens of the prompt, where generation named them.
        is_whole: Whether the prompt was read in one piece, none of it from a cache.
        entry: (B,) long, the codebook entry that answered each row, -1 for none.
        distance: (B,) distance of each row's query to the nearest entry.
        contested: (B,) bool, whether the query lies in balls of two different labels.
        activation: (B, D_in) what entered the layer at the queries, where somebody asked for it.
        memo: What editors decided at the prompt (see `LayerCall.remember`).
    """

    query: Tensor | None = None
    is_open: bool = False
    step: int = -1
    length: int = 0
    n_given: int | None = None
    is_whole: bool = True
    entry: Tensor | None = None
    distance: Tensor | None = None
    contested: Tensor | None = None
    activation: Tensor | None = None
    memo: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerCall:
    """One call of the edited layer, as an editor sees it.

    Attributes:
        input: (B, T, D_in) activations that enter the layer.
        output: (B, T, D_out) activations that leave it.
        position: (B,) long, each row's query position in the prompt.
        state: The state of the sequence the call belongs to.
    """

    input: Tensor
    output: Tensor
    position: Tensor
    state: QueryState

    @property
    def holds_prompt(self) -> bool:
        """Whether the activations begin with the prompt's: also after it, where generation keeps no cache."""
        return self.state.step == 0 or self.output.shape[1] == self.state.length + self.state.step

    def remember(self, name: str, decide: Callable[[], Decision]) -> Decision:
        """Returns what `decide` gave when the prompt was read; it holds for every token generated after it.

        Args:
            name: What is decided, unique among the editors of the model.
            decide: Decides from the call; asked once a sequence.

        Raises:
            UserError: If the prompt was not read in one piece, so that its query is not known.
        """
        state, n_read = self.state, self.output.shape[1]
        in_one_piece = state.is_whole and (self.holds_prompt or n_read == 1)
        if not in_one_piece or (state.step > 0 and name not in state.memo):
            raise UserError(
                "an edited model decides at its prompt which edit applies, so it reads a prompt whole: start without a "
                "cache, prefill in one chunk and decode token by token"
            )
        if name not in state.memo:
            state.memo[name] = decide()
        decision: Decision = state.memo[name]
        return decision

    @property
    def query(self) -> Tensor:
        """(B, D_in) the activations at the query positions."""
        return self.input[torch.arange(len(self.position), device=self.position.device), self.position]

    @property
    def output_at_query(self) -> Tensor:
        """(B, D_out) what the layer gives at the query positions."""
        return self.output[torch.arange(len(self.position), device=self.position.device), self.position]

    def replace(self, values: Tensor, rows: Tensor, where: Replacement) -> Tensor:
        """Returns the output with `values` written over it in some rows.

        Args:
            values: (B, D_out) one value a row.
            rows: (B,) bool, which rows are written.
            where: The query position, every position, or those before the query (GRACE, section 3.3). Tokens generated
                after the prompt are only reached by `replace_all`.
        """
        steps = torch.arange(self.output.shape[1], device=self.output.device)
        if where == "replace_all":
            mask = torch.ones_like(self.output[..., 0], dtype=torch.bool)
        elif not self.holds_prompt:
            return self.output
        elif where == "replace_last":
            mask = steps == self.position[:, None]
        else:
            mask = steps < self.position[:, None]
        mask = mask & rows[:, None]
        return torch.where(mask[..., None], values[:, None].to(self.output.dtype), self.output)


class EditableModel(nn.Module):
    """A model whose answers can be edited at one layer.

    The wrapped module stays in eval mode, on its device and in its dtype: `train()` and `to()` do nothing, because
    Avalanche calls both before every experience while editing and evaluating happen with dropout off.

    Args:
        module: The network. Its forward pass takes what `encode` gives and returns logits, or an object with `logits`.
        layer: Dotted path of the module to edit, such as `transformer.h.8.mlp.c_fc`.
        task: The task, by name or as a `Task`.
        tokenizer: A Hugging Face tokenizer; None if `encode` is given.
        encode: For models without a tokenizer: turns B texts into the keyword arguments of the forward pass.
        name: The name that results carry.
        engine: `exact`, or `plain` to compute every pass whole.

    Raises:
        UserError: If there is no such layer, with the closest one that exists.
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
        super().__init__()
        self.module = module.eval()
        self.layer_name = layer
        self.task: Task = get_task(task) if isinstance(task, str) else task
        self.tokenizer = tokenizer
        self.encode = encode
        self.name = name or type(module).__name__
        self._layer = self.find_layer(layer)
        self._bypassed = False
        self._state = QueryState()
        self.last_state = self._state
        """The state of the last sequence that ended."""
        self._depth = 0
        self._continued: WeakKeyDictionary[Any, QueryState] = WeakKeyDictionary()
        # Only the outermost call counts, which need not be the whole model's: a generation calls an encoder by itself.
        for part in self._path:
            names = tuple(inspect.signature(part.forward).parameters)
            part.register_forward_pre_hook(partial(self._begin_pass, names), with_kwargs=True)
            part.register_forward_hook(self._end_pass, with_kwargs=True, always_call=True)
        if callable(getattr(module, "generate", None)):
            self._generate: Callable[..., Any] = module.generate  # type: ignore[assignment]
            module.generate = self._generate_sequence  # type: ignore[assignment]
        module.requires_grad_(False)
        self.engine: Engine = make_engine(engine, self)

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
        tokenizer: bool = True,
        engine: EngineName = "exact",
    ) -> Self:
        """Loads a Hugging Face model by short name, hub id or folder.

        Args:
            name_or_path: A short name (`grace-bench list models`), a hub id, or a folder.
            layer: Dotted path of the layer to edit; None for the model's own where one is known.
            task: What the model is used for; decides the head that is loaded.
            dtype: `float32`, `bfloat16` or `float16`.
            device: `cpu`, `cuda`, `mps`, or `auto` for the fastest that is there.
            device_map: Spreads the weights over several devices and the disk instead: what transformers'
                `from_pretrained` takes, such as `auto`. Needs accelerate.
            tokenizer: Whether to load the tokenizer; without it the model takes token ids only.
            engine: `exact`, or `plain` to compute every pass whole.

        Raises:
            UserError: If the model cannot be found or loaded, or the layer is missing or unknown.
        """
        chosen = get_task(task) if isinstance(task, str) else task
        source = resolve_model(str(name_or_path))
        target = pick_device(device)
        precision = _pick_dtype(dtype)
        if device_map is not None:
            _check_device_map(device_map, device)
        if source.stream and get_task(source.stream.task).auto_class != chosen.auto_class:
            raise UserError(
                f"model={name_or_path} was trained for {source.stream.task} (stream {source.stream.registered_name}), "
                f"not for {chosen.name}"
            )
        weights, vocabulary = source.fetch()
        for folder in dict.fromkeys((weights, vocabulary)):
            check_model_folder(folder)
        custom = source.stream.load_model(Path(weights)) if source.stream else None
        if custom is None:
            module, encode = _load_module(weights, chosen, precision, device_map), None
        elif device_map is None:
            module, encode = custom
        else:
            raise UserError(f"model={name_or_path} is no transformers model: it takes device=, not device_map=")
        return cls(
            module if device_map is not None else module.to(device=target, dtype=precision),
            layer=layer or source.layer or default_layer(module),
            task=chosen,
            tokenizer=_load_tokenizer(vocabulary) if tokenizer and custom is None else None,
            encode=encode,
            name=source.name,
            engine=engine,
        )

    @property
    def layer(self) -> nn.Module:
        """The module that is edited."""
        return self._layer

    @property
    def _path(self) -> list[nn.Module]:
        """The modules around the edited layer, from the outermost to the layer itself."""
        names = self.layer_name.split(".")
        return [self.module.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]

    def find_layer(self, path: str) -> nn.Module:
        """Returns the module at a dotted path.

        Raises:
            UserError: If there is none, with the closest one that exists.
        """
        layers = dict(self.module.named_modules())
        if path in layers and path:
            return layers[path]
        if path.endswith((".weight", ".bias")):
            raise UserError(f"layer={path!r} names a parameter; name its module, {path.rpartition('.')[0]!r}")
        raise UserError(f"layer={path!r} is not in the model{did_you_mean(path, filter(None, layers))}")

    @property
    def device(self) -> torch.device:
        """Where inputs go: to the embedding, or to the first weights."""
        embed = getattr(self.module, "get_input_embeddings", None)
        return _device_of([embed() if embed else self.module, self.module])

    @property
    def layer_device(self) -> torch.device:
        """Where the edited layer computes, which need not be where inputs go."""
        return _device_of([*reversed(self._path), self.module])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights, of the first that are floating-point."""
        return _dtype_of([self.module])

    @property
    def layer_dtype(self) -> torch.dtype:
        """The dtype that the edited layer computes in, which need not be that of every layer."""
        return _dtype_of(list(reversed(self._path)))

    @property
    def config(self) -> Any:
        """The Hugging Face configuration, or None for another module."""
        return getattr(self.module, "config", None)

    @cached_property
    def layer_in_decoder(self) -> bool:
        """Whether the edited layer belongs to the decoder of an encoder-decoder model."""
        if not getattr(self.config, "is_encoder_decoder", False):
            return False
        return all(part is not self._layer for part in self.module.get_encoder().modules())  # type: ignore[operator]

    @cached_property
    def max_length(self) -> int | None:
        """The longest input in tokens, where the architecture or the tokenizer has a limit."""
        for attribute in ("max_position_embeddings", "n_positions"):
            limit = getattr(self.config, attribute, None)
            # T5 keeps an n_positions that its relative attention does not obey.
            if isinstance(limit, int) and not hasattr(self.config, "relative_attention_num_buckets"):
                return limit - 2 if self.config.model_type in {"roberta", "xlm-roberta", "camembert"} else limit
        # A tokenizer without a limit of its own says 1e30.
        limit = getattr(self.tokenizer, "model_max_length", None)
        return int(limit) if limit is not None and limit < 1e6 else None

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """What the module's forward pass takes."""
        return frozenset(inspect.signature(self.module.forward).parameters)

    def train(self, mode: bool = True) -> Self:
        """Does nothing: the module stays in eval mode."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Does nothing: device and dtype are fixed when the model is made."""
        return self

    def logits(self, batch: EncodedBatch, **arguments: Any) -> Tensor:
        """Runs the model on a batch and returns its logits, (B, C) or (B, T, V).

        Args:
            batch: The inputs.
            **arguments: What else the module's forward pass takes.
        """
        inputs = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in batch.inputs.items()
        }
        if "position_ids" in inputs and "position_ids" not in self._accepted:
            inputs = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        with self.querying(batch.query):
            outputs = self.module(**inputs, **arguments)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        return logits.to(batch.query.device)

    def labelled_logits(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:
        """Runs the model on a batch for its labels' sake.

        Returns:
            The logits of all labelled positions, and maybe others, and the batch with the labels aligned with them.
        """
        return self.engine.labelled(batch)

    def answer(self, prompts: Sequence[str]) -> list[str | int]:
        """Returns what the model, as edited so far, answers: texts, or label ids.

        Raises:
            UserError: For language modelling, where nothing is asked.
        """
        with torch.no_grad():
            return self.task.answers(self, prompts)

    def ask(self, prompts: Sequence[str], *, progress: Progress | None = None) -> list[str | int]:
        """Returns what `answer` does, for any number of prompts, batched as `score` batches them.

        Args:
            prompts: The questions.
            progress: Called after every batch.

        Raises:
            UserError: For language modelling, where nothing is asked.
        """
        return self.task.ask(self, prompts, progress=progress)

    def score(self, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests, in the order given; batches hold inputs of like length."""
        return self.task.score(self, requests)

    def score_batch(self, requests: Sequence[EditRequest]) -> list[ItemScore]:
        """Scores the model's answers to requests of like length, in one batch."""
        return self.task.score_batch(self, requests)

    def score_batches(self, requests: Sequence[EditRequest]) -> Iterator[list[int]]:
        """Yields the indices of the requests that `score` scores in one batch."""
        return self.task.together(self, requests)

    def size(self, prompt: str, targets: Iterable[str | int] = ()) -> int:
        """Returns the most tokens that a forward pass reads of a prompt with one of the targets."""
        return self.task.size(self, prompt, targets)

    def count_labels(self, prompt: str) -> int | None:
        """Returns how many labels the model has for a prompt; None for tasks that answer in text."""
        return self.task.count_labels(self, prompt)

    def check_targets(self, requests: Iterable[EditRequest]) -> None:
        """Makes sure that the model can give every target.

        Raises:
            UserError: If one is a class that the model does not have, naming the request.
        """
        self.task.check_targets(self, requests)

    def repeated(self, batch: EncodedBatch, *, first_changed: int = 0) -> Repeated:
        """Makes ready to run a batch many times, while only what the edited layer gives, or its weights, may change.

        Args:
            batch: The inputs and their labels.
            first_changed: The first position at which the layer's output may change; 0 where its weights do.
        """
        return self.engine.repeated(batch, first_changed=first_changed)

    @contextmanager
    def bypassing(self) -> Iterator[None]:
        """Lets the layer answer by itself inside the context: interceptors are not asked."""
        outer, self._bypassed = self._bypassed, True
        try:
            yield
        finally:
            self._bypassed = outer

    @contextmanager
    def querying(self, query: Tensor | None) -> Iterator[QueryState]:
        """Makes the forward passes inside one sequence: a prompt, and the tokens generated after it.

        Args:
            query: (B,) where the prompt is queried, in the edited layer's sequence. None takes the last real token, and
                for a layer in a decoder the first.
        """
        outer, self._state = self._state, QueryState(query=query, is_open=True)
        try:
            yield self._state
        finally:
            self.last_state, self._state = self._state, outer

    @torch.no_grad()
    def layer_call(self, batch: EncodedBatch) -> LayerCall:
        """Runs a batch and returns what entered and left the layer itself, before any editor changed it.

        Raises:
            UserError: If the layer takes no part in the model's answers, or works on something else than activations.
        """
        seen: list[LayerCall] = []

        def observe(call: LayerCall) -> Tensor:
            seen.append(call)
            return call.output

        handle = self.intercept(observe, first=True)
        try:
            self.engine.reach_layer(batch)
        finally:
            handle.remove()
        if not seen:
            raise UserError(f"layer={self.layer_name} is never called: name a module inside it")
        return seen[0]

    def queries(self, prompts: Sequence[str], targets: Sequence[str | int] | None = None) -> Tensor:
        """Returns the (n, D_in) float32 activations that enter the edited layer at the queries of n prompts.

        Args:
            prompts: n texts, at least one.
            targets: n texts that follow them; only needed where a prompt is empty, because its target is running text.

        Raises:
            UserError: As `layer_call`.
        """
        sizes = [
            self.task.size(self, prompt, targets[i : i + 1] if targets else ()) for i, prompt in enumerate(prompts)
        ]
        rows: dict[int, Tensor] = {}
        for chunk in self.task.batches(sizes):
            chosen = [prompts[index] for index in chunk], targets and [targets[index] for index in chunk]
            rows.update(zip(chunk, self.layer_call(self.encode_batch(*chosen)).query.float(), strict=True))
        return torch.stack([rows[index] for index in range(len(prompts))])

    def intercept(self, answer: Callable[[LayerCall], Tensor], *, first: bool = False) -> Any:
        """Lets `answer` decide what the edited layer gives.

        Args:
            answer: Takes a `LayerCall` and returns its (B, T, D_out) output, changed or not.
            first: Whether it comes before the interceptors that are already there.

        Returns:
            A handle; `handle.remove()` gives the layer back.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            if self._bypassed and not first:
                return None
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            leaving = output[0] if isinstance(output, tuple) else output
            if not (_are_activations(given) and _are_activations(leaving)):
                raise UserError(f"layer={self.layer_name} does not turn activations into activations")
            state = self._state
            assert state.query is not None
            n_rows = len(state.query)
            inputs, outputs = _as_sequence(given, n_rows), _as_sequence(leaving, n_rows)
            state.length = state.length or outputs.shape[1]
            query = state.query.to(outputs.device)
            position = torch.where(query < 0, query + state.length, query).clamp(max=state.length - 1)
            changed = answer(LayerCall(inputs, outputs, position, state)).reshape(leaving.shape)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return self._layer.register_forward_hook(hook, with_kwargs=True, prepend=first)

    def _begin_pass(self, names: Sequence[str], _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = _cache_in(given)
        n_cached = 0 if cache is None else int(cache.get_seq_length())
        if not self._state.is_open:
            # Called from outside: what goes on from the cache of a known prompt belongs to it, all else is a prompt.
            known = self._continued.get(cache) if n_cached else None
            self._state = known or QueryState(is_whole=not n_cached)
        state = self._state
        state.step += 1
        if state.step:
            return
        tokens = given.get("input_ids")
        is_piece = state.n_given is not None and isinstance(tokens, Tensor) and tokens.shape[1] != state.n_given
        state.is_whole = not n_cached and not is_piece
        if state.query is None:
            state.query = self._last_tokens(given)

    def _end_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._depth -= 1
        cache = _cache_in(output)
        if not self._depth and cache is not None and not self._state.is_open:
            self._continued[cache] = self._state

    def _last_tokens(self, given: Mapping[str, Any]) -> Tensor:
        """(B,) each row's last real token, where the prompt of a call from outside is queried."""
        mask = given.get("attention_mask")
        n_rows = next((len(value) for value in given.values() if isinstance(value, Tensor) and value.dim()), 1)
        if self.layer_in_decoder:
            return torch.zeros(n_rows, dtype=torch.long)
        return last_token(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else torch.full((n_rows,), -1)

    def _generate_sequence(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own `generate`, all of whose forward passes belong to one prompt."""
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        with nullcontext(self._state) if self._state.is_open else self.querying(None) as state:
            if isinstance(given, Tensor) and not self.layer_in_decoder:
                state.n_given = given.shape[1]
            return self._generate(*args, **kwargs)

    def encode_batch(
        self, prompts: Sequence[str], targets: Sequence[str | int] | None = None, *, side: Any = None
    ) -> EncodedBatch:
        """Encodes prompts, and targets if given, as the task wants them, on the model's device."""
        return self.task.encode(self, prompts, targets, side=side).to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all weights and buffers, taken when first asked for and kept; the name of the unedited model."""
        return hash_tensors(_Weights(self.module))

    @cached_property
    def config_fingerprint(self) -> str:
        """SHA-256 of what else decides the answers: the configuration and the tokenizer, if it has any."""
        config: Any = getattr(self.module, "config", None)
        parts = {
            # Only what is no default: another transformers knows other options.
            "config": _lasting(config.to_diff_dict()) if hasattr(config, "to_diff_dict") else None,
            "tokenizer": None if self.tokenizer is None else _serialised(self.tokenizer),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _lasting(config: Any) -> Any:
    """A configuration without what differs by where and with what it was loaded; the dtype is told apart by itself."""
    if not isinstance(config, Mapping):
        return config
    return {str(name): _lasting(value) for name, value in config.items() if name not in _PASSING}


def _serialised(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"vocabulary": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    # Every call sets these anew.
    passing = ("truncation", "padding")
    return {
        **{name: value for name, value in content.items() if name not in passing},
        "special_tokens": tokenizer.special_tokens_map,
        "clean_up": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "longest": tokenizer.model_max_length,
    }


class _Weights(Mapping[str, Tensor]):
    """A module's state dict, of which offloaded tensors are read one at a time when they are asked for."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._state = module.state_dict()

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._state[name]
        if not tensor.is_meta:
            return tensor
        from accelerate.utils import align_module_device

        path, _, attribute = name.rpartition(".")
        owner = self._module.get_submodule(path)
        with align_module_device(owner, torch.device("cpu")):
            loaded: Tensor = getattr(owner, attribute)
            return loaded.detach().clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of named tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pick_device(device: str | torch.device) -> torch.device:
    """Returns the device by name; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        UserError: If torch does not know the device or it is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        # A device without storage, such as `meta`, cannot give the number back.
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"device={device}: {str(error).splitlines()[0]}") from error
    return chosen


def _check_device_map(device_map: DeviceMap, device: str | torch.device) -> None:
    if device != "auto":
        raise UserError(f"device={device} and device_map={device_map} exclude each other")
    if find_spec("accelerate") is None:
        raise UserError(f"device_map={device_map} needs accelerate: pip install 'grace-bench[large]'")


def _device_of(candidates: Sequence[nn.Module]) -> torch.device:
    """Where the first module that has weights computes."""
    for part in (part for candidate in candidates for part in candidate.modules()):
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
            # accelerate offloads weights between calls and knows where they will be.
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu")


def _dtype_of(candidates: Sequence[nn.Module]) -> torch.dtype:
    """The dtype of the first module that has floating-point weights; what holds a byte each is quantised."""
    weights = (weight for candidate in candidates for weight in candidate.parameters())
    return next((w.dtype for w in weights if w.is_floating_point() and w.element_size() > 1), torch.float32)


def pick_threads(model: nn.Module, threads: int | Literal["auto"]) -> int:
    """Returns how many threads torch should use: one for tiny models, which spend more on handing work out.

    Raises:
        UserError: If there are not as many cores.
    """
    if threads != "auto":
        most = os.cpu_count() or 1
        if not 1 <= threads <= most:
            raise UserError(f"threads={threads} should be auto or from 1 to {most}")
        return threads
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1 if n_parameters < _TINY_MODEL_PARAMETERS else torch.get_num_threads()


def _pick_dtype(dtype: str | torch.dtype) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in known:
        raise UserError(f"dtype={dtype!r} is not known{did_you_mean(dtype, known)} (there are: {', '.join(known)})")
    return known[dtype]


def _load_module(path: str, task: Task, dtype: torch.dtype, device_map: DeviceMap | None) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with _loading(path):
        model, loading = getattr(transformers, task.auto_class).from_pretrained(
            path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map=device_map if device_map is None or isinstance(device_map, str) else dict(device_map),
        )
    # transformers fills in what is missing at random.
    lacking = sorted({*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])})
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"model={path}: the checkpoint lacks {lacking[0]}{more}, which {task.name} needs")
    # A checkpoint's own sampling settings would make answers differ between models for no reason of theirs.
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=getattr(model.config, "decoder_start_token_id", None),
        do_sample=False,
        num_beams=1,
    )
    loaded: nn.Module = model
    return loaded


def _load_tokenizer(path: str) -> Any:
    import transformers

    # transformers makes up a vocabulary where a folder has none.
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in _VOCABULARIES):
        raise UserError(f"model={path}: the folder holds no tokenizer ({', '.join(_VOCABULARIES)})")
    with _loading(path):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _loading(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # A broken folder fails in as many ways as there are libraries that read it.
        raise UserError(f"model={path}: cannot be loaded ({reason_of(error)})") from error


def _are_activations(value: Any) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cache_in(values: Any) -> Any:
    """The keys and values among what a forward pass is given or gives, None without."""
    if not isinstance(values, Mapping):
        return None
    return next((values[name] for name in CACHES if values.get(name) is not None), None)


def _as_sequence(tensor: Tensor, n_rows: int) -> Tensor:
    """Views a layer's activations as (B, T, D); a layer outside a sequence has T = 1."""
    if tensor.dim() == 3:
        return tensor
    return tensor.reshape(n_rows, -1, tensor.shape[-1])
