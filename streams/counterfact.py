"""CounterFact, in ROME's own format, EasyEdit's and KnowEdit's."""

from collections.abc import Container, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.common.options import check_text
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import DerivedRequest, EditRequest, Probe, TaskName
from grace_bench.data.stream import AnswerLength, StreamData, StreamMetadata, check_answer_length
from grace_bench.registry import register_stream
from grace_bench.streams._easyedit import OneHop, Questions, Texts, answered_probes
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._natural_questions import Answers, flat_texts
from grace_bench.streams._questions import check_locality_target
from grace_bench.streams._records import Files, Format, Hub, Reader, RecordStream, Source


class _Completion(BaseModel):
    model_config = ConfigDict(frozen=True)

    case_id: int | str | None = None
    prompt: Filled
    target_new: Filled
    subject: Filled


class _EasyEdit(_Completion):
    ground_truth: Filled | None = None
    rephrase_prompt: Filled | None = None
    locality_prompt: Filled | None = None
    locality_ground_truth: Filled | None = None
    portability: OneHop | None = None


class _KnowEdit(_Completion):
    ground_truth: Answers | None = None
    rephrase_prompt: Texts | None = None
    rephrase: Texts | None = None
    locality: Questions
    portability: Questions = Field(default_factory=dict)


class _Target(BaseModel):
    model_config = ConfigDict(frozen=True)

    text: Filled = Field(alias="str")


class _Rewrite(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    subject: Filled
    target_new: _Target
    target_true: _Target


class _Rome(BaseModel):
    model_config = ConfigDict(frozen=True)

    case_id: int | str
    requested_rewrite: _Rewrite
    paraphrase_prompts: tuple[Filled, ...] = ()
    neighborhood_prompts: tuple[Filled, ...] = ()
    portability: OneHop | None = None


_FORMATS: tuple[Format[Any], ...] = (
    Format("ROME", _Rome, frozenset({"requested_rewrite", "neighborhood_prompts"})),
    # Before EasyEdit's, whose fields it has too.
    Format("KnowEdit", _KnowEdit, frozenset({"prompt", "target_new", "locality"})),
    Format("EasyEdit", _EasyEdit, frozenset({"prompt", "target_new"})),
)


@register_stream("counterfact")
class CounterFact(RecordStream):
    """Counterfactual completions: from the hub, ROME's `counterfact.json`, or a file in EasyEdit's format.

    Records come in one of three formats; fields that are not named here are ignored.

    - ROME: `case_id`, `requested_rewrite`; optionally `paraphrase_prompts`, `neighborhood_prompts` and `portability`,
      which EasyEdit adds to ROME's records.
    - EasyEdit: `prompt`, `target_new`, `subject`; optionally `case_id`, `ground_truth`, `rephrase_prompt`,
      `locality_prompt`, `locality_ground_truth`, `portability`.
    - KnowEdit (`wiki_counterfact`): `prompt`, `target_new`, `subject`, `locality`; optionally `case_id`,
      `ground_truth`, `rephrase_prompt` or `rephrase`, `portability`. Locality and portability map kinds to lists of
      `prompt` and `ground_truth` (a text or a list of texts), and questions without an answer are left out.

    A record without `case_id` has its number as id.

    Paraphrases and rephrases become the holdout. Neighbourhood and locality prompts become locality probes. They also
    become upstream requests, without duplicates and edited prompts, whose targets are the unedited model's own answers
    (`target_from_model`).

    In addition to exact match, the probabilities of two answers are compared as in ROME (Meng et al. 2022, section
    3.4): for edits and their paraphrases the new answer should be likelier than the true one, in the neighbourhood the
    true answer should be likelier than the new one. The scores are `ERR/contrast`, `Holdout/contrast` and
    `Locality/contrast`.

    Args:
        path: A file or folder; None for `azhx/counterfact` on the hub, a copy of ROME's file, whose test split is used
            for validation.
        validation_path: Records for tuning, in the same formats; records with an edited prompt are left out.
        locality_target: The target of locality probes: `unedited`, the unedited model's own answer, or `gold`, the true
            answer in the data.
        max_new_tokens: The largest number of tokens that free generation may produce; `auto` for as many as the longest
            target takes.
        on_error: `raise`, or `skip` to leave broken records out and count them.
    """

    task: TaskName = "completion"
    younger_options = ("locality_target",)
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="CounterFact, rome.baulab.info",
        revision="the file as read, or the hub's newest",
        license="MIT",
        citation="Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022",
        main_score="f1",
    )

    def __init__(
        self,
        *,
        path: str | None = None,
        validation_path: str | None = None,
        locality_target: str = "unedited",
        max_new_tokens: AnswerLength = "auto",
        on_error: str = "raise",
    ) -> None:
        for name, value in (("path", path), ("validation_path", validation_path)):
            check_text(f"stream.{name}", value, optional=True)
        check_locality_target(locality_target)
        check_answer_length("stream.max_new_tokens", max_new_tokens)
        self.path = path
        self.validation_path = validation_path
        self.locality_target = locality_target
        self.max_new_tokens = max_new_tokens
        self.on_error = on_error

    def sources(self) -> tuple[Source, ...]:
        if self.path is None:
            return tuple(Hub("azhx/counterfact", split, option="stream.path") for split in ("train", "test"))
        return tuple(Files(path) for path in (self.path, self.validation_path) if path is not None)

    def read(self, reader: Reader) -> StreamData:
        convert = partial(_request, gold=self.locality_target == "gold")
        edits, *rest = (
            tuple(reader.read(source, _FORMATS, convert, id_fields=["case_id"])) for source in self.sources()
        )
        edited = {request.prompt for request in edits}
        validation = []
        for request in rest[0] if rest else ():
            if request.prompt in edited:
                reader.leave_out("a validation record about an edited prompt")
            else:
                validation.append(request)
        return StreamData(
            edits=edits,
            upstream=tuple(_upstream(edits, edited)),
            holdout=tuple(rephrased(edits)),
            validation=tuple(validation),
        )


