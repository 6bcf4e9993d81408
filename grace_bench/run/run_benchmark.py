"""`run_benchmark`: one editor on one stream, from settings to a result and its files."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from grace_bench.common.credentials import without_secrets
from grace_bench.common.files import write_atomically
from grace_bench.common.progress import Progress
from grace_bench.common.untrusted import check_run_folder
from grace_bench.data.avalanche import BaseLogger, BasePlugin, EvaluationPlugin
from grace_bench.data.benchmark import EditBenchmark, probe_requests
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import DeviceMap, EditableModel, pick_threads
from grace_bench.models.engine.engine import EngineName, make_engine
from grace_bench.models.tasks.base import get_task
from grace_bench.models.zoo import resolve_model
from grace_bench.registry import EDITORS, METRICS, STREAMS
from grace_bench.results.schema import EditorInfo, ModelInfo, Protocol, RunResult, StreamInfo, sealed
from grace_bench.run.environment import describe_environment
from grace_bench.run.loggers import RunLogger, RunPlan
from grace_bench.run.loggers.jsonl import JsonlLogger, PredictionsLogger
from grace_bench.run.loop import Run, Schedule, seed_everything
from grace_bench.run.resumable import KeptRun

_MOST_UPSTREAM = 4096
"""So many activations are enough to estimate a covariance from; they are held at once."""

_ALWAYS_NAMED: dict[str, float | None] = {"TRR": None, "ERR": None, "Avg": None}
"""Scores that a result names also where there is nothing to measure them on."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything a run needs beside its stream, model and editor.

    Attributes:
        seed: Orders the edits and seeds every random generator.
        schedule: When to edit and evaluate.
        split: `edits`, or `validation` for tuning.
        query: Where running text is queried: `prefix` or `last_token`.
        prefix_length: Tokens of running text that are read and not scored.
        batch_size: The most inputs in one forward pass of scoring.
        batch_tokens: The most tokens in one, padding included; on a CPU at most 1,024 where nothing is generated.
        engine: `exact`, or `plain` for every pass whole and one input at a time, whatever `batch_size` says.
        engine_memory_mb: What the exact engine may keep between evaluations; None for a quarter of the free memory.
        threads: torch threads, or `auto` by model size.
        tuning_budget: How the hyperparameters were chosen, as the table shows it.
        checkpoint_every: Write a checkpoint after every so many edits, beside the start.
        strict: Stop at the first edit that cannot be made, rather than record it and go on.
    """

    seed: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    split: str = "edits"
    query: str = "prefix"
    prefix_length: int = 8
    batch_size: int = 64
    batch_tokens: int = 16384
    engine: EngineName = "exact"
    engine_memory_mb: int | None = None
    threads: int | Literal["auto"] = "auto"
    tuning_budget: str | None = None
    checkpoint_every: int = 50
    strict: bool = False


@contextmanager
def own_threads() -> Iterator[None]:
    """Gives torch its number of threads back: what one run chose for its model must not be what the next one finds."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@own_threads()
