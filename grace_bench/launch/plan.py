"""`grace-bench plan`: how long a run will take and how much memory, from a few steps of it.

Trials make the run's first steps with its own loop: a sample of the upstream requests is scored, some edits are made,
everything is taken back. A count walks through the whole schedule without asking the model. The plan is the sum of
counts times measured units.
"""

import math
import resource
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.editable import DeviceMap, EditableModel
from grace_bench.registry import EDITORS, METRICS
from grace_bench.run.loggers import RunLogger, RunPlan
from grace_bench.run.loggers.jsonl import JsonlLogger, PredictionsLogger
from grace_bench.run.loop import LOOKAHEAD, Pending, Run, Schedule
from grace_bench.run.run_benchmark import (
    RunSettings,
    check_fit,
    check_subjects,
    open_benchmark,
    own_threads,
    prepare_editor,
)

# Measuring goes on until it took this share of the run it foresees, within these seconds.
_SHARE = 0.1
_LEAST_SECONDS, _MOST_SECONDS = 2.0, 30.0
_GROWTH = 8
_STEP = 4
_MOST_BATCHES = 4
_MOST_TRIAL_EDITS = 2 * LOOKAHEAD
# What the same run takes from one time to the next on a machine that does other work too.
_NOISE = 0.2
# A row of an evaluation is kept as a dict of numbers and strings until the next evaluation, a score with its request.
_ROW_BYTES, _SCORE_BYTES = 600, 1500