def _upstream(edits: Iterable[EditRequest], edited: Container[str]) -> Iterator[EditRequest]:
    seen: set[str] = set()
    for request in edits:
        for number, probe in enumerate(request.locality):
            if probe.prompt in edited or probe.prompt in seen:
                continue
            seen.add(probe.prompt)
            yield DerivedRequest(
                id=f"{request.id}/locality/{number}",
                prompt=probe.prompt,
                target=_true_answer(probe),
                target_from_model=True,
            )


def _true_answer(probe: Probe) -> str:
    assert probe.contrast is not None
    return probe.contrast[0]


def _request(record: Record[Any], *, gold: bool) -> EditRequest:
    converts = ((_Rome, _from_rome), (_EasyEdit, _from_easyedit), (_KnowEdit, _from_knowedit))
    convert = next(convert for schema, convert in converts if isinstance(record.value, schema))
    return convert(record, gold=gold)


def _neighbour(prompt: str, *, true: str, new: str, gold: bool) -> Probe:
    return Probe(prompt=prompt, target=true if gold else None, gold=() if gold else (true,), contrast=(true, new))


def _from_rome(record: Record[Any], *, gold: bool) -> EditRequest:
    value: _Rome = record.value
    rewrite = value.requested_rewrite
    new, true = rewrite.target_new.text, rewrite.target_true.text
    if rewrite.prompt.count("{}") != 1:
        record.fail("requested_rewrite.prompt", "should hold {} once, where the subject goes")
    return EditRequest(
        id=str(value.case_id),
        prompt=rewrite.prompt.replace("{}", rewrite.subject),
        target=new,
        subject=rewrite.subject,
        rephrases=value.paraphrase_prompts,
        locality=tuple(_neighbour(text, true=true, new=new, gold=gold) for text in value.neighborhood_prompts),
        portability=() if value.portability is None else (value.portability.probe(),),
        contrast=(new, true),
        metadata={"ground_truth": true},
    )


def _from_easyedit(record: Record[Any], *, gold: bool) -> EditRequest:
    value: _EasyEdit = record.value
    for given, other in (
        ("locality_prompt", "locality_ground_truth"),
        ("locality_ground_truth", "locality_prompt"),
    ):
        if getattr(value, given) is not None and getattr(value, other) is None:
            record.fail(other, f"is missing, while '{given}' is given")
    locality: tuple[Probe, ...] = ()
    if value.locality_prompt is not None and value.locality_ground_truth is not None:
        true = value.locality_ground_truth
        locality = (_neighbour(value.locality_prompt, true=true, new=value.target_new, gold=gold),)
    return _completion(
        record,
        truth=value.ground_truth,
        rephrases=flat_texts(value.rephrase_prompt),
        locality=locality,
        portability=() if value.portability is None else (value.portability.probe(),),
    )


def _from_knowedit(record: Record[Any], *, gold: bool) -> EditRequest:
    value: _KnowEdit = record.value
    kept = ((probe.prompt, str(probe.target)) for probe in answered_probes(record, "locality", value.locality))
    return _completion(
        record,
        truth=next(iter(flat_texts(value.ground_truth)), None),
        rephrases=flat_texts((*flat_texts(value.rephrase_prompt), *flat_texts(value.rephrase))),
        locality=tuple(_neighbour(asked, true=true, new=value.target_new, gold=gold) for asked, true in kept),
        portability=tuple(answered_probes(record, "portability", value.portability)),
    )


def _completion(
    record: Record[Any],
    *,
    truth: str | None,
    rephrases: tuple[str, ...],
    locality: tuple[Probe, ...],
    portability: tuple[Probe, ...],
) -> EditRequest:
    value: _Completion = record.value
    if value.subject not in value.prompt:
        record.fail("subject", "does not occur in the prompt, letter by letter")
    return EditRequest(
        id=str(record.number if value.case_id is None else value.case_id),
        prompt=value.prompt,
        target=value.target_new,
        subject=value.subject,
        rephrases=rephrases,
        locality=locality,
        portability=portability,
        contrast=None if truth is None else (value.target_new, truth),
        metadata={} if truth is None else {"ground_truth": truth},
    )
