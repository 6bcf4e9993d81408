"""A run in its folder: started, resumed or reused, and what it leaves behind when it fails."""

import errno
import hashlib
import json
import platform
import re
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from grace_bench.common.credentials import refuse_secrets, without_secrets
from grace_bench.common.files import name_aside, write_atomically
from grace_bench.common.lock import LOCK_FILES, FolderLock
from grace_bench.common.terminal import progress_bars
from grace_bench.common.text import on_one_line
from grace_bench.common.untrusted import check_run_folder, refuse_references
from grace_bench.data.benchmark import fingerprint_requests
from grace_bench.errors import MISFITS, RunFailure, UserError, reason_of
from grace_bench.launch.arguments import run_arguments
from grace_bench.launch.run_config import RunConfig, hash_config
from grace_bench.models.zoo import known_models, resolve_model
from grace_bench.results.reading import read_result
from grace_bench.results.schema import RunResult
from grace_bench.results.summary import summary
from grace_bench.run.checkpoint import FOLDER as CHECKPOINTS
from grace_bench.run.loggers.progress import ProgressLogger
from grace_bench.run.loggers.wandb import WandbLogger
from grace_bench.run.run_benchmark import run_benchmark

Say = Callable[[str], None]

_FAILURE = "error.json"
_FILES = ("config.yaml", "edits.jsonl", "metrics.jsonl", "predictions.parquet", "result.json", _FAILURE)
_FOLDERS = (CHECKPOINTS, "editor", "wandb")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)
_LONGEST_SLUG = 100
"""File systems take names of 255 bytes."""


def run_or_reuse(config: RunConfig, *, say: Say, console: Console | None = None) -> RunResult:
    """Carries out a run in its folder, resumes an unfinished one if asked to, or reuses the finished one.

    Args:
        config: The configuration.
        say: Takes lines for the user.
        console: Where progress is shown; standard error by default.

    Raises:
        UserError: If the folder holds an unfinished run that is not to be resumed, another process is at work on it, or
            an option has a value that it cannot have.
        RunFailure: If the disk is full, the folder can no longer be written to, or every edit failed alike.
    """
    return _run_or_reuse_in(folder_of(config), config, say=say, console=console)


def resume(folders: Sequence[Path], *, say: Say) -> None:
    """Resumes runs that were interrupted or failed, each with the configuration in its folder.

    Args:
        folders: The run folders; a finished run is reported and left untouched.
        say: Takes lines for the user.

    Raises:
        UserError: If a folder holds no run, or one that cannot be resumed; the others are resumed all the same.
        RunFailure: If one fails for a known reason; the others are resumed all the same.
    """
    failures: list[UserError | RunFailure] = []
    for folder in folders:
        try:
            config, expected = _config_to_resume(folder)
            if re.fullmatch(r"[0-9a-f]{8}-s\d+", folder.name) and folder.name != expected:
                path = folder / "config.yaml"
                raise UserError(f"{path}: was changed since the run began (its folder would be {expected} now)")
            _run_or_reuse_in(folder, config, say=say, console=None)
        except (UserError, RunFailure) as error:
            failures.append(error)
    if failures:
        # The exit code of a failure must not be hidden by a mistake.
        first = next((failure for failure in failures if isinstance(failure, RunFailure)), failures[0])
        others = f" (and {len(failures) - 1} more of the runs)" if len(failures) > 1 else ""
        raise type(first)(f"{first}{others}")


def folder_of(config: RunConfig) -> Path:
    """Returns the folder of the run that a configuration describes.

    Raises:
        UserError: If an option has a value that it cannot have.
    """
    _, arguments = run_arguments(config)
    model = model_slug(arguments["model"], list(known_models()))
    return Path(config.out) / config.stream.name / model / config.editor.name / f"{config.digits}-s{config.seed}"


def model_slug(name_or_path: str, known: Sequence[str]) -> str:
    """Returns a folder name for a model: a short name as it is, else a slug and eight hex digits of the whole path.

    >>> model_slug("atlas-qa", ["atlas-qa"])
    'atlas-qa'
    >>> model_slug("models/My Model", [])
    'my-model-e6de211f'
    """
    if name_or_path in known:
        return name_or_path
    slug = re.sub(r"[^a-z0-9.]+", "-", Path(name_or_path).name.lower())[:_LONGEST_SLUG].strip("-.") or "model"
    return f"{slug}-{hashlib.sha256(name_or_path.encode()).hexdigest()[:8]}"


