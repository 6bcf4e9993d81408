"""Checkpoints: the whole state of a run on disk, from which it resumes bit for bit.

`checkpoint/` in a run folder holds the two newest, each a numbered folder of `state.json`, `tensors.safetensors` and
`manifest.json`. A checkpoint is written under a hidden name and renamed once it is on disk, so a visible one was
complete. The manifest has the digests of the other two files, which expose later damage, and the length and digest of
each file that the run appends to. Their content is not copied, so it does not add to the size of a checkpoint.
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

from grace_bench.common.append_only import Prefix
from grace_bench.common.files import atomic_path, readable
from grace_bench.errors import UserError

SCHEMA_VERSION = 6
FOLDER = "checkpoint"
_KEPT = 2
_TENSOR = "$tensor"
# Names that cannot lead out of their folder.
_OwnFile = Annotated[str, StringConstraints(pattern=r"^[a-z]+\.[a-z]+$")]
_RunFile = Annotated[str, StringConstraints(pattern=rf"^({FOLDER}/)?[a-z_]+\.[a-z]+$")]


class _Manifest(BaseModel):
    """The manifest of a checkpoint.

    Attributes:
        identity: Everything that determines what the run computes.
        n_edits: Edits made so far.
        files: The SHA-256 of the checkpoint's other files.
        run_files: The prefixes of the files that the run appends to, by path in the run folder.
        digest: The SHA-256 of all the above.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    identity: dict[str, Any]
    n_edits: int
    files: dict[_OwnFile, str]
    run_files: dict[_RunFile, Prefix]
    digest: str = ""

    def sealed(self) -> "_Manifest":
        """Returns the manifest with its digest."""
        content = json.dumps(self.model_dump(exclude={"digest"}), sort_keys=True)
        return self.model_copy(update={"digest": digest(content.encode())})


class _Version(BaseModel):
    schema_version: int


class _BrokenError(Exception):
    """A checkpoint cannot be used; the message says why."""


