"""`run_benchmark`: one editor on one stream, from settings to a result and its files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grace_bench.common.files import write_atomically
from grace_bench.common.progress import Progress
from grace_bench.common.untrusted import check_run_folder
from grace_bench.data.avalanche import BaseLogger, BasePlugin, EvaluationPlugin
from grace_bench.data.stream import EditStream
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.evaluation.capability import CapabilityMeter, CapabilityTasks, check_model
from grace_bench.models.editable import DeviceMap, EditableModel, Quantisation
from grace_bench.registry import EDITORS, METRICS
from grace_bench.results.schema import RunResult, sealed
from grace_bench.run.description import environment_of, identity_of, plan_of, result_of
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loggers.jsonl import JsonlLogger, PredictionsLogger
from grace_bench.run.loop import RunLoop
from grace_bench.run.opening import check_fit, check_steps, check_subjects, open_benchmark, own_threads, prepare_editor
from grace_bench.run.resumable import ResumableRun
from grace_bench.run.settings import CapabilitySettings, RunSettings
from grace_bench.run.tracebacks import Tracebacks


def _capability_meter(settings: CapabilitySettings | None, model: EditableModel) -> CapabilityMeter | None:
    """Loads the tasks, so that an unknown one, or data that is not at hand, stops a run before its first edit."""
    if settings is None:
        return None
    check_model(model)
    tasks = CapabilityTasks(settings.tasks, limit=settings.limit, folders=settings.folders)
    return CapabilityMeter(tasks, every=settings.every)


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
    load_in: Quantisation | None = None,
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

    With a folder, checkpoints are written there during the run, and on SIGINT and SIGTERM. A run that was stopped in
    any way and then resumed ends with the same bytes as an uninterrupted one, except for times.

    Args:
        stream: A stream, or the name of a registered one.
        model: An editable model, whose own task and engine are restored afterwards, or a name as in
            `EditableModel.from_pretrained`; None for the stream's default model.
        editor: The name of a registered editor, for the defaults of its constructor, or a callable that makes one from
            `model=`, `plugins=` and `evaluator=`.
        settings: Seed, schedule and protocol.
        layer: The layer to edit, if `model` is a name.
        dtype: The model's dtype, if `model` is a name.
        device: Where to run, if `model` is a name.
        device_map: How to spread its weights over devices instead (see `EditableModel.from_pretrained`).
        load_in: How to quantise it, if `model` is a name (see there).
        folder: Where the run's files are written, except `config.yaml`; None writes none.
        run_id: The name of the run; None derives one from stream, model, editor and seed.
        config: The resolved configuration, for loggers.
        configuration: SHA-256 of that configuration, for the result.
        loggers: Avalanche loggers; those of `grace_bench.run.loggers` are also told of the run's start and end.
        plugins: Avalanche plugins that use experience-level callbacks.
        progress: Called while a long stream is read, the unedited model answers, and an editor prepares.
        resume: Resume from the newest usable checkpoint in the folder, if there is one.
        say: Called with single lines: which targets no free answer can equal, where a resumed run starts and which
            parts of its files were dropped, and the first edit that failed with a programming error.

    Returns:
        The result; with `folder`, also written there as `result.json`.

    Raises:
        UserError: If a name is unknown, data cannot be read, the parts do not fit together, a checkpoint is from
            another configuration, model or data, or a link in the folder points outside it.
        Interrupted: After a signal, once a checkpoint is written.
        RunFailure: At an edit that failed, with `settings.strict`, once a checkpoint is written; or if every edit
            failed with a programming error, once the result is written.
    """
    settings = settings or RunSettings()
    if folder is not None:
        check_run_folder(folder)
    with open_benchmark(
        stream,
        model=model,
        settings=settings,
        layer=layer,
        dtype=dtype,
        device=device,
        device_map=device_map,
        load_in=load_in,
        progress=progress,
    ) as opened:
        check_fit(opened.model, opened.benchmark)
        check_steps(opened.benchmark, settings.schedule)
        if say is not None:
            for line in opened.answerability.lines():
                say(line)
        files: list[RunLogger] = [] if folder is None else [JsonlLogger(folder), PredictionsLogger(folder)]
        evaluator = EvaluationPlugin(
            *(metric() for metric in METRICS.classes().values()), loggers=[*files, *loggers], collect_all=False
        )
        make = EDITORS.get(editor) if isinstance(editor, str) else editor
        strategy = make(model=opened.model, plugins=list(plugins), evaluator=evaluator)
        watchers = [*files, *(logger for logger in loggers if isinstance(logger, RunLogger))]
        tracebacks = Tracebacks(folder=folder, say=say)
        result: RunResult | None = None
        try:
            check_subjects(strategy, opened.benchmark)
            capability = _capability_meter(settings.capability, opened.model)
            if say is not None and strategy.needs_locality:
                say(f"editor '{strategy.registered_name}' is shown the locality probes that it is tested on")
            identity = identity_of(strategy, opened.benchmark, settings)
            environment = environment_of(strategy, opened.stream)
            loop = RunLoop(
                benchmark=opened.benchmark,
                strategy=strategy,
                schedule=settings.schedule,
                strict=settings.strict,
                progress=progress,
                tracebacks=tracebacks,
                capability=capability,
            )
            resumable = (
                None
                if folder is None
                else ResumableRun(folder, loop, loggers=watchers, identity=identity, environment=environment)
            )
            if not (resume and resumable is not None and resumable.resume(say)):
                prepare_editor(strategy, opened.benchmark, progress=progress)
            plan = plan_of(strategy, opened.benchmark, settings, run_id=run_id, folder=folder, config=config)
            for watcher in watchers:
                watcher.start(plan)
            if resumable is None:
                loop.run()
            else:
                resumable.run(every=settings.checkpoint_every)
                environment = resumable.environment()
            result = result_of(
                loop, opened, settings, run_id=plan.run_id, configuration=configuration, environment=environment
            )
            if folder is not None and resumable is not None:
                strategy.save_pretrained(folder / "editor")
                for file in files:
                    file.finish(result)
                # Written last: a folder with a result is complete.
                result = sealed(result, folder)
                write_atomically(folder / "result.json", result.model_dump_json(indent=2) + "\n")
                resumable.clear()
        finally:
            for watcher in watchers:
                watcher.finish(result)
            strategy.detach()
    tracebacks.check(loop.position.n_edits)
    return result
