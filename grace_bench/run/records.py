"""The record of a candidate: a line of `edits.jsonl`."""

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditOutcome
from grace_bench.models.tasks.base import Task
from grace_bench.results.schema import LONGEST_TEXT, EditRecord
from grace_bench.run.backlog import PendingCandidate, ScoredAfter


def edit_record(
    candidate: PendingCandidate, scored_after: ScoredAfter, *, request: EditRequest, task: Task
) -> EditRecord:
    """Returns the record of a candidate.

    Args:
        candidate: The candidate, its edit finished.
        scored_after: What was scored right after its edit; empty if it was not edited.
        request: Its request.
        task: The task that scored it.
    """
    outcome, before = candidate.outcome or EditOutcome(), candidate.before
    after = next(iter(scored_after.get("edited", ())), None)
    return EditRecord(
        index=candidate.index,
        id=request.id,
        was_error=None if before.correct is None else not before.correct,
        edited=after is not None,
        n_edits=candidate.n_edits,
        prompt=_cut(request.prompt),
        target=_cut(task.named(request.target)),
        before_text=before.text,
        after_text=None if after is None else after.text,
        score_before=before.score,
        score_after=None if after is None else after.score,
        scores_after={} if after is None else {**task.columns(after, stream="edited")},
        loss=outcome.loss,
        steps=outcome.steps,
        seconds=candidate.seconds,
        failed=outcome.failed,
        op=outcome.op,
        key=outcome.key,
        distance=outcome.distance,
        n_keys=outcome.n_keys,
    )


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
