"""Layers by the block of the model that they are in: the first number in their dotted path."""

from collections.abc import Sequence

from grace_bench.analysis.figures.drawing import plain
from grace_bench.models.editable import EditableModel


def analogous_layers(model: EditableModel) -> list[str]:
    """Returns the model's layer and its counterparts in the other blocks, in order."""
    pattern = layer_pattern(model.layer_name)
    return sorted((name for name, _ in model.module.named_modules() if layer_pattern(name) == pattern), key=layer_order)


def layer_names(layers: Sequence[str]) -> list[str]:
    """Returns short names of layers: their block numbers if they differ in nothing else, otherwise their paths.

    >>> layer_names(["encoder.block.0.wo", "encoder.block.4.wo"])
    ['block 0', 'block 4']
    >>> layer_names(["first", "second"])
    ['first', 'second']
    """
    if len({layer_pattern(layer) for layer in layers}) == 1 and "*" in layer_pattern(layers[0]):
        return [f"block {layer_order(layer)[0]}" for layer in layers]
    return [plain(layer) for layer in layers]


def layer_order(layer: str) -> tuple[int, str]:
    """Returns a sort key by block; layers outside of blocks come first."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), -1), layer


def layer_pattern(layer: str) -> str:
    """Returns a path with an asterisk in place of the block's number.

    >>> layer_pattern("encoder.block.4.layer.1.wo")
    'encoder.block.*.layer.1.wo'
    """
    parts = layer.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join("*" if index == number else part for index, part in enumerate(parts))
