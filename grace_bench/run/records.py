"""The record of a candidate: a line of `edits.jsonl`."""

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditOutcome
from grace_bench.models.tasks.base import ItemScore
from grace_bench.results.schema import LONGEST_TEXT, EditRecord
from grace_bench.run.backlog import PendingCandidate


def edit_record(
    candidate: PendingCandidate, after: ItemScore | None, *, request: EditRequest, target: str
) -> EditRecord:
    """Returns the record of a candidate.

    Args:
        candidate: The candidate, its edit finished.
        after: Its score right after its edit; None if it was not edited.
        request: Its request.
        target: The wanted answer, or its label's name.
    """
    outcome, before = candidate.outcome or EditOutcome(), candidate.before
    return EditRecord(
        index=candidate.index,
        id=request.id,
        was_error=None if before.correct is None else not before.correct,
        edited=after is not None,
        n_edits=candidate.n_edits,
        prompt=_cut(request.prompt),
        target=_cut(target),
        before_text=before.text,
        after_text=None if after is None else after.text,
        score_before=before.score,
        score_after=None if after is None else after.score,
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
