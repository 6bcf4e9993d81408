"""Reading files that have an end, and writing them so that they are whole or not there."""

import errno
import hashlib
import os
import shutil
import stat
import time
from contextlib import suppress
from itertools import count
from pathlib import Path


def readable(path: Path | str) -> Path:
    """Returns a path with `~` filled in, after making sure that reading what is there comes to an end.

    Raises:
        OSError: If nothing is there, or no path can be so called, or it is a pipe or a device, at which a reader may
            wait for ever.
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
    """Removes a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Writes a file under another name, makes sure it is on disk, and renames it into place."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.partial")
    write_synced(partial, text.encode())
    partial.replace(path)
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file and makes sure that its content is on disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def set_aside(path: Path) -> Path:
    """Renames a file or folder to a hidden name beside it; returns that."""
    aside = name_aside(path)
    path.rename(aside)
    return aside


def name_aside(path: Path) -> Path:
    """Returns a hidden name beside a file or folder, with the time, that nothing has yet."""
    stamp = f".{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamp if n == 1 else f"{stamp}-{n}" for n in count(1))
    return next(name for name in map(path.with_name, names) if not name.exists())


def make_folder(folder: Path) -> None:
    """Makes a folder, and those above it that are missing, and makes sure that their names are on disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        # Names can be made in a folder that does not tell which it has.
        with suppress(PermissionError):
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes sure that the names in a folder are on disk."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
