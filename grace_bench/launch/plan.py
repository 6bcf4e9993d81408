"""`grace-bench plan`: how long a run will take and how much memory, from trials of its first steps.

A trial carries out the first steps with the run's own loop, on a sample of the upstream requests, and is undone. The
whole schedule is then counted without asking the model, and the plan is the sum of counts times measured seconds.
"""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from grace_bench.common.progress import Progress
from grace_bench.common.terminal import table_console
from grace_bench.common.text import visible
from grace_bench.data.avalanche import EvaluationPlugin
from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.stream import EditStream
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.launch.plan_trials import Counts, Trial, count_run, sample
from grace_bench.models.editable import DeviceMap, EditableModel, Quantisation
from grace_bench.registry import EDITORS, METRICS
from grace_bench.run.backlog import LOOKAHEAD
from grace_bench.run.cost import peak_rss
from grace_bench.run.description import plan_of
from grace_bench.run.loggers import RunLogger
from grace_bench.run.loggers.jsonl import JsonlLogger, PredictionsLogger
from grace_bench.run.opening import check_fit, check_steps, check_subjects, open_benchmark, own_threads, prepare_editor
from grace_bench.run.settings import RunSettings

# Trials go on until they took this share of the run they foresee, within these seconds.
_SHARE = 0.1
_LEAST_SECONDS, _MOST_SECONDS = 2.0, 30.0
_GROUP_GROWTH = 4
_MOST_BATCHES = 4
_MOST_TRIAL_EDITS = 2 * LOOKAHEAD
# By how much the time of a run varies on a machine that does other work too.
_NOISE = 0.2


@dataclass(frozen=True)
class Phase:
    """A part of a run: what is done, how often and counted in what unit, and the seconds of all of it."""

    name: str
    count: int
    unit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take.

    Attributes:
        title: Editor, stream and model.
        phases: The parts of its time.
        seconds_low, seconds_high: The range that its time is likely in.
        rss_mb: Peak memory of the process.
        gpu_mb: Peak memory of torch on the GPU; None without one.
        memory_mb: What the memory is for, by name: the model's weights, the editor's matrices, and the rest.
        disk_mb: Size of the run folder, without W&B's uploads.
        counts: What the run does.
        measured_seconds: What the trials took.
        trial_edits: Edits of the largest trial.
        notes: What the plan does not know or includes.
    """

    title: str
    phases: Sequence[Phase]
    seconds_low: float
    seconds_high: float
    rss_mb: float
    gpu_mb: float | None
    memory_mb: Mapping[str, float]
    disk_mb: float
    counts: Counts
    measured_seconds: float
    trial_edits: int
    notes: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """The expected time of the whole command."""
        return sum(phase.seconds for phase in self.phases)


@own_threads()
def plan_benchmark(
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
    loggers: Callable[[Path], Sequence[RunLogger]] = lambda folder: (),
    started: float | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Foresees what `run_benchmark` will take with the same arguments; leaves no files.

    Args:
        stream: As in `run_benchmark`, like `model` to `load_in` and `progress`.
        model: See above.
        editor: See above.
        settings: See above.
        layer: See above.
        dtype: See above.
        device: See above.
        device_map: See above.
        load_in: See above.
        loggers: Makes the loggers that the run will have, for a folder that is removed afterwards.
        started: When the process began to get ready, as `time.time()` gives it; now by default.
        progress: See above.

    Raises:
        UserError: Where the run would raise it before its first edit.
    """
    settings, started, program = settings or RunSettings(), started or time.time(), peak_rss()
    make = EDITORS.get(editor) if isinstance(editor, str) else editor
    with (
        TemporaryDirectory(prefix="grace-bench-plan-") as name,
        open_benchmark(
            stream,
            model=model,
            settings=settings,
            layer=layer,
            dtype=dtype,
            device=device,
            device_map=device_map,
            load_in=load_in,
            progress=progress,
        ) as opened,
    ):
        check_fit(opened.model, opened.benchmark)
        check_steps(opened.benchmark, settings.schedule)
        watchers = [JsonlLogger(Path(name)), PredictionsLogger(Path(name)), *loggers(Path(name))]
        metrics = [metric() for metric in METRICS.classes().values()]
        evaluator = EvaluationPlugin(*metrics, loggers=watchers, collect_all=False)
        with make(model=opened.model, plugins=[], evaluator=evaluator) as strategy:
            check_subjects(strategy, opened.benchmark)
            return _Planner(opened.benchmark, strategy, settings, watchers, Path(name), program).plan(started, progress)


