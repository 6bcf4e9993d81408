"""`sweep=tune`: an editor's hyperparameters, chosen on a stream's validation requests and never on its edits."""

import math
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from grace_bench.common.files import set_aside, write_atomically
from grace_bench.common.terminal import table_console
from grace_bench.common.text import visible
from grace_bench.errors import UserError
from grace_bench.launch.compose import default_component, given_options
from grace_bench.launch.run_config import RunConfig, default_options
from grace_bench.launch.sweep import preset_parts
from grace_bench.launch.sweep_run import SweepRun
from grace_bench.launch.typed import texts_of
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.metric_info import metric_infos
from grace_bench.results.reading import read_result
from grace_bench.results.rescored import rescored
from grace_bench.results.schema import RunResult

PRESETS = Path("presets")
"""Where chosen settings are written, for `tuned=presets`."""


def search_space(stream: str, editor: str) -> dict[str, list[Any]]:
    """Returns the values that tuning tries, by option, the preferred value first.

    The editor's class declares the values of its own options, the stream's class the layers.

    Args:
        stream: The stream.
        editor: The editor, which also declares the kind of layer that it edits.

    Raises:
        UserError: If there is no such stream or editor.
    """
    cls, layers = EDITORS.get(editor), STREAMS.get(stream).search_layers
    space: dict[str, list[Any]] = {}
    if cls.layer_kind in layers:
        space["editor.layers" if cls.layer_kind in {"several", "mlp_outputs"} else "layer"] = _listed(
            layers[cls.layer_kind]
        )
    elif "any" in layers:
        space["layer"] = _listed(layers["any"])
    return space | {f"editor.{name}": _listed(values) for name, values in cls.search_space.items()}


def searches(overrides: Sequence[str]) -> list[list[str]]:
    """Returns the multiruns of a tuning, one per stream and editor; a value on the command line replaces the space's.

    Raises:
        UserError: If the overrides ask for the stream's edits, an editor has no search space, or budgets differ.
    """
    given = given_options(overrides)
    if given.get("split", "validation") != "validation":
        raise UserError(f"split={given['split']}: tuning edits validation requests only")
    (base,) = preset_parts("tune", overrides)
    parts, budgets = [], {}
    for stream in texts_of(given.get("stream", default_component("stream"))):
        for editor in texts_of(given.get("editor", default_component("editor"))):
            space = {name: values for name, values in search_space(stream, editor).items() if name not in given}
            chosen = [name for name in given if _is_searched(name, given[name])]
            if not chosen and not any(name.startswith("editor.") for name in space):
                raise UserError(f"editor {editor!r} has no search space: name values, as editor.NAME=VALUE,VALUE")
            own = [f"stream={stream}", f"editor={editor}", *(f"{name}={_values(space[name])}" for name in space)]
            parts.append([*own, *(item for item in base if not item.startswith(("stream=", "editor=")))])
            budgets[stream, editor] = math.prod(len(values) for values in space.values())
    for stream, editor in budgets:
        other = next((e for s, e in budgets if s == stream and budgets[s, e] != budgets[stream, editor]), None)
        if other is not None:
            raise UserError(
                f"tuning gives every editor the same budget, but {editor} has {budgets[stream, editor]} settings on "
                f"{stream} and {other} {budgets[stream, other]}: tune one at a time, or name values"
            )
    return parts


def conclude(runs: Sequence[SweepRun], *, say: Callable[[str], None], score: str | None = None) -> None:
    """Prints the trials of a tuning and writes the best setting of each stream and editor as a preset.

    Args:
        runs: The trials.
        say: Takes lines for the user.
        score: The score of the panel by which the best is chosen; None for the main score.

    Raises:
        UserError: If a trial did not record that score.
    """
    pairs: dict[tuple[str, str], list[SweepRun]] = defaultdict(list)
    for sweep_run in runs:
        # A trial without a configuration is reported by the sweep.
        if sweep_run.config is not None:
            pairs[sweep_run.config.stream.name, sweep_run.config.editor.name].append(sweep_run)
    for (stream, editor), trials in pairs.items():
        _choose(stream, editor, trials, score, say)


def quality(result: RunResult) -> float:
    """Returns what is maximised: the metric that ranks tables (Avg).

    Without it, for perplexity, that is minus the mean logarithm of the metrics that it names for this (ERR, ARR, TRR).
    Where the score exists on one stream alone, it is that stream's metric.
    """
    preferred = metric_infos().ranking[0]
    value = result.metrics.get(preferred.name)
    if value is None and result.protocol.higher_is_better:
        known = (result.metrics.get(info.name) for info in metric_infos() if info.is_main_score)
        value = next((figure for figure in known if figure is not None), -math.inf)
    elif value is None:
        values = [result.metrics.get(name) or math.inf for name in preferred.log_averages]
        value = -sum(map(math.log, values)) / len(values)
    return -math.inf if math.isnan(value) else float(value)


