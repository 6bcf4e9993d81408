"""Models by short name, and the layers that were published for them."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grace_bench.errors import UserError
from grace_bench.registry import STREAMS

# Hartvigsen et al. 2023, section 4 and the official configuration: architecture and depth to the edited layer.
_PUBLISHED_LAYERS: dict[tuple[Any, Any], str] = {
    ("t5", 8): "encoder.block.4.layer.1.DenseReluDense.wo",
    ("bert", 12): "bert.encoder.layer.10.output.dense",
    ("gpt2", 48): "transformer.h.35.mlp.c_fc",
}

_STREAM_KEY = "grace_bench_stream"
"""The entry of a checkpoint's config.json that names the stream it was trained for."""


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        name: The name that results carry.
        path: A folder or a hub id.
        stream: The stream class the model was trained for, which knows its layer; None for other models.
    """

    name: str
    path: str
    stream: Any = None


def known_models() -> dict[str, str]:
    """Returns the short names with one line on each."""
    summaries = {}
    for path in sorted(_checkpoints().glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config.get("architectures", [config["model_type"]])[0]
        summaries[path.parent.name] = f"{kind}, trained for stream {path.parent.name}; ships with grace-bench"
    return summaries


def resolve_model(name_or_path: str) -> ModelSource:
    """Finds a model by short name, folder or hub id.

    Raises:
        UserError: If the name looks like a folder and there is none, or the folder holds no model.
    """
    folder = Path(name_or_path).expanduser()
    shipped = _checkpoints() / name_or_path
    if name_or_path and not folder.is_absolute() and (shipped / "config.json").is_file():
        folder = shipped
    if folder.is_dir():
        return ModelSource(folder.resolve().name, str(folder), _trained_for(folder))
    if name_or_path.startswith(("/", ".", "~")) or name_or_path.count("/") > 1:
        raise UserError(f"model={name_or_path}: no such folder")
    return ModelSource(name_or_path, name_or_path)


def published_layer(module: Any) -> str:
    """Returns the layer that was published for a model of this architecture and depth.

    Raises:
        UserError: If none was.
    """
    config = getattr(module, "config", None)
    depths = (getattr(config, key, None) for key in ("num_layers", "num_hidden_layers", "n_layer"))
    depth = next((value for value in depths if value is not None), None)
    model_type = getattr(config, "model_type", type(module).__name__)
    layer = _PUBLISHED_LAYERS.get((model_type, depth))
    if layer is None:
        size = "" if depth is None else f" of {depth} layers"
        raise UserError(
            f"no layer is published for a {model_type}{size}: name one with layer=, for example the last projection "
            f"of a middle block"
        )
    return layer


def mark_checkpoint(folder: Path, stream: str) -> None:
    """Notes in a checkpoint's config.json which stream it was trained for."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[_STREAM_KEY] = stream
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checkpoints() -> Path:
    spec = find_spec("grace_bench.streams")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "checkpoints"


def _trained_for(folder: Path) -> Any:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"model={folder}: the folder holds no config.json") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from error
    name = config.get(_STREAM_KEY) if isinstance(config, dict) else None
    return None if name is None else STREAMS.get(str(name))
