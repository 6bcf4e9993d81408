"""Engines: how a model's passes are computed. An engine never changes an answer, only its cost.

`exact` computes only what can change: repeated passes start at the edited layer (`replay`), and their ends are pruned
to the scored positions (`pruning`). `plain` computes every pass in full, as the official code does: the baseline.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from grace_bench.common.options import check_choice
from grace_bench.errors import UserError
from grace_bench.models.calls import LayerCall
from grace_bench.models.encoding import EncodedBatch
from grace_bench.models.engine.pruning import Tail, cache_argument, is_given, skipping, tail_of, takes_columns
from grace_bench.models.engine.replay import (
    CannotReplayError,
    Recording,
    Replay,
    Run,
    is_training,
    patched,
    run_to_layer,
)
from grace_bench.models.network import Network, agree

EngineName = Literal["exact", "plain"]

_APPENDED = (DynamicLayer, DynamicSlidingWindowLayer)
"""The layers of a cache that hold keys and values alone."""


@dataclass(frozen=True)
class Repeated:
    """A batch that is run many times, while only the output of the edited layer changes.

    Attributes:
        batch: The batch with labels aligned to the logits, possibly only part of the given labels.
        run: Returns the logits.
        n_bytes: The size of what is recorded for it, which lasts as long as this object.
    """

    batch: EncodedBatch
    run: Run
    n_bytes: int = 0

    def __call__(self) -> Tensor:
        """Returns the logits."""
        return self.run()


class Engine(ABC):
    """Computes the passes of one model.

    Args:
        model: The model.
    """

    name: EngineName
    batches_edits: bool
    """Whether independent edits may be trained together."""
    rescores: bool
    """Whether an evaluation rescores only answers that may have changed."""

    def __init__(self, model: Network) -> None:
        self.model = model
        self.notes: list[str] = []
        """Passes that had to be computed in full, and why."""

    @abstractmethod
    def labelled(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:
        """Returns logits that cover every labelled position, and the batch with labels aligned to them."""

    @abstractmethod
    def repeated(self, batch: EncodedBatch, *, first_changed: int = 0, records: bool = True) -> Repeated:
        """Prepares many runs of a batch, in which the layer's output before `first_changed` stays its own.

        Args:
            batch: The batch.
            first_changed: The first position at which the layer's output may change.
            records: Whether there is memory for a recording.
        """

    @abstractmethod
    def reach_layer(self, batch: EncodedBatch) -> None:
        """Runs a batch at least until the edited layer and its hooks have been called."""

    @contextmanager
    def remembering(self, *, drops_unused: bool = True) -> Iterator[None]:
        """Lets `labelled` cache recordings inside the context and reuse those of earlier contexts.

        So does `reach_layer`, if modules are rewritten.

        Args:
            drops_unused: Whether to drop recordings that this context did not use.
        """
        yield

    @property
    def kept_bytes(self) -> int:
        """Size of the cached recordings, in bytes."""
        return 0

    @property
    def most_kept_bytes(self) -> int:
        """The memory limit of cached recordings, in bytes."""
        return 0

    def note(self, text: str) -> None:
        """Records, and warns of, something that makes the passes of this model cost more; once per engine."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(f"{self.model.name}: {text}", RuntimeWarning, stacklevel=2)

    def forget(self) -> None:  # noqa: B027 - an engine without a cache has nothing to forget
        """Drops all cached recordings."""

    def rewrites(self, modules: Sequence[nn.Module]) -> None:  # noqa: B027 - nor need it know what changes
        """Declares the modules whose weights edits may change from now on."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the decisions made so far about how passes are computed, as JSON values."""
        return {"notes": list(self.notes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, so that no decision is made again on other batches."""
        self.notes = list(state["notes"])


class PlainEngine(Engine):
    """Computes every pass in full."""

    name = "plain"
    batches_edits = False
    rescores = False

    def labelled(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:  # noqa: D102
        return self.model.logits(batch), batch

    def repeated(  # noqa: D102
        self, batch: EncodedBatch, *, first_changed: int = 0, records: bool = True
    ) -> Repeated:
        return Repeated(batch, partial(self.model.logits, batch))

    def reach_layer(self, batch: EncodedBatch) -> None:  # noqa: D102
        self.model.logits(batch)


class ExactEngine(Engine):
    """Starts passes at the edited layer if everything before it is recorded, and ends them at the scored positions.

    Args:
        model: The model.
        memory: Limit of cached recordings in bytes; None for a quarter of the memory that is free at first use.
    """

    name = "exact"
    batches_edits = True
    rescores = True

    def __init__(self, model: Network, *, memory: int | None = None) -> None:
        super().__init__(model)
        self._memory = memory
        self._changing: tuple[nn.Module, ...] = ()
        self._replay = Replay(model.module, model.layer)
        self._recent: tuple[EncodedBatch, Recording] | None = None
        self._kept: dict[bytes, Recording] = {}
        self._narrows = False
        self._used: set[bytes] | None = None
        self._prunes: dict[str, bool] = {}
        self._differentiable: dict[str, bool] = {}

    def forget(self) -> None:  # noqa: D102
        self._recent, self._kept = None, {}

    def rewrites(self, modules: Sequence[nn.Module]) -> None:  # noqa: D102
        if tuple(modules) != self._changing:
            self._changing = tuple(modules)
            self._replay = Replay(self.model.module, self.model.layer, self._changing)
            self._differentiable = {}
            self.forget()

    def labelled(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:  # noqa: D102
        tail = self._tail(batch, trains=False)
        run = self._pruned(batch, tail)
        if self._used is None:
            return run(), tail.batch
        return self._from_kept(batch, run)(), tail.batch

    def repeated(  # noqa: D102
        self, batch: EncodedBatch, *, first_changed: int = 0, records: bool = True
    ) -> Repeated:
        tail = self._tail(batch, first_changed, trains=torch.is_grad_enabled())
        given = tail.given(batch)
        kind, run = _kind(batch, tail), self._pruned(batch, tail)
        replayed = self._replayed(given, run, kind=kind) if records else run
        if replayed is run or not self._is_differentiable(kind, run, replayed):
            return Repeated(tail.batch, run)
        assert self._recent is not None
        return Repeated(tail.batch, replayed, self._recent[1].n_bytes)

    def reach_layer(self, batch: EncodedBatch) -> None:  # noqa: D102
        run: Run = partial(self.model.logits, batch, **self._fewest_logits)
        if self._used is not None and self._changing:
            # Otherwise the layer itself gives the same each time, and it is the caller who keeps that.
            run = self._from_kept(batch, run)
        elif self._replay.knows(_kind(batch)):
            run = self._replayed(batch, run, kind=_kind(batch))
        run_to_layer(self.model.layer, run)

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return {**super().state_dict(), "prunes": dict(self._prunes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self._prunes = dict(state["prunes"])

    @contextmanager
    def remembering(self, *, drops_unused: bool = True) -> Iterator[None]:  # noqa: D102
        self._used, self._narrows = set(), False
        try:
            yield
        finally:
            if drops_unused:
                self._kept = {key: recording for key, recording in self._kept.items() if key in self._used}
            self._used = None

    @property
    def kept_bytes(self) -> int:  # noqa: D102
        return sum(kept.n_bytes for kept in self._kept.values())

    @property
    def most_kept_bytes(self) -> int:  # noqa: D102
        if self._memory is None:
            on_gpu = self.model.layer_device.type == "cuda"
            self._memory = (torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available) // 4
        return self._memory

    def _pruned(self, batch: EncodedBatch, tail: Tail) -> Run:
        """A function that runs a batch, pruned to its tail."""
        past = self._keys_and_values(batch.until(tail.start)) if tail.start else None
        given = tail.given(batch)

        def run() -> Tensor:
            arguments = dict(tail.arguments)
            if past is not None:
                arguments |= self._with_cache(_copy_of(past))
            with patched(tail.forwards):
                return self.model.logits(given, **arguments)

        return run

    @torch.no_grad()
    def _keys_and_values(self, batch: EncodedBatch) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        with self.model.bypassing(), patched(skipping(self.model.module, is_given(batch))):
            self.model.logits(batch, **self._fewest_logits, **self._with_cache(cache))
        return cache

    @property
    def _fewest_logits(self) -> dict[str, int]:
        """Arguments of a pass whose logits nobody reads; a model returns them for at least one position."""
        return {"logits_to_keep": 1} if takes_columns(self.model.module) else {}

    def _with_cache(self, cache: DynamicCache) -> dict[str, Any]:
        return {str(cache_argument(self.model.module)): cache}

    def _play(self, replay: Replay, run: Run, recording: Recording, kind: str) -> Tensor:
        if replay is not self._replay:
            # Modules that edits rewrite have been declared since, and may be part of the recording.
            return run()
        try:
            return replay.play(run, recording, kind)
        except CannotReplayError as reason:
            self._note_whole(reason)
            return run()

    def _replayed(self, batch: EncodedBatch, run: Run, *, kind: str) -> Run:
        """A function that returns the same as `run`, computed from the layer on."""
        try:
            if self._recent is None or self._recent[0] is not batch or not self._replay.holds(self._recent[1], kind):
                self._recent = None
                self._recent = (batch, self._replay.record(run, kind))
        except CannotReplayError as reason:
            self._note_whole(reason)
            return run
        return partial(self._play, self._replay, run, self._recent[1], kind)

    def _from_kept(self, batch: EncodedBatch, run: Run) -> Run:
        """The same, from a recording that is cached while there is memory."""
        assert self._used is not None
        kind, key = _kind(batch), _digest(batch)
        recording = self._kept.get(key)
        if recording is None or not self._replay.holds(recording, kind):
            try:
                recording = self._replay.record(run, kind)
            except CannotReplayError as reason:
                self._note_whole(reason)
                return run
            self._kept.pop(key, None)
            self._keep(key, recording)
        self._used.add(key)
        return partial(self._play, self._replay, run, recording, kind)

    def _keep(self, key: bytes, recording: Recording) -> None:
        """Caches a recording if there is memory for it, narrowing all recordings if necessary."""
        if not self._narrows and self.kept_bytes + recording.n_bytes > self.most_kept_bytes:
            self._narrows = True
            self._kept = {name: kept.narrowed() for name, kept in self._kept.items()}
        if self._narrows:
            recording = recording.narrowed()
        if self.kept_bytes + recording.n_bytes <= self.most_kept_bytes:
            self._kept[key] = recording

    def _is_differentiable(self, kind: str, run: Run, replayed: Run) -> bool:
        """Whether gradients reach the layer in a replay as they do in the pass itself, compared at first use."""
        if replayed is run or not torch.is_grad_enabled():
            return True
        if kind not in self._differentiable:
            agrees = self._same_gradients(run, replayed)
            if agrees is None:
                return True
            self._differentiable[kind] = agrees
            if not agrees:
                self._note_whole(CannotReplayError("a replay does not give the gradients of the whole model"))
        return self._differentiable[kind]

    def _same_gradients(self, run: Run, other: Run, *, start: int = 0) -> bool | None:
        """Whether two ways to run a batch give one gradient, the second also when it is repeated.

        Args:
            run: Runs all positions.
            other: Runs the positions from `start` on.
            start: The first position at which the layer's output may change.

        Returns:
            None if there is no gradient, or it contains NaN, so that the batch cannot show it.
        """
        gradient = self._gradient(run, since=start)
        if gradient is None or bool(gradient.isnan().any()):
            return None
        for _ in range(2):
            try:
                # A pass may write into what the backward pass of it, or of the next one, still needs.
                found = self._gradient(other, since=0)
            except RuntimeError:
                return False
            if found is None or not agree(found, gradient, self.model.dtype):
                return False
        return True

    @torch.enable_grad()
    def _gradient(self, run: Run, *, since: int) -> Tensor | None:
        """The (D_out,) gradient of the squared logits of a position, summed, by a shift of the layer's output."""
        shifts: list[Tensor] = []

        def shift(call: LayerCall) -> Tensor:
            shifts.append(call.output.new_zeros(call.output.shape[-1], requires_grad=True))
            return torch.cat([call.output[:, :since], call.output[:, since:] + shifts[-1]], dim=1)

        interceptor = self.model.intercept(shift)
        try:
            logits = run()
        except UserError:
            # The layer's output is no sequence of activations.
            return None
        else:
            effect = logits.float().square().mean(dim=-1).sum()
            return torch.autograd.grad(effect, shifts, allow_unused=True)[0] if shifts else None
        finally:
            interceptor.remove()

    def _tail(self, batch: EncodedBatch, first_changed: int = 0, *, trains: bool) -> Tail:
        tail = tail_of(self.model.module, self.model.layer, batch, first_changed=first_changed, changing=self._changing)
        if tail.is_whole:
            return tail
        if is_training(self.model.module):
            self.note("passes are computed to their end: the model is in training mode")
            return Tail(batch)
        # A model may get another mask, or none, where nothing is padded.
        circumstances = {"trained": trains, "padded": batch.is_padded, "skipping": tail.skips}
        kind = ",".join([_kind(batch, tail), *(name for name, is_so in circumstances.items() if is_so)])
        if kind not in self._prunes:
            agrees = self._agrees(batch, tail, trains=trains)
            if agrees is None:
                return Tail(batch)
            self._prunes[kind] = agrees
            if not agrees:
                what = "behind cached keys and values" if tail.start else "pruned to what is scored"
                self.note(f"passes are computed whole: {what} they would differ")
        if self._prunes[kind]:
            return tail
        return self._tail(batch, trains=trains) if tail.start else Tail(batch)

    def _agrees(self, batch: EncodedBatch, tail: Tail, *, trains: bool) -> bool | None:
        """Whether a pruned pass, run twice, equals the full one: exactly at the layer's input, up to rounding after it.

        None if the logits contain NaN, so that the batch cannot show it.
        """
        run_whole = self._pruned(batch, Tail(batch))
        entered, whole = self._observed(run_whole)
        if bool(whole.isnan().any()):
            return None
        whole = tail.of(whole)
        try:
            run = self._pruned(batch, tail)
            for _ in range(2):
                entered_pruned, pruned = self._observed(run)
                if whole.shape != pruned.shape:
                    return False
                # Behind a cache, a block may get another mask, or none, and products have fewer rows, which may round
                # differently from the first layer on.
                enters_alike = bool(tail.start) or (
                    len(entered) == len(entered_pruned) and all(map(torch.equal, entered, entered_pruned))
                )
                if not (enters_alike and agree(pruned, whole, self.model.dtype)):
                    return False
        except Exception:
            # A custom block with the name of a known one may fail in any way.
            return False
        if not trains:
            return True

        return self._same_gradients(lambda: tail.of(run_whole()), run, start=tail.start)

    @torch.no_grad()
    def _observed(self, run: Run) -> tuple[list[Tensor], Tensor]:
        """The layer's input tensors in a pass, and the logits."""
        entered: list[Tensor] = []

        def observe(_: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            entered.extend(leaf.clone() for leaf in leaves)

        handle = self.model.layer.register_forward_pre_hook(observe, with_kwargs=True)
        try:
            return entered, run()
        finally:
            handle.remove()

    def _note_whole(self, reason: CannotReplayError) -> None:
        self.note(f"passes are computed from their start: {reason}")


def make_engine(name: EngineName, model: Network, *, memory_mb: int | None = None) -> Engine:
    """Returns an engine by name.

    Args:
        name: `exact` or `plain`.
        model: The model.
        memory_mb: For `exact`, the limit in MiB of recordings between evaluations; None for a quarter of the free
            memory.

    Raises:
        UserError: If there is no such engine.
    """
    check_choice("engine", name, get_args(EngineName))
    return (
        PlainEngine(model)
        if name == "plain"
        else ExactEngine(model, memory=None if memory_mb is None else memory_mb * 2**20)
    )


def _copy_of(cache: DynamicCache) -> DynamicCache:
    """A cache for one pass, which appends keys and values in new tensors but writes into recurrent states."""
    own = copy(cache)
    own.layers = [copy(layer) if type(layer) in _APPENDED else deepcopy(layer) for layer in cache.layers]
    return own


def _kind(batch: EncodedBatch, tail: Tail | None = None) -> str:
    """Names a way to run batches; behind a cache, a recurrent model reads a single token in another way."""
    if tail is None or not tail.start:
        return ",".join(sorted(batch.inputs))
    return ",".join([*sorted(batch.inputs), "token past" if tail.end - tail.start == 1 else "past"])


def _digest(batch: EncodedBatch) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch.inputs):
        tensor = batch.inputs[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.dim() else b"")
    return digest.digest()
