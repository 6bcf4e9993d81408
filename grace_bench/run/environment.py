"""The environment of a result: versions, the state of the code, the machine, and torch's settings."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_PACKAGES = {
    "grace_bench": "grace-bench",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "avalanche": "avalanche-lib",
    "numpy": "numpy",
    "safetensors": "safetensors",
    "peft": "peft",
    "datasets": "datasets",
    "wandb": "wandb",
}
_PLUGIN_GROUPS = ("grace_bench.streams", "grace_bench.editors", "grace_bench.metrics")
_GIT_SECONDS = 5
# Variables that git sets inside hooks; they would direct every query to the hook's repository.
_GIT_OVERRIDES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


def describe_environment(device: torch.device, *, threads: int, classes: Iterable[type] = ()) -> dict[str, Any]:
    """Returns the environment of a result as JSON values.

    Args:
        device: The model's device.
        threads: torch's threads within an operation.
        classes: The classes of the run's parts; for classes from other packages, package and code are listed under
            `plugins`.
    """
    return {
        **{name: _version(distribution) for name, distribution in _PACKAGES.items()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **_cuda(device),
        "threads": threads,
        "interop_threads": torch.get_num_interop_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "git": git_state(*(Path(folder) for name in ("grace_bench", *_PLUGIN_GROUPS) for folder in _folders_of(name))),
        "plugins": dict(sorted(_plugin(cls) for cls in classes if not cls.__module__.startswith("grace_bench."))),
    }


@cache
def git_state(*code: Path) -> dict[str, Any] | None:
    """Returns the commit of the checkout that code lies in, and whether the code was changed since.

    Computed once per process, because later changes to the files are not in the imported code.

    Args:
        code: Files or folders of one repository.

    Returns:
        `commit` and `modified`; None where git does not follow the first of them, is missing, or does not answer.
    """
    paths = [str(path) for path in code]
    folder = code[0] if code[0].is_dir() else code[0].parent
    # A virtual environment may lie inside a repository that does not track the installed packages.
    if _git(folder, "ls-files", "--error-unmatch", "--", paths[0]) is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", *paths)
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "modified": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_OVERRIDES}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return None if done.returncode else done.stdout


def _folders_of(package: str) -> list[str]:
    spec = find_spec(package)
    return list(spec.submodule_search_locations or ()) if spec is not None else []


def _plugin(cls: type) -> tuple[str, dict[str, Any]]:
    """The package of a class, with its version if it is installed and the state of its code if that is a checkout."""
    name = cls.__module__.partition(".")[0]
    package = sys.modules.get(name)
    paths = [*getattr(package, "__path__", ())] or [getattr(package, "__file__", None)]
    return name, {"version": _plugin_version(name), "git": git_state(Path(paths[0])) if paths[0] else None}


@cache
def _plugin_version(package: str) -> str | None:
    for group in _PLUGIN_GROUPS:
        for point in entry_points(group=group):
            if point.dist is not None and point.module.partition(".")[0] == package:
                return point.dist.version
    # Looking up the distribution of a module takes a second; most have the module's name.
    return _version(package)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cuda(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }
