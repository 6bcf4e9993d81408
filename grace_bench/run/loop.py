"""The run loop: candidates in, edits, evaluations, one result out (docs/protocol.md)."""

import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from grace_bench.common.options import check_whole
from grace_bench.common.progress import Progress
from grace_bench.common.state import copied, restored
from grace_bench.common.text import visible
from grace_bench.data.benchmark import EditBenchmark, eval_stream
from grace_bench.data.derived import fill_targets, is_answered_by_model, probe_requests
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditOutcome
from grace_bench.editing.guard import failed_outcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import EditFailure, RunFailure
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.tasks.base import ItemScore
from grace_bench.results.schema import LONGEST_TEXT, Cost, EditRecord
from grace_bench.run.recorder import EvaluationRecorder


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run edits and evaluates.

    Attributes:
        max_edits: Stop at exactly this many edits; None for the whole stream.
        eval_every: Evaluate after every so many edits, beside the start and the end.
        max_upstream: The most upstream requests scored, spread evenly over the stream; None for all.
    """

    max_edits: int | None = None
    eval_every: int = 50
    max_upstream: int | None = 500

    def __post_init__(self) -> None:
        check_whole("eval_every", self.eval_every, least=1)
        for name in ("max_edits", "max_upstream"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), least=1)


LOOKAHEAD = 32
"""How many candidates are scored, and edits left pending, together."""


@dataclass
class Pending:
    """A candidate that is not told of yet; an edited one has its outcome, and its score after is still to come."""

    request: EditRequest
    before: ItemScore
    index: int
    n_edits: int
    outcome: EditOutcome | None = None
    seconds: float = 0.0


@dataclass
class Due:
    """An evaluation that waits for pending edits: after which candidate it is due, and at what clock.

    `edited` and `superseded` are those of the run's position then.
    """

    index: int
    n_edits: int
    edited: list[int]
    superseded: list[int]


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        index: The next candidate.
        edited: Indices of the edited requests that ERR is taken over.
        superseded: Indices of the edited requests whose input was edited again with another target.
        n_failed: Edits the editor could not make; they count as edits all the same.
        n_close: Edits in which rounding could have decided otherwise.
        edit_times: Seconds each edit took.
        eval_seconds: Seconds spent scoring.
        peak_rss_mb, peak_gpu_mb: Peak memory of the processes that brought the run here.
        last_evaluation: The clock of the newest evaluation.
    """

    index: int = 0
    edited: list[int] = field(default_factory=list)
    superseded: list[int] = field(default_factory=list)
    n_failed: int = 0
    n_close: int = 0
    edit_times: list[float] = field(default_factory=list)
    eval_seconds: float = 0.0
    peak_rss_mb: float = 0.0
    peak_gpu_mb: float | None = None
    last_evaluation: int | None = None


