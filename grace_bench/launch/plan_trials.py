"""What `grace-bench plan` reckons with: trials of a run's first steps, and counts of what its whole schedule does."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from grace_bench.data.benchmark import EditBenchmark
from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.editable import EditableModel
from grace_bench.run.evaluated import (
    UneditedModel,
    distinct,
    evaluated_requests,
    prompts_to_ask,
    reachable,
    thinned,
)
from grace_bench.run.loop import RunLoop
from grace_bench.run.observer import RunObserver
from grace_bench.run.position import Position, Step, walk
from grace_bench.run.settings import Schedule


class Timed(NamedTuple):
    """An evaluation of a trial: how many requests were evaluated, and the seconds that took."""

    n_requests: int
    seconds: float

    @property
    def each(self) -> float:
        """Seconds per request."""
        return self.seconds / max(1, self.n_requests)


class Trial(RunObserver):
    """The first steps of a run, timed. The first evaluation is repeated: cached scores and recordings save time.

    Args:
        benchmark: The run's streams, reduced.
        strategy: The editor, without edits; the trial leaves its edits in it.
        n_edits: How many edits to make, if so many candidates are errors.
        schedule: The run's schedule.

    Attributes:
        position: Where the trial ended.
        is_incremental: Whether only what may have changed is scored again.
        evaluations: Two before the first edit, and one after the edits.
        edit_times: Seconds of each edit.
        n_groups: In how many groups the edits were finished.
        defers: Whether the editor left edits pending.
        ask_seconds: Seconds per prompt that the unedited model was asked.
        scoring_seconds: Seconds of asking the unedited model and of all evaluations.
        candidate_seconds: Seconds to score a candidate, or an edit after it was made.
        other_seconds: Seconds per candidate spent neither scoring nor editing.
        seconds: All of it.
    """

    def __init__(self, *, benchmark: EditBenchmark, strategy: EditorStrategy, n_edits: int, schedule: Schedule) -> None:
        self.evaluations: list[Timed] = []
        self.n_groups, self.defers, self.ask_seconds = 0, False, 0.0
        schedule = replace(schedule, max_edits=n_edits, eval_every=n_edits, max_upstream=None)
        loop = RunLoop(benchmark=benchmark, strategy=strategy, schedule=schedule, observer=self)
        self.position, self.edit_times = loop.position, loop.meter.edit_times
        self.is_incremental = loop.rescorer.is_incremental
        started, steps = time.perf_counter(), loop.steps()
        next(steps)
        asking = loop.meter.eval_seconds - self.evaluations[0].seconds
        loop.evaluate(again=True)
        for _ in steps:
            pass
        self.seconds, scoring = time.perf_counter() - started, loop.meter.eval_seconds
        candidates = scoring - asking - sum(timed.seconds for timed in self.evaluations)
        self.candidate_seconds = max(0.0, candidates) / (self.position.index + self.n_edits)
        self.other_seconds = max(0.0, self.seconds - scoring - sum(self.edit_times)) / self.position.index
        self.scoring_seconds = max(1e-6, scoring - candidates)

    @property
    def n_edits(self) -> int:
        """Edits made."""
        return self.position.n_edits

    @property
    def seconds_per_edit(self) -> float:
        """Seconds of an edit, with the scoring of candidates until there was one to edit."""
        n_scored = self.position.index + self.n_edits
        return max(1e-6, sum(self.edit_times) + self.candidate_seconds * n_scored) / max(1, self.n_edits)

    def asked(self, n_prompts: int, *, seconds: float) -> None:  # noqa: D102
        self.ask_seconds = seconds / max(1, n_prompts)

    def settling(self, n_edits: int, *, n_pending: int) -> None:  # noqa: D102
        self.n_groups += n_edits > 0
        self.defers |= n_pending > 0

    def evaluated(self, streams: Mapping[str, Sequence[EditRequest]], *, seconds: float) -> None:  # noqa: D102
        self.evaluations.append(Timed(sum(map(len, streams.values())), seconds))

    @property
    def known_seconds(self) -> float:
        """Seconds to evaluate a request that the evaluation before scored, also if edits changed its answer."""
        fresh, again, *after = self.evaluations
        if not self.is_incremental or not after:
            return again.each
        n_known = again.n_requests + self.n_edits
        return max(again.each, (after[0].seconds - fresh.each * (after[0].n_requests - n_known)) / n_known)


class Evaluation(NamedTuple):
    """An evaluation, counted in advance: its requests by stream, and how many of them are scored for the first time.

    The others were scored by the evaluation before, and a score or a recording of them is cached.
    """

    n_edits: int
    requests: Mapping[str, int]
    n_fresh: int

    @property
    def n_known(self) -> int:
        """How many were scored before."""
        return sum(self.requests.values()) - self.n_fresh


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a run does, counted in advance: prompts asked, candidates reached, edits made, and the evaluations."""

    asked: int
    candidates: int
    edits: int
    evaluations: Sequence[Evaluation]

    @property
    def rows(self) -> int:
        """Requests evaluated, all evaluations together: the rows of `predictions.parquet`."""
        return sum(sum(evaluation.requests.values()) for evaluation in self.evaluations)


