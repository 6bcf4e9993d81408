"""What replays of recorded runs share: reading a recording, loading its model, and comparing numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from grace_bench.common.files import readable
from grace_bench.data.requests import TaskName
from grace_bench.editing.commands import OtherRecordError, Verdict
from grace_bench.errors import UserError, first_error
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import EncodedBatch

_N_PERTURBED = 6
# The differences of the starting weights, in units in the last place.
_PERTURBATIONS = (1, 4)
# Recorded numbers have nine digits.
_PRINTED = 1e-6

Whole = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A part of a recording; fields that no replay reads are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Change(Part):
    """How a weight changed: its Frobenius norm, and the change at the record's `entry_positions`."""

    fro: float
    entries: list[float]


class Probe(Part):
    """An input whose logits were recorded after the stream."""

    input_ids: Annotated[list[Whole], Field(min_length=1)]


class Recording(Part):
    """What every recording of an editor has."""

    editor: str
    model: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    tensors: dict[str, Any]


Kind = TypeVar("Kind", bound=Recording)


class UnusableError(Exception):
    """Half a message about a recording; where its file is known, it becomes a `UserError` with the other half."""


def read_recording(path: Path, kind: type[Kind], *, editors: Sequence[str]) -> tuple[Kind, dict[str, Tensor]]:
    """Reads a recording and its tensors, if it has any, from the safetensors file of the same name beside it.

    Args:
        path: The JSON file.
        kind: What its fields must be.
        editors: The names that its field `editor` may have.

    Raises:
        OtherRecordError: If it is of another editor.
        UserError: If a file is missing or damaged, naming the field.
    """
    try:
        content = readable(path).read_text(encoding="utf-8")
        if _editor_named_in(content) not in editors:
            raise OtherRecordError(f"{path}: is no recording of {' or '.join(editors)}")
        record = kind.model_validate_json(content)
        tensors = load_file(readable(path.with_suffix(".safetensors"))) if record.tensors else {}
    except (OSError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_error(error).removeprefix('Value error, ')}") from error
    missing = next((name for name in record.tensors if name not in tensors), None)
    if missing is not None:
        raise UserError(f"{path}: field 'tensors.{missing}': is missing in {path.with_suffix('.safetensors').name}")
    return record, tensors


class _Kind(BaseModel):
    editor: str


def _editor_named_in(content: str) -> str | None:
    try:
        return _Kind.model_validate_json(content).editor
    except ValidationError:
        return None


@contextmanager
def replaying(path: Path) -> Iterator[None]:
    """Computes with one thread inside the context; raises an `UnusableError` as a `UserError` that names the file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    except UnusableError as error:
        raise UserError(f"{path}: {error}") from error
    finally:
        torch.set_num_threads(threads)


def load_recorded_model(path: Path, record: Recording, *, layer: str, field: str, task: TaskName) -> EditableModel:
    """Loads the model of a recording on the CPU: the folder `models/<model>` beside the editor's folder.

    Args:
        path: The recording.
        record: Its content.
        layer: Dotted path of the edited layer.
        field: The field of the recording that says so.
        task: The task.

    Raises:
        UnusableError: If there is no such folder, or the model cannot be loaded.
    """
    folder = models_folder(path) / record.model
    if not folder.is_dir():
        raise UnusableError(f"field 'model': there is no folder models/{record.model} beside the recordings")
    with usable_model():
        try:
            return EditableModel.from_pretrained(folder, layer=layer, task=task, device="cpu")
        except UserError as error:
            raise UnusableError(f"field '{field}': {error}") from error


def models_folder(path: Path) -> Path:
    """The folder with the models of recordings, given a recording `<editor>/<model>/<name>.json`."""
    return path.resolve().parents[2] / "models"


@contextmanager
def usable_model() -> Iterator[None]:
    """Turns what loading a model's files raises inside the context into an `UnusableError`."""
    try:
        yield
    # A broken checkpoint can raise the errors of any library that reads it.
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnusableError(f"its model cannot be loaded ({type(error).__name__}: {error})") from error


def check_positions(positions: Sequence[int], path: str, model: EditableModel) -> None:
    """Raises `UnusableError` if one of the `entry_positions` is outside the weight at a dotted path."""
    size = model.find_layer(path).get_parameter("weight").numel()
    if max(positions, default=0) >= size:
        raise UnusableError(f"field 'entry_positions': {max(positions)} is outside the {size} elements of {path}")


def check_ids(ids: Sequence[int], field: str, model: EditableModel) -> None:
    """Raises `UnusableError` if the model cannot read the token ids of a field."""
    limit = model.config.vocab_size
    if max(ids) >= limit:
        raise UnusableError(f"field '{field}': {max(ids)} is not one of the model's {limit} ids")
    if model.max_length is not None and len(ids) > model.max_length:
        raise UnusableError(f"field '{field}': {len(ids)} tokens, where the model reads {model.max_length}")


