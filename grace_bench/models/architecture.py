"""What a model's config.json says of its size, and the dotted paths of its feed-forward layers; imports no torch."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from grace_bench.common.files import readable
from grace_bench.models.zoo import projections_by_config, resolve_model

Part = str
"""The place of a layer in its feed-forward block: `out` for the last map, `in` for the first, `gate` for its gate."""


class _Blocks(NamedTuple):
    """Where an architecture has its blocks, and in each the layers of the feed-forward network by part."""

    path: str
    parts: Mapping[Part, str]


_GATED = {"out": "mlp.down_proj", "in": "mlp.up_proj", "gate": "mlp.gate_proj"}
_FUSED = {"out": "mlp.down_proj", "in": "mlp.gate_up_proj"}
_CONV = {"out": "mlp.c_proj", "in": "mlp.c_fc"}
_PLAIN = {"out": "mlp.fc2", "in": "mlp.fc1"}
_DENSE = {"out": "mlp.dense_4h_to_h", "in": "mlp.dense_h_to_4h"}

_ARCHITECTURES: dict[str, _Blocks] = {
    **dict.fromkeys(
        (
            *(
                "llama",
                "mistral",
                "qwen2",
                "qwen3",
                "qwen3_5",
                "qwen3_5_text",
                "gemma",
                "gemma2",
                "gemma3_text",
                "olmo",
            ),
            *("olmo2", "olmo3", "stablelm", "granite", "cohere", "cohere2", "smollm3"),
        ),
        _Blocks("model.layers", _GATED),
    ),
    "gemma3": _Blocks("model.language_model.layers", _GATED),
    **dict.fromkeys(("phi3", "glm", "glm4"), _Blocks("model.layers", _FUSED)),
    **dict.fromkeys(("gpt2", "gpt_neo", "gpt_bigcode"), _Blocks("transformer.h", _CONV)),
    "starcoder2": _Blocks("model.layers", _CONV),
    "gptj": _Blocks("transformer.h", {"out": "mlp.fc_out", "in": "mlp.fc_in"}),
    "gpt_neox": _Blocks("gpt_neox.layers", _DENSE),
    **dict.fromkeys(("bloom", "falcon"), _Blocks("transformer.h", _DENSE)),
    "phi": _Blocks("model.layers", _PLAIN),
    "opt": _Blocks("model.decoder.layers", {"out": "fc2", "in": "fc1"}),
    # The first Qwen, whose code is not part of transformers.
    "qwen": _Blocks("transformer.h", {"out": "mlp.c_proj", "in": "mlp.w1", "gate": "mlp.w2"}),
}
_BLOCK = re.compile(r"(.*?)\.(\d+)(?:\.(.*))?$")
_PARTS = {suffix: part for blocks in _ARCHITECTURES.values() for part, suffix in blocks.parts.items()}

# A field of config.json has these names in one architecture or another.
_FIELDS = {
    "n_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff"),
    "max_length": ("max_position_embeddings", "n_positions"),
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The architecture and size of a model.

    Attributes:
        model_type: The architecture as transformers names it.
        n_layers: The number of blocks.
        hidden_size: The width of the residual stream.
        intermediate_size: The width inside a feed-forward block; None if the file does not say.
        max_length: The longest input in tokens; None if the file does not say.
        folder: Where the model is, with a slash at its end; empty if unknown.
    """

    model_type: str
    n_layers: int
    hidden_size: int
    intermediate_size: int | None = None
    max_length: int | None = None
    folder: str = ""

    @property
    def n_weights(self) -> int:
        """Roughly how many weights the blocks have."""
        return self.n_layers * self.hidden_size**2