def count_run(
    benchmark: EditBenchmark,
    schedule: Schedule,
    *,
    is_incremental: bool,
    is_edited: Callable[[int], bool],
    compares_with_unedited: bool = False,
) -> Counts:
    """Walks through a run's schedule without a model, and counts what it does.

    Args:
        benchmark: The run's streams.
        schedule: Its schedule.
        is_incremental: Whether only what may have changed is scored again.
        is_edited: Says of each candidate, by index, whether it will be edited.
        compares_with_unedited: Whether locality probes are compared with the unedited model.
    """
    data = thinned(benchmark, schedule.max_upstream).data
    candidates = reachable(data, schedule)
    unedited = UneditedModel(dict.fromkeys(prompts_to_ask(data, candidates), ""))
    n_compared = len(distinct(unedited.probes_of(candidates, "locality"))) if compares_with_unedited else 0
    position, evaluations = Position(data.edits), list[Evaluation]()
    before: Mapping[str, Sequence[EditRequest]] = {}
    for step in walk(schedule, position):
        if step is Step.TAKE_CANDIDATE:
            position.advance(edited=is_edited(position.index))
        elif step is Step.EVALUATE and position.last_evaluation != position.n_edits:
            position.last_evaluation = position.n_edits
            streams = evaluated_requests(
                data, edited=position.edited, superseded=position.superseded, unedited=unedited
            )
            n_fresh = 0
            for name, requests in streams.items():
                known = before.get(name, ())
                if not is_incremental:
                    # Recordings are cached by batch, and a stream that grew is batched anew.
                    n_fresh += 0 if requests == known else len(requests)
                elif name != "edited":
                    # The edited requests were scored right after their edits.
                    n_fresh += len({request.id for request in requests} - {request.id for request in known})
            before = streams
            sizes = {name: len(requests) for name, requests in streams.items()}
            evaluations.append(Evaluation(position.n_edits, sizes, n_fresh))
    return Counts(
        asked=len(unedited.answers) + n_compared,
        candidates=position.index,
        edits=position.n_edits,
        evaluations=evaluations,
    )


def sample(model: EditableModel, requests: Sequence[EditRequest], n: int) -> tuple[EditRequest, ...]:
    """Returns about `n` requests that stand for all: whole batches as the task makes them, from short to long."""
    if not requests or n >= len(requests):
        return tuple(requests)
    batches = [*model.score_batches(requests)]
    n_batches = n // max(map(len, batches))
    if n_batches == 0:
        return tuple(requests[i] for i in batches[len(batches) // 2][:n])
    return tuple(requests[i] for k in range(n_batches) for i in batches[(2 * k + 1) * len(batches) // (2 * n_batches)])
