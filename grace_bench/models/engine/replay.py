"""Replay: runs a model from its edited layer on, over a recording of everything before it.

Modules before the edited layer always give the same output. One traced pass finds the modules that finish before the
layer starts while their parent is still running: their outputs, with the parents' code between them, decide everything
that follows. A recording holds these outputs; in a replay the modules return them, while the parents' own code runs. No
code here knows an architecture, and a replay gives the same bits as the full model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdRef

Run = Callable[[], Tensor]
Forward = Callable[..., Any]
Stamp = tuple[tuple[WeakIdRef, int, int, bool], ...]

# Attributes that can be read of a placeholder, which has no values.
_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.__repr__,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")),
}

_CALLS_DIFFER = "the model does not call the same modules each time"
_FEW_WEIGHTS = 1 / 8
"""The modules that a narrow recording computes again have at most this share of the weights before the layer."""


class CannotReplayError(Exception):
    """The model violates an assumption of replaying; the message says which."""


class _UndecidedError(CannotReplayError):
    """This batch cannot show whether the model can be replayed; another one may."""


class _LayerReachedError(Exception):
    """Ends a pass at the layer when the rest is not needed."""


class _Dropped(Tensor):
    """Placeholder for a tensor that nothing read when the model was traced; has its shape but no values."""

    @classmethod
    def like(cls, leaf: Tensor) -> "_Dropped":
        return torch.full((), torch.nan, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in _METADATA:
            raise CannotReplayError("the model does not read the same tensors each time")
        return super().__torch_function__(func, types, args, kwargs or {})


@dataclass(frozen=True)
class _Output:
    """A module's return value: its leaves, and the structure that they belong to."""

    leaves: tuple[Any, ...]
    spec: TreeSpec

    @classmethod
    def of(cls, value: Any) -> "_Output":
        leaves, spec = tree_flatten(value)
        return cls(tuple(leaves), spec)

    def value(self) -> Any:
        return tree_unflatten(list(self.leaves), self.spec)

    def pruned(self, kept: Sequence[bool]) -> "_Output":
        """The output with placeholders for the leaves that are not kept."""
        pairs = zip(self.leaves, kept, strict=True)
        return _Output(tuple(leaf if keep else _Dropped.like(leaf) for leaf, keep in pairs), self.spec)


@dataclass(frozen=True)
class Recording:
    """The outputs of the modules before the edited layer for one batch.

    Attributes:
        outputs: One output per call, in the order of the calls.
        stamp: The state of the recorded modules' weights; the recording is valid while they have it.
        versions: How often each tensor of the outputs was written to.
        n_narrow: The number of outputs, counted from the first, in the narrowest equivalent recording.
    """

    outputs: tuple[_Output, ...]
    stamp: Stamp
    versions: tuple[int, ...]
    n_narrow: int

    @cached_property
    def n_bytes(self) -> int:
        """Size of the recording."""
        storages = (tensor.untyped_storage() for tensor in _tensors(self.outputs))
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def is_intact(self) -> bool:
        """Whether the outputs are unchanged since they were recorded."""
        return self.versions == _versions(self.outputs)

    def narrowed(self) -> "Recording":
        """Returns the recording in less memory, from which a replay computes a little more.

        A transformer's hidden states are narrow; the input of a layer inside a block is up to four times as wide.
        """
        if len(self.outputs) == self.n_narrow:
            return self
        outputs = self.outputs[: self.n_narrow]
        return replace(self, outputs=outputs, versions=self.versions[: len(_versions(outputs))])


@dataclass(frozen=True)
class _Plan:
    """The calls that finish before the layer.

    Attributes:
        calls: The called modules, in order.
        parents: The modules that are running when the layer starts.
        kept: For each call, which leaves of its output are read afterwards.
        n_narrow: The number of calls in the narrowest recording.
    """

    calls: tuple[nn.Module, ...]
    parents: tuple[nn.Module, ...]
    kept: tuple[tuple[bool, ...], ...] = ()
    n_narrow: int = 0

    def weights(self) -> Iterator[Tensor]:
        """The weights of the recorded part: those of the called modules, and the parents' own."""
        for part in dict.fromkeys(self.calls):
            yield from (*part.parameters(), *part.buffers())
        for parent in self.parents:
            yield from _own_weights(parent)

    def stamp(self) -> Stamp:
        """For each of the weights itself, its address, how often it was written to, and whether it wants a gradient.

        An address alone may be that of an earlier weight. Offloaded weights, which never change, are left out.
        """
        weights = (weight for weight in self.weights() if not weight.is_meta)
        return tuple(
            (WeakIdRef(weight), weight.data_ptr(), weight._version, weight.requires_grad) for weight in weights
        )


