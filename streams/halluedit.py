"""HalluEditBench: facts that a language model gets wrong, with questions around each."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest, Probe
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.registry import register_stream
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._questions import QuestionStream, given, kept_answers, pair, within
from grace_bench.streams._records import Format, Reader, Source
from grace_bench.streams._tables import CsvFiles

_HOPS = range(2, 7)


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True)

    question: Filled
    object: Filled
    subject: Filled
    topic: str | None = None
    relation: str | None = None
    paraphrased_question: str | None = None
    locality_question: str | None = None
    reversed_relation_question: str | None = None
    question_2hop: str | None = None
    answer_2hop: str | None = None
    question_3hop: str | None = None
    answer_3hop: str | None = None
    question_4hop: str | None = None
    answer_4hop: str | None = None
    question_5hop: str | None = None
    answer_5hop: str | None = None
    question_6hop: str | None = None
    answer_6hop: str | None = None


_FORMAT = Format("HalluEditBench", _Row, frozenset({"question", "object", "subject"}))


@register_stream("halluedit")
class HalluEdit(QuestionStream):
    """Facts that a language model gets wrong, with questions around each (HalluEditBench, one CSV file a topic).

    A row has the columns `question`, `object` (the answer), `subject`; optionally `topic`, `relation`,
    `paraphrased_question`, `locality_question`, `reversed_relation_question`, and `question_2hop` with `answer_2hop` up
    to `question_6hop` with `answer_6hop`. Other columns are ignored, and cells of the optional ones may be empty.

    The paraphrase is the holdout. Multi-hop questions are portability probes, and so is the question for the reversed
    relation, whose answer is the subject. The locality question has no answer in the data: its target is the unedited
    model's own, as a probe and, once each, as upstream. A subject that does not occur literally in its question is
    dropped. Ids are the numbers of the rows.

    Args:
        path: A CSV file, or a folder of them.
        max_new_tokens: The largest number of tokens that free generation may produce.
        on_error: `raise`, or `skip` to leave broken rows out and count them.

    Raises:
        UserError: If no path is given.
    """

    where = "FILE: a CSV file of github.com/llm-editing/HalluEditBench, data/questions/hallucination_final"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="HalluEditBench, github.com/llm-editing/HalluEditBench",
        revision="the file as read",
        license="MIT",
        citation="Huang et al., Can Knowledge Editing Really Correct Hallucinations?, ICLR 2025",
        main_score="f1",
    )

    def __init__(self, *, path: str | None = None, max_new_tokens: int = 32, on_error: str = "raise") -> None:
        super().__init__(path=path, max_new_tokens=max_new_tokens, on_error=on_error)

    def sources(self) -> tuple[Source, ...]:
        return (CsvFiles(self.path),)

    def read(self, reader: Reader) -> StreamData:
        (source,) = self.sources()
        edits = tuple(reader.read(source, [_FORMAT], _request))
        return StreamData(edits=edits, upstream=tuple(kept_answers(edits)), holdout=tuple(rephrased(edits)))


def _request(record: Record[Any]) -> EditRequest:
    row: _Row = record.value
    paraphrase, locality = given(row.paraphrased_question), given(row.locality_question)
    follows = [pair(record, f"question_{n}hop", f"answer_{n}hop") for n in _HOPS]
    if given(row.reversed_relation_question) is not None:
        follows.insert(0, (str(row.reversed_relation_question), row.subject))
    about = {"topic": row.topic, "relation": row.relation}
    return EditRequest(
        id=str(record.number),
        prompt=row.question,
        target=row.object,
        subject=within(row.question, row.subject),
        rephrases=() if paraphrase is None else (paraphrase,),
        locality=() if locality is None else (Probe(prompt=locality),),
        portability=tuple(Probe(prompt=known[0], target=known[1]) for known in follows if known is not None),
        metadata={name: text for name, text in about.items() if given(text) is not None},
    )
