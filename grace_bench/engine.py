"""Engines: how a model's passes are computed. An engine never changes an answer, only what it costs.

`exact` computes what can still change: passes that repeat start at the edited layer (`replay`), and their ends are
pruned to what is scored (`pruning`). `plain` computes every pass whole, as the official code does: the baseline.
"""

import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import psutil
import torch
from torch import Tensor, nn

from grace_bench.encoding import EncodedBatch
from grace_bench.options import check_choice
from grace_bench.pruning import Tail, tail_of
from grace_bench.replay import CannotReplayError, Recording, Replay, Run, patched, run_to_layer

if TYPE_CHECKING:
    from grace_bench.models import EditableModel

EngineName = Literal["exact", "plain"]


@dataclass(frozen=True)
class Repeated:
    """A batch that is run many times, while only what the edited layer gives changes.

    Attributes:
        batch: The batch with the labels that the logits are aligned with, which may be fewer than it was given.
        run: Returns those logits.
    """

    batch: EncodedBatch
    run: Run

    def __call__(self) -> Tensor:
        """Returns the logits."""
        return self.run()


class Engine(ABC):
    """How the passes of one model are computed.

    Args:
        model: The model.
    """

    name: EngineName

    def __init__(self, model: "EditableModel") -> None:
        self.model = model
        self.notes: list[str] = []
        """What the engine had to compute in full after all, and why."""

    @abstractmethod
    def labelled(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:
        """Returns logits that cover every labelled position, and the batch with the labels they are aligned with."""

    @abstractmethod
    def repeated(self, batch: EncodedBatch) -> Repeated:
        """Makes ready to run a batch many times."""

    @abstractmethod
    def reach_layer(self, batch: EncodedBatch) -> None:
        """Runs a batch at least until the edited layer and the hooks on it were called."""

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """What `labelled` computes inside may be kept for the next time; what this time did not use is dropped."""
        yield

    def rewrites(self, modules: Sequence[nn.Module]) -> None:  # noqa: B027 - an engine that keeps nothing need not know
        """Declares which modules' weights edits may change from now on."""


class PlainEngine(Engine):
    """Every pass is computed whole and anew."""

    name = "plain"

    def labelled(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:  # noqa: D102
        return self.model.logits(batch), batch

    def repeated(self, batch: EncodedBatch) -> Repeated:  # noqa: D102
        return Repeated(batch, partial(self.model.logits, batch))

    def reach_layer(self, batch: EncodedBatch) -> None:  # noqa: D102
        self.model.logits(batch)


class ExactEngine(Engine):
    """Passes start at the edited layer where what comes before it is known, and end where nothing more is scored.

    Args:
        model: The model.
        memory: Bytes that kept recordings may take; None for a quarter of the memory that is free at first use.
    """

    name = "exact"

    def __init__(self, model: "EditableModel", *, memory: int | None = None) -> None:
        super().__init__(model)
        self._memory = memory
        self._changing: tuple[nn.Module, ...] = ()
        self._replay = Replay(model.module, model.layer)
        self._recent: tuple[EncodedBatch, Recording] | None = None
        self._kept: dict[bytes, Recording] = {}
        self._used: set[bytes] | None = None
        self._prunes: dict[str, bool] = {}

    def rewrites(self, modules: Sequence[nn.Module]) -> None:  # noqa: D102
        if tuple(modules) != self._changing:
            self._changing = tuple(modules)
            self._replay = Replay(self.model.module, self.model.layer, self._changing)
            self._recent, self._kept = None, {}

    def labelled(self, batch: EncodedBatch) -> tuple[Tensor, EncodedBatch]:  # noqa: D102
        tail = self._tail(batch)
        run = partial(self._run, batch, tail)
        if self._used is None:
            return run(), tail.batch
        return self._from_kept(batch, run)(), tail.batch

    def repeated(self, batch: EncodedBatch) -> Repeated:  # noqa: D102
        tail = self._tail(batch)
        return Repeated(tail.batch, self._replayed(batch, partial(self._run, batch, tail)))

    def reach_layer(self, batch: EncodedBatch) -> None:  # noqa: D102
        run = partial(self.model.logits, batch)
        if self._replay.knows(_kind(batch)):
            run = self._replayed(batch, run)
        run_to_layer(self.model.layer, run)

    @contextmanager
    def remembering(self) -> Iterator[None]:  # noqa: D102
        self._used = set()
        try:
            yield
        finally:
            self._kept = {key: recording for key, recording in self._kept.items() if key in self._used}
            self._used = None

    def _run(self, batch: EncodedBatch, tail: Tail) -> Tensor:
        with patched(tail.forwards):
            return self.model.logits(batch, **tail.arguments)

    def _replayed(self, batch: EncodedBatch, run: Run) -> Run:
        """A function that gives what `run` gives, from the layer on."""
        kind = _kind(batch)
        try:
            if self._recent is None or self._recent[0] is not batch or not self._replay.holds(self._recent[1], kind):
                self._recent = None
                self._recent = (batch, self._replay.record(run, kind))
        except CannotReplayError as reason:
            self._note(f"every pass is computed from its start: {reason}")
            return run
        return partial(self._replay.play, run, self._recent[1], kind)

    def _from_kept(self, batch: EncodedBatch, run: Run) -> Run:
        """The same, from a recording that is kept for the next time as long as there is memory."""
        assert self._used is not None
        kind, key = _kind(batch), _digest(batch)
        recording = self._kept.get(key)
        if recording is None or not self._replay.holds(recording, kind):
            try:
                recording = self._replay.record(run, kind)
            except CannotReplayError as reason:
                self._note(f"every pass is computed from its start: {reason}")
                return run
            self._kept.pop(key, None)
            if sum(kept.n_bytes for kept in self._kept.values()) + recording.n_bytes <= self._budget():
                self._kept[key] = recording
        self._used.add(key)
        return partial(self._replay.play, run, recording, kind)

    def _budget(self) -> int:
        if self._memory is None:
            on_gpu = self.model.layer_device.type == "cuda"
            self._memory = (torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available) // 4
        return self._memory

    def _tail(self, batch: EncodedBatch) -> Tail:
        tail = tail_of(self.model.module, self.model.layer, batch)
        whole = Tail(batch)
        if not (tail.arguments or tail.forwards):
            return whole
        kind = _kind(batch)
        if kind not in self._prunes:
            self._prunes[kind] = self._agrees(batch, tail)
            if not self._prunes[kind]:
                self._note("every pass is computed to its end: pruned to what is scored it would differ")
        return tail if self._prunes[kind] else whole

    @torch.no_grad()
    def _agrees(self, batch: EncodedBatch, tail: Tail) -> bool:
        """Whether a pruned pass gives what the whole one gives, but for rounding."""
        whole = self._run(batch, Tail(batch))
        if "logits_to_keep" in tail.arguments:
            whole = whole[:, tail.arguments["logits_to_keep"]]
        try:
            pruned = self._run(batch, tail)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return False
        rounding = 1e3 * torch.finfo(self.model.dtype).eps * float(whole.abs().max())
        return whole.shape == pruned.shape and bool((whole - pruned).abs().max() <= rounding)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(f"{self.model.name}: {text}", RuntimeWarning, stacklevel=2)


def make_engine(name: EngineName, model: "EditableModel", *, memory_mb: int | None = None) -> Engine:
    """Returns an engine by name.

    Args:
        name: `exact` or `plain`.
        model: The model it runs.
        memory_mb: For `exact`, what recordings kept between evaluations may take; None for a quarter of what is free.

    Raises:
        UserError: If there is no such engine.
    """
    check_choice("engine", name, get_args(EngineName))
    return (
        PlainEngine(model)
        if name == "plain"
        else ExactEngine(model, memory=None if memory_mb is None else memory_mb * 2**20)
    )


def _kind(batch: EncodedBatch) -> str:
    return ",".join(sorted(batch.inputs))


def _digest(batch: EncodedBatch) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(batch.inputs):
        tensor = batch.inputs[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().data if tensor.dim() else b"")
    return digest.digest()
