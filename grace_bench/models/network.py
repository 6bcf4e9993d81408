"""A network with a tokenizer and one layer to edit: the interface that tasks and engines use."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from grace_bench.errors import UserError, did_you_mean
from grace_bench.models.calls import (
    LayerCall,
    ModuleCall,
    QueryState,
    activations_of,
    layer_call_of,
    module_call_of,
)
from grace_bench.models.encoding import EncodedBatch
from grace_bench.models.limits import first_position, longest_input, longest_target
from grace_bench.models.padding import BEGIN_TOKENS, embedding_of, padded_for, with_known_padding
from grace_bench.models.sequences import SequenceTracker

TextEncoder = Callable[[Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Reading:
    """What is read in place of a prompt, and which network reads it.

    Attributes:
        text: The text.
        network: The network that reads and answers it; None for the one that was asked. It has the same tokenizer,
            the same vocabulary, and reads texts that are as long.
    """

    text: str
    network: "Network | None" = None


PromptReader = Callable[[Sequence[str]], Sequence[str | Reading]]
"""Takes n prompts and returns the n texts that are read in their place, as a `Reading` if another network answers."""
_READERS = "_grace_bench_readers"
"""The attribute of a module that holds its prompt interceptors; like hooks, they are the module's."""


class Network(nn.Module):
    """A module whose answers can be changed at one layer.

    The module is put into eval mode and stays there, on its device and in its dtype: `train()` and `to()` do nothing,
    because Avalanche calls both before every experience, while editing and evaluating happen with dropout off. Its
    weights stop requiring gradients.

    Hooks are installed on the module by the first `intercept` and removed with the last interceptor. So any number of
    networks can share one module, at the same or different layers, in turn or at the same time.

    Args:
        module: The module. Its forward pass takes what `encode` returns, and returns logits or an object with `logits`.
        layer: Dotted path of the module to edit, such as `transformer.h.8.mlp.c_fc`.
        tokenizer: A Hugging Face tokenizer; None if `encode` is given. If its padding token is not in the module's
            embedding, a copy with another one is used.
        encode: For modules without a tokenizer: turns B texts into keyword arguments of the forward pass.
        name: The name used in results and messages; the module's class by default.

    Raises:
        UserError: If there is no such layer; names the closest one.
    """

    layer: nn.Module
    """The edited module."""

    def __init__(
        self,
        module: nn.Module,
        *,
        layer: str,
        tokenizer: Any = None,
        encode: TextEncoder | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self.module = module.eval()
        self.layer_name = layer
        self.tokenizer = with_known_padding(tokenizer, module)
        self.encode = encode
        self.name = name or type(module).__name__
        self.layer = self.find_layer(layer)
        self.n_labels: int | None = None
        """The number of classes, once a classification task has counted them."""
        self._pads: dict[str, bool] = {}
        self._bypassed = False
        self._interceptors: set[Interceptor] = set()
        self._prompt_interceptors: set[PromptInterceptor] = set()
        self._tracker = SequenceTracker(self._path, queries_start=self.layer_in_decoder)
        module.requires_grad_(False)

    def find_layer(self, path: str, *, option: str = "layer") -> nn.Module:
        """Returns the module at a dotted path.

        Args:
            path: The path.
            option: The option that names it, for messages.

        Raises:
            UserError: If there is none; names the closest one.
        """
        layers = dict(self.module.named_modules())
        if path in layers and path:
            return layers[path]
        if path.endswith((".weight", ".bias")):
            raise UserError(f"{option}={path!r} names a parameter; name its module, {path.rpartition('.')[0]!r}")
        raise UserError(f"{option}={path!r} is not in the model{did_you_mean(path, filter(None, layers))}")

    @property
    def _path(self) -> list[nn.Module]:
        """The modules around the edited layer, from the outermost to the layer itself."""
        names = self.layer_name.split(".")
        return [self.module.get_submodule(".".join(names[:n])) for n in range(len(names) + 1)]

    @property
    def config(self) -> Any:
        """The Hugging Face configuration; None for other modules."""
        return getattr(self.module, "config", None)

    @property
    def device(self) -> torch.device:
        """The device of the inputs: that of the embedding, or of the first weights."""
        return _device_of([embedding_of(self.module) or self.module, self.module])

    @property
    def layer_device(self) -> torch.device:
        """The device on which the edited layer computes; may differ from `device`."""
        return _device_of([*reversed(self._path), self.module])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point weights."""
        return _dtype_of([self.module])

    @property
    def layer_dtype(self) -> torch.dtype:
        """The dtype in which the edited layer computes; may differ from `dtype`."""
        return _dtype_of(list(reversed(self._path)))

    @cached_property
    def layer_in_decoder(self) -> bool:
        """Whether the edited layer belongs to the decoder of an encoder-decoder model."""
        if not getattr(self.config, "is_encoder_decoder", False):
            return False
        return all(part is not self.layer for part in self.module.get_encoder().modules())  # type: ignore[operator]

    @cached_property
    def max_length(self) -> int | None:
        """The longest input in tokens, if the configuration, a position table or the tokenizer sets a limit."""
        return longest_input(self.module, self.tokenizer)

    @cached_property
    def max_target_length(self) -> int | None:
        """The longest target of an encoder-decoder in tokens, end token included, if its decoder has a limit."""
        return longest_target(self.module)

    @cached_property
    def decoder_start(self) -> int:
        """The token with which the decoder of an encoder-decoder starts, in training and in generation.

        Raises:
            UserError: If neither the model nor the tokenizer names one.
        """
        named = [start_token(self.module), *(getattr(self.tokenizer, key, None) for key in BEGIN_TOKENS)]
        start = next((token for token in named if token is not None), None)
        if start is None:
            raise UserError(
                f"model {self.name} names no token for its decoder to start with: set decoder_start_token_id in its "
                "generation_config.json"
            )
        return start

    @cached_property
    def _accepted(self) -> frozenset[str]:
        """The argument names of the module's forward pass."""
        return frozenset(inspect.signature(self.module.forward).parameters)

    def train(self, mode: bool = True) -> Self:
        """Does nothing: the module stays in eval mode."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Does nothing: device and dtype are fixed when the model is made."""
        return self

    def logits(self, batch: EncodedBatch, **arguments: Any) -> Tensor:
        """Runs a batch and returns its logits, (B, C) or (B, T, V).

        Args:
            batch: The inputs.
            **arguments: Further arguments of the module's forward pass.
        """
        if batch.networks:
            return self._logits_by_network(batch)
        inputs = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in batch.inputs.items()
        }
        inputs = self._with_positions(inputs)
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        padded, padding = padded_for(self.module, inputs)
        with self.querying(batch.query), padding:
            outputs = self.module(**padded, **arguments)
        logits: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        return logits.to(batch.query.device)

    def _logits_by_network(self, batch: EncodedBatch) -> Tensor:
        """The logits of a batch of which other networks answer some rows."""
        parts = batch.by_network()
        logits = [(network or self).logits(batch.rows(rows).own) for network, rows in parts]
        order = torch.tensor([row for _, rows in parts for row in rows], device=logits[0].device)
        return torch.cat([part.to(order.device) for part in logits])[order.argsort()]

    def generation_inputs(self, batch: EncodedBatch) -> dict[str, Tensor]:
        """Returns the arguments of the module's `generate` for a batch of prompts."""
        inputs = self._with_positions(batch.inputs)
        # By itself, generate counts positions from 0.
        names = ("input_ids", "attention_mask", *(("position_ids",) if self._first_position else ()))
        return {name: inputs[name] for name in names if name in inputs}

    def _with_positions(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs with positions as the model counts them, or without, if it does not accept any."""
        given = dict(inputs)
        positions = given.pop("position_ids", None)
        if positions is not None and "position_ids" in self._accepted:
            given["position_ids"] = positions + self._first_position
        return given

    @cached_property
    def _first_position(self) -> int:
        return first_position(self.module)

    @contextmanager
    def greedy(self) -> Iterator[None]:
        """Puts the module's own settings of generation aside inside the context, except the decoder's start token.

        Sampling would make the answers of models incomparable, and a forced token is not forced on targets.
        """
        own = getattr(self.module, "generation_config", None)
        if own is None:
            yield
            return
        self.module.generation_config = self._greedy_config
        try:
            yield
        finally:
            self.module.generation_config = own

    @cached_property
    def _greedy_config(self) -> Any:
        is_encoder_decoder = getattr(self.config, "is_encoder_decoder", False)
        return greedy_config(self.decoder_start if is_encoder_decoder else None)

    def labelled_logits(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:
        """Runs a batch for its labels.

        Returns:
            Logits that cover all labelled positions, and the batch with labels aligned to them.
        """
        return self.logits(batch), batch

    def pads(self, batch: EncodedBatch, *, generates: bool = False) -> bool:
        """Whether each row of a batch is answered as if it were alone, whatever padding it has.

        The positions of some models count padding, and some recurrent models read it. The first batch with padding
        decides, by a comparison of a few of its rows with themselves alone.

        Args:
            batch: The batch.
            generates: Whether answers are generated after it, rather than its labels scored.
        """
        if len(batch.equally_long) == 1:
            return True
        kind = ",".join(["generated" if generates else "scored", *sorted(batch.inputs)])
        if kind not in self._pads:
            agrees = self._agrees_with_itself(batch, generates=generates)
            if agrees is None:
                return True
            self._pads[kind] = agrees
        return self._pads[kind]

    @torch.no_grad()
    def _agrees_with_itself(self, batch: EncodedBatch, *, generates: bool) -> bool | None:
        """Compares the most and the least padded rows with themselves alone; None if the logits contain NaN."""
        lengths = batch.lengths
        order = sorted(range(len(batch)), key=lengths.__getitem__)
        padded = [row for row in order if lengths[row] != lengths[order[-1]]]
        shortest_answer = min(order, key=lambda row: lengths[row][1])
        compared = dict.fromkeys((padded[0], padded[-1], shortest_answer))
        found = [self._agrees_alone(batch, row, order[-1], generates=generates) for row in compared]
        return None if None in found else all(found)

    def _agrees_alone(self, batch: EncodedBatch, row: int, longest: int, *, generates: bool) -> bool | None:
        observe = self._first_steps if generates else self._scored_logits
        with self.bypassing():
            # Two rows: some models ignore the mask of a single one.
            together, alone = observe(batch.rows([row, longest])), observe(batch.unpadded([row]))
        if bool(alone.isnan().any()):
            return None
        if generates and not torch.equal(together[0].argmax(), alone[0].argmax()):
            # Two tokens that are equally likely: the second steps follow different ones.
            together = torch.cat([together[:1], alone[1:]])
        return agree(together, alone, self.dtype)

    def _first_steps(self, batch: EncodedBatch) -> Tensor:
        """(2, V) logits of the first row's first two generated tokens."""
        with self.querying(batch.query), self.greedy():
            steps = self.module.generate(  # type: ignore[operator]
                **self.generation_inputs(batch),
                max_new_tokens=2,
                min_new_tokens=2,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return torch.stack([logits[0].float() for logits in steps.logits])

    def _scored_logits(self, batch: EncodedBatch) -> Tensor:
        """The first row's logits, (C,), or (T, V) where it is not padded."""
        logits = self.logits(batch)[0].float()
        if logits.dim() == 1:
            return logits
        if "decoder_input_ids" in batch.inputs:
            return logits[: batch.lengths[0][1] or None]
        return logits[batch.inputs["attention_mask"][0].bool()]

    @contextmanager
    def bypassing(self) -> Iterator[None]:
        """Lets the layer answer by itself inside the context: interceptors are not called, of prompts neither."""
        outer, self._bypassed = self._bypassed, True
        try:
            yield
        finally:
            self._bypassed = outer

    def querying(self, query: Tensor | None, *, leaders: Tensor | None = None) -> AbstractContextManager[QueryState]:
        """Makes the forward passes inside the context one sequence: a prompt and the tokens generated after it.

        Args:
            query: (B,) the prompt's query positions in the edited layer's sequence. None for the last real token, or
                for the first position if the layer is in a decoder.
            leaders: (B,) for each row the row whose prompt decides what editors do, as in `QueryState`; None if each
                row decides by its own.
        """
        return self._tracker.querying(query, leaders=leaders)

    @property
    def is_intercepted(self) -> bool:
        """Whether an editor may change the output of a layer."""
        return bool(self._interceptors)

    @property
    def is_querying(self) -> bool:
        """Whether the forward passes of this moment belong to a sequence begun by `querying`."""
        return self._tracker.state.is_open

    @property
    def last_state(self) -> QueryState:
        """The state of the last sequence that ended."""
        return self._tracker.last_state

    def intercept(self, answer: Callable[[LayerCall], Tensor], *, first: bool = False) -> "Interceptor":
        """Lets `answer` decide the output of the edited layer.

        Args:
            answer: Takes a `LayerCall` and returns the layer's (B, T, D_out) output, changed or not.
            first: Whether to call it before the present interceptors, and even while they are bypassed.

        Returns:
            A handle; `handle.remove()` removes the interceptor.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            if self._bypassed and not first:
                return None
            call = layer_call_of(self.layer_name, args, kwargs, output, self._tracker.state)
            return _with_activations(output, answer(call))

        return self._installed(self.layer, hook, first=first)

    def intercept_at(
        self, path: str, answer: Callable[[ModuleCall], Tensor], *, option: str = "layer"
    ) -> "Interceptor":
        """Lets `answer` decide the output of another module, in the passes that call the edited layer before it.

        Args:
            path: Dotted path of the module.
            answer: Takes a `ModuleCall` and returns the module's (B, T, D_out) output, changed or not.
            option: The option that names the module, for messages.

        Returns:
            A handle; `handle.remove()` removes the interceptor.

        Raises:
            UserError: If the model has no such module.
        """

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
            if self._bypassed:
                return None
            call = module_call_of(f"{option}={path}", args, kwargs, output, self._tracker.state)
            return _with_activations(output, answer(call))

        module = self.find_layer(path, option=option)
        return self._installed(module, hook)

    def _installed(self, module: nn.Module, hook: Callable[..., Any], *, first: bool = False) -> "Interceptor":
        # The tracker's own hooks come first: an interceptor may remove both while the hooks are called.
        self._tracker.attach()
        interceptor = Interceptor(self, module.register_forward_hook(hook, with_kwargs=True, prepend=first))
        self._interceptors.add(interceptor)
        return interceptor

    def intercept_prompts(self, read: PromptReader) -> "PromptInterceptor":
        """Lets `read` decide which text the module reads in place of each prompt, wherever prompts become tokens.

        An empty prompt, whose target is running text, asks nothing and stays empty. If there are several interceptors,
        each gets what the one before it returned.

        Args:
            read: Takes prompts that are not empty and returns the texts to read. A text should end with its prompt:
                where the whole is too long, what comes before the prompt is cut first. The same prompt must give the
                same text until an edit changes it, whatever the other prompts are, and the same text the same network.
                While it runs, the network's interceptors are bypassed, so that it can ask the unedited model.

        Returns:
            A handle; `handle.remove()` removes the interceptor.
        """
        interceptor = PromptInterceptor(self, read)
        vars(self.module).setdefault(_READERS, []).append(interceptor)
        self._prompt_interceptors.add(interceptor)
        return interceptor

    @property
    def reads_prompts(self) -> bool:
        """Whether an interceptor may let another text be read in place of a prompt."""
        return bool(vars(self.module).get(_READERS))

    def as_read(self, prompts: Sequence[str]) -> list[str]:
        """Returns the text that is read in place of each prompt, as edited so far."""
        return [reading.text for reading in self.readings(prompts)]

    def readings(self, prompts: Sequence[str]) -> list[Reading]:
        """Returns what is read in place of each prompt, as edited so far, and by which network."""
        readings = [Reading(prompt) for prompt in prompts]
        asked = [i for i, prompt in enumerate(prompts) if prompt.strip()]
        for interceptor in vars(self.module).get(_READERS, ()) if asked else ():
            for i, found in zip(asked, interceptor.read([readings[i].text for i in asked]), strict=True):
                readings[i] = found if isinstance(found, Reading) else replace(readings[i], text=found)
        return readings

    def release(self) -> None:
        """Removes every interceptor, and with the last one all hooks of this network."""
        for interceptor in [*self._interceptors]:
            interceptor.remove()
        for reader in [*self._prompt_interceptors]:
            reader.remove()

    def _forget(self, interceptor: "Interceptor") -> None:
        self._interceptors.discard(interceptor)
        if not self._interceptors:
            self._tracker.detach()


class Interceptor:
    """An interceptor of the edited layer or another module (see `Network.intercept` and `Network.intercept_at`)."""

    def __init__(self, network: Network, handle: Any) -> None:
        self._network, self._handle = network, handle

    def remove(self) -> None:
        """Removes the interceptor; removing it again does nothing."""
        self._handle.remove()
        self._network._forget(self)


class PromptInterceptor:
    """An interceptor of prompts (see `Network.intercept_prompts`)."""

    def __init__(self, network: Network, read: PromptReader) -> None:
        self._network, self._read = network, read

    def read(self, prompts: Sequence[str]) -> Sequence[str | Reading]:
        """Returns the texts to read in place of prompts: the prompts themselves while the network is bypassed."""
        if self._network._bypassed:
            return prompts
        with self._network.bypassing():
            return self._read(prompts)

    def remove(self) -> None:
        """Removes the interceptor; removing it again does nothing."""
        present = [other for other in vars(self._network.module).pop(_READERS, ()) if other is not self]
        if present:
            vars(self._network.module)[_READERS] = present
        self._network._prompt_interceptors.discard(self)


def _with_activations(output: Any, changed: Tensor) -> Any:
    """A module's output with other activations, in their original shape."""
    changed = changed.reshape(activations_of(output).shape)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether tensors of one shape, computed in a dtype in two ways, agree up to rounding.

    Half of the digits count: a wrong way differs by far more, and bfloat16 has few digits to compare.
    """
    return bool((found - expected).abs().max() <= torch.finfo(dtype).eps ** 0.5 * float(expected.abs().max()))


def start_token(module: nn.Module) -> int | None:
    """Returns the token with which a module's decoder starts: of its generation settings, then of its configuration.

    Where neither names one, it is the begin token of either.
    """
    config = getattr(module, "config", None)
    places = [getattr(module, "generation_config", None), config, getattr(config, "decoder", None)]
    named = (getattr(place, key, None) for key in ("decoder_start_token_id", "bos_token_id") for place in places)
    return next((int(token) for token in named if isinstance(token, int)), None)


def greedy_config(decoder_start: int | None) -> Any:
    """Returns transformers' settings for greedy generation.

    Args:
        decoder_start: The token with which a decoder starts; None for a model without one.
    """
    from transformers import GenerationConfig

    return GenerationConfig(decoder_start_token_id=decoder_start, do_sample=False, num_beams=1)


def _device_of(candidates: Sequence[nn.Module]) -> torch.device:
    """The device on which the first module with weights computes."""
    for part in (part for candidate in candidates for part in candidate.modules()):
        for weight in part.parameters(recurse=False):
            if not weight.is_meta:
                return weight.device
            # accelerate offloads weights between calls, and knows the device that they are loaded to.
            device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("cpu")


def _dtype_of(candidates: Sequence[nn.Module]) -> torch.dtype:
    """The dtype of the first floating-point weights; weights of one byte each are quantised and do not count."""
    weights = (weight for candidate in candidates for weight in candidate.parameters())
    return next((w.dtype for w in weights if w.is_floating_point() and w.element_size() > 1), torch.float32)
