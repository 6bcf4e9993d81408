"""The run loop: candidates in, edits, evaluations, one result out (docs/protocol.md)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from grace_bench.common.progress import Progress
from grace_bench.common.state import copied, restored
from grace_bench.common.text import visible
from grace_bench.data.avalanche import trigger_plugins
from grace_bench.data.benchmark import BatchExperience, EditBenchmark, eval_stream
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import RunFailure
from grace_bench.evaluation.capability import CapabilityMeter
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.tasks.base import ItemScore
from grace_bench.results.schema import Cost
from grace_bench.run.backlog import LOOKAHEAD, Backlog, PendingCandidate, QueuedEvaluation, ScoredAfter
from grace_bench.run.cost import CostMeter
from grace_bench.run.evaluated import (
    RelatedRequests,
    UneditedModel,
    distinct,
    evaluated_requests,
    prompts_to_ask,
    reachable,
    thinned,
    with_answers,
)
from grace_bench.run.observer import RunObserver
from grace_bench.run.position import Position, Step, reached_together, walk
from grace_bench.run.randomness import load_random_state, random_state
from grace_bench.run.recorder import EvaluationRecorder
from grace_bench.run.records import edit_record
from grace_bench.run.settings import Schedule
from grace_bench.run.tracebacks import Tracebacks


class RunLoop:
    """One editor on one benchmark. Everything that changes during the run is in `state_dict`.

    Args:
        benchmark: The streams.
        strategy: The editor, without edits, with its metrics and loggers.
        schedule: When to edit and evaluate.
        strict: Stop at the first edit that fails.
        progress: Called while the unedited model answers prompts.
        tracebacks: Records the tracebacks of edits that failed with a programming error; None records none.
        observer: Called at each stage of the run; None for no observer.
        capability: Measures what the model can do besides; None for nothing.

    Attributes:
        position: The run's position in the stream.
        meter: The cost so far.
        before: The metrics of the unedited model.
        stopped: Which edit failed and why, if a strict run must stop there.
    """

    def __init__(
        self,
        *,
        benchmark: EditBenchmark,
        strategy: EditorStrategy,
        schedule: Schedule,
        strict: bool = False,
        progress: Progress | None = None,
        tracebacks: Tracebacks | None = None,
        observer: RunObserver | None = None,
        capability: CapabilityMeter | None = None,
    ) -> None:
        self.benchmark = thinned(benchmark, schedule.max_upstream)
        self.strategy = strategy
        self.schedule = schedule
        self.strict = strict
        self.progress = progress
        self.tracebacks = tracebacks or Tracebacks()
        self.observer = observer or RunObserver()
        self.capability = capability
        self.position = Position(benchmark.data.edits)
        self.meter = CostMeter()
        self.before: dict[str, float] = {}
        self.stopped: str | None = None
        self.rescorer = Rescorer(strategy)
        strategy.score_requests = self.rescorer.score
        self.recorder = EvaluationRecorder(strategy.evaluator)
        self._unedited: UneditedModel | None = None
        self._related: RelatedRequests | None = None
        self._judged: dict[int, ItemScore] = {}
        self._batches = reached_together(
            benchmark.data.edits, schedule.edits_at_once, by_step=schedule.eval_every == "step"
        )
        self._backlog = Backlog(
            strategy=strategy,
            rescorer=self.rescorer,
            position=self.position,
            candidates=benchmark.data.edits,
            meter=self.meter,
            requests_of=lambda queued: [request for requests in self._streams(queued).values() for request in requests],
            related_to=lambda request: {} if self._related is None else self._related.of(request),
        )

    def run(self) -> None:
        """Runs from the current position to the end.

        Raises:
            RunFailure: At an edit that failed, if the run is strict.
        """
        for _ in self.steps():
            if self.stopped is not None:
                raise RunFailure(f"strict=true: {self.stopped}")

    def steps(self) -> Iterator[int]:
        """Runs from the current position, pausing before each candidate, where `state_dict` is complete.

        Yields:
            The index of the next candidate.
        """
        if self._unedited is None:
            self._ask_unedited()
        for step in walk(self.schedule, self.position):
            if step is Step.TAKE_CANDIDATE:
                yield self.position.index
                self._take_candidates(self.position.index)
            elif step is Step.EVALUATE:
                self.evaluate()
            else:
                self.settle()
                yield self.position.index
        self._measure_at_the_end()

    def evaluate(self, *, again: bool = False) -> None:
        """Evaluates at the current number of edits, once. With edits pending, the evaluation is queued behind them.

        Args:
            again: Evaluate even if this number of edits was evaluated already.
        """
        n_edits = self.position.n_edits
        if not again and (self.position.last_evaluation == n_edits or self._backlog.has_evaluation(n_edits)):
            return
        self._backlog.queue_evaluation()
        if not (self.strategy.n_pending and self.strategy.knows_past):
            self.settle()

    def settle(self) -> None:
        """Finishes pending edits, then writes records and evaluates in stream order."""
        self.observer.settling(self._backlog.n_edits, n_pending=self.strategy.n_pending)
        self._backlog.settle(record=self._record, evaluate=self._carry_out)

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the newest evaluation, and the counts of the run."""
        latest = self.recorder.latest
        return {
            # Metrics of the unedited model come first, so that the order does not depend on where the run stopped.
            **{name: latest[name] for name in self.before if name in latest},
            **latest,
            "n_edits": self.strategy.n_edits,
            "n_candidates": self.position.index,
            "n_superseded": len(self.position.superseded),
            "n_failed": self.position.n_failed,
            "n_close": self.position.n_close,
        }

    def cost(self) -> Cost:
        """Returns the cost so far."""
        return self.meter.cost(extra_parameters=self.strategy.extra_parameters)

    def state_dict(self) -> dict[str, Any]:
        """Returns everything needed to resume as if the run had not been stopped. The call has no effect on the run."""
        evaluator = self.strategy.evaluator
        return {
            # Copied, because editors and metrics may return objects that they change later.
            "editor": copied(self.strategy.state_dict()),
            "position": copied(self.position.state_dict()),
            "backlog": self._backlog.state_dict(),
            "cost": self.meter.state_dict(),
            "scores": self.rescorer.state_dict(),
            "engine": self.strategy.model.engine.state_dict(),
            "before": dict(self.before),
            "answers": None if self._unedited is None else self._unedited.state_dict(),
            "tracebacks": self.tracebacks.state_dict(),
            "metrics": {
                metric.registered_name: copied(metric.state_dict())
                for metric in (evaluator.metrics if evaluator else [])
            },
            "recorder": self.recorder.state_dict(),
            "judged": [[index, score.state_dict()] for index, score in self._judged.items()],
            "capability": None if self.capability is None else self.capability.state_dict(),
            "random": random_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state from `state_dict`, on a run made from the same configuration."""
        self.strategy.load_state_dict(state["editor"])
        self.position.load_state_dict(state["position"])
        self._backlog.load_state_dict(state["backlog"])
        self.meter.load_state_dict(state["cost"])
        self.rescorer.load_state_dict(state["scores"])
        self.recorder.load_state_dict(state["recorder"])
        # Checkpoints made before requests could be reached together have none.
        self._judged = {int(index): restored(ItemScore, score) for index, score in state.get("judged", ())}
        if self.capability is not None:
            self.capability.load_state_dict(state["capability"])
        self.strategy.model.engine.load_state_dict(state["engine"])
        self.before = dict(state["before"])
        if state["answers"] is not None:
            self._take_answers(UneditedModel.from_state(state["answers"]))
        self.tracebacks.load_state_dict(state["tracebacks"])
        if self.strategy.evaluator is not None:
            for metric in self.strategy.evaluator.metrics:
                metric.load_state_dict(state["metrics"][metric.registered_name])
        load_random_state(state["random"])

    def _ask_unedited(self) -> None:
        """Collects the unedited model's answers, which are the targets of some requests."""
        if self.strategy.n_edits:
            raise RuntimeError("a run begins with an editor that has made no edit")
        model, candidates = self.strategy.model, reachable(self.benchmark.data, self.schedule)
        prompts, seconds = prompts_to_ask(self.benchmark.data, candidates), self.meter.eval_seconds
        n_asked = len(prompts)
        with self.meter.scoring():
            answers = model.ask(prompts, progress=self.progress)
            unedited = UneditedModel(dict(zip(prompts, answers, strict=True)))
            if model.task.compares_with_unedited:
                probes = distinct(unedited.probes_of(candidates, "locality"))
                n_asked += len(probes)
                unedited.learn(probes, model.task.unedited(model, probes, progress=self.progress))
        self._take_answers(unedited)
        self.observer.asked(n_asked, seconds=self.meter.eval_seconds - seconds)

    def _take_answers(self, unedited: UneditedModel) -> None:
        self._unedited = unedited
        self.benchmark = with_answers(self.benchmark, unedited.answers)
        if self.schedule.score_after == "all":
            self._related = RelatedRequests(self.benchmark.data, unedited)

    def _take_candidates(self, index: int) -> None:
        """Takes the next candidate, or for an editor of batches all that are reached together."""
        if self.schedule.edits_at_once > 1 and self.strategy.edits_together:
            self._take_batch(index)
        elif self.schedule.edits_at_once > 1 and self.schedule.edit == "errors":
            if self._judge_together(index):
                self._take_candidate(index, self._judged[index])
        elif self._is_ready(self.benchmark.data.edits[index], index):
            self._take_candidate(index, self._score_before(self.benchmark.data.edits[index], index))

    def _is_ready(self, request: EditRequest, index: int) -> bool:
        """Finishes pending edits if a candidate's score depends on them; whether it still is the next one."""
        if self._depends_on_pending(request):
            self.settle()
        # If a pending edit fails, the candidates after it are repeated.
        return self.position.index == index

    def _judge_together(self, index: int) -> bool:
        """Scores all candidates that are reached together with this one, before the first is edited.

        Returns:
            Whether this candidate still is the next one.
        """
        reached = self._reached_with(index)
        if reached[0] != index and index in self._judged:
            return True
        if self.strategy.n_pending:
            self.settle()
            if self.position.index != index:
                return False
        with self.meter.scoring():
            scores = self.rescorer.score([self.benchmark.data.edits[i] for i in reached])
        self._judged = dict(zip(reached, scores, strict=True))
        return True

    def _reached_with(self, index: int) -> range:
        """The indices of the candidates that are reached together with this one."""
        return next(reached for reached in self._batches if index in reached)

    def _take_candidate(self, index: int, before: ItemScore) -> None:
        """Edits a candidate if it is to be edited, and adds it to the backlog."""
        outcome, seconds = None, 0.0
        if self._is_edited(before):
            started = time.perf_counter()
            self.strategy.train(self.benchmark.streams["edits"][index], eval_streams=[])
            (outcome,), seconds = self.strategy.outcomes, time.perf_counter() - started
        self.position.advance(edited=outcome is not None)
        self._backlog.add_candidate(PendingCandidate(index, self.position.n_edits, before, outcome, seconds))
        if self._backlog.must_settle():
            self.settle()

    def _is_edited(self, before: ItemScore) -> bool:
        return self.schedule.edit == "all" or not before.correct

    def _take_batch(self, index: int) -> None:
        """Scores the candidates that are reached together, and edits those to be edited as one batch."""
        reached, edits, n_before = self._reached_with(index), self.benchmark.data.edits, self.position.n_edits
        if self.strategy.n_pending:
            self.settle()
        with self.meter.scoring():
            scores = self.rescorer.score([edits[i] for i in reached])
        edited = [i for i, score in zip(reached, scores, strict=True) if self._is_edited(score)]
        if self.schedule.max_edits is not None and len(edited) > (room := self.schedule.max_edits - n_before):
            edited = edited[:room]
            reached = range(index, edited[-1] + 1)
        outcomes: dict[int, EditOutcome] = {}
        started = time.perf_counter()
        if edited:
            self.strategy.train(BatchExperience([edits[i] for i in edited]), eval_streams=[])
            outcomes = dict(zip(edited, self.strategy.outcomes, strict=True))
        seconds = (time.perf_counter() - started) / max(1, len(edited))
        for i in reached:
            self.position.advance(edited=i in outcomes)
        for i, before in zip(reached, scores, strict=False):
            n_edits, outcome = self.position.n_edits, outcomes.get(i)
            took = seconds if outcome is not None else 0.0
            self._backlog.add_candidate(PendingCandidate(i, n_edits, before, outcome, took))
        self.settle()
        if self.schedule.is_due(self.position.n_edits, since=n_before):
            self.evaluate()

    def _depends_on_pending(self, request: EditRequest) -> bool:
        """Returns whether the pending edits must be finished before a candidate can be scored."""
        scorer = self.rescorer
        return scorer.is_incremental and (not scorer.knows(request) or scorer.waits_for_values(request))

    def _score_before(self, request: EditRequest, index: int) -> ItemScore:
        """Scores a candidate, together with the next ones: edits in between seldom change their scores."""
        scorer, together = self.rescorer, [request]
        if scorer.is_incremental and not scorer.knows(request):
            most = self.schedule.max_edits
            n_ahead = LOOKAHEAD if most is None else min(LOOKAHEAD, most - self.position.n_edits)
            together = [*self.benchmark.data.edits[index : index + n_ahead]]
        with self.meter.scoring():
            return scorer.score(together)[0]

    def _record(self, candidate: PendingCandidate, after: ScoredAfter) -> None:
        """Writes the record of a candidate; `after` was scored right after its edit."""
        request, outcome = self.benchmark.data.edits[candidate.index], candidate.outcome
        if outcome is not None:
            self.meter.edit_times.append(candidate.seconds)
            self.position.n_failed += outcome.failed is not None
            self.position.n_close += outcome.is_close
            self.tracebacks.add(outcome, request_id=request.id, n_edits=candidate.n_edits)
            if self.strict and outcome.failed is not None and self.stopped is None:
                self.stopped = visible(f"edit {candidate.n_edits} (request '{request.id}') failed: {outcome.failed}")
        record = edit_record(candidate, after, request=request, task=self.strategy.model.task)
        self.strategy.observe_candidate(request, record, scored_after=after)

    def _carry_out(self, queued: QueuedEvaluation) -> None:
        """Scores every evaluation stream."""
        streams, seconds = self._streams(queued), self.meter.eval_seconds
        is_last = self.schedule.is_full(queued.n_edits) or queued.index + 1 >= len(self.benchmark.data.edits)
        capability = self._with_capability(queued.n_edits, at_the_end=is_last)
        with self.meter.scoring(), capability, self.rescorer.evaluation():
            self.strategy.eval([stream[0] for stream in (eval_stream(*named) for named in streams.items())])
        self.recorder.complete(queued.n_edits)
        if self.position.last_evaluation is None:
            self.before = dict(self.metrics())
        self.position.last_evaluation = queued.n_edits
        self.observer.evaluated(streams, seconds=self.meter.eval_seconds - seconds)

    @contextmanager
    def _with_capability(self, n_edits: int, *, at_the_end: bool) -> Iterator[bool]:
        """Measures capability if it is due, and shows it to the metrics inside the context; whether it was due."""
        meter = self.capability
        is_due = meter is not None and meter.is_due(n_edits, at_the_end=at_the_end)
        if meter is not None and is_due:
            # lm-eval seeds the generators that editors draw from.
            random = random_state()
            self.strategy.capability = meter.measure(self.strategy.model, n_edits)
            load_random_state(random)
        try:
            yield is_due
        finally:
            self.strategy.capability = None

    def _measure_at_the_end(self) -> None:
        """Adds the capability to the last evaluation if nobody could know then that no edit would follow."""
        n_edits = self.position.n_edits
        with self.meter.scoring(), self._with_capability(n_edits, at_the_end=True) as is_due:
            if is_due:
                trigger_plugins(self.strategy, "after_eval")
                self.recorder.complete(n_edits, anew=False)

    def _streams(self, queued: QueuedEvaluation) -> dict[str, Sequence[EditRequest]]:
        assert self._unedited is not None
        return evaluated_requests(
            self.benchmark.data, edited=queued.edited, superseded=queued.superseded, unedited=self._unedited
        )
