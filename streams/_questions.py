"""Streams of questions in the user's files: what they share, locality probes, optional texts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from grace_bench.common.options import check_choice, check_text, check_whole
from grace_bench.data.requests import DerivedRequest, EditRequest, Probe, TaskName
from grace_bench.errors import UserError
from grace_bench.streams._lines import Record
from grace_bench.streams._records import Files, RecordStream, Source


class QuestionStream(RecordStream):
    """A stream of questions whose data the user has to name.

    Args:
        path: A file or a folder.
        max_new_tokens: The largest number of tokens that free generation may produce.
        on_error: `raise`, or `skip` to leave broken records out and count them.

    Raises:
        UserError: If no path is given; says where the files are.
    """

    task: TaskName = "completion"
    where: ClassVar[str]
    """What `stream.path` should name, and where it is found."""

    def __init__(self, *, path: str | None, max_new_tokens: int, on_error: str) -> None:
        if path is None:
            raise UserError(f"stream={self.registered_name} needs stream.path={self.where}")
        check_text("stream.path", path)
        check_whole("stream.max_new_tokens", max_new_tokens, least=1)
        self.path = path
        self.max_new_tokens = max_new_tokens
        self.on_error = on_error

    def sources(self) -> tuple[Source, ...]:
        return (Files(self.path),)


def check_locality_target(value: str) -> None:
    """Makes sure that `stream.locality_target` is `unedited`, for the unedited model's own answers, or `gold`.

    Raises:
        UserError: If it is neither.
    """
    check_choice("stream.locality_target", value, ("unedited", "gold"))


def locality_probe(prompt: str, answers: Sequence[str], *, target: str) -> tuple[Probe, ...]:
    """Returns a locality question as a probe; none if its target should be a gold answer and there is none.

    Args:
        prompt: The question.
        answers: Its gold answers, the preferred one first.
        target: `unedited` or `gold`.
    """
    metadata = {"ground_truth": [*answers]}
    if target == "unedited":
        return (Probe(prompt=prompt, gold=tuple(answers), metadata=metadata),)
    if not answers:
        return ()
    return (Probe(prompt=prompt, target=answers[0], answers=tuple(answers[1:]), metadata=metadata),)


def kept_answers(edits: Iterable[EditRequest]) -> Iterator[DerivedRequest]:
    """Yields each locality question that is not edited once, with the unedited model's answer as its target."""
    seen = {request.prompt for request in edits}
    for request in edits:
        for number, probe in enumerate(request.locality):
            if probe.prompt not in seen:
                seen.add(probe.prompt)
                yield DerivedRequest(
                    id=f"{request.id}/locality/{number}", prompt=probe.prompt, target="", target_from_model=True
                )


def pair(record: Record[Any], question: str, answer: str) -> tuple[str, str] | None:
    """Returns the texts of a question's and its answer's field; None if both are absent, null or blank.

    Raises:
        UserError: If only one of them is given; the message names the record and the missing field.
    """
    texts = [given(getattr(record.value, field)) for field in (question, answer)]
    if None not in texts:
        return str(texts[0]), str(texts[1])
    for field, other, text in ((question, answer, texts[1]), (answer, question, texts[0])):
        if text is not None:
            record.fail(field, f"is missing, while '{other}' is given")
    return None


def given(text: str | None) -> str | None:
    """Returns a text, or None if it is blank: data sets leave a field empty where they have nothing to say."""
    return text if text is not None and text.strip() else None


def within(prompt: str, subject: str | None) -> str | None:
    """Returns the subject if it occurs in the prompt, letter by letter."""
    return subject if subject is not None and subject in prompt else None
