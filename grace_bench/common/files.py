"""Reading files without blocking, and writing files that are either complete or absent."""

import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path


def readable(path: Path | str) -> Path:
    """Returns a path with `~` expanded, after checking that reading it terminates.

    Raises:
        OSError: If the path does not exist, is invalid, or is a pipe or a device, which may block a reader for ever.
    """
    try:
        found = Path(path).expanduser()
        mode = found.stat().st_mode
    except (RuntimeError, ValueError) as error:  # No such user; a NUL character.
        raise OSError(errno.EINVAL, str(error)) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file")
    return found


def remove(path: Path) -> None:
    """Removes a file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def atomic_path(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields a hidden path beside `path` to write to; what is written there gets the name `path` once it is on disk.

    If writing fails, the hidden file is removed and `path` does not change. Missing parent folders are created.

    Args:
        path: A file, which is replaced if it exists, or a folder, which must not exist yet.
        shared: Whether several processes may write `path` at the same time. Each then writes to a hidden path of its
            own, which a killed process leaves behind; otherwise the next write reuses it.
    """
    make_folder(path.parent)
    owner = f".{os.getpid()}" if shared else ""
    partial = path.with_name(f".{path.name}{owner}.partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
    except BaseException:
        # A partial file would only take space on a disk that may be full.
        with suppress(OSError):
            remove(partial)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file through `atomic_path`; text is encoded as UTF-8."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file in place and waits until its content is on disk."""
    path.write_bytes(content)
    _sync(path)


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path) -> Path:
    """Renames a file or folder to a hidden name beside it, and returns the new path."""
    aside = name_aside(path)
    path.rename(aside)
    return aside


def name_aside(path: Path) -> Path:
    """Returns a hidden path beside a file or folder that contains the time and does not exist yet."""
    stamp = f".{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamp if n == 1 else f"{stamp}-{n}" for n in count(1))
    return next(name for name in map(path.with_name, names) if not name.exists())


def make_folder(folder: Path) -> None:
    """Makes a folder and its missing parents, and waits until their names are on disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        # A folder can be writable without being readable.
        with suppress(PermissionError):
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Waits until a file, or a folder with everything in it, is on disk."""
    if path.is_dir():
        for inner in path.iterdir():
            _sync(inner)
        sync_folder(path)
    else:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
