"""Descriptions of a run: its plan, its identity, its environment and its result."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grace_bench.common.credentials import without_secrets
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.stream import EditStream
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.registry import METRICS
from grace_bench.results.metric_info import metric_infos
from grace_bench.results.schema import EditorInfo, ModelInfo, Protocol, RunResult, StreamInfo
from grace_bench.run.environment import describe_environment
from grace_bench.run.loggers import RunPlan
from grace_bench.run.loop import RunLoop
from grace_bench.run.opening import Opened
from grace_bench.run.settings import RunSettings


def plan_of(
    strategy: EditorStrategy,
    benchmark: EditBenchmark,
    settings: RunSettings,
    *,
    run_id: str | None = None,
    folder: Path | None,
    config: Mapping[str, Any] | None = None,
) -> RunPlan:
    """Returns the description of a run that loggers receive before it starts.

    Args:
        strategy: The editor.
        benchmark: The stream.
        settings: The run's settings.
        run_id: The name of the run; None derives one from stream, model, editor and seed.
        folder: The run folder; None if the run leaves no files.
        config: The resolved configuration.
    """
    model = strategy.model
    return RunPlan(
        run_id=run_id or f"{benchmark.name}/{model.name}/{strategy.registered_name}/s{settings.seed}",
        folder=folder,
        config=dict(config or {}),
        stream=benchmark.name,
        model=model.name,
        editor=strategy.registered_name,
        n_candidates=len(benchmark.data.edits),
        max_edits=settings.schedule.max_edits,
        higher_is_better=model.task.higher_is_better,
    )


def identity_of(strategy: EditorStrategy, benchmark: EditBenchmark, settings: RunSettings) -> dict[str, Any]:
    """Returns everything that determines what a run computes, under the names of the options if there are any."""
    model = strategy.model
    # Only if they are not what every run did before there was a choice, so that older checkpoints can be resumed.
    order = {} if benchmark.order == "shuffle" else {"order": benchmark.order}
    normalise = {} if model.task.normalise == "squad" else {"normalise": model.task.normalise}
    scores = {
        name: value
        for name in ("main_score", "locality_score", "scores")
        if (value := getattr(settings, name)) is not None
    }
    measured = settings.capability
    capability = {} if measured is None else {"capability": [[*measured.tasks], measured.every, measured.limit]}
    return {
        "stream": benchmark.fingerprint,
        "model": model.fingerprint,
        "model_config": model.config_fingerprint,
        "layer": model.layer_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "editor": {"name": strategy.registered_name, **strategy.settings()},
        "seed": settings.seed,
        **settings.schedule.changed(),
        **{name: getattr(settings, name) for name in ("split", "batch_size", "engine")},
        **order,
        # What has its default is left out, so that checkpoints made before it was an option still fit.
        "protocol": {
            "query": settings.query,
            "prefix_length": settings.prefix_length,
            **normalise,
            **scores,
            **model.task.format.changed(),
        },
        "max_new_tokens": benchmark.max_new_tokens,
        **capability,
    }


def environment_of(strategy: EditorStrategy, source: EditStream) -> dict[str, Any]:
    """Returns the environment of a run, and the command that started it."""
    model = strategy.model
    parts = [type(strategy), type(source), *METRICS.classes().values()]
    return {
        **describe_environment(model.device, threads=torch.get_num_threads(), classes=parts),
        "engine": model.engine.name,
        "engine_notes": model.engine.notes,
        "command": [without_secrets(argument) for argument in (Path(sys.argv[0]).name, *sys.argv[1:])],
    }


def result_of(
    loop: RunLoop,
    opened: Opened,
    settings: RunSettings,
    *,
    run_id: str,
    configuration: str | None,
    environment: Mapping[str, Any],
) -> RunResult:
    """Returns the result of a finished run, without the hashes of its files.

    Args:
        loop: The run, at its end.
        opened: Its stream and model.
        settings: Its settings.
        run_id: Its name.
        configuration: SHA-256 of its resolved configuration; None if it was not made from one.
        environment: Its environment (see `environment_of`).
    """
    benchmark, model, task, strategy = opened.benchmark, opened.model, opened.model.task, loop.strategy
    # Some metrics are in every result, even if there was nothing to measure them on.
    unmeasured = {info.name: None for info in metric_infos() if info.always_in_result}
    return RunResult(
        run_id=run_id,
        stream=StreamInfo(
            name=benchmark.name,
            task=benchmark.task,
            fingerprint=benchmark.fingerprint,
            n_candidates=len(benchmark.data.edits),
            left_out=dict(benchmark.data.left_out),
            unanswerable=dict(opened.answerability.unanswerable),
            **benchmark.metadata.model_dump(include={"source", "revision", "license"}),
        ),
        model=ModelInfo(
            name=model.name,
            path=opened.path,
            fingerprint=model.fingerprint,
            config_fingerprint=model.config_fingerprint,
            files=opened.files,
            layer=model.layer_name,
            dtype=str(model.dtype).removeprefix("torch."),
            n_parameters=sum(parameter.numel() for parameter in model.module.parameters()),
        ),
        editor=EditorInfo(name=strategy.registered_name, **strategy.settings()),
        protocol=Protocol(
            split=settings.split,
            order=benchmark.order,
            main_score=task.main_score,
            locality_score=settings.locality_score,
            higher_is_better=task.higher_is_better,
            edit=settings.schedule.edit,
            edits_at_once=settings.schedule.edits_at_once,
            max_edits=settings.schedule.max_edits,
            eval_every=settings.schedule.eval_every,
            score_after=settings.schedule.score_after,
            scores=None if settings.scores is None else [*settings.scores],
            max_upstream=settings.schedule.max_upstream,
            max_new_tokens=task.max_new_tokens,
            max_input_tokens=task.max_input_tokens,
            max_target_tokens=task.max_target_tokens,
            query=task.query,
            prefix_length=task.prefix_length,
            normalise=task.normalise,
            stop=task.format.stop,
            chat=task.format.chat,
            chat_system=task.format.system,
            target_space=task.format.target_space,
            special_tokens=task.format.special_tokens,
            shows_locality=strategy.needs_locality,
            capability_tasks=None if settings.capability is None else [*settings.capability.tasks],
            capability_limit=None if settings.capability is None else settings.capability.limit,
            tuning_budget=settings.tuning_budget,
        ),
        seed=settings.seed,
        before={**unmeasured, **loop.before},
        metrics={**unmeasured, **loop.metrics()},
        cost=loop.cost(),
        configuration=configuration,
        environment=dict(environment),
    )
