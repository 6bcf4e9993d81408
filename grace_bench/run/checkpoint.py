"""Checkpoints: a run's whole state on disk, from which it goes on bit for bit.

`checkpoint/` in a run folder holds the two newest, each a numbered folder of `state.json`, `tensors.safetensors` and
`manifest.json`, which has the digests of the others. A checkpoint is written under another name, every file of it on
disk before it is renamed: one that has its name was whole, and one that was damaged since does not match its manifest.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from grace_bench.common.files import readable, sync_folder, write_synced
from grace_bench.errors import UserError

SCHEMA_VERSION = 6
FOLDER = "checkpoint"
_KEPT = 2
_TENSOR = "$tensor"
# A file in a folder beside the checkpoints, and no way out of there.
_Place = Annotated[str, StringConstraints(pattern=r"^[0-9a-z_-]+/[0-9a-z_-]+\.[a-z]+$")]


class _Manifest(BaseModel):
    """What a checkpoint is of, and the SHA-256 of each of its files, by path from the folder of all checkpoints.

    Its own `digest` is that of everything else in it.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    identity: dict[str, Any]
    n_edits: int
    files: dict[_Place, str]
    digest: str = ""

    def sealed(self) -> "_Manifest":
        """Returns the manifest with its digest."""
        content = json.dumps(self.model_dump(exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": digest(content.encode())})


class _Version(BaseModel):
    schema_version: int


class _BrokenError(Exception):
    """A checkpoint is not whole; the message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What was found on disk.

    Attributes:
        state: The newest whole state; None if there is none.
        n_edits: Its clock.
        dropped: What was left aside because it is not whole, in words.
    """

    state: dict[str, Any] | None = None
    n_edits: int = 0
    dropped: list[str] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: The run folder.
        identity: Everything that decides what the run computes, as JSON values; a checkpoint with another is refused.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any]) -> None:
        self._run = folder
        self._folder = folder / FOLDER
        # As it will be read again: tuples as lists, keys as text.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))

    def save(self, state: Mapping[str, Any], *, n_edits: int, beside: Mapping[str, str] | None = None) -> None:
        """Writes the run's state, whole or not at all, and drops the oldest checkpoint.

        Args:
            state: Tensors and JSON values, nested in dicts and lists.
            n_edits: The clock.
            beside: Files under `checkpoint/` that belong to the state and are on disk already, with their SHA-256.

        Raises:
            OSError: If it cannot be written; those before stay as they are.
        """
        numbers = self._numbers()
        name = f"{max(numbers, default=0) + 1:06d}"
        self._remove_partial()
        text, tensors = _without_tensors(state)
        files = {
            "state.json": text.encode(),
            "tensors.safetensors": safetensors.torch.save(tensors),
        }
        digests = {**(beside or {}), **{f"{name}/{file}": digest(content) for file, content in files.items()}}
        manifest = _Manifest(
            schema_version=SCHEMA_VERSION, identity=self._identity, n_edits=n_edits, files=digests
        ).sealed()
        files["manifest.json"] = f"{manifest.model_dump_json(indent=2)}\n".encode()
        partial = self._folder / f".{name}.partial"
        try:
            partial.mkdir(parents=True)
            for file, content in files.items():
                write_synced(partial / file, content)
            sync_folder(partial)
            partial.rename(self._folder / name)
        except OSError:
            # What is left of it would only take room that a full disk does not have.
            shutil.rmtree(partial, ignore_errors=True)
            raise
        sync_folder(self._folder)
        for number in numbers[: 1 - _KEPT]:
            shutil.rmtree(self._path(number))

    def load(self) -> Loaded:
        """Returns the newest whole checkpoint.

        Raises:
            UserError: If the newest is of another schema version, or of another run than this one.
        """
        dropped = ["a checkpoint that was being written"] if any(self._folder.glob(".*.partial")) else []
        for number in reversed(self._numbers()):
            path = self._path(number)
            try:
                manifest = self._manifest(path)
                return Loaded(state=self._state(path, manifest), n_edits=manifest.n_edits, dropped=dropped)
            except _BrokenError as reason:
                dropped.append(f"checkpoint {path.name} ({reason})")
        return Loaded(dropped=dropped)

    def drop_broken(self) -> None:
        """Removes what `load` left aside, so that the newest whole checkpoint stays among those that are kept."""
        self._remove_partial()
        for number in reversed(self._numbers()):
            try:
                self._state(self._path(number), self._manifest(self._path(number)))
                return
            except _BrokenError:
                shutil.rmtree(self._path(number))

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}"

    def _numbers(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def _remove_partial(self) -> None:
        for path in self._folder.glob(".*.partial"):
            shutil.rmtree(path)

    def _manifest(self, path: Path) -> _Manifest:
        text = _read(path / "manifest.json")
        try:
            version = _Version.model_validate_json(text).schema_version
            if version != SCHEMA_VERSION:
                raise UserError(
                    f"{path}: checkpoint of schema version {version}, this grace-bench reads {SCHEMA_VERSION}; "
                    f"existing=rerun sets the run aside and starts anew"
                )
            manifest = _Manifest.model_validate_json(text)
        except ValidationError as error:
            raise _BrokenError("manifest.json is not whole") from error
        if manifest != manifest.sealed():
            raise _BrokenError("manifest.json is not whole")
        self._check_identity(path, manifest.identity)
        return manifest

    def _check_identity(self, path: Path, found: Mapping[str, Any]) -> None:
        wanted, found = _flat(self._identity), _flat(found)
        for name in [*wanted, *found]:
            if wanted.get(name) == found.get(name):
                continue
            if name == "model":
                raise UserError(f"{self._run}: the model's weights are not those that the run began with")
            if name == "model_config":
                raise UserError(
                    f"{self._run}: the model's configuration or tokenizer is not that which the run began with"
                )
            if name == "stream":
                raise UserError(f"{self._run}: the stream's requests are not those that the run began with")
            raise UserError(
                f"{path}: checkpoint of another configuration: {name}={found.get(name)}, not {wanted.get(name)}"
            )

    def _state(self, path: Path, manifest: _Manifest) -> dict[str, Any]:
        contents = {}
        for name, expected in manifest.files.items():
            content = _read(self._folder / name)
            if digest(content) != expected:
                raise _BrokenError(f"{Path(name).name} is not whole")
            contents[name] = content
        try:
            tensors = safetensors.torch.load(contents[f"{path.name}/tensors.safetensors"])
            text = contents[f"{path.name}/state.json"]
            if rb"\ud" in text:
                # Half a surrogate pair, which no other file takes.
                json.dumps(json.loads(text), ensure_ascii=False).encode()
            state: dict[str, Any] = _with_tensors(text, tensors)
        except (KeyError, RecursionError, TypeError, ValueError, SafetensorError) as error:
            raise _BrokenError("it lacks its state") from error
        return state


def digest(content: bytes) -> str:
    """Returns the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return readable(path).read_bytes()
    except OSError as error:
        raise _BrokenError(f"{path.name}: {error.strerror or error}") from error


def _without_tensors(state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """A state as JSON in which tensors stand by name, and the tensors."""
    tensors: dict[str, Tensor] = {}

    def name(value: Any) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise TypeError(f"a state holds tensors and JSON values, not {type(value).__name__}")
        # A file takes no two names for one memory.
        tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: str(len(tensors) - 1)}

    return json.dumps(state, default=name), tensors


def _with_tensors(text: bytes, tensors: Mapping[str, Tensor]) -> Any:
    def look_up(value: dict[str, Any]) -> Any:
        # Bytes of a file lie where they lie; arithmetic is the same only from where torch puts tensors itself.
        return tensors[value[_TENSOR]].clone() if value.keys() == {_TENSOR} else value

    return json.loads(text, object_hook=look_up)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping by dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
