"""Writing files so that they are whole or not there."""

import os
import time
from itertools import count
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Writes a file under another name, makes sure it is on disk, and renames it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def set_aside(path: Path) -> Path:
    """Renames a file or folder to a hidden name beside it, with the time, that nothing has yet; returns that."""
    stamp = f".{path.name}.{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamp if n == 1 else f"{stamp}-{n}" for n in count(1))
    aside = next(name for name in map(path.with_name, names) if not name.exists())
    path.rename(aside)
    return aside
