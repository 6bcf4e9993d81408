"""One process a run folder."""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from grace_bench.common.files import make_folder
from grace_bench.errors import UserError

_LOCK = ".lock"
_OWNER = ".owner.json"
LOCK_FILES = (_OWNER, _LOCK)
"""What a process at work on a run folder has there; one that was killed leaves them."""


class FolderLock:
    """Keeps other processes out of a run folder, as long as the context lasts or this process lives.

    The operating system lets go of the lock with the process, however that ends, so none is ever left behind.

    Args:
        folder: The run folder, which is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / _LOCK, blocking=False)

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
            UserError: If another process has it, naming that one.
            OSError: If the folder cannot be made or written to.
        """
        make_folder(self._folder)
        owner = self._folder / _OWNER
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(f"{self._folder}: {_described(owner)} is at work on it") from error
        process = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            owner.write_text(json.dumps(process), encoding="utf-8")
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # While the lock is held: a process that waits for it sees that the file it opened is gone.
        for name in LOCK_FILES:
            # Where nothing can be removed any more, what ended the run is what the user is to hear of.
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
        self._lock.release()

    def rename(self, target: Path) -> None:
        """Gives the locked folder another name."""
        self._folder.rename(target)
        self._folder = target


def _described(owner: Path) -> str:
    try:
        process = json.loads(owner.read_bytes())
        return f"process {process['pid']} on {process['host']} (since {process['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        # It has the lock, and has not yet written who it is.
        return "another process"