def _shown_metrics() -> list[str]:
    shown = metric_infos().shown("tuning")
    return [
        *(info.name for info in shown if not info.is_cost),
        "n_edits",
        *(info.name for info in shown if info.is_cost),
    ]


def _choose(
    stream: str, editor: str, trials: Sequence[SweepRun], score: str | None, say: Callable[[str], None]
) -> None:
    given = dict.fromkeys(item.partition("=")[0] for run in trials for item in run.overrides)
    names = [name for name in given if name == "layer" or name.startswith("editor.")]
    results: dict[tuple[str, ...], list[RunResult]] = defaultdict(list)
    configs: dict[tuple[str, ...], RunConfig] = {}
    seeds = set()
    for run in trials:
        assert run.config is not None
        seeds.add(run.config.seed)
        setting = tuple(_values([_value_of(run.config, name)]) for name in names)
        configs.setdefault(setting, run.config)
        if run.outcome is not None and run.outcome.state != "failed" and run.folder is not None:
            results[setting].append(rescored(read_result(run.folder / "result.json"), score))
    scores = {
        setting: fmean(map(quality, results[setting])) if len(results[setting]) == len(seeds) else -math.inf
        for setting in configs
    }
    best = max(scores, key=scores.__getitem__)
    _print(stream, editor, names, scores, results, best)
    if scores[best] == -math.inf:
        say(f"{editor} on {stream}: no trial has a score, nothing is chosen")
        return
    most = max(trial.metrics.get("n_edits") or 0 for found in results.values() for trial in found)
    max_edits = configs[best].max_edits
    by = "" if score is None else f", by {score}"
    budget = f"{len(trials)} runs of {'' if most == max_edits else 'at most '}{max_edits} validation edits{by}"
    chosen = " ".join(f"{name}={value}" for name, value in zip(names, best, strict=True))
    say(f"{editor} on {stream}: best of {budget}: {chosen}")
    preset = _preset(configs[best], names, budget)
    say(f"written: {_write(PRESETS / stream / f'{editor}.yaml', preset)} (taken with tuned={PRESETS})")


def _print(
    stream: str,
    editor: str,
    names: Sequence[str],
    scores: Mapping[tuple[str, ...], float],
    results: Mapping[tuple[str, ...], Sequence[RunResult]],
    best: tuple[str, ...],
) -> None:
    table = Table(title=f"{editor} on {stream}, validation", title_justify="left", title_style="bold", box=None)
    metrics = _shown_metrics()
    for column in ("", "score", *(name.removeprefix("editor.") for name in names), *metrics):
        table.add_column(column, overflow="fold")
    for setting, score in scores.items():
        figures = []
        for name in metrics:
            values = [value for result in results[setting] if (value := result.metrics.get(name)) is not None]
            figures.append(f"{fmean(values):.4g}" if values else "–")
        shown = [escape(visible(text)) for text in setting]
        table.add_row("*" if setting == best else "", f"{score:.4f}", *shown, *figures)
    table_console().print(table)


def _preset(config: RunConfig, names: Sequence[str], budget: str) -> str:
    chosen: dict[str, Any] = {"tuning_budget": budget}
    # A layer's path holds for this model only.
    if config.model is not None:
        chosen["model"] = config.model
    # What was tuned in a chat is not meant for bare prompts.
    plain, defaults = config.plain(), default_options()
    chosen |= {name: plain[name] for name in ("chat", "target_space") if plain[name] != defaults[name]}
    for name in names:
        group, _, option = name.rpartition(".")
        (chosen.setdefault(group, {}) if group else chosen)[option] = _value_of(config, name)
    command = " ".join(shlex.join(["grace-bench", *sys.argv[1:]]).split())
    text = yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)
    return f"# Chosen on the validation split: {command}\n{text}"


def _write(path: Path, text: str) -> Path:
    """Writes a preset; an earlier one of that name with other settings is set aside."""
    try:
        if path.exists() and path.read_text(encoding="utf-8") != text:
            set_aside(path)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    return path


def _is_searched(name: str, value: str) -> bool:
    return name.startswith("editor.") and "," in value


def _listed(values: Sequence[Any]) -> list[Any]:
    """The values of an option as plain lists, as configuration files hold them."""
    return [list(value) if isinstance(value, tuple) else value for value in values]


def _values(values: Sequence[Any]) -> str:
    return ",".join(f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value) for value in values)


def _value_of(config: RunConfig, name: str) -> Any:
    """The value of `layer` or of an editor's option, which may be nested (`editor.a.b`)."""
    group, *path = name.split(".")
    value: Any = config.editor.node if group == "editor" else getattr(config, group)
    for part in path:
        value = value[part]
    return value