def shape_of(config: Mapping[str, Any], folder: str = "") -> ModelShape | None:
    """Returns the shape that the content of a config.json describes; None if it lacks type, depth or width.

    >>> shape_of({"model_type": "gpt2", "n_layer": 48, "n_embd": 1600})
    ModelShape(model_type='gpt2', n_layers=48, hidden_size=1600, intermediate_size=None, max_length=None, folder='')
    """
    nested = config.get("text_config")
    # Models that also take images keep the sizes of their language model apart.
    text = {**config, **nested} if isinstance(nested, Mapping) else config
    values = {name: _first_whole(text, keys) for name, keys in _FIELDS.items()}
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or values["n_layers"] is None or values["hidden_size"] is None:
        return None
    return ModelShape(model_type=model_type, folder=folder, **values)  # type: ignore[arg-type]


def read_shape(model: str) -> ModelShape | None:
    """Returns the shape of a model by its config.json; None if the file cannot be had or does not say.

    Args:
        model: A short name, a folder or a hub id.

    Raises:
        UserError: If the name looks like a folder and there is none, or the folder contains no model.
    """
    path = resolve_model(model).config_file()
    if path is None:
        return None
    try:
        config = json.loads(readable(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError):
        # Loading the model will say what is wrong.
        return None
    return shape_of(config, str(path.parent)) if isinstance(config, Mapping) else None


def block_of(layer: str) -> str:
    """Returns the dotted path of the block that a layer is in.

    >>> block_of("model.layers.27.mlp.down_proj")
    'model.layers.27'

    Raises:
        ValueError: If it is in no numbered block.
    """
    path, number, _ = _split(layer)
    return f"{path}.{number}"


def number_of(layer: str) -> int:
    """Returns the number of the block that a layer is in.

    >>> number_of("model.layers.27.mlp.down_proj")
    27
    """
    return int(_split(layer)[1])


def is_in_block(layer: str) -> bool:
    """Returns whether a dotted path leads into a numbered block.

    >>> is_in_block("model.layers.27.mlp.down_proj"), is_in_block("lm_head")
    (True, False)
    """
    return _BLOCK.match(layer) is not None


def is_portable(layer: str) -> bool:
    """Returns whether it is known to which part of its block a layer belongs, so that other architectures have it too.

    >>> is_portable("transformer.h.3.mlp.c_proj"), is_portable("transformer.h.3.attn.c_attn")
    (True, False)
    """
    return _split(layer)[2] in _PARTS


def corresponding(layer: str, of: ModelShape, shape: ModelShape) -> str | None:
    """Returns the layer of a model that corresponds to a layer of another: at the same relative depth, the same part.

    >>> llama = ModelShape(model_type="llama", n_layers=32, hidden_size=4096)
    >>> corresponding("model.layers.27.mlp.down_proj", llama, ModelShape(model_type="gpt2", n_layers=12, hidden_size=8))
    'transformer.h.10.mlp.c_proj'

    Args:
        layer: Dotted path of the other model's layer.
        of: The other model.
        shape: The model.

    Returns:
        The dotted path; None if the model's architecture has no such layer that is known.
    """
    path, number, suffix = _split(layer)
    depth = min(round(int(number) / of.n_layers * shape.n_layers), shape.n_layers - 1)
    part = _PARTS.get(suffix)
    blocks = _ARCHITECTURES.get(shape.model_type)
    if blocks is not None and part is not None:
        # Not every block has a gate of its own.
        return f"{blocks.path}.{depth}.{blocks.parts.get(part, blocks.parts['in'])}"
    if of.model_type == shape.model_type:
        return ".".join(name for name in (path, str(depth), suffix) if name)
    if blocks is not None:
        return f"{blocks.path}.{depth}.{blocks.parts['out']}"
    projections = projections_by_config(shape.folder) if shape.folder else []
    return next((found for found in projections if number_of(found) == depth), None)


def _split(layer: str) -> tuple[str, str, str]:
    """The path of the blocks, the number of the block, and the path within it."""
    found = _BLOCK.match(layer)
    if found is None:
        raise ValueError(f"{layer} is in no numbered block")
    return found[1], found[2], found[3] or ""


def _first_whole(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), None)