@dataclass(frozen=True)
class Work:
    """Requests to score.

    Attributes:
        requests: How many.
        batches: The forward batches that the task makes of them.
        tokens: Tokens, padding aside.
    """

    requests: int = 0
    batches: int = 0
    tokens: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.requests + other.requests, self.batches + other.batches, self.tokens + other.tokens)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run: so many units, and the seconds they take.

    Attributes:
        name: What is done.
        count: How often.
        unit: What is counted.
        seconds: All of them together.
    """

    name: str
    count: int
    unit: str
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as counted in advance.

    Attributes:
        n_edits: The clock.
        requests: Requests by stream.
        fresh: Those that are scored in full.
        known: Those that were scored in the evaluation before, with a score or a recording that is kept.
    """

    n_edits: int
    requests: Mapping[str, int]
    fresh: Work
    known: Work


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a run does, counted in advance.

    Attributes:
        asked: Prompts that the unedited model is asked.
        candidates: Candidates reached.
        edits: Edits made.
        scored: Candidates before and edits after, as they are scored.
        evaluations: The evaluations.
    """

    asked: int
    candidates: int
    edits: int
    scored: Work
    evaluations: Sequence[Evaluation]

    @property
    def rows(self) -> int:
        """Requests evaluated, all evaluations together: the rows of `predictions.parquet`."""
        return sum(sum(evaluation.requests.values()) for evaluation in self.evaluations)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will take.

    Attributes:
        title: Editor, stream and model.
        phases: The parts of its time.
        seconds_low, seconds_high: The range that its time is likely in.
        rss_mb: Peak memory of the process.
        gpu_mb: Peak memory of torch on the GPU; None without one.
        disk_mb: Size of the run folder, W&B aside.
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
    loggers: Callable[[Path], Sequence[RunLogger]] = lambda folder: (),
    started: float | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """Foresees what `run_benchmark` will take with the same arguments; leaves no files.

    Args:
        stream: As in `run_benchmark`.
        model: As in `run_benchmark`.
        editor: As in `run_benchmark`.
        settings: As in `run_benchmark`.
        layer: As in `run_benchmark`.
        dtype: As in `run_benchmark`.
        device: As in `run_benchmark`.
        device_map: As in `run_benchmark`.
        loggers: Makes the loggers that the run will have, for a folder that is removed afterwards.
        started: When the process began to get ready, as `time.time()` gives it; now by default.
        progress: As in `run_benchmark`.

    Raises:
        UserError: Where the run would raise it before its first edit.
    """
    settings = settings or RunSettings()
    started = time.time() if started is None else started
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
    check_fit(opened.model, opened.benchmark)
    make = EDITORS.get(editor) if isinstance(editor, str) else editor
    with TemporaryDirectory(prefix="grace-bench-plan-") as name:
        folder = Path(name)
        watchers = [JsonlLogger(folder), PredictionsLogger(folder), *loggers(folder)]
        evaluator = EvaluationPlugin(
            *(metric() for metric in METRICS.classes().values()), loggers=watchers, collect_all=False
        )
        with make(model=opened.model, plugins=[], evaluator=evaluator) as strategy:
            check_subjects(strategy, opened.benchmark)
            planner = _Planner(opened.benchmark, strategy, settings.schedule, watchers, folder)
            return planner.plan(started, progress)


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
    for line in _lines(forecast):
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


class _Trial(Run):
    """The first steps of a run, timed; where scores or recordings are kept, what is evaluated is evaluated twice."""

    def __init__(self, benchmark: EditBenchmark, strategy: EditorStrategy, schedule: Schedule) -> None:
        super().__init__(benchmark, strategy, schedule)
        self.n_asked, self.ask_seconds, self.n_groups = 0, 0.0, 0
        self.defers = False
        self.timed: list[_Timed] = []
        started = time.perf_counter()
        self.run()
        self.seconds = time.perf_counter() - started

    @property
    def n_edits(self) -> int:
        return len(self.position.edit_times)

    @property
    def edit_seconds(self) -> float:
        return sum(self.position.edit_times)

    @property
    def candidates(self) -> Work:
        """Candidates scored before, and edits after they were made."""
        requests = self.benchmark.data.edits
        before = _work(self.strategy.model, requests[: self.position.index])
        edited = [requests[index] for index in (*self.position.edited, *self.position.superseded)]
        after = _work(self.strategy.model, edited)
        return before + Work(after.requests, self.n_groups, after.tokens)

    @property
    def candidate_seconds(self) -> float:
        """Seconds in which candidates were scored, and edits after they were made."""
        return max(0.0, self.position.eval_seconds - self.ask_seconds - sum(timed.inner for timed in self.timed))

    @property
    def other_seconds(self) -> float:
        """Seconds that went to neither scoring, edits nor evaluations."""
        evaluations = sum(timed.seconds for timed in self.timed)
        return max(0.0, self.seconds - self.ask_seconds - self.candidate_seconds - self.edit_seconds - evaluations)

    def evaluate(self) -> None:
        if self.position.last_evaluation == self.strategy.n_edits:
            return
        self.settle()
        self._evaluate_timed()
        if not self.strategy.n_edits or self.rescorer.is_incremental:
            # The second time shows what is kept.
            self.position.last_evaluation = None
            self._evaluate_timed()

    def _evaluate_timed(self) -> None:
        scorer, inner = self.rescorer, self.position.eval_seconds
        n_scored, started = scorer.n_scored, time.perf_counter()
        super().evaluate()
        self.timed.append(
            _Timed(
                seconds=time.perf_counter() - started,
                inner=self.position.eval_seconds - inner,
                n_scored=scorer.n_scored - n_scored,
                work=self._work(),
            )
        )

    def _work(self) -> Work:
        streams = (experience.requests for stream in self._eval_streams(self._due_now()) for experience in stream)
        return sum((_work(self.strategy.model, requests) for requests in streams), Work())

    def _ask_unedited(self) -> dict[str, str | int]:
        started = time.perf_counter()
        answers = super()._ask_unedited()
        self.n_asked, self.ask_seconds = len(answers), time.perf_counter() - started
        return answers

    def settle(self) -> None:
        self.defers |= self.strategy.n_pending > 0
        self.n_groups += any(isinstance(one, Pending) and one.outcome is not None for one in self._pending)
        super().settle()


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """An evaluation of a trial.

    Attributes:
        seconds: All of it.
        inner: The part that the run counts as scoring.
        n_scored: Requests that the model was asked for.
        work: What was evaluated.
    """

    seconds: float
    inner: float
    n_scored: int
    work: Work


class _Count(Run):
    """A run that asks the model nothing and counts.

    Args:
        seen: Whether each of the first candidates was edited in a trial.
        share: The share of the others that is.
    """

    def __init__(
        self,
        benchmark: EditBenchmark,
        strategy: EditorStrategy,
        schedule: Schedule,
        *,
        seen: Sequence[bool],
        share: float,
    ) -> None:
        super().__init__(benchmark, strategy, schedule)
        self._seen, self._share, self._due = seen, share, 0.0
        self._before_streams: dict[str, tuple[EditRequest, ...]] = {}
        self._scored: dict[str, set[str]] = {}
        self._n_asked = 0
        self._scored_tokens = 0
        self._evaluations: list[Evaluation] = []

    def count(self) -> Counts:
        """Walks through the schedule."""
        self.run()
        n_edits, n_candidates = self.strategy.n_edits, self.position.index
        incremental = self.rescorer.is_incremental
        scored = n_candidates + n_edits
        return Counts(
            asked=self._n_asked,
            candidates=n_candidates,
            edits=n_edits,
            scored=Work(scored, math.ceil(scored / LOOKAHEAD) if incremental else scored, self._scored_tokens),
            evaluations=self._evaluations,
        )

    def evaluate(self) -> None:
        if self.position.last_evaluation == self.strategy.n_edits:
            return
        streams = {stream.name: stream[0].requests for stream in self._eval_streams(self._due_now())}
        fresh = known = Work()
        for name, requests in streams.items():
            if self.rescorer.is_incremental:
                seen = self._scored.setdefault(name, set())
                new = [request for request in requests if request.id not in seen and name != "edited"]
                seen.update(request.id for request in requests)
                work = _work(self.strategy.model, new)
                fresh += work
                known += Work(len(requests) - len(new))
            else:
                # Recordings are kept by batch, and a stream that grew is batched anew.
                work = _work(self.strategy.model, requests)
                if requests == self._before_streams.get(name):
                    known += work
                else:
                    fresh += work
        self._before_streams = streams
        sizes = {name: len(requests) for name, requests in streams.items()}
        self._evaluations.append(Evaluation(self.strategy.n_edits, sizes, fresh, known))
        self.position.last_evaluation = self.strategy.n_edits

    def _ask_unedited(self) -> dict[str, str | int]:
        prompts = self._prompts_to_ask()
        self._n_asked = len(prompts)
        return dict.fromkeys(prompts, "")

    def _candidate(self, index: int) -> None:
        request, model = self.benchmark.data.edits[index], self.strategy.model
        size = model.size(request.prompt, (request.target,))
        edited = self._is_edited(index)
        self.position.index += 1
        self._scored_tokens += size * (1 + edited)
        if edited:
            self.strategy.n_edits += 1
            self._supersede(request, index)

    def _is_edited(self, index: int) -> bool:
        if index < len(self._seen):
            return self._seen[index]
        self._due += self._share
        # A share of one, summed up, stays a whole number.
        edited = self._due >= 1 - 1e-9
        self._due -= edited
        return edited


@dataclass
class _Planner:
    """Makes trials of growing size and puts the plan together.

    Attributes:
        benchmark, strategy, schedule: As of the run.
        watchers: The run's loggers, in `folder`.
        folder: What the trials write, removed afterwards.
    """

    benchmark: EditBenchmark
    strategy: EditorStrategy
    schedule: Schedule
    watchers: Sequence[RunLogger]
    folder: Path
    trials: list[_Trial] = field(default_factory=list)

    def plan(self, started: float, progress: Progress | None) -> Forecast:
        """Measures and adds up."""
        model = self.strategy.model
        # The run takes it too, before its first edit.
        model.fingerprint  # noqa: B018
        opened = time.time()
        prepare_editor(self.strategy, self.benchmark, progress=progress)
        prepared = time.time()
        plan = RunPlan(
            run_id="plan",
            folder=self.folder,
            stream=self.benchmark.name,
            model=model.name,
            editor=self.strategy.registered_name,
            n_candidates=len(self.benchmark.data.edits),
            max_edits=self.schedule.max_edits,
            higher_is_better=model.task.higher_is_better,
        )
        for watcher in self.watchers:
            watcher.start(plan)
        watching = time.time()
        rss = _peak_rss()
        with warnings.catch_warnings():
            # The run itself says them.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._measure()
        measured = time.time()
        last = self._edited
        self.strategy.save_pretrained(self.folder / "editor")
        for watcher in self.watchers:
            watcher.finish(None)
        saved = time.time()
        # What was taken up for the first time, the run takes up too.
        again = [trial for trial in self.trials[1:2] if trial.benchmark.data.edits]
        first_use = sum(max(0.0, self.trials[0].edit_seconds - trial.edit_seconds) for trial in again)
        start = Phase(
            name="Python, stream and model",
            count=1,
            unit="start",
            seconds=opened - started + watching - prepared + first_use,
        )
        prepare = Phase(name="preparing the editor", count=1, unit="editor", seconds=prepared - opened)
        save = Phase(name="saving", count=1, unit="run", seconds=saved - measured)
        counts = self._count()
        phases = [start, prepare, *self._phases(counts), save]
        spread = self._spread(phases)
        seconds = sum(phase.seconds for phase in phases)
        return Forecast(
            title=f"{self.strategy.registered_name} on {self.benchmark.name}, model {model.name}",
            phases=phases,
            seconds_low=max(seconds - spread, start.seconds * (1 - _NOISE)),
            seconds_high=seconds + spread,
            rss_mb=(_peak_rss() + self._growth(counts, rss)) / 2**20,
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
        most_edits = min(_MOST_TRIAL_EDITS, self.schedule.max_edits or _MOST_TRIAL_EDITS)
        n_scored = n_edits = 1
        self._try(n_scored, n_edits)
        if self.trials[0].seconds < self._budget() / 2:
            # The first trial also took up what is used for the first time.
            self._try(n_scored, n_edits)
        left = self._budget() / 2
        while (larger := self._next(n_scored, left, self._scoring_seconds() / n_scored, most_scored)) >= 2 * n_scored:
            n_scored = larger
            self._try(n_scored, 0)
            left -= self.trials[-1].seconds
        left = self._budget() / 2 - 2 * self._scoring_seconds()
        while (larger := self._next(n_edits, left, self._seconds_an_edit(), most_edits)) >= 2 * n_edits:
            n_edits = larger
            self._try(n_scored, n_edits)
            left -= self.trials[-1].seconds
        group = min(LOOKAHEAD, most_edits)
        # Edits that are finished together cost less the more they are, which a step less than a group shows cheaply.
        while (
            self._edited.defers
            and n_edits < group
            and (larger := min(group, _STEP * n_edits)) * self._seconds_an_edit() <= _MOST_SECONDS
        ):
            n_edits = larger
            self._try(n_scored, n_edits)

    @property
    def _is_incremental(self) -> bool:
        return self.trials[-1].rescorer.is_incremental

    def _seconds_an_edit(self) -> float:
        last = self._edited
        return (last.edit_seconds + last.candidate_seconds) / max(1, last.n_edits)

    def _scoring_seconds(self) -> float:
        """Seconds that the newest trial took for its sample before the first edit."""
        last = self.trials[-1]
        return last.ask_seconds + sum(timed.seconds for timed in last.timed[:2])

    @staticmethod
    def _next(now: int, seconds: float, each: float, most: int) -> int:
        return max(now, min(most, now * _GROWTH, int(seconds / max(each, 1e-6))))

    def _budget(self) -> float:
        seconds = sum(phase.seconds for phase in self._phases(self._count()))
        return min(_MOST_SECONDS, max(_LEAST_SECONDS, _SHARE * seconds))

    def _try(self, n_scored: int, n_edits: int) -> None:
        data, model = self.benchmark.data, self.strategy.model
        if self.trials:
            self.strategy.rollback()
        # What an earlier trial left would make this one's first scoring a second one.
        model.engine.forget()
        # Trials of one request each take another one.
        n_before = len(self.trials)
        most = self.schedule.max_upstream
        n_upstream = len(data.upstream) if most is None else min(most, len(data.upstream))
        share = n_upstream / (n_upstream + len(data.accurate)) if data.upstream or data.accurate else 0.0
        n_candidates = math.ceil(2 * n_edits / self._share()) + 2 if n_edits else 0
        reduced = self.benchmark.with_data(
            edits=data.edits[:n_candidates],
            upstream=_sample(model, data.upstream, math.ceil(n_scored * share), n_before),
            accurate=_sample(model, data.accurate, math.ceil(n_scored * (1 - share)), n_before),
        )
        schedule = Schedule(max_edits=max(1, n_edits), eval_every=max(1, n_edits), max_upstream=None)
        self.trials.append(_Trial(reduced, self.strategy, schedule))

    def _share(self) -> float:
        """The share of candidates that is edited, as far as it was seen."""
        if not self.trials:
            return 1.0
        last = self._edited
        return last.n_edits / last.position.index if last.n_edits else 1 / (last.position.index + 1)

    def _count(self) -> Counts:
        """Counts, with the editor's clock as it is, which the count moves on."""
        last, n_edits = self._edited, self.strategy.n_edits
        edited = {*last.position.edited, *last.position.superseded}
        self.strategy.n_edits = 0
        count = _Count(
            self.benchmark,
            self.strategy,
            self.schedule,
            seen=[index in edited for index in range(last.position.index)],
            share=self._share() if last.n_edits else 0.0,
        )
        try:
            return count.count()
        finally:
            self.strategy.n_edits = n_edits

    def _phases(self, counts: Counts) -> list[Phase]:
        last = self._edited
        incremental = self._is_incremental
        first, *later = counts.evaluations
        cold = self._cold()
        if incremental:
            stale = sum((self._stale(before, after) for before, after in pairwise(counts.evaluations)), Work())
            known_seconds = self._look_up() * sum(evaluation.known.requests for evaluation in later) + cold(stale)
            candidate_seconds = cold(counts.scored)
        else:
            warm = _fitted([(trial.timed[1].work, trial.timed[1].seconds) for trial in self._ends()]) or cold
            known_seconds = sum(warm(evaluation.known) for evaluation in later)
            seen = last.position.index + last.n_edits
            candidate_seconds = last.candidate_seconds / seen * counts.scored.requests if seen else 0.0
        fresh = sum((evaluation.fresh for evaluation in later), Work())
        known = sum(evaluation.known.requests for evaluation in later)
        others = last.other_seconds / max(1, last.position.index) * counts.candidates
        ask = next((trial.ask_seconds / trial.n_asked for trial in reversed(self.trials) if trial.n_asked), 0.0)
        return [
            Phase(name="answers of the unedited model", count=counts.asked, unit="prompt", seconds=ask * counts.asked),
            Phase(
                name="evaluation before the first edit",
                count=first.fresh.requests,
                unit="request",
                seconds=cold(first.fresh),
            ),
            Phase(
                name="candidates, before and after",
                count=counts.scored.requests,
                unit="request",
                seconds=candidate_seconds + others,
            ),
            Phase(name="edits", count=counts.edits, unit="edit", seconds=self._edit_seconds(counts)),
            Phase(name="later evaluations: new requests", count=fresh.requests, unit="request", seconds=cold(fresh)),
            Phase(name="later evaluations: known requests", count=known, unit="request", seconds=known_seconds),
        ]

    @property
    def _edited(self) -> _Trial:
        """The trial with the most edits."""
        return next(trial for trial in reversed(self.trials) if trial.benchmark.data.edits)

    def _ends(self, *, edited: bool = False) -> list[_Trial]:
        """The smallest trial that came after the first use of everything, and the largest."""
        trials = [trial for trial in self.trials if trial.benchmark.data.edits or not edited]
        size = (lambda trial: trial.n_edits) if edited else (lambda trial: trial.timed[0].work.requests)
        return [trials[min(1, len(trials) - 1)], max(trials, key=size)]

    def _cold(self) -> Callable[[Work], float]:
        """Seconds of scoring for the first time, as a function of the work."""
        evaluated = [(trial.timed[0].work, trial.timed[0].seconds) for trial in self._ends()]
        # Without upstream data, candidates are what is scored for the first time.
        candidates = [(trial.candidates, trial.candidate_seconds) for trial in self._ends()]
        return _fitted(evaluated) or _fitted(candidates) or (lambda work: 0.0)

    def _look_up(self) -> float:
        """Seconds that a request takes in an evaluation which does not score it anew."""
        timed = self._edited.timed[-1]
        return timed.seconds / timed.work.requests if timed.work.requests else 0.0

    def _stale(self, before: Evaluation, after: Evaluation) -> Work:
        """The known requests of an evaluation whose answer changed since the one before."""
        last = self._edited
        if not last.n_edits or not last.timed[1].work.requests:
            return Work()
        upstream, changed = last.timed[1].work, last.timed[2]
        new = changed.work.requests - upstream.requests - last.n_edits
        rate = min(1.0, max(0, changed.n_scored - new) / upstream.requests / last.n_edits)
        share = 1 - (1 - rate) ** (after.n_edits - before.n_edits)
        return _part(upstream, round(share * after.known.requests))

    def _edit_seconds(self, counts: Counts) -> float:
        """Edits whose values are trained together share what a group costs."""
        small, last = self._ends(edited=True)
        if not last.n_edits:
            return 0.0
        together = max(last.n_edits / max(1, last.n_groups), 1.0)
        if last.n_groups == 1 and last.n_edits > 1:
            together = LOOKAHEAD
        n_groups = math.ceil(counts.edits / together)
        measured = [(Work(trial.n_edits, trial.n_groups, trial.n_edits), trial.edit_seconds) for trial in (small, last)]
        fitted = _fitted(measured)
        assert fitted is not None
        return fitted(Work(counts.edits, n_groups, counts.edits))

    def _spread(self, phases: Sequence[Phase]) -> float:
        """Half the range of the time: what runs of the same differ by, and what the sampled edits leave open."""
        times = np.asarray(self._edited.position.edit_times)
        edits = next(phase.seconds for phase in phases if phase.name == "edits")
        error = float(2 * times.std(ddof=1) / len(times) ** 0.5 / times.mean()) if len(times) > 1 else 0.5
        return _NOISE * sum(phase.seconds for phase in phases) + min(error, 0.5) * edits

    def _growth(self, counts: Counts, rss: int) -> float:
        """Bytes that the run will take beyond what the trials took."""
        strategy, last = self.strategy, self._edited
        task = strategy.model.task
        most = max(sum(evaluation.requests.values()) for evaluation in counts.evaluations)
        sampled = max(trial.timed[0].work.requests for trial in self.trials)
        growth = float(_ROW_BYTES * most)
        growth += 4 * max(0, strategy.max_extra_parameters(counts.edits) - strategy.max_extra_parameters(last.n_edits))
        if self._is_incremental:
            growth += _SCORE_BYTES * (most + counts.candidates)
        if sampled:
            kept = strategy.model.engine.kept_bytes
            n_kept = self.trials[-1].timed[-1].work.requests
            growth += (
                max(0.0, min(kept / n_kept * most, strategy.model.engine.most_kept_bytes) - kept) if n_kept else 0.0
            )
        # A batch larger than any of the trials takes more for its activations.
        largest = min(task.batch_size, most)
        if 0 < sampled < largest:
            growth += (_peak_rss() - rss) * (largest / sampled - 1)
        return growth

    def _disk(self, counts: Counts) -> float:
        """Bytes of the run folder."""
        last = self._edited
        rows = sum(timed.work.requests for trial in self.trials for timed in trial.timed)
        lines = sum(trial.position.index for trial in self.trials)
        evaluations = sum(len(trial.timed) for trial in self.trials)
        sizes = {name: (self.folder / name).stat().st_size for name in ("edits.jsonl", "metrics.jsonl")}
        # Put together when a run is finished.
        predictions = sum(path.stat().st_size for path in self.folder.rglob("*.parquet"))
        editor = sum(path.stat().st_size for path in (self.folder / "editor").iterdir())
        more = self.strategy.max_extra_parameters(counts.edits) - self.strategy.max_extra_parameters(last.n_edits)
        return (
            sizes["edits.jsonl"] / max(1, lines) * counts.candidates
            + sizes["metrics.jsonl"] / max(1, evaluations) * len(counts.evaluations)
            + predictions / max(1, rows) * counts.rows
            + editor
            + 4 * max(0, more)
        )

    def _notes(self, counts: Counts) -> list[str]:
        last = self._edited
        notes = []
        if not last.n_edits:
            notes.append(f"none of the {last.position.index} candidates tried was an error, so no edit could be timed")
        elif counts.edits < (self.schedule.max_edits or 0):
            notes.append(f"the stream is likely to end after {counts.edits} of {self.schedule.max_edits} edits")
        return notes