def run_benchmark(
    stream: EditStream | str,
    *,
    model: EditableModel | str | None = None,
    editor: Callable[..., EditorStrategy] | str,
    settings: RunSettings | None = None,
    layer: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    folder: Path | None = None,
    run_id: str | None = None,
    config: Mapping[str, Any] | None = None,
    configuration: str | None = None,
    loggers: Sequence[BaseLogger] = (),
    plugins: Sequence[BasePlugin] = (),
    progress: Progress | None = None,
    resume: bool = False,
    say: Callable[[str], None] | None = None,
) -> RunResult:
    """Runs one editor on one stream.

    With a folder, the run's state is kept there as it goes on, and on SIGINT and SIGTERM: a run that was stopped in any
    way and resumed ends with the same bytes as one that never was, times aside.

    Args:
        stream: A stream, or the name of a registered one.
        model: An editable model, or what `EditableModel.from_pretrained` takes; None for the stream's own.
        editor: The name of a registered editor, for the defaults of its constructor, or anything that makes one from
            `model=`, `plugins=` and `evaluator=`.
        settings: Seed, schedule and protocol.
        layer: The layer to edit, if `model` is a name.
        dtype: The model's dtype, if `model` is a name.
        device: Where to run, if `model` is a name.
        device_map: How to spread its weights over devices instead (see `EditableModel.from_pretrained`).
        folder: Receives the run's files, `config.yaml` aside; None leaves none.
        run_id: The name of the run; None makes one from what is run.
        config: The resolved configuration, for loggers.
        configuration: SHA-256 of that configuration, for the result.
        loggers: Avalanche loggers; those of `grace_bench.run.loggers` also hear of the run's start and end.
        plugins: Avalanche plugins that live on experience-level callbacks.
        progress: Called as a long stream is read, the unedited model is asked, and an editor prepares.
        resume: Go on from the newest whole checkpoint in the folder, if there is one.
        say: Takes a line on where a resumed run goes on, and what of its files was dropped.

    Returns:
        The result; with `folder`, also written there as `result.json`.

    Raises:
        UserError: If a name is unknown, data cannot be read, the parts do not fit together, a checkpoint is of another
            configuration, model or data, or something in the folder leads out of it.
        Interrupted: After a signal, once the run's state is on disk.
        RunFailure: At an edit that cannot be made, with `settings.strict`, once the run's state is on disk.
    """
    settings = settings or RunSettings()
    if folder is not None:
        check_run_folder(folder)
    opened = open_benchmark(
        stream,
        model=model,
        settings=settings,
        layer=layer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        progress=progress,
    )
    benchmark, editable, task = opened.benchmark, opened.model, opened.model.task
    fingerprint = editable.fingerprint
    check_fit(editable, benchmark)
    files: list[RunLogger] = [] if folder is None else [JsonlLogger(folder), PredictionsLogger(folder)]
    kept: KeptRun | None = None
    evaluator = EvaluationPlugin(
        *(metric() for metric in METRICS.classes().values()), loggers=[*files, *loggers], collect_all=False
    )
    make = EDITORS.get(editor) if isinstance(editor, str) else editor
    strategy = make(model=editable, plugins=list(plugins), evaluator=evaluator)
    watchers = [logger for logger in loggers if isinstance(logger, RunLogger)]
    result: RunResult | None = None
    try:
        check_subjects(strategy, benchmark)
        environment = _environment(strategy, opened.stream)
        run = Run(benchmark, strategy, settings.schedule, strict=settings.strict, progress=progress)
        if folder is not None:
            kept = KeptRun(
                folder,
                run,
                loggers=[*files, *watchers],
                identity=_identity(strategy, benchmark, settings, fingerprint),
                environment=environment,
            )
        if not (resume and kept is not None and kept.take_up(say)):
            prepare_editor(strategy, benchmark, progress=progress)
        plan = RunPlan(
            run_id=run_id or f"{benchmark.name}/{editable.name}/{strategy.registered_name}/s{settings.seed}",
            folder=folder,
            config=dict(config or {}),
            stream=benchmark.name,
            model=editable.name,
            editor=strategy.registered_name,
            n_candidates=len(benchmark.data.edits),
            max_edits=settings.schedule.max_edits,
            higher_is_better=task.higher_is_better,
        )
        for watcher in (*files, *watchers):
            watcher.start(plan)
        if kept is None:
            run.run()
        else:
            kept.carry_out(every=settings.checkpoint_every)
        result = RunResult(
            run_id=plan.run_id,
            stream=StreamInfo(
                name=benchmark.name,
                task=benchmark.task,
                fingerprint=benchmark.fingerprint,
                n_candidates=len(benchmark.data.edits),
                left_out=dict(benchmark.data.left_out),
                **benchmark.metadata.model_dump(include={"source", "revision", "license"}),
            ),
            model=ModelInfo(
                name=editable.name,
                path=opened.path,
                fingerprint=fingerprint,
                config_fingerprint=editable.config_fingerprint,
                files=opened.files,
                layer=editable.layer_name,
                dtype=str(editable.dtype).removeprefix("torch."),
                n_parameters=sum(parameter.numel() for parameter in editable.module.parameters()),
            ),
            editor=EditorInfo(name=strategy.registered_name, **strategy.settings()),
            protocol=Protocol(
                split=settings.split,
                main_score=task.main_score,
                higher_is_better=task.higher_is_better,
                max_edits=settings.schedule.max_edits,
                eval_every=settings.schedule.eval_every,
                max_upstream=settings.schedule.max_upstream,
                max_new_tokens=task.max_new_tokens,
                max_input_tokens=task.max_input_tokens,
                max_target_tokens=task.max_target_tokens,
                query=task.query,
                prefix_length=task.prefix_length,
                tuning_budget=settings.tuning_budget,
            ),
            seed=settings.seed,
            before={**_ALWAYS_NAMED, **run.before},
            metrics={**_ALWAYS_NAMED, **run.metrics()},
            cost=run.cost(),
            configuration=configuration,
            environment=environment if kept is None else kept.environment(),
        )
        if folder is not None and kept is not None:
            strategy.save_pretrained(folder / "editor")
            for file in files:
                file.finish(result)
            # A folder with a result is a whole one.
            result = sealed(result, folder)
            write_atomically(folder / "result.json", result.model_dump_json(indent=2) + "\n")
            kept.clear()
        return result
    finally:
        for watcher in (*files, *watchers):
            watcher.finish(result)
        strategy.detach()


