"""Artifacts that editors compute once and reuse, such as trained editor networks and key statistics.

An artifact is a safetensors file `<owner>/<key>.safetensors`, where the owner is an editor, or what several of them
share, such as `moments`, and the key is the SHA-256 of all its inputs. The
package's own artifacts are searched first, then the cache folder: `GRACE_BENCH_CACHE`, or `grace-bench` under
`XDG_CACHE_HOME` (default `~/.cache`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grace_bench.common.files import atomic_path
from grace_bench.data.requests import EditRequest, content_of


def content_key(**content: Any) -> str:
    """Returns the SHA-256 of named JSON values, independent of their order.

    >>> content_key(a=1, b=[2]) == content_key(b=[2], a=1)
    True
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def requests_key(requests: Iterable[EditRequest]) -> str:
    """Returns the SHA-256 of a sequence of requests; the order counts."""
    return content_key(requests=[content_of(request) for request in requests])


def shipped_folder() -> Path:
    """Returns the folder of the artifacts that ship with the package."""
    return Path(str(files("grace_bench.editors"))) / "artifacts"


def cache_folder() -> Path:
    """Returns the folder in which artifacts computed on this machine are cached."""
    own = os.environ.get("GRACE_BENCH_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "grace-bench"


def load_artifact(owner: str, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Returns the tensors (on the CPU) and the notes of an artifact; None if its file is missing or incomplete.

    Args:
        owner: The registered name of the editor that the artifact belongs to, or what several editors share.
        key: The content key of the artifact.
    """
    for path in _places(owner, key):
        try:
            with safe_open(path, framework="pt") as file:
                # The handle has `keys()` but is not a mapping.
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
        except (OSError, SafetensorError):
            # An incomplete file counts as missing; the artifact is computed again.
            continue
    return None


def save_artifact(owner: str, key: str, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Writes an artifact to the cache folder atomically.

    Args:
        owner: The registered name of the editor that the artifact belongs to, or what several editors share.
        key: The content key of the artifact.
        tensors: The tensors by name.
        notes: Information for people, such as settings and figures.
    """
    path = _places(owner, key)[-1]
    with atomic_path(path, shared=True) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, dict(notes))


def drop_artifact(owner: str, key: str) -> None:
    """Removes an artifact from the cache folder, if it exists."""
    _places(owner, key)[-1].unlink(missing_ok=True)


def artifact_path(owner: str, key: str) -> Path:
    """Returns the file of an artifact; where it would be in the cache folder, if it does not exist."""
    *shipped, cached = _places(owner, key)
    return next((path for path in shipped if path.exists()), cached)


def _places(owner: str, key: str) -> list[Path]:
    """Where an artifact may be; the last is in the cache folder."""
    return [folder / owner / f"{key}.safetensors" for folder in (shipped_folder(), cache_folder())]
