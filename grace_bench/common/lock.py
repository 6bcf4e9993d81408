"""A lock that lets one process at a time work on a run folder."""

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
"""The files of the lock in a run folder; a killed process leaves them behind."""


class FolderLock:
    """Keeps other processes out of a run folder inside the context.

    The operating system releases the lock when the process ends, however it ends, so no lock is ever stale.

    Args:
        folder: The run folder; created if missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FileLock(folder / _LOCK, blocking=False)

    def __enter__(self) -> Self:
        """Takes the lock.

        Raises:
            UserError: If another process holds it; the message names the process.
            OSError: If the folder cannot be created or written to.
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
        # Before the release, so that a process waiting for the lock notices that its file was removed.
        for name in LOCK_FILES:
            # A folder that cannot be written to must not hide the error that ended the run.
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)
        self._lock.release()

    def rename(self, target: Path) -> None:
        """Renames the locked folder."""
        self._folder.rename(target)
        self._folder = target


def _described(owner: Path) -> str:
    try:
        process = json.loads(owner.read_bytes())
        return f"process {process['pid']} on {process['host']} (since {process['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        # The process has taken the lock and not written its name yet.
        return "another process"