@own_threads()
def meta_train(
    stream: EditStream | str,
    *,
    model: EditableModel | str | None = None,
    editor: Callable[..., EditorStrategy] | str,
    settings: RunSettings | None = None,
    layer: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    device_map: DeviceMap | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Meta-trains an editor on the requests that a stream marks for training, and keeps the result for its runs.

    Args:
        stream: A stream, or the name of a registered one.
        model: As in `run_benchmark`.
        editor: As in `run_benchmark`.
        settings: As in `run_benchmark`; only the seed, the protocol and the threads matter here.
        layer: The layer to edit, if `model` is a name.
        dtype: The model's dtype, if `model` is a name.
        device: Where to train, if `model` is a name.
        device_map: As in `run_benchmark`.
        progress: Called as training goes on.

    Returns:
        Figures of the training, by name.

    Raises:
        UserError: If the editor needs none, or the stream has no such requests.
    """
    opened = open_benchmark(
        stream,
        model=model,
        settings=settings or RunSettings(),
        layer=layer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        progress=progress,
    )
    make = EDITORS.get(editor) if isinstance(editor, str) else editor
    with make(model=opened.model) as strategy:
        train = opened.benchmark.data.train
        if strategy.needs_meta_training and not train:
            raise UserError(f"stream '{opened.benchmark.name}' has no requests for training")
        return strategy.meta_train(train, progress=progress)


@dataclass(frozen=True)
class Opened:
    """A stream with the model that is edited on it.

    Attributes:
        stream: The stream.
        benchmark: The stream's requests.
        model: The model, with the stream's task.
        path: What the model was loaded from; empty for one that was given.
        files: SHA-256 of the files in the folder it was loaded from; None if there is none.
    """

    stream: EditStream
    benchmark: EditBenchmark
    model: EditableModel
    path: str
    files: str | None


def open_benchmark(
    stream: EditStream | str,
    *,
    model: EditableModel | str | None,
    settings: RunSettings,
    layer: str | None,
    dtype: str,
    device: str,
    device_map: DeviceMap | None,
    progress: Progress | None,
) -> Opened:
    """Loads a stream's requests, in the order of the run, and the model that is edited on it.

    Takes what `run_benchmark` takes, and seeds every random generator.

    Raises:
        UserError: If a name is unknown, or data or model cannot be read.
    """
    source = STREAMS.get(stream)() if isinstance(stream, str) else stream
    source.progress = progress
    seed_everything(settings.seed)
    benchmark = EditBenchmark.from_stream(source, seed=settings.seed, split=settings.split)
    task = get_task(
        source.task,
        max_new_tokens=source.max_new_tokens,
        query=settings.query,
        prefix_length=settings.prefix_length,
        batch_size=1 if settings.engine == "plain" else settings.batch_size,
        batch_tokens=settings.batch_tokens,
        max_input_tokens=source.max_input_tokens,
        max_target_tokens=source.max_target_tokens,
        label_names=benchmark.data.label_names,
    )
    path = "" if isinstance(model, EditableModel) else str(model or _default_model(source))
    files = None
    if isinstance(model, EditableModel):
        editable = model
        editable.task = task
    else:
        editable = EditableModel.from_pretrained(
            path, layer=layer, task=task, dtype=dtype, device=device, device_map=device_map
        )
        files = resolve_model(path).content_hash()
    editable.engine = make_engine(settings.engine, editable, memory_mb=settings.engine_memory_mb)
    torch.set_num_threads(pick_threads(editable, settings.threads))
    benchmark = fitted(benchmark, source, editable, seed=settings.seed, split=settings.split)
    return Opened(source, benchmark, editable, path, files)


def fitted(
    benchmark: EditBenchmark, stream: EditStream, model: EditableModel, *, seed: int, split: str
) -> EditBenchmark:
    """Returns the benchmark; if it has labels that the model lacks, as its stream reads it knowing that.

    Only the reader of a record can name its place, or leave it out. The fingerprint stays that of the stream as it is
    for every model.

    Raises:
        UserError: If the stream takes a label that the model lacks for a mistake.
    """
    asked = _asked(benchmark)
    n_labels = model.count_labels(asked[0].prompt) if asked else None
    if n_labels is None or all(0 <= int(request.target) < n_labels for request in asked):
        return benchmark
    stream.n_model_labels = n_labels
    try:
        return benchmark.with_data(**vars(EditBenchmark.from_stream(stream, seed=seed, split=split).data))
    finally:
        stream.n_model_labels = None


def _identity(
    strategy: EditorStrategy, benchmark: EditBenchmark, settings: RunSettings, fingerprint: str
) -> dict[str, Any]:
    """Everything that decides what a run computes, by the names of the options where there are such."""
    model = strategy.model
    return {
        "stream": benchmark.fingerprint,
        "model": fingerprint,
        "model_config": model.config_fingerprint,
        "layer": model.layer_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "editor": {"name": strategy.registered_name, **strategy.settings()},
        "seed": settings.seed,
        **vars(settings.schedule),
        **{name: getattr(settings, name) for name in ("split", "batch_size", "engine")},
        "protocol": {"query": settings.query, "prefix_length": settings.prefix_length},
        "max_new_tokens": benchmark.max_new_tokens,
    }


def _environment(strategy: EditorStrategy, source: EditStream) -> dict[str, Any]:
    """What a run is computed with, and what started it."""
    model = strategy.model
    parts = [type(strategy), type(source), *METRICS.classes().values()]
    return {
        **describe_environment(model.device, threads=torch.get_num_threads(), classes=parts),
        "engine": model.engine.name,
        "engine_notes": model.engine.notes,
        "command": [without_secrets(argument) for argument in (Path(sys.argv[0]).name, *sys.argv[1:])],
    }


def check_fit(model: EditableModel, benchmark: EditBenchmark) -> None:
    """Makes sure that model, layer and stream fit together, before anything is written."""
    data = benchmark.data
    if data.edits:
        first = data.edits[0]
        model.layer_call(model.encode_batch([first.prompt], [first.target]))
    model.check_targets(_asked(benchmark))


def _asked(benchmark: EditBenchmark) -> tuple[EditRequest, ...]:
    """The requests whose targets a run needs of the model."""
    data = benchmark.data
    probes = (probe for kind in ("locality", "portability") for probe in probe_requests(data.edits, kind))
    wanted = (probe for probe in probes if not probe.metadata["target_from_model"])
    return (*data.edits, *data.upstream, *data.holdout, *data.accurate, *wanted)


def check_subjects(strategy: EditorStrategy, benchmark: EditBenchmark) -> None:
    """Makes sure that an editor which reads subjects finds one in every candidate."""
    for request in benchmark.data.edits if strategy.needs_subject else ():
        if not request.subject or request.subject not in request.prompt:
            raise UserError(
                f"request '{request.id}': field 'subject': editor '{strategy.registered_name}' needs one that occurs "
                f"in the prompt"
            )


def prepare_editor(strategy: EditorStrategy, benchmark: EditBenchmark, *, progress: Progress | None = None) -> None:
    """Makes an editor ready for its first edit on a benchmark."""
    strategy.prepare(benchmark.data.train, progress=progress)
    if strategy.needs_upstream:
        strategy.calibrate(_upstream_queries(strategy, benchmark))


def _upstream_queries(strategy: EditorStrategy, benchmark: EditBenchmark) -> Tensor:
    """The (n, D_in) activations at the queries of upstream requests; of many, those evenly spaced."""
    upstream = benchmark.data.upstream
    if not upstream:
        raise UserError(
            f"editor '{strategy.registered_name}' with these options needs upstream inputs, and stream "
            f"'{benchmark.name}' has none"
        )
    some = upstream[:: math.ceil(len(upstream) / _MOST_UPSTREAM)]
    prompts = [request.prompt for request in some if request.prompt.strip()]
    texts = [str(request.target) for request in some if not request.prompt.strip()]
    parts = []
    if prompts:
        parts.append(strategy.model.queries(prompts))
    if texts:
        parts.append(strategy.model.queries([""] * len(texts), texts))
    return torch.cat(parts)


def _default_model(stream: EditStream) -> str:
    if stream.default_model is None:
        raise UserError(f"stream '{stream.registered_name}' has no model of its own: name one with model=")
    return stream.default_model
