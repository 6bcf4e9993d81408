"""A run as the command line makes it: from a composed configuration to a run folder."""

import errno
import json
import os
import platform
import re
import shutil
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from grace_bench.common.credentials import refuse_secrets, without_secrets
from grace_bench.common.files import name_aside, write_atomically
from grace_bench.common.lock import LOCK_FILES, FolderLock
from grace_bench.common.terminal import progress_bars
from grace_bench.common.text import on_one_line
from grace_bench.common.untrusted import check_run_folder
from grace_bench.data.benchmark import fingerprint_requests
from grace_bench.errors import MISFITS, RunFailure, UserError, did_you_mean, reason_of
from grace_bench.launch.config import (
    check_options,
    config_hash,
    flat_settings,
    hash_config,
    make_editor,
    make_stream,
    plain_config,
    read_config,
    register_configs,
    registered_name,
    write_config,
)
from grace_bench.launch.model_slug import model_slug
from grace_bench.launch.presets import take_presets
from grace_bench.models.zoo import known_models, resolve_model
from grace_bench.results.reading import read_result
from grace_bench.results.schema import RunResult
from grace_bench.results.summary import summary
from grace_bench.run.checkpoint import FOLDER as CHECKPOINTS
from grace_bench.run.loggers.progress import ProgressLogger
from grace_bench.run.loggers.wandb import WandbLogger
from grace_bench.run.meta_training import meta_train
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule

if TYPE_CHECKING:
    from grace_bench.launch.plan import Forecast

Say = Callable[[str], None]

NOT_COMPOSED = (HydraException, OmegaConfBaseException, OverflowError, RecursionError)
"""What Hydra and what is beneath it raise where settings are none."""

_FAILURE = "error.json"
_FILES = ("config.yaml", "edits.jsonl", "metrics.jsonl", "predictions.parquet", "result.json", _FAILURE)
_FOLDERS = (CHECKPOINTS, "editor", "wandb")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE)


def foresee(config: DictConfig, *, started: float) -> "Forecast":
    """Foresees what a run will take.

    Args:
        config: The composed configuration.
        started: When the run's process would have started, as `time.time()` gives it.

    Raises:
        UserError: If the configuration asks for what cannot be.
    """
    from grace_bench.launch.plan import plan_benchmark

    stream, asked = asked_of(config)
    off = "disabled" in (config.wandb.mode, os.environ.get("WANDB_MODE"))
    with progress_bars() as progress:
        return plan_benchmark(
            stream,
            **asked,
            # Nothing of a plan goes to a server.
            loggers=lambda folder: () if off else (WandbLogger(folder, mode="offline"),),
            started=started,
            progress=progress,
        )


def compose(overrides: Sequence[str]) -> DictConfig:
    """Returns the configuration that overrides give.

    Raises:
        UserError: If they do not compose.
    """
    overrides = prepared(overrides)
    try:
        with hydra.initialize_config_module(config_module="grace_bench.launch.conf", version_base="1.3"):
            return hydra.compose("run", overrides)
    except NOT_COMPOSED as error:
        raise UserError(one_line(error)) from error


