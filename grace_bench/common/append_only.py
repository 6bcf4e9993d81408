"""Append-only files: a length and a digest are enough to return to an earlier state."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from grace_bench.common.files import make_folder, readable, sync_folder

_CHUNK = 1 << 20


class Prefix(BaseModel):
    """The beginning of a file.

    Attributes:
        size: Its length in bytes.
        sha256: The SHA-256 of these bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: NonNegativeInt = 0
    sha256: str = hashlib.sha256().hexdigest()

    def begins(self, path: Path) -> bool:
        """Returns whether a file begins with these bytes; a file that cannot be read counts as empty."""
        return _hash_prefix(path, self.size).hexdigest() == self.sha256


class AppendOnlyFile:
    """A file that a run appends to, and that a resumed run cuts back to the prefix its checkpoint recorded.

    The SHA-256 of the content is updated with every append, so that `sync` costs the same at any length.

    Args:
        path: The file; it is opened, and made if missing, by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = Prefix()
        """The prefix of an existing file that `open` keeps: empty, unless a checkpoint recorded one."""
        self._file: BinaryIO | None = None
        self._size = 0
        self._hash = hashlib.sha256()

    def surplus(self) -> bytes:
        """Returns the content after `start`, which `open` will cut off."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self.start.size)
            return file.read()

    def open(self) -> None:
        """Opens the file for appending after cutting it back to `start`."""
        make_folder(self.path.parent)
        self._file = self.path.open("ab")
        self._file.truncate(self.start.size)
        sync_folder(self.path.parent)
        self._size, self._hash = self.start.size, _hash_prefix(self.path, self.start.size)

    def append(self, content: bytes) -> None:
        """Appends to the file and hands the content to the operating system at once.

        Raises:
            OSError: If it cannot be written; part of it may then be in the file.
        """
        assert self._file is not None
        self._file.write(content)
        self._file.flush()
        self._size += len(content)
        self._hash.update(content)

    def sync(self) -> Prefix:
        """Waits until everything appended is on disk, and returns the whole content as a prefix."""
        assert self._file is not None
        os.fsync(self._file.fileno())
        return Prefix(size=self._size, sha256=self._hash.hexdigest())

    def close(self) -> None:
        """Closes the file if it is open.

        Raises:
            OSError: If an `append` failed and its content still cannot be written.
        """
        if self._file is not None:
            self._file.close()


def _hash_prefix(path: Path, size: int) -> "hashlib._Hash":
    found = hashlib.sha256()
    for chunk in _chunks(path, size):
        found.update(chunk)
    return found


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    try:
        with readable(path).open("rb") as file:
            while size and (chunk := file.read(min(size, _CHUNK))):
                size -= len(chunk)
                yield chunk
    except OSError:
        return