class Run:
    """One editor on one benchmark: everything that changes while it goes on lives in `state_dict`.

    Args:
        benchmark: The streams. Before the first edit the model is asked for the targets that stand for its own answer,
            of upstream requests and of the probes of all candidates, and never again.
        strategy: The editor, without edits, with its metrics and loggers.
        schedule: When to edit and evaluate.
        strict: Stop at the first edit that cannot be made.
        progress: Called as the unedited model is asked.

    Attributes:
        stopped: Which edit failed, and why, if that is to stop the run.
    """

    def __init__(
        self,
        benchmark: EditBenchmark,
        strategy: EditorStrategy,
        schedule: Schedule,
        *,
        strict: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.strategy = strategy
        self.rescorer = Rescorer(strategy)
        strategy.score_requests = self.rescorer.score
        self.recorder = EvaluationRecorder(strategy.evaluator)
        self.schedule = schedule
        self.strict = strict
        self.stopped: str | None = None
        self.progress = progress
        self.benchmark = _thinned(benchmark, schedule.max_upstream)
        self.position = Position()
        self.before: dict[str, float] = {}
        self._pending: list[Pending | Due] = []
        self._alone_until = -1
        self._by_prompt: defaultdict[str, list[int]] = defaultdict(list)
        self._unedited: dict[str, str | int] | None = None

    def run(self) -> None:
        """Goes on from where the run stands to its end.

        Raises:
            RunFailure: At an edit that cannot be made, if the run is strict.
        """
        for _ in self.steps():
            if self.stopped is not None:
                raise RunFailure(f"strict=true: {self.stopped}")

    def steps(self) -> Iterator[int]:
        """Goes on candidate by candidate, yielding the index of the next; between two, `state_dict` is complete."""
        if self._unedited is None:
            with self._scoring():
                self._take_answers(self._ask_unedited())
        if self.position.last_evaluation is None:
            self.evaluate()
            self.before = dict(self.metrics())
        yield self.position.index
        while not self._is_over():
            self._candidate(self.position.index)
            if self._is_due():
                self.evaluate()
            yield self.position.index
        if self.stopped is not None:
            yield self.position.index
        self.evaluate()
        self.settle()

    def evaluate(self) -> None:
        """Scores every evaluation stream as of this clock, unless that was done, once edits that wait are finished."""
        due = [one.n_edits for one in self._pending if isinstance(one, Due)]
        if self.strategy.n_edits in (self.position.last_evaluation, *due):
            return
        self._pending.append(self._due_now())
        if not (self.strategy.n_pending and self.strategy.knows_past):
            self.settle()

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the newest evaluation, and the counts of the run."""
        latest = self.recorder.latest
        return {
            # Those of the unedited model come first, so that the order does not depend on where the run stopped.
            **{name: latest[name] for name in self.before if name in latest},
            **latest,
            "n_edits": self.strategy.n_edits,
            "n_candidates": self.position.index,
            "n_superseded": len(self.position.superseded),
            "n_failed": self.position.n_failed,
            "n_close": self.position.n_close,
        }

    def cost(self) -> Cost:
        """Returns what the run cost so far."""
        times = self.position.edit_times
        quantiles = np.quantile(times, [0.5, 0.95]).tolist() if times else [None, None]
        self._note_memory()
        return Cost(
            seconds_per_edit_p50=quantiles[0],
            seconds_per_edit_p95=quantiles[1],
            edit_seconds=sum(times),
            eval_seconds=self.position.eval_seconds,
            peak_rss_mb=self.position.peak_rss_mb,
            peak_gpu_mb=self.position.peak_gpu_mb,
            extra_parameters=self.strategy.extra_parameters,
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns all that is needed to go on as if nothing had happened in between.

        That is the state of the editor, the position and the candidates that are not told of yet, the scores that still
        hold, the metrics and the random generators. Asking for it changes nothing that follows.
        """
        self._note_memory()
        evaluator = self.strategy.evaluator
        return {
            # Editors and metrics may hand out what they go on working with; a state stays what it was.
            "editor": copied(self.strategy.state_dict()),
            "position": copied(vars(self.position)),
            "pending": [_pending_state(pending) for pending in self._pending if isinstance(pending, Pending)],
            "due": [[place, vars(one)] for place, one in enumerate(self._pending) if isinstance(one, Due)],
            "scores": self.rescorer.state_dict(),
            "engine": self.strategy.model.engine.state_dict(),
            "before": dict(self.before),
            "unedited": None if self._unedited is None else dict(self._unedited),
            "metrics": {
                metric.registered_name: copied(metric.state_dict())
                for metric in (evaluator.metrics if evaluator else [])
            },
            "recorder": self.recorder.state_dict(),
            "random": _random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up a state from `state_dict`, on a run made from the same configuration."""
        self.strategy.load_state_dict(state["editor"])
        self.position = restored(Position, copied(state["position"]))
        self._pending = [self._pending_of(pending) for pending in state["pending"]]
        for place, due in state["due"]:
            self._pending.insert(place, restored(Due, due))
        self.rescorer.load_state_dict(state["scores"])
        self.recorder.load_state_dict(state["recorder"])
        self.strategy.model.engine.load_state_dict(state["engine"])
        self.before = dict(state["before"])
        if state["unedited"] is not None:
            self._take_answers(state["unedited"])
        if self.strategy.evaluator is not None:
            for metric in self.strategy.evaluator.metrics:
                metric.load_state_dict(state["metrics"][metric.registered_name])
        self._by_prompt.clear()
        for index in self.position.edited:
            self._by_prompt[self.benchmark.data.edits[index].prompt].append(index)
        _load_random_state(state["random"])

    def _pending_of(self, state: Mapping[str, Any]) -> Pending:
        return Pending(
            request=self.benchmark.data.edits[state["index"]],
            before=restored(ItemScore, state["before"]),
            index=state["index"],
            n_edits=state["n_edits"],
            outcome=None if state["outcome"] is None else restored(EditOutcome, state["outcome"]),
            seconds=state["seconds"],
        )

    def _note_memory(self) -> None:
        """Takes this process's peak memory into the run's."""
        position, rss = self.position, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts kilobytes, macOS bytes.
        position.peak_rss_mb = max(position.peak_rss_mb, rss / (1024 if sys.platform != "darwin" else 1024**2))
        if torch.cuda.is_available():
            position.peak_gpu_mb = max(position.peak_gpu_mb or 0.0, torch.cuda.max_memory_allocated() / 1024**2)

    def _ask_unedited(self) -> dict[str, str | int]:
        """Returns what the model answers before its first edit, by prompt, wherever a target stands for that."""
        if self.strategy.n_edits:
            raise RuntimeError("a run begins with an editor that has made no edit")
        prompts, model = self._prompts_to_ask(), self.strategy.model
        return dict(zip(prompts, model.ask(prompts, progress=self.progress), strict=True))

    def _prompts_to_ask(self) -> list[str]:
        data = self.benchmark.data
        probes = (probe for kind in ("locality", "portability") for probe in probe_requests(data.edits, kind))
        asked = (request for request in (*data.upstream, *probes) if is_answered_by_model(request))
        return list(dict.fromkeys(request.prompt for request in asked))

    def _take_answers(self, unedited: Mapping[str, str | int]) -> None:
        self._unedited = dict(unedited)
        self.benchmark = self.benchmark.answered_by(self._recall)

    def _recall(self, prompts: Sequence[str]) -> list[str | int]:
        assert self._unedited is not None
        return [self._unedited[prompt] for prompt in prompts]

    def _is_over(self) -> bool:
        """Whether no candidate is left; what waits is finished first, because a failure there leaves some again."""
        if self._is_at_the_end():
            self.settle()
        return self._is_at_the_end()

    def _is_at_the_end(self) -> bool:
        most = self.schedule.max_edits
        is_full = most is not None and self.strategy.n_edits >= most
        return is_full or self.position.index >= len(self.benchmark.data.edits)

    def _is_due(self) -> bool:
        return self.strategy.n_edits % self.schedule.eval_every == 0

    def _candidate(self, index: int) -> None:
        request = self.benchmark.data.edits[index]
        if self._depends_on_pending(request):
            self.settle()
            if self.position.index != index:
                # An edit failed, and the candidates that came after it are taken up again.
                return
        before = self._score_before(request, index)
        self.position.index += 1
        if before.correct:
            self._pending.append(Pending(request, before, index, self.strategy.n_edits))
        else:
            experience = self.benchmark.streams["edits"][index]
            started = time.perf_counter()
            self.strategy.train(experience, eval_streams=[])
            seconds = time.perf_counter() - started
            edited = Pending(request, before, index, self.strategy.n_edits, self.strategy.outcome, seconds)
            self._pending.append(edited)
            self._supersede(request, index)
        if not 0 < self.strategy.n_pending < LOOKAHEAD or index <= self._alone_until:
            self.settle()

    def _depends_on_pending(self, request: EditRequest) -> bool:
        """Whether a candidate can be scored only when the edits before it are finished."""
        scorer = self.rescorer
        return scorer.is_incremental and (not scorer.knows(request) or scorer.waits_for_values(request))

    def _score_before(self, request: EditRequest, index: int) -> ItemScore:
        """Scores a candidate as edited so far, and with it those that come next, which edits before seldom reach."""
        scorer, together = self.rescorer, [request]
        if scorer.is_incremental and not scorer.knows(request):
            together = [*self.benchmark.data.edits[index : index + self._n_ahead()]]
        with self._scoring():
            return scorer.score(together)[0]

    def _n_ahead(self) -> int:
        most = self.schedule.max_edits
        return LOOKAHEAD if most is None else min(LOOKAHEAD, most - self.strategy.n_edits)

    def settle(self) -> None:
        """Finishes pending edits, then tells of candidates and evaluates in stream order, each as of its clock.

        The time of finishing is shared equally by the edits. Where one of them failed, what came after it is forgotten,
        to be taken up again from there.
        """
        self._flush()
        waiting, self._pending = self._pending, []
        edits = [one for one in waiting if isinstance(one, Pending) and one.outcome is not None]
        due = [one for one in waiting if isinstance(one, Due)]
        with self.rescorer.keeping_versions():
            after = self._score_after(edits, due)
            for one in waiting:
                with self._as_of(one.n_edits):
                    if isinstance(one, Pending):
                        self._tell(one, after.get(one.index))
                    else:
                        self._carry_out(one)

    def _as_of(self, n_edits: int) -> AbstractContextManager[None]:
        return self.strategy.as_of(n_edits) if self.strategy.knows_past else nullcontext()

    def _due_now(self) -> Due:
        return Due(self.position.index - 1, self.strategy.n_edits, [*self.position.edited], [*self.position.superseded])

    def _score_after(self, edits: Sequence[Pending], due: Sequence[Due]) -> dict[int, ItemScore]:
        """Scores requests as of their edits, by index, and with them what evaluations that are due will ask for."""
        scorer, requests = self.rescorer, [pending.request for pending in edits]
        together = [*requests]
        if len(due) > 1:
            # All of it as it is now, when few answers are others than when they were due.
            together += [request for stream in self._eval_streams(due[-1]) for request in stream[0].requests]
        with self._scoring(), scorer.evaluation() if len(due) > 1 else nullcontext():
            after = dict(zip([pending.index for pending in edits], scorer.score(together), strict=False))
            later: set[int | None] = set()
            for pending in reversed(edits if self.strategy.knows_past else ()):
                outcome = pending.outcome
                assert outcome is not None
                # An entry that was edited since, or does not answer any more, may have answered otherwise.
                is_past = outcome.key in later or after[pending.index].entry != outcome.key
                if is_past and pending is not edits[-1]:
                    with self._as_of(pending.n_edits):
                        after[pending.index] = scorer.score([pending.request])[0]
                later.add(outcome.key)
        return after

    def _tell(self, pending: Pending, after: ItemScore | None) -> None:
        """Tells of a candidate."""
        if pending.outcome is not None:
            self.position.edit_times.append(pending.seconds)
            self.position.n_failed += pending.outcome.failed is not None
            self.position.n_close += pending.outcome.is_close
            if self.strict and pending.outcome.failed is not None and self.stopped is None:
                self.stopped = _told_of(pending)
        self.strategy.observe_candidate(pending.request, self._record(pending, after))

    def _carry_out(self, due: Due) -> None:
        """Scores every evaluation stream."""
        started = time.perf_counter()
        with self.rescorer.evaluation():
            self.strategy.eval([experience for stream in self._eval_streams(due) for experience in stream])
        self.position.eval_seconds += time.perf_counter() - started
        self.position.last_evaluation = due.n_edits
        self.recorder.complete(due.n_edits)

    def _flush(self) -> None:
        # Those that failed when they were made have left nothing to finish.
        made = [one for one in self._pending if isinstance(one, Pending) and one.outcome is not None]
        edits = [pending for pending in made if pending.outcome is not None and pending.outcome.failed is None]
        if not edits:
            return
        started = time.perf_counter()
        try:
            flushed = self.strategy.finish()
        except EditFailure as failure:
            if len(edits) > 1:
                # Which one it was shows when each is finished before the next is made.
                self._alone_until = edits[-1].index
                self._go_back(edits[0].index, n_edits=edits[0].n_edits - 1)
                return
            flushed = [failed_outcome(failure)]
        share = (time.perf_counter() - started) / len(edits)
        for pending in edits:
            pending.seconds += share
        for pending, outcome in zip(edits, flushed, strict=False):
            pending.outcome = outcome
        if flushed and flushed[-1].failed is not None:
            failed = edits[len(flushed) - 1]
            self._go_back(failed.index + 1, n_edits=failed.n_edits)
        elif flushed and len(flushed) != len(edits):
            raise RuntimeError(f"flush gave {len(flushed)} outcomes of {len(edits)} edits")

    def _go_back(self, index: int, *, n_edits: int) -> None:
        """Makes a candidate the next one again, and forgets it and those after it: the editor took their edits back."""
        position = self.position
        self.strategy.n_edits, position.index = n_edits, index
        self._pending = [one for one in self._pending if one.index < index]
        edited = sorted(i for i in (*position.edited, *position.superseded) if i < index)
        position.edited, position.superseded = [], []
        self._by_prompt.clear()
        for i in edited:
            self._supersede(self.benchmark.data.edits[i], i)

    def _record(self, pending: Pending, after: ItemScore | None) -> EditRecord:
        outcome, before = pending.outcome or EditOutcome(), pending.before
        return EditRecord(
            index=pending.index,
            id=pending.request.id,
            was_error=None if before.correct is None else not before.correct,
            edited=after is not None,
            n_edits=pending.n_edits,
            prompt=_cut(pending.request.prompt),
            target=_cut(self.strategy.model.task.named(pending.request.target)),
            before_text=before.text,
            after_text=None if after is None else after.text,
            score_before=before.score,
            score_after=None if after is None else after.score,
            loss=outcome.loss,
            steps=outcome.steps,
            seconds=pending.seconds,
            failed=outcome.failed,
            op=outcome.op,
            key=outcome.key,
            distance=outcome.distance,
            n_keys=outcome.n_keys,
        )

    def _supersede(self, request: EditRequest, index: int) -> None:
        same_input = self._by_prompt[request.prompt]
        # Running text has no input of its own: its whole text is the target.
        if request.prompt.strip():
            edits = self.benchmark.data.edits
            for earlier in [i for i in same_input if edits[i].target != request.target]:
                same_input.remove(earlier)
                self.position.edited.remove(earlier)
                self.position.superseded.append(earlier)
        same_input.append(index)
        self.position.edited.append(index)

    def _eval_streams(self, due: Due) -> Iterator[Any]:
        data = self.benchmark.data
        edited = [data.edits[index] for index in due.edited]
        roles: tuple[tuple[str, Sequence[EditRequest]], ...] = (
            ("upstream", data.upstream),
            ("edited", edited),
            ("holdout", self._holdout(edited, due.superseded)),
            ("accurate", data.accurate),
            ("locality", self._probes("locality", edited)),
            ("portability", self._probes("portability", edited)),
        )
        yield from (eval_stream(name, requests) for name, requests in roles if requests)

    def _holdout(self, edited: Sequence[EditRequest], superseded: Sequence[int]) -> Sequence[EditRequest]:
        """The holdout requests of the facts that were edited, those that want a superseded target left out."""
        facts = {request.fact_id for request in edited}
        edits = self.benchmark.data.edits
        outdated = {(edits[i].fact_id, edits[i].target) for i in superseded}
        outdated -= {(request.fact_id, request.target) for request in edited}
        return [
            request
            for request in self.benchmark.data.holdout
            if (request.fact_id in facts or (edited and request.fact is None))
            and (request.fact_id, request.target) not in outdated
        ]

    def _probes(self, kind: str, edited: Sequence[EditRequest]) -> Sequence[EditRequest]:
        """The probes of the edited requests, with the unedited model's answers where they have no target."""
        return fill_targets(probe_requests(edited, kind), self._recall)

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.position.eval_seconds += time.perf_counter() - started


def _thinned(benchmark: EditBenchmark, most: int | None) -> EditBenchmark:
    upstream = benchmark.data.upstream
    if most is None or len(upstream) <= most:
        return benchmark
    chosen = tuple(upstream[i * len(upstream) // most] for i in range(most))
    return benchmark.with_data(upstream=chosen)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"


def seed_everything(seed: int) -> None:
    """Seeds every random generator that an editor may use."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _told_of(failed: Pending) -> str:
    assert failed.outcome is not None
    return visible(f"edit {failed.n_edits} (request '{failed.request.id}') failed: {failed.outcome.failed}")


def _pending_state(pending: Pending) -> dict[str, Any]:
    return {
        "index": pending.index,
        "before": pending.before.state_dict(),
        "n_edits": pending.n_edits,
        "outcome": None if pending.outcome is None else asdict(pending.outcome),
        "seconds": pending.seconds,
    }


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def _load_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
