"""Hyperparameters and layers as they were published for editors on models, and how a run takes them.

The data are in `published/`: `presets.jsonl` has one line for an editor on a model, `models.yaml` says which models
these are, `sources.yaml` whose settings count first.
"""

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, open_dict

from grace_bench.errors import UserError, did_you_mean, reason_of
from grace_bench.models.architecture import (
    ModelShape,
    corresponding,
    is_in_block,
    is_portable,
    number_of,
    read_shape,
)
from grace_bench.models.zoo import layer_by_size, resolve_model
from grace_bench.registry import EDITORS

GROUP = "model_preset"
"""Hydra's group of the nodes that `preset=auto` adds to a configuration: `auto_PAPER_EDITOR`."""
ANY_MODEL = "any"
_FOLDER = files("grace_bench.launch") / "published"
_PRESETS = "presets.jsonl"
KEY = "preset"
"""Where a composed configuration says that it takes a preset, and then has its values; no option of the run."""
_LAYERS = "layers"
"""The option of an editor that acts on several layers."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What was published for an editor on a model.

    Attributes:
        editor: The editor's registered name, or the one that it will have.
        model: The model's name in `models.yaml`, or `any`.
        source: Where it stands: `repository@commit:path`.
        variant: The name of the setting where a source has several for one editor and model.
        layers: Dotted paths of the layers that are edited, in the order in which the source names them.
        options: The editor's options.
        untranslated: What the editor has no option for, as the source names it.
        place: The file and line that hold it.
    """

    editor: str
    model: str
    source: str
    variant: str | None = None
    layers: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    untranslated: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""

    @property
    def repository(self) -> str:
        """The repository that the source is in."""
        return self.source.partition("@")[0]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A model of `models.yaml`; the fields are those of `ModelShape`."""

    model_type: Sequence[str]
    n_layers: int
    hidden_size: int
    intermediate_size: int | None = None
    max_length: int | None = None

    @property
    def shape(self) -> ModelShape:
        return ModelShape(model_type=self.model_type[0], n_layers=self.n_layers, hidden_size=self.hidden_size)

    def is_shape_of(self, shape: ModelShape) -> bool:
        """Whether a model of that shape is this one."""
        return (
            shape.model_type in self.model_type
            and (shape.n_layers, shape.hidden_size) == (self.n_layers, self.hidden_size)
            and _may_equal(shape.intermediate_size, self.intermediate_size)
        )


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a run takes of the presets.

    Attributes:
        options: The editor's options.
        layer: Dotted path of the layer; None for the model's own.
        budget: How the hyperparameters were chosen; None for the editor's defaults.
        note: What there is to say of the settings, without the layer; empty if they were published for this very model.
        layer_note: Where the layer comes from; empty if it was published for this very model.
        no_layer: Why there is no layer; empty if there is one.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    layer: str | None = None
    budget: str | None = None
    note: str = ""
    layer_note: str = ""
    no_layer: str = ""


@cache
def presets() -> tuple[Preset, ...]:
    """Returns all presets, in the order of the file.

    Raises:
        UserError: If a line is no preset, is about a model that `models.yaml` does not have, or names a layer that the
            model lacks; names line and field.
    """
    lines = (_FOLDER / _PRESETS).read_text(encoding="utf-8").splitlines()
    return tuple(_preset(f"{_PRESETS}:{number}", line) for number, line in enumerate(lines, start=1))


def _preset(place: str, line: str) -> Preset:
    try:
        entry = json.loads(line)
        preset = Preset(**{**entry, "layers": tuple(entry.get("layers", ()))}, place=place)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{place}: is no preset ({reason_of(error)})") from error
    known = _models().get(preset.model)
    if known is None and preset.model != ANY_MODEL:
        raise UserError(f"{place}: field 'model': no model {preset.model!r}{did_you_mean(preset.model, _models())}")
    for layer in preset.layers:
        if known is None:
            raise UserError(f"{place}: field 'layers': settings for any model name no layer, such as {layer}")
        if not is_in_block(layer) or number_of(layer) >= known.n_layers:
            raise UserError(f"{place}: field 'layers': {preset.model} has {known.n_layers} blocks, and no {layer}")
    return preset


@cache
def _models() -> dict[str, _Known]:
    return {name: _Known(**known) for name, known in _yaml("models.yaml").items()}


@cache
def _yaml(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((_FOLDER / name).read_text(encoding="utf-8"))
    return content


def choose(editor: str, model: str, *, paper: str = "none") -> Chosen:
    """Returns what was published for an editor on a model, or else on the model that is nearest to it.

    A model is recognised by its config.json: by type, depth and width. Where there are no settings for it, those for
    the nearest model are taken, at the same relative depth. Nearest is a model of the same type before others, then the
    one with the most similar number of weights.

    Args:
        editor: A registered name.
        model: A short name, a folder or a hub id.
        paper: The paper whose authors' settings count first.

    Returns:
        The choice; the editor's and the model's own defaults for a model of which no config.json is at hand.

    Raises:
        UserError: If the name of the model looks like a folder and there is none, the folder contains no model, or a
            preset has an option that the editor lacks.
    """
    shape = read_shape(model)
    if shape is None:
        return Chosen()
    nearness = _nearness(shape, model, paper)
    # Settings for any model say nothing about layers, but more than those for another model.
    settings = min(_presets_of(editor), key=nearness, default=None)
    layered = min(_layered(editor, shape), key=nearness, default=None)
    chosen = Chosen()
    if settings is not None:
        exact = settings.model == ANY_MODEL or _models()[settings.model].is_shape_of(shape)
        chosen = Chosen(
            options=settings.options,
            budget="published" if exact else f"published for {settings.model}",
            note="" if exact else f"settings of {settings.model} ({settings.source})",
        )
    return chosen if layered is None else _with_layer(chosen, layered, editor, shape, model)


def preset_lines() -> list[str]:
    """Returns what `list presets` prints: a line for each editor and model, and under it the settings."""
    lines: list[str] = []
    names = [f"{preset.model} ({preset.variant})" if preset.variant else preset.model for preset in presets()]
    n_editor, n_name = max(len(preset.editor) for preset in presets()), max(map(len, names))
    for preset, name in zip(presets(), names, strict=True):
        layers = _shortened(preset.layers) or "no layer of its own"
        unusable = "" if preset.editor in EDITORS.entries() else f"; no editor {preset.editor!r} yet: not usable"
        lines.append(f"{preset.editor:<{n_editor}}  {name:<{n_name}}  {layers}  ({preset.source}{unusable})")
        lines += [f"    {_assignments(preset.options)}"] if preset.options else []
        lines += [f"    without an option: {_assignments(preset.untranslated)}"] if preset.untranslated else []
    return lines


def preset_node(editor: str, paper: str) -> dict[str, Any]:
    """Returns the node by which a configuration takes the presets of an editor.

    Its values are references to those of the preset, which `fill_in` adds, so that whatever is typed replaces them.
    """
    return {
        KEY: {"paper": paper, "editor": editor},
        "layer": f"${{{KEY}.layer}}",
        "tuning_budget": f"${{{KEY}.budget}}",
        "editor": {name: f"${{{KEY}.options.{name}}}" for name in _node_options(editor)},
    }


def fill_in(config: DictConfig) -> str | None:
    """Gives a composed configuration the values of its preset, if it takes one, where nothing else was typed.

    Returns:
        A line on what was published for another model; None if there is nothing to say.

    Raises:
        UserError: If no layer of the model corresponds to the published one, or the model's folder is missing.
    """
    if KEY not in config:
        return None
    paper, editor = config[KEY].paper, config[KEY].editor
    chosen = Chosen() if config.model is None else choose(editor, str(config.model), paper=paper)
    takes_layer = OmegaConf.is_interpolation(config, "layer")
    if takes_layer and chosen.no_layer:
        raise UserError(chosen.no_layer)
    defaults = {name: parameter.default for name, parameter in _parameters(editor).items()}
    options = {name: chosen.options.get(name, defaults[name]) for name in _node_options(editor)}
    with open_dict(config):
        config[KEY] = {"layer": chosen.layer, "budget": chosen.budget, "options": options}
    layer_note = chosen.layer_note if takes_layer else ""
    if not chosen.note and not layer_note:
        return None
    missing = "nothing" if chosen.note else "no layer"
    taken = ", ".join(filter(None, (chosen.note, layer_note)))
    return f"{missing} is published for editor {editor} on {config.model}: {taken}"


def _shortened(layers: Sequence[str]) -> str:
    """Layers that differ only in the number of their block as one: `transformer.h.{13,14,15}.mlp.c_proj`."""
    numbers: dict[str, list[str]] = {}
    for layer in layers:
        path, number, rest = re.match(r"(.*?\.)(\d+)(.*)", layer).groups()  # type: ignore[union-attr]
        numbers.setdefault(f"{path}#{rest}", []).append(number)
    return " ".join(
        path.replace("#", found[0] if len(found) == 1 else f"{{{','.join(found)}}}") for path, found in numbers.items()
    )


def _assignments(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items()
    )


def _parameters(editor: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(EDITORS.get(editor)).parameters


def _presets_of(editor: str) -> list[Preset]:
    """The presets of an editor that can be imported, after checking their options against its own."""
    found, parameters = [preset for preset in presets() if preset.editor == editor], _parameters(editor)
    for preset in found:
        for name in preset.options:
            if name not in parameters:
                unknown = (
                    f"field 'options.{name}': editor {editor!r} has no such option{did_you_mean(name, parameters)}"
                )
                raise UserError(f"{preset.place}: {unknown}")
    return found


def _node_options(editor: str) -> list[str]:
    """The options of an editor that presets have values for."""
    named = [name for preset in _presets_of(editor) for name in preset.options]
    return list(dict.fromkeys((*named, *([_LAYERS] if _LAYERS in _parameters(editor) else []))))


def _layered(editor: str, shape: ModelShape) -> Sequence[Preset]:
    """The presets that an editor may take its layer from."""
    for name in (editor, _yaml("sources.yaml")["layers_of"].get(editor)):
        found = [preset for preset in presets() if preset.editor == name and preset.layers]
        if found:
            return found
    if layer_by_size(shape.model_type, shape.n_layers) is not None:
        return ()
    # An editor for which no layer was published needs one all the same, and so does a run without any editor.
    return [preset for preset in presets() if len(preset.layers) == 1 and preset.editor in EDITORS.entries()]


def _with_layer(chosen: Chosen, preset: Preset, editor: str, shape: ModelShape, model: str) -> Chosen:
    """The choice with the layers of a preset, or those that correspond to them in another model."""
    of = _models()[preset.model]
    found = [corresponding(layer, of.shape, shape) for layer in preset.layers]
    layers = [layer for layer in dict.fromkeys(found) if layer is not None]
    published = f"{preset.layers[-1]} in {preset.model} ({preset.source})"
    if not layers or None in found:
        if layer_by_size(shape.model_type, shape.n_layers) is not None or resolve_model(model).layer is not None:
            return chosen
        problem = (
            f"model={model}: no layer of a {shape.model_type} is known that corresponds to {published}: name one with "
            f"layer="
        )
        return replace(chosen, no_layer=problem)
    note = f"layer={layers[-1]}, at the relative depth of {published}"
    is_own = of.is_shape_of(shape) and preset.editor in (editor, _yaml("sources.yaml")["layers_of"].get(editor))
    return replace(
        chosen,
        layer=layers[-1],
        # Settings that have a value of their own for it act on other layers beside the named one.
        options={_LAYERS: layers, **chosen.options} if _LAYERS in _parameters(editor) else chosen.options,
        layer_note="" if is_own else note,
    )


def _nearness(shape: ModelShape, model: str, paper: str) -> Callable[[Preset], tuple[Any, ...]]:
    """A key that orders presets: the nearest model first, then the paper's authors, then the editor's."""
    sources, names = _yaml("sources.yaml"), list(_models())

    def key(preset: Preset) -> tuple[Any, ...]:
        repositories = [sources["of_paper"].get(paper), sources["of_editor"].get(preset.editor), preset.repository]
        by_source = repositories.index(preset.repository)
        if preset.model == ANY_MODEL:
            return (2, by_source)
        known, is_variant = _models()[preset.model], preset.variant is not None
        if not known.is_shape_of(shape):
            is_of_type = shape.model_type in known.model_type
            is_like_it = is_of_type or all(map(is_portable, preset.layers))
            return (
                1,
                not is_of_type,
                not is_like_it,
                is_variant,
                abs(math.log(known.shape.n_weights / shape.n_weights)),
                by_source,
            )
        is_named = preset.model in Path(model).name.lower()
        is_as_long = _may_equal(shape.max_length, known.max_length)
        return (0, not is_named, not is_as_long, names.index(preset.model), is_variant, by_source)

    return key


def _may_equal(given: int | None, known: int | None) -> bool:
    """Whether two values are equal, as far as both are known."""
    return None in (given, known) or given == known
