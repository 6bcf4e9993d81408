"""The runs that ship in `leaderboard/`, beside which others rank their own."""

import atexit
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

from grace_bench.errors import UserError
from grace_bench.results.reading import RESULT_FILE, find_result_files, read_result
from grace_bench.results.schema import RunResult

_ARCHIVE = "runs.tar.xz"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A finished run.

    Attributes:
        result: Its result.
        file: The file that the result was read from.
        is_reference: Whether it is one of the runs that ship with grace-bench.
    """

    result: RunResult
    file: Path
    is_reference: bool = False

    @property
    def folder(self) -> Path | None:
        """The run folder; None for a result file of another name, which may lie beside the files of another run."""
        return self.file.parent if self.file.name == RESULT_FILE else None


def find_runs(paths: Iterable[Path], *, reference: bool = False) -> list[Found]:
    """Reads the results of finished runs.

    Args:
        paths: As in `find_result_files`.
        reference: Whether to add the reference runs on the streams of these runs; all of them if no path is given.

    Raises:
        UserError: If a path contains no result, a result is broken, or there are no reference runs.
    """
    own = [Found(result=read_result(file), file=file) for file in find_result_files(paths)]
    if not reference:
        return own
    shipped = [Found(result=read_result(file), file=file, is_reference=True) for file in _reference_files()]
    streams = {run.result.stream.name for run in own or shipped}
    known = {run.file.resolve() for run in shipped}
    return [
        *(run for run in own if run.file.resolve() not in known),
        *(run for run in shipped if run.result.stream.name in streams),
    ]


def reference_folder() -> Path | None:
    """Returns the folder of the reference runs; None if this installation has none.

    A wheel has them in an archive (`setup.py`). It is unpacked into a folder that is removed when the process ends.
    """
    try:
        folder = Path(str(files("grace_bench.leaderboard")))
    except ModuleNotFoundError:
        return None
    archive = folder / _ARCHIVE
    return _unpacked(archive) if archive.is_file() else folder


@cache
def _unpacked(archive: Path) -> Path:
    folder = TemporaryDirectory(prefix="grace-bench-reference-")
    atexit.register(folder.cleanup)
    with tarfile.open(archive) as runs:
        # Absent from the first patch releases of Python 3.11.
        runs.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        runs.extractall(folder.name)
    return Path(folder.name)


def _reference_files() -> list[Path]:
    folder = reference_folder()
    if folder is None or not folder.is_dir() or next(folder.rglob(RESULT_FILE), None) is None:
        raise UserError("--reference: no reference runs came with this installation")
    return find_result_files([folder])