class _RunFileError(_BrokenError):
    """A checkpoint is intact, but a file of the run does not begin as the checkpoint recorded it."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} was cut or changed")
        self.name = name


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The newest usable checkpoint, as loaded from disk.

    Attributes:
        state: The state in the newest usable checkpoint; None if there is none.
        n_edits: Edits made up to that checkpoint.
        run_files: The prefixes that it recorded of the files that the run appends to.
        dropped: Descriptions of checkpoints that were skipped as unusable.
    """

    state: dict[str, Any] | None = None
    n_edits: int = 0
    run_files: dict[str, Prefix] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: The run folder.
        identity: Everything that determines what the run computes, as JSON values; a checkpoint with another is
            refused.
    """

    def __init__(self, folder: Path, *, identity: Mapping[str, Any]) -> None:
        self._run = folder
        self._folder = folder / FOLDER
        # In the form in which it will be read: tuples as lists, keys as text.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._broken: list[Path] = []

    def save(self, state: Mapping[str, Any], *, n_edits: int, run_files: Mapping[str, Prefix] | None = None) -> None:
        """Writes the run's state, completely or not at all, and removes the oldest checkpoint.

        Args:
            state: Tensors and JSON values, nested in dicts and lists.
            n_edits: Edits made so far.
            run_files: The prefixes of the files that the run appends to, by path in the run folder; already on disk.

        Raises:
            OSError: If it cannot be written; earlier checkpoints stay as they are.
        """
        numbers = self._numbers()
        text, tensors = _without_tensors(state)
        files = {
            "state.json": text.encode(),
            "tensors.safetensors": safetensors.torch.save(tensors),
        }
        manifest = _Manifest(
            schema_version=SCHEMA_VERSION,
            identity=self._identity,
            n_edits=n_edits,
            files={name: digest(content) for name, content in files.items()},
            run_files=dict(run_files or {}),
        ).sealed()
        files["manifest.json"] = f"{manifest.model_dump_json(indent=2)}\n".encode()
        with atomic_path(self._path(max(numbers, default=0) + 1)) as partial:
            partial.mkdir()
            for name, content in files.items():
                (partial / name).write_bytes(content)
        for number in numbers[: 1 - _KEPT]:
            shutil.rmtree(self._path(number))

    def load(self) -> Loaded:
        """Returns the newest usable checkpoint: intact, and with every file of the run beginning as it recorded.

        Raises:
            UserError: If the newest has another schema version or is from another run, or if there are intact
                checkpoints but files of the run were cut or changed so that none of them fits.
        """
        dropped = ["a checkpoint that was being written"] if any(self._folder.glob(".*.partial")) else []
        damaged: str | None = None
        self._broken = []
        for number in reversed(self._numbers()):
            path = self._path(number)
            try:
                manifest = self._manifest(path)
                state = self._state(path, manifest)
                self._check_run_files(manifest)
            except _BrokenError as reason:
                if isinstance(reason, _RunFileError):
                    damaged = reason.name
                self._broken.append(path)
                dropped.append(f"checkpoint {path.name} ({reason})")
                continue
            return Loaded(state=state, n_edits=manifest.n_edits, run_files=manifest.run_files, dropped=dropped)
        if damaged is not None:
            raise UserError(
                f"{self._run / damaged}: was cut or changed since the run's checkpoints; put the file back as it was, "
                f"or existing=rerun sets the run aside and starts over"
            )
        return Loaded(dropped=dropped)

    def drop_broken(self) -> None:
        """Removes the checkpoints that `load` skipped, so that they do not count among the two that are kept."""
        for path in (*self._folder.glob(".*.partial"), *self._broken):
            shutil.rmtree(path)

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}"

    def _numbers(self) -> list[int]:
        if not self._folder.is_dir():
            return []
        return sorted(int(path.name) for path in self._folder.iterdir() if path.name.isdecimal())

    def _manifest(self, path: Path) -> _Manifest:
        text = _read(path / "manifest.json")
        try:
            version = _Version.model_validate_json(text).schema_version
            if version != SCHEMA_VERSION:
                raise UserError(
                    f"{path}: checkpoint of schema version {version}, this grace-bench reads {SCHEMA_VERSION}; "
                    f"existing=rerun sets the run aside and starts over"
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
                raise UserError(f"{self._run}: the model's weights are not the ones that the run began with")
            if name == "model_config":
                raise UserError(
                    f"{self._run}: the model's configuration or tokenizer is not the one that the run began with"
                )
            if name == "stream":
                raise UserError(f"{self._run}: the stream's requests are not the ones that the run began with")
            raise UserError(
                f"{path}: checkpoint of another configuration: {name}={found.get(name)}, not {wanted.get(name)}"
            )

    def _state(self, path: Path, manifest: _Manifest) -> dict[str, Any]:
        contents = {}
        for name, expected in manifest.files.items():
            content = _read(path / name)
            if digest(content) != expected:
                raise _BrokenError(f"{name} is not whole")
            contents[name] = content
        try:
            tensors = safetensors.torch.load(contents["tensors.safetensors"])
            text = contents["state.json"]
            if rb"\ud" in text:
                # Half a surrogate pair cannot be encoded in any other file.
                json.dumps(json.loads(text), ensure_ascii=False).encode()
            state: dict[str, Any] = _with_tensors(text, tensors)
        except (KeyError, RecursionError, TypeError, ValueError, SafetensorError) as error:
            raise _BrokenError("it lacks its state") from error
        return state

    def _check_run_files(self, manifest: _Manifest) -> None:
        for name, prefix in manifest.run_files.items():
            if not prefix.begins(self._run / name):
                raise _RunFileError(name)


def digest(content: bytes) -> str:
    """Returns the SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def _read(path: Path) -> bytes:
    try:
        return readable(path).read_bytes()
    except OSError as error:
        raise _BrokenError(f"{path.name}: {error.strerror or error}") from error


def _without_tensors(state: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Returns a state as JSON with names in place of its tensors, and the tensors by these names."""
    tensors: dict[str, Tensor] = {}

    def name(value: Any) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise TypeError(f"a state holds tensors and JSON values, not {type(value).__name__}")
        # safetensors does not store two names of the same memory.
        tensors[str(len(tensors))] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: str(len(tensors) - 1)}

    return json.dumps(state, default=name), tensors


def _with_tensors(text: bytes, tensors: Mapping[str, Tensor]) -> Any:
    def look_up(value: dict[str, Any]) -> Any:
        # Alignment affects the order of float operations: only memory allocated by torch gives the same bits.
        return tensors[value[_TENSOR]].clone() if value.keys() == {_TENSOR} else value

    return json.loads(text, object_hook=look_up)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested mapping flattened to dotted paths."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