@torch.no_grad()
def last_logits(model: EditableModel, probe: Probe) -> Tensor:
    """Returns the (V,) logits of a causal model at the last position of a probe."""
    ids = torch.tensor([probe.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.logits(EncodedBatch(inputs=inputs, query=torch.tensor([-1])))[0, -1]


@dataclass(frozen=True)
class Tolerance:
    """The largest differences that are allowed: ten times those of a second implementation (docs/fidelity.md).

    Attributes:
        loss: Relative to the total loss.
        weight: Of weights, keys and values, relative in the Frobenius norm.
        entry: Of single elements, relative to the largest one recorded.
        logit: Absolute.
    """

    loss: float
    weight: float
    entry: float
    logit: float


@dataclass(frozen=True)
class _Expected:
    """Recorded numbers, and how far ours may be from them.

    Attributes:
        numbers: Any shape.
        allowed: The largest difference.
        is_norm: Whether the difference is taken in the Frobenius norm rather than element by element.
    """

    numbers: Tensor
    allowed: float
    is_norm: bool = False

    def gap(self, ours: Tensor, other: Tensor | None = None) -> float:
        """The difference from our numbers, or between two runs of ours; infinite where one is NaN or lacks some."""
        found, reference = self._part(ours), self.numbers if other is None else self._part(other)
        if found.shape != reference.shape:
            return torch.inf
        difference = found.double() - reference.double()
        gap = difference.norm() if self.is_norm else difference.abs().max()
        return float(gap.nan_to_num(nan=torch.inf))

    def _part(self, ours: Tensor) -> Tensor:
        """What was recorded of our numbers: of logits sometimes the first ones only."""
        return ours[: len(self.numbers)] if ours.dim() == self.numbers.dim() == 1 else ours


class Expectations:
    """Everything recorded that has a counterpart of ours, by name, in the order of the stream."""

    def __init__(self) -> None:
        self._expected: dict[str, _Expected] = {}

    def add(self, name: str, numbers: Any, allowed: float, *, is_norm: bool = False) -> None:
        """Adds numbers, unless they are None: numbers of any shape and the largest absolute difference allowed."""
        if numbers is not None:
            tensor = torch.as_tensor(numbers, dtype=torch.float64)
            self._expected[name] = _Expected(tensor, allowed + _PRINTED, is_norm)

    def add_norms(self, name: str, numbers: Any, allowed: float) -> None:
        """Adds norms, unless they are None, of which the largest may differ by a share of itself."""
        if numbers is not None:
            self.add(name, numbers, allowed * float(torch.as_tensor(numbers).abs().max()))

    def add_tensor(self, name: str, numbers: Tensor, allowed: float) -> None:
        """Adds a tensor that may differ by a share of its Frobenius norm."""
        self.add(name, numbers, allowed * float(numbers.norm()), is_norm=True)

    def add_change(self, where: str, change: Change, tolerance: Tolerance) -> None:
        """Adds the norm and the entries of a weight's change, as `fro at {where}` and `entries at {where}`."""
        self.add(f"fro at {where}", change.fro, tolerance.weight * change.fro)
        self.add(f"entries at {where}", change.entries, tolerance.entry * max(map(abs, change.entries), default=0.0))

    def compare(
        self,
        ours: Mapping[str, Tensor],
        *,
        perturbed: Callable[[int], Mapping[str, Tensor]] | None = None,
        family: Callable[[str], str] = str,
    ) -> Verdict:
        """Compares our numbers with those recorded.

        Args:
            ours: Our numbers, by name.
            perturbed: Returns the numbers of a run from weights that `perturb` changed with a seed. Where a number is
                out of tolerance, the range of such runs is allowed. None if the tolerance is final.
            family: Returns what numbers have in common whose ranges count for each other: a number is allowed the
                largest range of its family so far. By itself, each number is a family of its own.

        Raises:
            UnusableError: If a number was recorded that the editor does not compute.
        """
        foreign = next((name for name in self._expected if name not in ours), None)
        if foreign is not None:
            raise UnusableError(f"{foreign} is nothing that the editor computes")
        apart = {name: one.gap(ours[name]) for name, one in self._expected.items()}
        outside = [name for name, one in self._expected.items() if not apart[name] <= one.allowed]
        if not outside:
            return Verdict()
        runs = [] if perturbed is None else [perturbed(seed) for seed in range(_N_PERTURBED)]
        spreads: dict[str, float] = {}
        for name, one in self._expected.items():
            # A run that stops a step earlier lacks the numbers of the last pass.
            spread = 2 * max((one.gap(run[name], ours[name]) for run in runs if name in run), default=0.0)
            spread = spreads[family(name)] = max(spread, spreads.get(family(name), 0.0))
            if not apart[name] <= max(one.allowed, spread):
                allowed = max(one.allowed, spread)
                return Verdict(f"{name} differs by {apart[name]:.2g} where {allowed:.2g} is allowed")
        noun = "number" if len(self._expected) == 1 else "numbers"
        return Verdict(notes=(f"{len(outside)} of {len(self._expected)} {noun} within what rounding moves them",))


@torch.no_grad()
def perturb(tensors: Sequence[Tensor], seed: int) -> None:
    """Changes every number in place, by a unit in the last place or four, up or down; symmetric matrices stay so."""
    generator = torch.Generator().manual_seed(seed)
    size = _PERTURBATIONS[seed % len(_PERTURBATIONS)] * torch.finfo(torch.float32).eps
    for tensor in tensors:
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        if tensor.dim() == 2 and torch.equal(tensor, tensor.T):
            signs = signs.triu() + signs.triu(1).T
        tensor.mul_(1 + signs * size)