class Replay:
    """Records and replays the passes of one model.

    Args:
        module: The whole model.
        layer: The edited layer. If its weights never change, its own output is recorded too, and its hooks act on the
            recorded output.
        changing: The modules whose weights edits change; recordings end before the first of them.
    """

    def __init__(self, module: nn.Module, layer: nn.Module, changing: Sequence[nn.Module] = ()) -> None:
        self._module = module
        self._layer = layer
        changed = _sharing(module, changing)
        self._ends = {layer, *changed}
        self._records_layer = changed.isdisjoint(layer.modules())
        self._plans: dict[str, _Plan | CannotReplayError] = {}

    def record(self, run: Run, kind: str) -> Recording:
        """Runs the model up to the layer and records what a replay needs.

        Args:
            run: Runs the model on one batch and returns its logits.
            kind: Names the arguments that the model is called with; each kind is traced once.

        Raises:
            CannotReplayError: If a replay would not give the model's own logits.
        """
        if is_training(self._module):
            raise CannotReplayError("the model is in training mode")
        plan = self._plan(run, kind)
        if any(weight.requires_grad for weight in plan.weights()):
            raise CannotReplayError("gradients are wanted before the layer")
        return self._record(run, plan)

    def knows(self, kind: str) -> bool:
        """Whether passes of a kind have been traced."""
        return kind in self._plans

    def holds(self, recording: Recording, kind: str) -> bool:
        """Whether a recording is still valid: the model's weights and mode are the same.

        Writes through a tensor's `.data` cannot be noticed.
        """
        plan = self._plans[kind]
        if not isinstance(plan, _Plan) or is_training(self._module):
            return False
        return recording.is_intact and recording.stamp == plan.stamp()

    def play(self, run: Run, recording: Recording, kind: str) -> Tensor:
        """Runs the model from the layer on; gradients reach everything after the recorded part.

        Raises:
            CannotReplayError: If the model behaves on this batch as it did not when it was traced.
        """
        plan = self._plans[kind]
        assert isinstance(plan, _Plan)
        if not recording.is_intact:
            raise CannotReplayError("the model changes in place what it is handed")
        calls = plan.calls[: len(recording.outputs)]
        n_given = 0

        def hand_out(part: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            nonlocal n_given
            if n_given == len(calls):
                return forward(*args, **kwargs)
            if part is not calls[n_given]:
                raise CannotReplayError(_CALLS_DIFFER)
            n_given += 1
            return recording.outputs[n_given - 1].value()

        with patched(dict.fromkeys(calls, hand_out)):
            logits = run()
        if n_given != len(calls):
            raise CannotReplayError(_CALLS_DIFFER)
        return logits

    def _plan(self, run: Run, kind: str) -> _Plan:
        if kind not in self._plans:
            try:
                self._plans[kind] = self._trace(run, kind)
            except _UndecidedError:
                raise
            except CannotReplayError as reason:
                self._plans[kind] = reason
        plan = self._plans[kind]
        if isinstance(plan, CannotReplayError):
            raise plan
        return plan

    @torch.no_grad()
    def _trace(self, run: Run, kind: str) -> _Plan:
        everything = self._find_calls(run)
        whole: list[Tensor] = []
        uses = _Uses()
        outputs = self._collect(lambda: whole.append(run()), everything, uses=uses)
        if bool(whole[0].isnan().any()):
            raise _UndecidedError("a batch whose logits are no numbers came first")
        uses.note(whole)
        kept = tuple(tuple(id(leaf) in uses.seen or not _is_large(leaf) for leaf in out.leaves) for out in outputs)
        plan = self._plans[kind] = replace(everything, kept=kept, n_narrow=len(kept))
        recording = self._record(run, plan)
        for _ in range(2):
            # Twice, because code that changes its arguments in place shows only at the second replay.
            if not self._plays(run, recording, kind, whole[0]):
                raise CannotReplayError("a replay does not give what the whole model gives")
        narrowest = replace(plan, n_narrow=_n_narrow(plan, recording, outputs, uses.entered))
        if narrowest == plan:
            return plan
        narrow = replace(recording, n_narrow=narrowest.n_narrow).narrowed()
        try:
            agrees = all(self._plays(run, narrow, kind, whole[0]) for _ in range(2))
        except CannotReplayError:
            agrees = False
        return narrowest if agrees else plan

    def _plays(self, run: Run, recording: Recording, kind: str, whole: Tensor) -> bool:
        """Whether a replay gives the logits of the whole model."""
        try:
            return torch.equal(self.play(run, recording, kind), whole)
        except CannotReplayError:
            raise
        except Exception as error:
            # Modules may hand values on past their outputs: some of Gemma 3n's layers read others' keys and values.
            raise CannotReplayError("a part of the model needs more than the outputs of those before it") from error

    def _find_calls(self, run: Run) -> _Plan:
        """The modules that finish before the layer starts, or with it, while their parent is running."""
        running: list[nn.Module] = []
        finished: list[tuple[int, nn.Module]] = []
        reached: nn.Module | None = None
        n_layer_calls = 0
        found: _Plan | None = None

        def start(part: nn.Module, *_: Any) -> None:
            nonlocal reached, n_layer_calls, found
            n_layer_calls += part is self._layer
            if reached is None and part in self._ends:
                reached = part
                if not (self._records_layer and part is self._layer):
                    found = _Plan(tuple(done for _, done in finished), tuple(running))
            running.append(part)

        def end(part: nn.Module, *_: Any) -> None:
            nonlocal found
            running.pop()
            if found is None:
                while finished and finished[-1][0] > len(running):
                    finished.pop()
                finished.append((len(running), part))
                if part is reached:
                    found = _Plan(tuple(done for _, done in finished), tuple(running))

        handles = [
            handle
            for part in self._module.modules()
            for handle in (
                part.register_forward_pre_hook(start),
                part.register_forward_hook(end, prepend=True),
            )
        ]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()
        if found is None:
            raise CannotReplayError("the layer takes no part in the answer")
        if n_layer_calls != 1:
            raise CannotReplayError("the layer is called more than once a pass")
        return found

    def _record(self, run: Run, plan: _Plan) -> Recording:
        with torch.no_grad():
            outputs = self._collect(run, plan, stops=True)
        if len(outputs) != len(plan.calls):
            raise CannotReplayError(_CALLS_DIFFER)
        kept = tuple(output.pruned(keep) for output, keep in zip(outputs, plan.kept, strict=True))
        return Recording(kept, plan.stamp(), _versions(kept), plan.n_narrow)

    def _collect(
        self, run: Callable[[], object], plan: _Plan, *, uses: "_Uses | None" = None, stops: bool = False
    ) -> list[_Output]:
        """Runs the model and returns the outputs of the plan's calls; `uses` notes which of them were read."""
        outputs: list[_Output] = []
        n_inside = 0

        def keep(part: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
            nonlocal n_inside
            if n_inside or len(outputs) == len(plan.calls):
                return forward(*args, **kwargs)
            if part is not plan.calls[len(outputs)]:
                raise CannotReplayError(_CALLS_DIFFER)
            n_inside += 1
            if uses is not None:
                uses.enter((args, kwargs))
                if part is self._layer:
                    # Its hooks read its input.
                    uses.note((args, kwargs))
                uses.is_paused = True
            given = forward(*args, **kwargs)
            if uses is not None:
                uses.is_paused = False
            n_inside -= 1
            outputs.append(_Output.of(given))
            if uses is not None:
                uses.watch(outputs[-1].leaves)
            if stops and len(outputs) == len(plan.calls):
                raise _LayerReachedError
            return given

        with patched(dict.fromkeys(plan.calls, keep)):
            try:
                if uses is None:
                    run()
                else:
                    with uses:
                        run()
            except _LayerReachedError:
                pass
        return outputs


def _sharing(module: nn.Module, changing: Sequence[nn.Module]) -> set[nn.Module]:
    """The parts of a model that hold a weight of the changing modules, such as an embedding tied to a head."""
    parts = {part for changed in changing for part in changed.modules()}
    places = {place for part in parts for place in _places(part)}
    return parts | {part for part in module.modules() if not places.isdisjoint(_places(part))}


def _places(part: nn.Module) -> set[int]:
    """Where a part's own weights begin in memory; tied weights may be different tensors at one place."""
    return {weight.data_ptr() or id(weight) for weight in _own_weights(part)}


def _own_weights(part: nn.Module) -> Iterator[Tensor]:
    yield from (*part.parameters(recurse=False), *part.buffers(recurse=False))


def is_training(module: nn.Module) -> bool:
    """Whether any part of a model is in training mode."""
    return any(part.training for part in module.modules())


def run_to_layer(layer: nn.Module, run: Run) -> None:
    """Runs a model until its layer and the layer's hooks have been called, and no further."""

    def stop(*_: Any) -> None:
        raise _LayerReachedError

    handle = layer.register_forward_hook(stop)
    try:
        run()
    except _LayerReachedError:
        pass
    finally:
        handle.remove()


class _Uses(TorchFunctionMode):
    """Notes which of the watched tensors are read by any operation, except while paused."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()
        self.entered: list[set[int]] = []
        """For each recorded call, its watched arguments."""
        self.is_paused = False
        # The watched tensors are alive, so their ids are unique; ids of other tensors may be reused.
        self._watched: set[int] = set()

    def watch(self, leaves: Iterable[Any]) -> None:
        self._watched.update(id(leaf) for leaf in leaves)

    def note(self, arguments: Any) -> None:
        self.seen |= self._among(arguments)

    def enter(self, arguments: Any) -> None:
        self.entered.append(self._among(arguments))

    def _among(self, arguments: Any) -> set[int]:
        return self._watched.intersection(map(id, tree_leaves(arguments)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self.is_paused and func not in _METADATA:
            self.note((args, kwargs))
        return func(*args, **(kwargs or {}))


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces modules' forward passes inside the context; hooks on the modules stay.

    A hook could not do this: hooks cannot keep a module from running.

    Args:
        forwards: For each module a function of the module, its own forward pass and the arguments.
    """
    own: dict[nn.Module, Any] = {}
    try:
        for part, function in forwards.items():
            # accelerate replaces a module's forward pass in the same way.
            own[part] = part.__dict__.get("forward")
            part.__dict__["forward"] = _bound(function, part, part.forward)
        yield
    finally:
        for part, forward in own.items():
            if forward is None:
                del part.__dict__["forward"]
            else:
                part.__dict__["forward"] = forward


def _bound(function: Callable[..., Any], part: nn.Module, forward: Forward) -> Forward:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(part, forward, *args, **kwargs)

    return call


def _n_narrow(plan: _Plan, recording: Recording, outputs: Sequence[_Output], entered: Sequence[set[int]]) -> int:
    """The number of calls whose recording takes the least memory without much recomputation.

    Args:
        plan: The plan.
        recording: Its recording of a batch.
        outputs: The outputs of its calls in the traced pass.
        entered: For each call, the ids of the tensors of `outputs` among its arguments in that pass.
    """
    n_weights = [sum(weight.numel() for weight in part.parameters()) for part in plan.calls]
    narrowest, least_bytes = len(plan.calls), recording.n_bytes
    for n in reversed(range(len(plan.calls))):
        if sum(n_weights[n:]) > _FEW_WEIGHTS * sum(n_weights):
            break
        dropped = {
            id(leaf)
            for output, kept in zip(outputs[:n], plan.kept[:n], strict=True)
            for leaf, keep in zip(output.leaves, kept, strict=True)
            if not keep
        }
        n_bytes = replace(recording, n_narrow=n).narrowed().n_bytes
        if n_bytes < least_bytes and dropped.isdisjoint(set().union(*entered[n:])):
            narrowest, least_bytes = n, n_bytes
    return narrowest


def _tensors(outputs: Sequence[_Output]) -> Iterator[Tensor]:
    """The tensors of the outputs, without placeholders."""
    leaves = (leaf for output in outputs for leaf in output.leaves)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, _Dropped))


def _versions(outputs: Sequence[_Output]) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in _tensors(outputs))


def _is_large(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 1