def write_config(config: RunConfig, path: Path) -> None:
    """Writes the configuration as YAML."""
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(config.plain())))


def read_plain_config(path: Path) -> dict[str, Any]:
    """Reads a file that `write_config` wrote, as plain values for `RunConfig.from_plain` and `hash_config`.

    Raises:
        UserError: If the file is missing or holds no configuration of a run.
    """
    try:
        refuse_references(path)
        config = OmegaConf.load(path)
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (RecursionError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not a configuration ({reason_of(error)})") from error
    missing = next((name for name in ("stream", "editor", "seed", "out") if name not in config), None)
    if not isinstance(config, DictConfig) or missing is not None:
        raise UserError(f"{path}: field '{missing}': is missing")
    return dict(plain)


def record_failure(folder: Path, error: BaseException) -> None:
    """Writes the error that ended a run into its folder as `error.json`, which marks the run as failed."""
    with suppress(OSError):
        record = {
            "error": type(error).__name__,
            "reason": without_secrets(reason_of(error)),
            "host": platform.node(),
            "traceback": without_secrets("".join(traceback.format_exception(error))),
        }
        write_atomically(folder / _FAILURE, json.dumps(record, indent=1))


def _config_to_resume(folder: Path) -> tuple[RunConfig, str]:
    """The configuration in a run folder, set to be resumed, and the name that its folder should have."""
    path = folder / "config.yaml"
    plain = read_plain_config(path)
    try:
        config = replace(RunConfig.from_plain(plain), existing="resume")
        return config, folder_of(config).name
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except MISFITS as error:
        raise UserError(f"{path}: not a configuration ({reason_of(error)})") from error


def _run_or_reuse_in(folder: Path, config: RunConfig, *, say: Say, console: Console | None) -> RunResult:
    refuse_secrets("the configuration", config.flat())
    stream, arguments = run_arguments(config)
    with ExitStack() as stack:
        try:
            check_run_folder(folder)
            if config.existing != "rerun":
                _refuse_wrong_kinds(folder)
                finished = _finished(folder, stream, arguments, say)
                if finished is not None:
                    _tidy(folder)
                    return finished
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            aside = _set_aside(folder) if config.existing == "rerun" and folder.exists() else None
            stack.enter_context(FolderLock(folder))
            # Another process may have finished the run until the lock was free.
            finished = _finished(folder, stream, arguments, say)
            if finished is not None:
                return finished
            is_new = _begin(folder, config, say)
        except OSError as error:
            what = str(folder) if _is_there(folder / "config.yaml") else f"out={config.out}"
            if error.errno in _DISK_FULL:
                raise RunFailure(f"{what}: {error.strerror}") from error
            raise UserError(f"{what}: {error.strerror or error}") from error
        try:
            result = _run_in(folder, config, stream, arguments, say, console)
        except Exception as error:
            edits = folder / "edits.jsonl"
            if is_new and isinstance(error, UserError) and not (edits.exists() and edits.stat().st_size):
                # A mistake found before the first candidate leaves nothing to resume: the user can correct it.
                shutil.rmtree(folder)
                for path in missing[1:]:
                    with suppress(OSError):
                        path.rmdir()
                if aside is not None:
                    aside.rename(folder)
                raise
            if not isinstance(error, UserError):
                record_failure(folder, error)
            if isinstance(error, OSError) and error.errno in (*_DISK_FULL, *_NOT_WRITABLE):
                need = "with room" if error.errno in _DISK_FULL else "once that is mended"
                raise RunFailure(
                    f"{error.filename or folder}: {error.strerror}; what was kept before is whole: {need}, "
                    f"`grace-bench resume {folder}` goes on"
                ) from error
            raise
    say(summary(result, folder))
    return result


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # The name may be too long for a file, for example.
        return False


def _refuse_wrong_kinds(folder: Path) -> None:
    """Raises if a folder stands where a run has a file, or a file where it has a folder."""
    for names, is_wrong, kind in ((_FILES, Path.is_dir, "a folder"), (_FOLDERS, Path.is_file, "a file")):
        for path in (folder / name for name in names):
            if is_wrong(path):
                raise UserError(f"{path}: is {kind}, which no run makes there; existing=rerun sets the run aside")


def _begin(folder: Path, config: RunConfig, say: Say) -> bool:
    """Prepares a locked folder for its run, and returns whether the run is new."""
    is_new = all(path.name.startswith(".") for path in folder.iterdir())
    if not is_new and config.existing != "resume":
        raise UserError(
            f"{folder}: holds an unfinished run: `grace-bench resume {folder}` or existing=resume goes on with it; "
            f"existing=rerun sets it aside and starts over"
        )
    if not (folder / "config.yaml").exists():
        write_config(config, folder / "config.yaml")
    if is_new and config.existing == "resume":
        say(f"{folder}: started")
    failure = folder / _FAILURE
    if failure.exists():
        say(f"{folder}: retried, after it failed ({_failure_in(failure)})")
        failure.unlink()
    return is_new


def _failure_in(path: Path) -> str:
    try:
        record = json.loads(path.read_bytes())
        return on_one_line(f"{record['error']}: {record['reason']}")
    except (OSError, ValueError, KeyError, TypeError):
        return "the reason was not fully recorded"


def _run_in(
    folder: Path, config: RunConfig, stream: Any, arguments: dict[str, Any], say: Say, console: Console | None
) -> RunResult:
    plain = config.plain()
    with progress_bars(console) as progress:
        return run_benchmark(
            stream,
            **arguments,
            folder=folder,
            run_id=folder_of(config).relative_to(config.out).as_posix(),
            config=plain,
            configuration=hash_config(plain),
            loggers=[
                ProgressLogger(console),
                WandbLogger(folder, mode=config.wandb.mode, project=config.wandb.project, group=config.wandb.group),
            ],
            progress=progress,
            resume=config.existing == "resume" and (folder / "edits.jsonl").exists(),
            say=say,
        )


def _finished(folder: Path, stream: Any, arguments: Mapping[str, Any], say: Say) -> RunResult | None:
    """Returns the finished run in a folder, if there is one, and reports that it is reused.

    Raises:
        UserError: If the stream, its defaults or the model have changed since.
        RunFailure: If the run failed although it has a result, as when every edit met a mistake in the editor.
    """
    if not (folder / "result.json").is_file():
        return None
    result = read_result(folder / "result.json")
    data = stream.load()
    if result.stream.fingerprint != fingerprint_requests(data):
        raise UserError(f"{folder}: was made from other requests; existing=rerun sets it aside and starts over")
    # The defaults are the stream's, and the configuration's hash does not know them.
    order = arguments["settings"].order or stream.default_order(data)
    normalise = arguments["settings"].normalise or stream.normalise
    for option, made, now in (
        ("order", result.protocol.order, order),
        ("protocol.normalise", result.protocol.normalise, normalise),
    ):
        if made != now:
            raise UserError(
                f"{folder}: was made with {option}={made}, now {now}; existing=rerun sets it aside and starts over"
            )
    model = arguments["model"]
    if result.model.files is not None and _files_of(model) not in (None, result.model.files):
        raise UserError(
            f"{folder}: was made with other files of model={model}; existing=rerun sets it aside and starts over"
        )
    if (folder / _FAILURE).is_file():
        raise RunFailure(
            f"{folder}: failed before ({_failure_in(folder / _FAILURE)}); existing=rerun sets it aside and starts over"
        )
    say(f"finished before, reused: {folder}")
    return result


def _files_of(model: str) -> str | None:
    """The hash of a model's files; None if they are not on this machine: the finished run is then reused unchecked."""
    try:
        return resolve_model(model).content_hash()
    except (OSError, UserError):
        return None


def _tidy(folder: Path) -> None:
    """Removes what a process that was killed right after writing its result left, unless another is at work there."""
    leftovers = [name for name in (CHECKPOINTS, *LOCK_FILES) if (folder / name).exists()]
    with suppress(OSError, UserError):
        if leftovers:
            with FolderLock(folder):
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Renames a folder that no process is at work on to a hidden name, and returns the new path."""
    aside = name_aside(folder)
    with FolderLock(folder) as lock:
        lock.rename(aside)
    return aside
