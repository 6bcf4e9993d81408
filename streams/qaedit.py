"""QAEdit: real questions of three data sets that language models get wrong, asked in three contexts."""

from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.common.options import check_choice
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.registry import register_stream
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._questions import (
    QuestionStream,
    check_locality_target,
    given,
    kept_answers,
    locality_probe,
    within,
)
from grace_bench.streams._records import Format, Reader

INSTRUCTION = "Answer the question briefly.\n\nQuestion: {}\nAnswer:"

_CONTEXTS = {"bare": "{}", "instruction": INSTRUCTION, "chat": "{}"}


class _Locality(BaseModel):
    model_config = ConfigDict(frozen=True)

    loc: Filled
    loc_ans: Filled


class _Question(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: int | Filled
    prompt: Filled
    target: Filled
    source: str | None = None
    subject: str | None = None
    rephrase: str | None = None
    locality: tuple[_Locality, ...] = Field(default=())


_FORMAT = Format("QAEdit", _Question, frozenset({"id", "prompt", "target"}))


@register_stream("qaedit")
class QaEdit(QuestionStream):
    """Real questions of Natural Questions, TriviaQA and SimpleQA, asked bare, with an instruction or in a chat.

    Records have `id`, `prompt`, `target`; optionally `source`, `subject`, `rephrase` and `locality`, a list of `loc`
    and `loc_ans`. Other fields are ignored. An id is `source/id`, since each source has ids of its own.

    The rephrase is the holdout. Locality questions are locality probes; they are also upstream, each once and with the
    unedited model's answer as target. A subject that does not occur literally in its question is dropped. Every
    question, edited or not, is asked in the same context.

    Args:
        path: A file or a folder.
        context: `bare`, the question alone; `instruction`, the question after an instruction to answer it briefly;
            `chat`, the question as a user's message in the tokenizer's chat template.
        locality_target: The target of locality probes: `unedited`, the unedited model's own answer, or `gold`.
        max_new_tokens: The largest number of tokens that free generation may produce.
        on_error: `raise`, or `skip` to leave broken records out and count them.

    Raises:
        UserError: If no path is given.
    """

    where = "FILE: QAEdit's JSON from github.com/WanliYoung/Revisit-Editing-Evaluation"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="QAEdit, github.com/WanliYoung/Revisit-Editing-Evaluation",
        revision="the file as read",
        license="Apache-2.0",
        citation="Yang et al., The Mirage of Model Editing: Revisiting Evaluation in the Wild, ACL 2025",
        main_score="f1",
    )

    def __init__(
        self,
        *,
        path: str | None = None,
        context: str = "bare",
        locality_target: str = "unedited",
        max_new_tokens: int = 32,
        on_error: str = "raise",
    ) -> None:
        super().__init__(path=path, max_new_tokens=max_new_tokens, on_error=on_error)
        check_choice("stream.context", context, tuple(_CONTEXTS))
        check_locality_target(locality_target)
        self.context = context
        self.locality_target = locality_target
        self.chat = context == "chat"

    def read(self, reader: Reader) -> StreamData:
        (source,) = self.sources()
        convert = partial(
            _request, template=_CONTEXTS[self.context], locality_target=self.locality_target, first_seen={}
        )
        edits = tuple(reader.read(source, [_FORMAT], convert))
        return StreamData(edits=edits, upstream=tuple(kept_answers(edits)), holdout=tuple(rephrased(edits)))


def _request(record: Record[Any], *, template: str, locality_target: str, first_seen: dict[str, str]) -> EditRequest:
    value: _Question = record.value
    source = given(value.source)
    key = str(value.id) if source is None else f"{source}/{value.id}"
    if key in first_seen:
        record.fail("id", f"{key!r} was used before, at {first_seen[key]}")
    first_seen[key] = record.place

    def asked(question: str) -> str:
        return template.replace("{}", question)

    return EditRequest(
        id=key,
        prompt=asked(value.prompt),
        target=value.target,
        subject=within(value.prompt, given(value.subject)),
        rephrases=() if given(value.rephrase) is None else (asked(str(value.rephrase)),),
        locality=tuple(
            probe
            for question in value.locality
            for probe in locality_probe(asked(question.loc), [question.loc_ans], target=locality_target)
        ),
    )
