"""Natural Questions as upstream data: what a question-answering model was trained on and must still answer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from pydantic import BaseModel, ConfigDict

from grace_bench.common.progress import Progress
from grace_bench.data.requests import EditRequest
from grace_bench.errors import UserError
from grace_bench.streams._lines import Filled, Record, validate
from grace_bench.streams._records import Files, Format, Hub, Reader, Unread

_N_PAIRS = 1_000

Answers = str | tuple[str | tuple[str, ...], ...]
"""One answer, a list of answers, or a list of answers each with its aliases."""


class _Pair(BaseModel):
    model_config = ConfigDict(frozen=True)

    question: Filled
    answer: Answers


class _Columns(BaseModel):
    model_config = ConfigDict(frozen=True)

    questions: tuple[Any, ...]
    answers: tuple[Any, ...]


_FORMAT = Format("NQ-open", _Pair, frozenset({"question", "answer"}))


@dataclass(frozen=True)
class NaturalQuestions:
    """The first 1,000 pairs of Natural Questions, in one of two formats.

    NQ-open has one record per pair, with the fields `question` and `answer`. MEND's `nq_train.json` has all pairs in
    one object, with the fields `questions` and `answers`. An answer is a text or a list of texts; the first is the
    target, the others are accepted too.

    Attributes:
        source: The files, or the data set on the hub.
    """

    source: Files | Hub

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def digest(self) -> str:
        # A file read in another role makes different requests, so the digest of the content is not enough.
        return f"pairs of {self.source.digest}"

    def records(self, progress: Progress | None) -> Iterator[Unread]:
        return islice(self._pairs(progress), _N_PAIRS)

    def read(self, reader: Reader) -> list[EditRequest]:
        """Returns one request per pair."""
        return reader.read(self, [_FORMAT], _request)

    def _pairs(self, progress: Progress | None) -> Iterator[Unread]:
        for unread in self.source.records(progress):
            try:
                item = unread.parse()
            except UserError:
                # The reader parses the record again and handles the error as `on_error` says.
                item = None
            if isinstance(item, dict) and "questions" in item:
                yield from _zipped(unread, item)
            else:
                yield unread


def flat_texts(given: Answers | None) -> tuple[str, ...]:
    """Flattens answers of any shape, in order, without duplicates and blank texts.

    >>> flat_texts((("Europe", "Old Continent"), "Europe", ""))
    ('Europe', 'Old Continent')
    """
    items = (given,) if isinstance(given, str) else given or ()
    flat = (text for item in items for text in ((item,) if isinstance(item, str) else item))
    return tuple(dict.fromkeys(text for text in flat if text.strip()))


def _zipped(whole: Unread, item: dict[str, Any]) -> Iterator[Unread]:
    place = whole.place
    columns = validate(place, item, _Columns)
    questions, answers = columns.questions, columns.answers
    if len(questions) != len(answers):
        raise UserError(f"{place}: field 'answers': holds {len(answers)} for {len(questions)} questions")
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True), start=1):
        yield Unread(whole.file, f"{place}: pair {number}", partial(dict, question=question, answer=answer))


def _request(record: Record[_Pair]) -> EditRequest:
    answers = flat_texts(record.value.answer)
    if not answers:
        record.fail("answer", "is empty")
    return EditRequest(id=f"nq/{record.number}", prompt=record.value.question, target=answers[0], answers=answers[1:])