@dataclass
class _Planner:
    """Makes trials of growing size in `folder`, with the loggers of the run, and adds up its plan.

    `program` is what Python and its libraries took before stream and model were opened, in bytes.
    """

    benchmark: EditBenchmark
    strategy: EditorStrategy
    settings: RunSettings
    watchers: Sequence[RunLogger]
    folder: Path
    program: int
    trials: list[Trial] = field(default_factory=list)

    def plan(self, started: float, progress: Progress | None) -> Forecast:
        strategy, model = self.strategy, self.strategy.model
        # The run computes it too, before its first edit.
        model.fingerprint  # noqa: B018
        opened = time.time()
        prepare_editor(strategy, self.benchmark, progress=progress)
        prepared = time.time()
        for watcher in self.watchers:
            watcher.start(plan_of(strategy, self.benchmark, self.settings, run_id="plan", folder=self.folder))
        watching, rss = time.time(), peak_rss()
        with warnings.catch_warnings():
            # The run will show them.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._measure()
        measured, last = time.time(), self.trials[-1]
        strategy.save_pretrained(self.folder / "editor")
        for watcher in self.watchers:
            watcher.finish(None)
        saved, counts = time.time(), self._count()
        # What the first edit took longer than the second, the run will take once too.
        again = self.trials[min(1, len(self.trials) - 1)]
        first_use = max(0.0, sum(self.trials[0].edit_times) - sum(again.edit_times))
        opening = opened - started + watching - prepared + first_use
        phases = [
            Phase("Python, stream and model", 1, "start", opening),
            Phase("preparing the editor", 1, "editor", prepared - opened),
            *self._phases(counts),
            Phase("saving", 1, "run", saved - measured),
        ]
        seconds, times = sum(phase.seconds for phase in phases), np.asarray(last.edit_times)
        error = float(2 * times.std(ddof=1) / len(times) ** 0.5 / times.mean()) if len(times) > 1 else 0.5
        spread = _NOISE * seconds + min(error, 0.5) * self._edit_seconds(counts.edits)
        memory = self._memory(peak_rss() + self._memory_growth(counts, peak_rss() - rss), counts)
        return Forecast(
            title=f"{strategy.registered_name} on {self.benchmark.name}, model {model.name}",
            phases=phases,
            seconds_low=max(seconds - spread, opening * (1 - _NOISE)),
            seconds_high=seconds + spread,
            rss_mb=sum(memory.values()) / 2**20,
            memory_mb={what: size / 2**20 for what, size in memory.items()},
            gpu_mb=torch.cuda.max_memory_allocated() / 2**20 if model.device.type == "cuda" else None,
            disk_mb=self._disk(counts) / 2**20,
            counts=counts,
            measured_seconds=measured - watching,
            trial_edits=last.n_edits,
            notes=self._notes(counts),
        )

    def _measure(self) -> None:
        """Makes trials until enough of the run was seen."""
        most_scored = _MOST_BATCHES * self.strategy.model.task.batch_size
        most_edits = min(_MOST_TRIAL_EDITS, self.settings.schedule.max_edits or _MOST_TRIAL_EDITS)
        last, n_scored, n_edits = self._try(1, 1), 1, 1
        if last.seconds < self._budget() / 2:
            # The first trial also met everything that is used for the first time.
            last = self._try(1, 1)
        for _ in range(2):
            half = (self._budget() - sum(trial.seconds for trial in self.trials[1:])) / 2
            scored = max(n_scored, min(most_scored, int(half / last.scoring_seconds * n_scored)))
            edits = max(n_edits, min(most_edits, int(half / last.seconds_per_edit)))
            if scored < 2 * n_scored and edits < 2 * n_edits:
                break
            n_scored, n_edits = scored, edits
            last = self._try(n_scored, n_edits)
        # Edits finished together cost less each the more they are, which only a trial of a whole group shows.
        group = min(LOOKAHEAD, most_edits)
        while last.defers and n_edits < group:
            n_edits = min(group, _GROUP_GROWTH * n_edits)
            if n_edits * last.seconds_per_edit > _MOST_SECONDS:
                break
            last = self._try(n_scored, n_edits)

    def _budget(self) -> float:
        seconds = sum(phase.seconds for phase in self._phases(self._count()))
        return min(_MOST_SECONDS, max(_LEAST_SECONDS, _SHARE * seconds))

    def _try(self, n_scored: int, n_edits: int) -> Trial:
        data, model = self.benchmark.data, self.strategy.model
        if self.trials:
            self.strategy.rollback()
        # Recordings of an earlier trial would make this one's first scoring a second one.
        model.engine.forget()
        n_upstream = min(len(data.upstream), self.settings.schedule.max_upstream or len(data.upstream))
        part = n_scored * n_upstream / max(1, n_upstream + len(data.accurate))
        reduced = self.benchmark.with_data(
            edits=data.edits[: math.ceil(2 * n_edits / self._share()) + 2],
            upstream=sample(model, data.upstream, math.ceil(part)),
            accurate=sample(model, data.accurate, math.ceil(n_scored - part)),
        )
        schedule = self.settings.schedule
        self.trials.append(Trial(benchmark=reduced, strategy=self.strategy, n_edits=n_edits, schedule=schedule))
        return self.trials[-1]

    def _share(self) -> float:
        """The share of candidates that are errors, as far as was seen; less than one in all those seen, if none."""
        last = self.trials[-1].position if self.trials else None
        return 1.0 if last is None else last.n_edits / last.index or 1 / (last.index + 1)

    def _count(self) -> Counts:
        last = self.trials[-1].position
        edited, share = {*last.edited, *last.superseded}, last.n_edits / last.index

        def is_edited(index: int) -> bool:
            """Whether a trial edited the candidate; of those beyond the trial, as large a share is edited, evenly."""
            n = index - last.index
            # A share of one is a whole number however often it is added.
            return index in edited if n < 0 else int((n + 1) * share + 1e-9) > int(n * share + 1e-9)

        return count_run(
            self.benchmark,
            self.settings.schedule,
            is_incremental=self.trials[-1].is_incremental,
            is_edited=is_edited,
            compares_with_unedited=self.strategy.model.task.compares_with_unedited,
        )

    def _phases(self, counts: Counts) -> list[Phase]:
        last, (first, *later) = self.trials[-1], counts.evaluations
        # Without upstream requests, candidates are what is scored for the first time.
        fresh = last.evaluations[0].each or last.candidate_seconds
        n_fresh, n_known = sum(one.n_fresh for one in later), sum(one.n_known for one in later)
        n_scored = counts.candidates + counts.edits
        candidates = last.candidate_seconds * n_scored + last.other_seconds * counts.candidates
        return [
            Phase("answers of the unedited model", counts.asked, "prompt", last.ask_seconds * counts.asked),
            Phase("evaluation before the first edit", first.n_fresh, "request", fresh * first.n_fresh),
            Phase("candidates, before and after", n_scored, "request", candidates),
            Phase("edits", counts.edits, "edit", self._edit_seconds(counts.edits)),
            Phase("later evaluations: new requests", n_fresh, "request", fresh * n_fresh),
            Phase("later evaluations: known requests", n_known, "request", last.known_seconds * n_known),
        ]

    def _edit_seconds(self, n_edits: int) -> float:
        """Seconds of edits: a cost per group that is finished together, and a cost per edit."""
        small, last = self.trials[min(1, len(self.trials) - 1)], self.trials[-1]
        seconds, small_seconds = sum(last.edit_times), sum(small.edit_times)
        apart = last.n_edits * small.n_groups - small.n_edits * last.n_groups
        if apart > 0:
            each = (seconds * small.n_groups - small_seconds * last.n_groups) / apart
            group = (small_seconds - each * small.n_edits) / small.n_groups
            if each >= 0 and group >= 0:
                together = LOOKAHEAD if last.n_groups == 1 else last.n_edits / last.n_groups
                return group * math.ceil(n_edits / together) + each * n_edits
        return seconds / max(1, last.n_edits) * n_edits

    def _memory_growth(self, counts: Counts, trials: int) -> float:
        """Bytes that the run will take beyond the trials, which took so many themselves."""
        engine, last = self.strategy.model.engine, self.trials[-1]
        most = max(sum(evaluation.requests.values()) for evaluation in counts.evaluations)
        recordings = engine.kept_bytes / max(1, last.evaluations[-1].n_requests) * most
        growth = max(0.0, min(recordings, engine.most_kept_bytes) - engine.kept_bytes) + self._more_parameters(counts)
        # A larger batch than any of the trials takes more memory for its activations.
        # No batch holds requests of two streams.
        stream = max((n for evaluation in counts.evaluations for n in evaluation.requests.values()), default=0)
        sampled, largest = last.evaluations[0].n_requests, min(self.strategy.model.task.batch_size, stream)
        return growth + (trials * (largest / sampled - 1) if 0 < sampled < largest else 0.0)

    def _memory(self, peak: float, counts: Counts) -> dict[str, float]:
        """Bytes of memory by what they hold; what nothing else accounts for is activations and the stream."""
        module = self.strategy.model.module
        # Weights that are tied or on a GPU take no main memory of their own.
        storages = {
            weight.data_ptr(): weight.nbytes for weight in (*module.parameters(), *module.buffers()) if weight.is_cpu
        }
        parts = {
            "Python and libraries": float(self.program),
            "weights of the model": float(sum(storages.values())),
            **{what: float(size) for what, size in self.strategy.matrix_bytes().items()},
            "parameters of the editor": 4.0 * self.strategy.max_extra_parameters(counts.edits),
        }
        return {**parts, "activations and the stream": max(0.0, peak - sum(parts.values()))}

    def _more_parameters(self, counts: Counts) -> int:
        """Bytes that the editor will add beyond those of the trial's edits."""
        most = self.strategy.max_extra_parameters
        return 4 * max(0, most(counts.edits) - most(self.trials[-1].n_edits))

    def _disk(self, counts: Counts) -> float:
        """Bytes of the run folder: those of the trials' files by candidate, evaluation and row, and of the editor."""
        timed = [timed for trial in self.trials for timed in trial.evaluations]
        done = {
            "edits.jsonl": (sum(trial.position.index for trial in self.trials), counts.candidates),
            "metrics.jsonl": (len(timed), len(counts.evaluations)),
            "*.parquet": (sum(one.n_requests for one in timed), counts.rows),
            "editor.*": (1, 1),
        }
        sizes = {name: sum(path.stat().st_size for path in self.folder.rglob(name)) for name in done}
        folder = sum(sizes[name] / max(1, n) * of_run for name, (n, of_run) in done.items())
        return folder + self._more_parameters(counts)

    def _notes(self, counts: Counts) -> list[str]:
        last, most = self.trials[-1], self.settings.schedule.max_edits or 0
        if not last.n_edits:
            return [f"none of the {last.position.index} candidates tried was an error, so no edit could be timed"]
        return [f"the stream is likely to end after {counts.edits} of {most} edits"] if counts.edits < most else []