def _work(model: EditableModel, requests: Sequence[EditRequest]) -> Work:
    sizes = _sizes(model, requests)
    return Work(len(sizes), sum(1 for _ in model.score_batches(requests)), sum(sizes))


def _sizes(model: EditableModel, requests: Sequence[EditRequest]) -> list[int]:
    return [model.size(request.prompt, (request.target,)) for request in requests]


def _part(work: Work, n: int) -> Work:
    """So many requests like those of some work, in batches like those."""
    share = n / work.requests if work.requests else 0.0
    return Work(n, math.ceil(work.batches * share), round(work.tokens * share))


def _sample(model: EditableModel, requests: Sequence[EditRequest], n: int, which: int) -> tuple[EditRequest, ...]:
    """About `n` requests that stand for all: whole batches as the task makes them, from short to long."""
    if not requests or n >= len(requests):
        return tuple(requests)
    batches = [*model.score_batches(requests)]
    n_batches = n // max(len(batch) for batch in batches)
    if n_batches == 0:
        middle = batches[len(batches) // 2]
        return tuple(requests[middle[(i + which) % len(middle)]] for i in range(min(n, len(middle))))
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * n_batches)] for i in range(min(n_batches, len(batches)))]
    return tuple(requests[i] for batch in chosen for i in batch)


