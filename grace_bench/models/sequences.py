"""Sequences: the prompt, with the tokens generated after it, that each forward pass of a model belongs to."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grace_bench.models.calls import QueryState
from grace_bench.models.encoding import CACHES, last_token


class SequenceTracker:
    """Tracks which sequence the forward passes of a module belong to.

    The tracker is on the module only while it is attached: forward hooks on the modules around the edited layer, and a
    `generate` that makes all of its passes one sequence. Several trackers can be attached to one module.

    Args:
        path: The modules around the edited layer, from the whole model to the layer itself.
        queries_start: Whether a prompt without a given query is queried at its first position, not at its last.
    """

    def __init__(self, path: Sequence[nn.Module], *, queries_start: bool) -> None:
        self._names = {part: tuple(inspect.signature(part.forward).parameters) for part in path}
        self._module = path[0]
        self._queries_start = queries_start
        self._hooks: list[Any] = []
        self._depth = 0
        self._continued: WeakKeyDictionary[Any, QueryState] = WeakKeyDictionary()
        self.state = QueryState()
        """The state of the current sequence."""
        self.last_state = self.state
        """The state of the last sequence that ended."""

    @contextmanager
    def querying(self, query: Tensor | None, *, leaders: Tensor | None = None) -> Iterator[QueryState]:
        """Makes the forward passes inside the context one sequence (see `Network.querying`)."""
        outer, self.state = self.state, QueryState(query=query, leaders=leaders, is_open=True)
        try:
            yield self.state
        finally:
            self.last_state, self.state = self.state, outer

    def attach(self) -> None:
        """Puts the tracker on the module, if it is not there."""
        if self._hooks:
            return
        # Only the outermost call counts. It need not be the whole model's: a generation calls an encoder by itself.
        for part, names in self._names.items():
            self._hooks.append(part.register_forward_pre_hook(partial(self._begin_pass, names), with_kwargs=True))
            self._hooks.append(part.register_forward_hook(self._end_pass, with_kwargs=True, always_call=True))
        if callable(getattr(self._module, "generate", None)):
            _Generate.of(self._module).trackers.append(self)

    def detach(self) -> None:
        """Removes the tracker from the module."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._depth = [], 0
        generate = vars(self._module).get("generate")
        if isinstance(generate, _Generate):
            generate.release(self)

    @contextmanager
    def generating(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Makes the forward passes of one call of `generate` one sequence.

        Args:
            args: The call's positional arguments, of which the first is the prompt's tokens.
            kwargs: Its keyword arguments.
        """
        given = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        with ExitStack() as stack:
            state = self.state if self.state.is_open else stack.enter_context(self.querying(None))
            if isinstance(given, Tensor) and not self._queries_start:
                state.n_given = given.shape[1]
            yield

    def _begin_pass(self, names: Sequence[str], _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        cache = _cache_in(given)
        continues = self._holds_tokens(cache)
        if not self.state.is_open:
            # A direct call of the module: it continues the prompt that its cache comes from, or reads a new prompt.
            known = self._continued.get(cache) if continues else None
            self.state = known or QueryState(is_whole=not continues)
        state = self.state
        state.widths = frozenset(value.shape[1] for value in given.values() if _are_tokens(value))
        state.step += 1
        if state.step:
            return
        tokens = given.get("input_ids")
        is_piece = state.n_given is not None and isinstance(tokens, Tensor) and tokens.shape[1] != state.n_given
        state.is_whole = not continues and not is_piece
        mask = given.get("attention_mask")
        state.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if state.query is None:
            state.query = self._default_query(given)

    def _holds_tokens(self, cache: Any) -> bool:
        """Whether a model has read tokens into a cache."""
        if cache is None:
            return False
        try:
            return bool(cache.get_seq_length())
        except ValueError:
            # The state of a recurrent model (Mamba) counts no tokens.
            return bool(cache.has_previous_state())
        except AttributeError:
            # A state of a class of its own (xLSTM): it holds what passes seen here have read.
            return cache in self._continued

    def _end_pass(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        # Attached inside a pass, the tracker sees the end of calls whose start it did not see.
        self._depth = max(0, self._depth - 1)
        cache = _cache_in(output)
        if not self._depth and cache is not None and not self.state.is_open:
            self._continued[cache] = self.state

    def _default_query(self, given: Mapping[str, Any]) -> Tensor:
        """(B,) each row's last real token, or its first position in a decoder that reads a question by attention."""
        mask = given.get("attention_mask")
        n_rows = next((len(value) for value in given.values() if isinstance(value, Tensor) and value.dim()), 1)
        if self._queries_start:
            return torch.zeros(n_rows, dtype=torch.long)
        return last_token(mask) if isinstance(mask, Tensor) and mask.dim() == 2 else torch.full((n_rows,), -1)


class _Generate:
    """Stands in for a module's `generate` while trackers are attached, each of which sees a call as one sequence."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._replaced = vars(module).get("generate")
        self._generate: Callable[..., Any] = module.generate  # type: ignore[assignment]
        self.trackers: list[SequenceTracker] = []

    @classmethod
    def of(cls, module: nn.Module) -> "_Generate":
        """Returns the instance on a module, after installing one if there is none."""
        present = vars(module).get("generate")
        if isinstance(present, cls):
            return present
        made = cls(module)
        module.generate = made  # type: ignore[assignment]
        return made

    def release(self, tracker: SequenceTracker) -> None:
        """Forgets a tracker, and restores the module's own `generate` after the last one."""
        self.trackers = [other for other in self.trackers if other is not tracker]
        if self.trackers:
            return
        if self._replaced is None:
            del self._module.generate
        else:
            self._module.generate = self._replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for tracker in self.trackers:
                stack.enter_context(tracker.generating(args, kwargs))
            return self._generate(*args, **kwargs)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def _cache_in(values: Any) -> Any:
    """The keys and values in a forward pass's arguments or output; None without."""
    if not isinstance(values, Mapping):
        return None
    return next((values[name] for name in CACHES if values.get(name) is not None), None)
