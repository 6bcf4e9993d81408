"""MQuAKE: edits, and multi-hop questions whose answers follow from them."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest, Probe
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.registry import register_stream
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._questions import QuestionStream, given
from grace_bench.streams._records import Format, Reader


class _Target(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: Filled = Field(alias="str")


class _Rewrite(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    subject: Filled
    target_new: _Target
    target_true: _Target | None = None
    question: str | None = None


class _Hop(BaseModel):
    model_config = ConfigDict(frozen=True)

    question: str
    answer: str
    answer_alias: tuple[str, ...] = ()


class _Case(BaseModel):
    model_config = ConfigDict(frozen=True)

    case_id: int | Filled
    requested_rewrite: tuple[_Rewrite, ...] = Field(min_length=1)
    questions: tuple[Filled, ...] = Field(min_length=1)
    new_answer: Filled
    new_answer_alias: tuple[str, ...] = ()
    new_single_hops: tuple[_Hop, ...] = ()


_FORMAT = Format("MQuAKE", _Case, frozenset({"case_id", "requested_rewrite", "questions", "new_answer"}))


@register_stream("mquake")
class Mquake(QuestionStream):
    """Edits, and multi-hop questions whose answers follow from them (MQuAKE-CF and MQuAKE-T).

    A record is a case: `case_id`, `requested_rewrite`, `questions`, `new_answer`; optionally `new_answer_alias` and
    `new_single_hops`. Other fields are ignored. A rewrite has `prompt` with `{}` where the `subject` goes, and
    `target_new`; optionally `target_true` and `question`.

    Each rewrite of a case is an edit with the id `case_id/number`. All share a group: they are edited together, and the
    seed does not separate them. Its `question` is the holdout, and the aliases of its answer in `new_single_hops` are
    accepted too. The case's questions are portability probes of its last edit, so they are scored once every edit of
    the case has been reached. They form a group: `Portability/any`, MQuAKE's own score, is the share of cases of which
    any question is answered with the new answer or one of its aliases.

    MQuAKE has no questions whose answers must stay: there is neither upstream nor locality.

    Args:
        path: A file or a folder.
        max_new_tokens: The largest number of tokens that free generation may produce.
        on_error: `raise`, or `skip` to leave broken records out and count them.

    Raises:
        UserError: If no path is given.
    """

    where = "FILE: MQuAKE-CF.json, MQuAKE-CF-3k.json or MQuAKE-T.json from github.com/princeton-nlp/MQuAKE"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="MQuAKE, github.com/princeton-nlp/MQuAKE",
        revision="the file as read",
        license="MIT",
        citation="Zhong et al., MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions, "
        "EMNLP 2023",
        main_score="f1",
    )

    def __init__(self, *, path: str | None = None, max_new_tokens: int = 32, on_error: str = "raise") -> None:
        super().__init__(path=path, max_new_tokens=max_new_tokens, on_error=on_error)

    def read(self, reader: Reader) -> StreamData:
        (source,) = self.sources()
        cases = reader.read(source, [_FORMAT], _requests, id_fields=["case_id"])
        edits = tuple(request for case in cases for request in case)
        return StreamData(edits=edits, holdout=tuple(rephrased(edits)))


def _requests(record: Record[Any]) -> list[EditRequest]:
    case: _Case = record.value
    key = str(case.case_id)
    aliases = _filled(case.new_answer_alias)
    questions = tuple(
        Probe(prompt=question, target=case.new_answer, answers=aliases, group=key) for question in case.questions
    )
    last = len(case.requested_rewrite) - 1
    requests = []
    for number, rewrite in enumerate(case.requested_rewrite):
        if rewrite.prompt.count("{}") != 1:
            record.fail(f"requested_rewrite[{number}].prompt", "should hold {} once, where the subject goes")
        new, question = rewrite.target_new.text, given(rewrite.question)
        requests.append(
            EditRequest(
                id=f"{key}/{number}",
                prompt=rewrite.prompt.replace("{}", rewrite.subject),
                target=new,
                answers=_aliases(case, rewrite),
                subject=rewrite.subject,
                group=key,
                contrast=None if rewrite.target_true is None else (new, rewrite.target_true.text),
                rephrases=() if question is None else (question,),
                portability=questions if number == last else (),
            )
        )
    return requests


def _aliases(case: _Case, rewrite: _Rewrite) -> tuple[str, ...]:
    """Returns the other names of a rewrite's answer, from the hop that asks its question."""
    hops = (
        hop
        for hop in case.new_single_hops
        if hop.question == rewrite.question and hop.answer == rewrite.target_new.text
    )
    return next((_filled(hop.answer_alias) for hop in hops), ())


def _filled(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(text for text in texts if text.strip())