def _fitted(measured: Sequence[tuple[Work, float]]) -> Callable[[Work], float] | None:
    """Seconds as a cost a batch and a cost a token, from a small and a large measurement; None if nothing was done."""
    (small, small_seconds), (large, large_seconds) = measured[0], measured[-1]
    if not large.tokens or not small.tokens:
        return None
    each, fixed = large_seconds / large.tokens, 0.0
    apart = large.tokens * small.batches - small.tokens * large.batches
    if apart > 0:
        token = (large_seconds * small.batches - small_seconds * large.batches) / apart
        batch = (small_seconds - token * small.tokens) / small.batches
        if token >= 0 and batch >= 0:
            each, fixed = token, batch
    return lambda work: fixed * work.batches + each * work.tokens


def _peak_rss() -> int:
    """Bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1024 if sys.platform != "darwin" else 1)


def _lines(forecast: Forecast) -> list[str]:
    memory = f"{forecast.rss_mb:,.0f} MB of memory"
    if forecast.gpu_mb is not None:
        memory += f", {forecast.gpu_mb:,.0f} MB on the GPU"
    return [
        f"about {_duration(forecast.seconds)} "
        f"({_duration(forecast.seconds_low)} to {_duration(forecast.seconds_high)}), "
        f"{memory}, {forecast.disk_mb:,.1f} MB of disk",
        f"from {forecast.trial_edits} {'edit' if forecast.trial_edits == 1 else 'edits'} and "
        f"{_duration(forecast.measured_seconds)} of measuring",
        *forecast.notes,
    ]


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
