"""`grace-bench moments`: the second moments of layer inputs that a run needs, computed and cached before it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from grace_bench.common.options import check_text
from grace_bench.common.terminal import progress_bars, say
from grace_bench.data.requests import EditRequest
from grace_bench.editing.moments import MomentSource, TextSource
from grace_bench.errors import UserError
from grace_bench.launch.arguments import run_settings
from grace_bench.launch.compose import NOT_COMPOSED, compose, given_options, one_line
from grace_bench.launch.run_config import RunConfig, make_stream
from grace_bench.launch.typed import quote_plain_text, refuse_several
from grace_bench.models.editable import EditableModel
from grace_bench.models.loading import pick_threads
from grace_bench.models.tasks.lookup import get_task
from grace_bench.run.opening import open_benchmark, own_threads

_SOURCE = tuple(declared.name for declared in fields(MomentSource))
_OWN = ("layers", "text")
"""Options of an editor that the command also takes by themselves."""


def moments_command(overrides: Sequence[str]) -> None:
    """Carries out `grace-bench moments`: caches second moments, and prints a line for each layer.

    Args:
        overrides: The options of the run that they are for, and `layers=` and `text=`. Without `stream=`, a model and a
            text of their own are enough; without `editor=`, `editor.` has the options of `MomentSource` and `layers`.

    Raises:
        UserError: If an option has a value that it cannot have, or there is no text.
        KeyboardInterrupt: If it is interrupted, with a line that says how it goes on.
    """
    wanted = _wanted(overrides)
    try:
        with progress_bars() as progress, _opened(wanted, progress) as (model, train):
            layers = wanted.layers or [model.layer_name]
            found = wanted.source.moments(model, layers, train, editor=wanted.config.editor.name, progress=progress)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or "interrupted; the same command goes on from what is cached") from None
    for layer, moment in found.items():
        how = "read" if wanted.source.moments_path is not None else "cached"
        if moment.seconds is not None:
            how = f"computed in {moment.seconds:.1f} s"
        say(f"{layer}  width {len(moment.matrix)}  {moment.n_tokens:,} tokens  {how}  {moment.path}")


@dataclass(frozen=True)
class _Wanted:
    """What the command was asked for."""

    config: RunConfig
    layers: Sequence[str] | None
    source: MomentSource
    has_stream: bool


def _wanted(overrides: Sequence[str]) -> _Wanted:
    flag = next((override for override in overrides if override.startswith("-")), None)
    if flag is not None:
        raise UserError(f"moments has no option {flag} (settings are given as option=value)")
    given = given_options(overrides)
    own = {name: _value(name, given.pop(name)) for name in _OWN if name in given}
    if "editor" not in given:
        known = {f"editor.{name}": name for name in (*_SOURCE, "layers")}
        other = next((name for name in given if name.startswith("editor.") and name not in known), None)
        if other is not None:
            raise UserError(f"{other}={given[other]} is an option of an editor: name it with editor=")
        typed = {known[name]: _value(name, given.pop(name)) for name in [*given] if name in known}
    has_stream = any(name in ("stream", "paper") or name.startswith("stream.") for name in given)
    if not has_stream or "editor" not in given:
        # What was tuned for the stream and editor of a run that names none says nothing here.
        given.setdefault("tuned", "none")
    config = compose([f"{name}={value}" for name, value in given.items()])
    if "editor" in given:
        typed = config.editor.settings
        if not {"text_path", "n_texts"} <= typed.keys():
            raise UserError(f"editor '{config.editor.name}' uses no second moments")
    options = {"seed": config.seed, **{name: value for name, value in typed.items() if name in _SOURCE}}
    if "text" in own:
        check_text("text", own["text"])
        is_source = own["text"] in get_args(TextSource)
        options |= {"text": own["text"], "text_path": None} if is_source else {"text_path": own["text"]}
    return _Wanted(
        config=config,
        layers=_layers(own["layers"] if "layers" in own else typed.get("layers")),
        source=MomentSource(**options),
        has_stream=has_stream,
    )


def _value(name: str, typed: str) -> Any:
    """What a typed value stands for."""
    override = f"{name}={typed}"
    refuse_several(override)
    try:
        return OverridesParser.create().parse_override(quote_plain_text(override)).value()
    except NOT_COMPOSED as error:
        raise UserError(one_line(error)) from error


def _layers(value: Any) -> list[str] | None:
    layers = [value] if isinstance(value, str) else value
    if layers is None:
        return None
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(layer, str) for layer in layers):
        raise UserError(f"layers={value} should be a list of dotted paths, as layers=[A,B]")
    return list(layers)


@contextmanager
@own_threads()
def _opened(wanted: _Wanted, progress: Any) -> Iterator[tuple[EditableModel, Sequence[EditRequest]]]:
    """The model, and the requests for training of the stream, if there is one."""
    config, settings = wanted.config, run_settings(wanted.config)
    # A model that no layer is known for needs none beside those that are asked for.
    layer = config.layer or (wanted.layers[0] if wanted.layers else None)
    loading: Mapping[str, Any] = {name: getattr(config, name) for name in ("dtype", "device", "device_map", "load_in")}
    if wanted.has_stream:
        stream = make_stream(config)
        with open_benchmark(
            stream, model=config.model, settings=settings, layer=layer, progress=progress, **loading
        ) as opened:
            train = opened.benchmark.data.train
            if wanted.source.needs_requests and opened.model.task.reads_running_text and not train:
                raise UserError(
                    f"stream '{stream.registered_name}' marks no requests for training: give text=FILE or text=model"
                )
            yield opened.model, train
        return
    if wanted.source.needs_requests:
        raise UserError(
            "text=train takes the requests that a stream marks for training: name it with stream=, or give text=FILE "
            "or text=model"
        )
    if config.model is None:
        raise UserError("whose layers? Name the model with model=, or a stream that has one with stream=")
    task = get_task("language_modelling", format=settings.text_format)
    model = EditableModel.from_pretrained(config.model, layer=layer, task=task, **loading)
    torch.set_num_threads(pick_threads(model, settings.threads))
    yield model, ()