def print_forecast(forecast: Forecast) -> None:
    """Prints a forecast as a table and a line or two."""
    console = table_console()
    table = Table(
        title=escape(visible(forecast.title)), title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    table.add_column("phase")
    for column in ("count", "each", "total"):
        table.add_column(column, justify="right")
    for phase in forecast.phases:
        if phase.count:
            each = "" if phase.count == 1 else f"{_duration(phase.seconds / phase.count)} per {phase.unit}"
            table.add_row(phase.name, f"{phase.count:,}", each, _duration(phase.seconds))
    console.print(table)
    gpu = "" if forecast.gpu_mb is None else f", {forecast.gpu_mb:,.0f} MB on the GPU"
    lines = [
        f"about {_duration(forecast.seconds)} "
        f"({_duration(forecast.seconds_low)} to {_duration(forecast.seconds_high)}), "
        f"{forecast.rss_mb:,.0f} MB of memory{gpu}, {forecast.disk_mb:,.1f} MB of disk",
        "memory: " + ", ".join(f"{what} {size:,.0f} MB" for what, size in forecast.memory_mb.items() if size >= 0.5),
        f"from {forecast.trial_edits} {'edit' if forecast.trial_edits == 1 else 'edits'} and "
        f"{_duration(forecast.measured_seconds)} of measuring",
        *forecast.notes,
    ]
    for line in lines:
        console.print(visible(line), highlight=False, markup=False, soft_wrap=True)


def print_sum(forecasts: Sequence[Forecast]) -> None:
    """Prints what several runs take one after the other."""
    low, high = sum(f.seconds_low for f in forecasts), sum(f.seconds_high for f in forecasts)
    table_console().print(
        f"{len(forecasts)} runs, one after the other: {_duration(sum(f.seconds for f in forecasts))} "
        f"({_duration(low)} to {_duration(high)}), at most {max(f.rss_mb for f in forecasts):,.0f} MB of memory, "
        f"{sum(f.disk_mb for f in forecasts):,.1f} MB of disk",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    """A time in two or three figures.

    >>> _duration(0.00123), _duration(0.5), _duration(75), _duration(5400)
    ('1.2 ms', '500 ms', '75 s', '1 h 30 min')
    """
    if seconds < 0.95:
        return f"{seconds * 1000:.2g} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 180:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