def prepared(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides as Hydra takes them, and puts the configs they ask for where Hydra finds them.

    Raises:
        UserError: If they name what does not exist.
    """
    overrides = _checked(take_presets(overrides))
    register_configs(overrides)
    return overrides


def execute(config: DictConfig, *, say: Say, console: Console | None = None) -> RunResult:
    """Carries out one run in its folder, goes on with an unfinished one if asked to, or reuses the finished one.

    Args:
        config: The composed configuration.
        say: Takes lines for the user.
        console: Where progress is shown; standard error by default.

    Raises:
        UserError: If the folder holds an unfinished run that is not to be resumed, another process is at work on it, or
            the configuration asks for what cannot be.
        RunFailure: If the disk takes no more, or the folder cannot be written to any more.
    """
    return _execute_in(folder_of(config), config, say=say, console=console)


def resume(folders: Sequence[Path], *, say: Say) -> None:
    """Goes on with runs that were interrupted or failed, each with the configuration in its folder.

    Args:
        folders: The run folders; those of finished runs are told of and left as they are.
        say: Takes lines for the user.

    Raises:
        UserError: If a folder holds no run, or one that cannot go on; the others are carried out all the same.
        RunFailure: If one fails for a known reason; so are the others then.
    """
    register_configs(())
    failures: list[UserError | RunFailure] = []
    for folder in folders:
        try:
            config = read_config(folder / "config.yaml")
            expected = _expected(config, folder / "config.yaml")
            if re.fullmatch(r"[0-9a-f]{8}-s\d+", folder.name) and folder.name != expected:
                raise UserError(f"{folder / 'config.yaml'}: was changed since the run began (it is of {expected} now)")
            _execute_in(folder, config, say=say, console=None)
        except (UserError, RunFailure) as error:
            failures.append(error)
    if failures:
        # What is nobody's mistake is what a script has to hear of.
        first = next((failure for failure in failures if isinstance(failure, RunFailure)), failures[0])
        others = f" (and {len(failures) - 1} more of the runs)" if len(failures) > 1 else ""
        raise type(first)(f"{first}{others}")


def _expected(config: DictConfig, path: Path) -> str:
    """Returns the name of the folder of a run whose configuration was read from a file, and sets that to be resumed."""
    try:
        config.existing = "resume"
        return folder_of(config).name
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (OmegaConfBaseException, *MISFITS) as error:
        raise UserError(f"{path}: not a configuration ({reason_of(error)})") from error


def _execute_in(folder: Path, config: DictConfig, *, say: Say, console: Console | None) -> RunResult:
    refuse_secrets("the configuration", flat_settings(config))
    stream, asked = asked_of(config)
    with ExitStack() as stack:
        try:
            check_run_folder(folder)
            if config.existing != "rerun":
                _refuse_others(folder)
                finished = _finished(folder, stream, asked["model"], say)
                if finished is not None:
                    _tidy(folder)
                    return finished
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            aside = _set_aside(folder) if config.existing == "rerun" and folder.exists() else None
            stack.enter_context(FolderLock(folder))
            # Another process may have had it until now.
            finished = _finished(folder, stream, asked["model"], say)
            if finished is not None:
                return finished
            is_new = _begin(folder, config, say)
        except OSError as error:
            what = str(folder) if _is_there(folder / "config.yaml") else f"out={config.out}"
            if error.errno in _DISK_FULL:
                raise RunFailure(f"{what}: {error.strerror}") from error
            raise UserError(f"{what}: {error.strerror or error}") from error
        try:
            result = _run_in(folder, config, stream, asked, say, console)
        except Exception as error:
            edits = folder / "edits.jsonl"
            if is_new and isinstance(error, UserError) and not (edits.exists() and edits.stat().st_size):
                # A mistake found before the first candidate leaves nothing to go on from: it may be put right.
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
        # No name for a file, for one.
        return False


def _refuse_others(folder: Path) -> None:
    """Raises if a folder stands where a run has a file, or a file where it has a folder."""
    for names, is_wrong, kind in ((_FILES, Path.is_dir, "a folder"), (_FOLDERS, Path.is_file, "a file")):
        for path in (folder / name for name in names):
            if is_wrong(path):
                raise UserError(f"{path}: is {kind}, which no run makes there; existing=rerun sets the run aside")


def _begin(folder: Path, config: DictConfig, say: Say) -> bool:
    """Makes a locked folder ready for its run, and returns whether that one is new."""
    is_new = all(path.name.startswith(".") for path in folder.iterdir())
    if not is_new and config.existing != "resume":
        raise UserError(
            f"{folder}: holds an unfinished run: `grace-bench resume {folder}` or existing=resume goes on with it; "
            f"existing=rerun sets it aside and starts anew"
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
        return "for a reason that was not recorded whole"


def execute_meta_training(config: DictConfig, *, say: Say) -> None:
    """Meta-trains the editor of a configuration, on the stream's requests for training, and says how it went.

    Args:
        config: The composed configuration, the same as for a run.
        say: Takes lines for the user.

    Raises:
        UserError: If the editor needs no meta-training, or the configuration asks for what cannot be.
    """
    stream, asked = asked_of(config)
    with progress_bars() as progress:
        figures = meta_train(stream, **asked, progress=progress)
    for name, value in figures.items():
        say(f"{name} {value:.4g}")


def folder_of(config: DictConfig) -> Path:
    """Returns the folder of the run that a configuration describes.

    Raises:
        UserError: If the configuration asks for what cannot be.
    """
    stream, asked = asked_of(config)
    slug = model_slug(asked["model"], list(known_models()))
    name = registered_name(config.editor)
    return Path(config.out) / stream.registered_name / slug / name / f"{config_hash(config)}-s{config.seed}"


def asked_of(config: DictConfig) -> tuple[Any, dict[str, Any]]:
    """Returns the stream, and what a configuration asks of any work on it."""
    check_options(config)
    stream, editor = make_stream(config), make_editor(config)
    model = config.model or stream.default_model
    if model is None:
        raise UserError(f"stream '{stream.registered_name}' has no model of its own: name one with model=")
    names = ("layer", "dtype", "device", "device_map")
    return stream, {
        "model": str(model),
        "editor": editor,
        "settings": _settings(config),
        **{name: config[name] for name in names},
    }


def _settings(config: DictConfig) -> RunSettings:
    return RunSettings(
        seed=config.seed,
        schedule=Schedule(max_edits=config.max_edits, eval_every=config.eval_every, max_upstream=config.max_upstream),
        split=config.split,
        query=config.protocol.query,
        prefix_length=config.protocol.prefix_length,
        batch_size=config.batch_size,
        batch_tokens=config.batch_tokens,
        engine=config.engine,
        engine_memory_mb=config.engine_memory_mb,
        threads=config.threads,
        tuning_budget=config.tuning_budget,
        checkpoint_every=config.checkpoint_every,
        strict=config.get("strict", False),
    )


def _run_in(
    folder: Path, config: DictConfig, stream: Any, asked: dict[str, Any], say: Say, console: Console | None
) -> RunResult:
    with progress_bars(console) as progress:
        return run_benchmark(
            stream,
            **asked,
            folder=folder,
            run_id=folder_of(config).relative_to(config.out).as_posix(),
            config=plain_config(config),
            configuration=hash_config(plain_config(config)),
            loggers=[
                ProgressLogger(console),
                WandbLogger(folder, mode=config.wandb.mode, project=config.wandb.project, group=config.wandb.group),
            ],
            progress=progress,
            resume=config.existing == "resume" and (folder / "edits.jsonl").exists(),
            say=say,
        )


def _finished(folder: Path, stream: Any, model: str, say: Say) -> RunResult | None:
    """Returns the finished run in a folder, if there is one, and says that it is reused.

    Raises:
        UserError: If its stream or model is another by now.
    """
    if not (folder / "result.json").is_file():
        return None
    result = read_result(folder / "result.json")
    if result.stream.fingerprint != fingerprint_requests(stream.load()):
        raise UserError(f"{folder}: was made from other requests; existing=rerun sets it aside and starts anew")
    if result.model.files is not None and _files_of(model) not in (None, result.model.files):
        raise UserError(
            f"{folder}: was made with other files of model={model}; existing=rerun sets it aside and starts anew"
        )
    say(f"finished before, reused: {folder}")
    return result


def _files_of(model: str) -> str | None:
    """The hash of a model's files; None if they are not here, when a finished run says nothing that they deny."""
    try:
        return resolve_model(model).content_hash()
    except (OSError, UserError):
        return None


def _tidy(folder: Path) -> None:
    """Removes what a process that was killed right after its result had no time to, if nobody is at work there."""
    leftovers = [name for name in (CHECKPOINTS, *LOCK_FILES) if (folder / name).exists()]
    with suppress(OSError, UserError):
        if leftovers:
            with FolderLock(folder):
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    """Gives a folder that no process is at work on a hidden name, and returns that."""
    aside = name_aside(folder)
    with FolderLock(folder) as lock:
        lock.rename(aside)
    return aside


def _checked(overrides: Sequence[str]) -> list[str]:
    """Returns the overrides, with what follows from them for the tuned and the published settings.

    Tuned settings hold for a model they were chosen on only, a published layer for the published model only, and
    either's budget where nothing of them is set by hand.
    """
    given = given_options(overrides)
    presets = Path(str(files("grace_bench.launch.conf")))
    for group in ("paper", "tuned"):
        known = sorted(path.stem for path in (presets / group).glob("*.yaml"))
        for name in given.get(group, "none").split(","):
            if name not in known:
                raise UserError(f"no {group} {name!r}{did_you_mean(name, known)} (there are: {', '.join(known)})")
    models = [] if given.get("model", "null") == "null" else given["model"].split(",")
    foreign = any(resolve_model(model).stream is None for model in models)
    added = ["tuned=none"] if foreign and "tuned" not in given else []
    papers = [OmegaConf.load(presets / "paper" / f"{name}.yaml") for name in given.get("paper", "none").split(",")]
    if models and "layer" not in given and any("layer" in paper for paper in papers):
        added.append("layer=null")
    # What is set by hand was not chosen by the tuning.
    if "tuning_budget" not in given and any(name == "layer" or name.startswith("editor.") for name in given):
        added.append("tuning_budget=null")
    return [*overrides, *added]


def given_options(overrides: Sequence[str]) -> dict[str, str]:
    """Returns the options that overrides give, with their values as typed.

    Raises:
        UserError: If one is not of the form `option=value`.
    """
    given: dict[str, str] = {}
    for override in overrides:
        if override.startswith("-"):
            raise UserError(f"run has no option {override} (settings are given as option=value, a sweep as -m)")
        name, _, given[name] = override.partition("=")
        if not name or name.startswith(("~", "+")) or "=" not in override:
            raise UserError(f"{override!r} should be option=value")
    return given


def record_failure(folder: Path, error: BaseException) -> None:
    """Writes what a run died of into its folder as `error.json`, by which it is known as failed."""
    with suppress(OSError):
        record = {
            "error": type(error).__name__,
            "reason": without_secrets(reason_of(error)),
            "host": platform.node(),
            "traceback": without_secrets("".join(traceback.format_exception(error))),
        }
        write_atomically(folder / _FAILURE, json.dumps(record, indent=1))


def one_line(error: Exception) -> str:
    """Returns what Hydra or OmegaConf say over several lines as one."""
    unknown = re.match(r"Could not override '([^']+)'", str(error))
    if unknown:
        return f"there is no option {unknown[1]}"
    if isinstance(error, RecursionError):
        return "the settings are nested too deeply"
    # Hydra says which override, OmegaConf beneath it what is wrong with it.
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), None)
    kept = [line for line in lines if not line.startswith(("full_key", "object_type", "reference_type", "See https"))]
    text = " ".join(kept) or type(error).__name__
    key = error.override if isinstance(error, OverrideParseException) else key
    return f"{key}: {text}" if key and key not in text else text
