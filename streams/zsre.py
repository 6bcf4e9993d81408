"""zsRE: questions about one relation of one subject, in the formats of MEND, EasyEdit and KnowEdit; FEVER."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from grace_bench.common.options import check_choice, check_text, check_whole
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest, Probe, TaskName
from grace_bench.data.stream import StreamData, StreamMetadata
from grace_bench.errors import UserError
from grace_bench.models.tasks.text_scores import normalize_answer
from grace_bench.registry import register_stream
from grace_bench.streams._easyedit import OneHop, Questions, Texts, answered_probes
from grace_bench.streams._lines import Filled, Record, validate
from grace_bench.streams._natural_questions import Answers, NaturalQuestions, flat_texts
from grace_bench.streams._questions import check_locality_target, locality_probe, within
from grace_bench.streams._records import Files, Format, Hub, Reader, RecordStream, Source, recognised

_N_QUESTIONS = 10_000
_N_REPHRASES = 10
_N_VALIDATION = 500
_SPLIT_SEED = 42
_NQ_PREFIX = "nq question: "
_TASKS: dict[str, TaskName] = {"qa": "qa", "completion": "completion"}


class _Output(BaseModel):
    model_config = ConfigDict(frozen=True)

    answer: str | None = None


class _Annotated(BaseModel):
    model_config = ConfigDict(frozen=True)

    id: int | Filled
    input: Filled
    output: tuple[_Output, ...]
    filtered_rephrases: tuple[Filled, ...]


class _Evaluation(BaseModel):
    model_config = ConfigDict(frozen=True)

    subject: Filled | None = None
    src: Filled
    alt: str
    answers: tuple[Filled, ...] = Field(min_length=1)
    rephrase: Filled
    loc: Filled
    loc_ans: Filled
    portability: OneHop | None = None


class _Malmen(BaseModel):
    model_config = ConfigDict(frozen=True)

    subject: Filled | None = None
    src: Filled
    ans: Filled
    rephrase: Filled
    loc: Filled
    loc_ans: Filled
    portability: OneHop | None = None


class _Fever(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    alt: Filled
    equiv_prompt: Texts
    unrel_prompt: Filled
    unrel_ans: Filled


class _EasyEdit(BaseModel):
    model_config = ConfigDict(frozen=True)

    prompt: Filled
    target_new: str
    subject: Filled | None = None
    ground_truth: Answers | None = None
    rephrase_prompt: Texts | None = None
    rephrase: Texts | None = None
    locality_prompt: Filled | None = None
    locality_ground_truth: Answers | None = None
    locality: Questions = Field(default_factory=dict)
    portability: Questions = Field(default_factory=dict)


_ANNOTATED = Format("MEND's annotated questions", _Annotated, frozenset({"input", "output"}))
_FORMATS: tuple[Format[Any], ...] = (
    _ANNOTATED,
    Format("MEND's evaluation", _Evaluation, frozenset({"src", "alt"})),
    Format("MALMEN", _Malmen, frozenset({"src", "ans"})),
    Format("FEVER", _Fever, frozenset({"prompt", "alt", "equiv_prompt"})),
    Format("EasyEdit", _EasyEdit, frozenset({"prompt", "target_new"})),
)


@register_stream("zsre")
class Zsre(RecordStream):
    """Questions and answers of zsRE, edited into a question-answering model; upstream is Natural Questions.

    The fields of a file's records decide its format; fields that are not named here are ignored. A folder may mix files
    of all formats but the first.

    - MEND's `structured_zeroshot-*.jsonl`, which the GRACE paper uses: `id`, `input`, `output`, `filtered_rephrases`.
      The first `output` is the target, the others are accepted too. The split is that of the official code. Each fact
      gives its question and, if it has at least ten filtered rephrasings, the first ten of them. The first 10,000 of
      these questions are permuted by `RandomState(42)`; the first half are the edits, the second half the holdout.
      Paraphrases of one fact (equal `fact`) are therefore in both halves, and some rephrasings repeat their question.
      Up to 500 further facts are for validation.
    - MEND's evaluation set, such as ROME's and EasyEdit's `zsre_mend_eval.json`: `src`, `alt`, `answers`, `rephrase`,
      `loc`, `loc_ans`; optionally `subject` and `portability` (`New Question`, `New Answer`). The target is `alt`.
      MALMEN's and UltraEdit's records, whose target is `ans`, need neither `alt` nor `answers`.
    - FEVER as MALMEN and UltraEdit have it: `prompt`, `alt`, `equiv_prompt` (a text or a list of texts),
      `unrel_prompt`, `unrel_ans`. The target is `alt`.
    - EasyEdit and KnowEdit: `prompt`, `target_new`; optionally `subject`, `ground_truth`, `rephrase_prompt` or
      `rephrase`, `locality_prompt` with `locality_ground_truth`, and `locality` and `portability`, which map kinds to
      lists of `prompt` and `ground_truth` (a text or a list of texts). The target of a portability question is its
      first answer; questions without an answer are left out.

    In all formats but the first:

    - Rephrases are the holdout, except those that are also edited prompts.
    - The prefix `nq question: ` of a locality question is removed, because models of Natural Questions are trained
      without it, and the question is then asked as `locality_question` says.
    - A record whose new answer is empty, or equals an old answer after normalisation, is left out and counted.
    - `pred`, `prediction` and `cond`, which come from another model, are never read.
    - A subject that does not occur literally in its prompt is dropped.
    - Ids are the numbers of the records.

    Args:
        path: A file or folder of records in one of these formats.
        upstream_path: Natural Questions: NQ-open lines with `question` and `answer`, or MEND's `nq_train.json`, an
            object with `questions` and `answers`. The first 1,000 pairs are used; the first answer is the target, the
            others are accepted too. If None, upstream are the locality questions with their answers, without duplicates
            and edited prompts; for MEND's `structured_zeroshot-*.jsonl`, which have no locality questions, NQ-open's
            train split from the hub.
        validation_path: Further records for tuning, in one of these formats; records that share a question, a subject
            or a fact with the edits are left out and counted.
        task: `qa` for an encoder-decoder model, or `completion` for a causal one, whose inputs and targets are not cut
            at 20 tokens.
        target: The target of MEND's evaluation records: `alt`, or `answers` for the first of the true answers; the
            others are then accepted too.
        locality_question: How a locality question is asked, with `{}` where the question goes.
        locality_target: The target of locality probes: `unedited`, the unedited model's own answer, or `gold`, the
            answer in the data; questions without one are left out.
        max_new_tokens: The largest number of tokens that free generation may produce.
        on_error: `raise`, or `skip` to leave broken records out and count them.

    Raises:
        UserError: If no path is given; no copy on the hub is known to come from the authors.
    """

    task: TaskName = "qa"
    max_input_tokens: int | None = 20
    max_target_tokens: int | None = 20
    younger_options = ("task", "target", "locality_question", "locality_target", "max_new_tokens")
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="zsRE as MEND prepared it, github.com/eric-mitchell/mend; upstream Natural Questions",
        revision="the files as read, or the hub's newest nq_open",
        license="MIT (MEND); CC BY-SA 3.0 (Natural Questions)",
        citation="Levy et al., Zero-Shot Relation Extraction via Reading Comprehension, CoNLL 2017; "
        "Mitchell et al., Fast Model Editing at Scale, ICLR 2022; "
        "Kwiatkowski et al., Natural Questions, TACL 2019",
        main_score="f1",
    )

    def __init__(
        self,
        *,
        path: str | None = None,
        upstream_path: str | None = None,
        validation_path: str | None = None,
        task: str = "qa",
        target: str = "alt",
        locality_question: str = "{}",
        locality_target: str = "unedited",
        max_new_tokens: int = 20,
        on_error: str = "raise",
    ) -> None:
        if path is None:
            raise UserError(
                "stream=zsre needs stream.path=FILE: structured_zeroshot-dev-new_annotated_final.jsonl from the Google "
                "Drive that github.com/eric-mitchell/mend links to, "
                "https://rome.baulab.info/data/dsets/zsre_mend_eval.json, or EasyEdit's or KnowEdit's zsRE"
            )
        for name, value in (("path", path), ("upstream_path", upstream_path), ("validation_path", validation_path)):
            check_text(f"stream.{name}", value, optional=True)
        check_choice("stream.task", task, tuple(_TASKS))
        check_choice("stream.target", target, ("alt", "answers"))
        check_text("stream.locality_question", locality_question)
        if locality_question.count("{}") != 1:
            raise UserError(
                f"stream.locality_question={locality_question} should hold {{}} once, where the question goes"
            )
        check_locality_target(locality_target)
        check_whole("stream.max_new_tokens", max_new_tokens, least=1)
        self.path = path
        self.upstream_path = upstream_path
        self.validation_path = validation_path
        self.task = _TASKS[task]
        self.target = target
        self.locality_question = locality_question
        self.locality_target = locality_target
        self.max_new_tokens = max_new_tokens
        if task == "completion":
            self.max_input_tokens = self.max_target_tokens = None
        self.on_error = on_error

    def sources(self) -> tuple[Source, ...]:
        validation = () if self.validation_path is None else (Files(self.validation_path),)
        nq = () if self._natural_questions is None else (self._natural_questions,)
        return (Files(self.path), *validation, *nq)

    def read(self, reader: Reader) -> StreamData:
        convert = partial(self._request, reader=reader, is_annotated=self._is_annotated)
        edits = reader.read(Files(self.path), _FORMATS, convert, id_fields=["id"])
        spare: Sequence[EditRequest] = ()
        if self._is_annotated:
            edits, holdout, spare = _split(edits)
        else:
            holdout = _in_other_words(edits)
        nq = self._natural_questions
        return StreamData(
            edits=tuple(edits),
            upstream=tuple(_kept(edits) if nq is None else nq.read(reader)),
            holdout=tuple(holdout),
            validation=tuple(self._validation(reader, spare, [*edits, *holdout])),
        )

    def _validation(
        self, reader: Reader, spare: Sequence[EditRequest], edited: Sequence[EditRequest]
    ) -> Iterator[EditRequest]:
        is_apart = _apart(edited)
        if self.validation_path is not None:
            convert = partial(self._request, reader=reader, prefix="validation/")
            for request in reader.read(Files(self.validation_path), _FORMATS, convert, id_fields=["id"]):
                if is_apart(request):
                    yield request
                else:
                    reader.leave_out("validation record about an edited fact")
        chosen = list(islice(filter(is_apart, spare), _N_VALIDATION if self.validation_path is None else 0))
        yield from chosen
        for _ in range(len(spare) - len(chosen)):
            reader.leave_out("fact beyond the first 10,000 questions")

    @cached_property
    def _is_annotated(self) -> bool:
        for _, place, parse in Files(self.path).records(None):
            try:
                item = parse()
                known = recognised(place, item, _FORMATS)
                validate(place, item, known.schema)
            except UserError:
                continue
            return known is _ANNOTATED
        return False

    @cached_property
    def _natural_questions(self) -> NaturalQuestions | None:
        if self.upstream_path is not None:
            return NaturalQuestions(Files(self.upstream_path))
        if self._is_annotated:
            repo = "google-research-datasets/nq_open"
            return NaturalQuestions(Hub(repo, "train", option="stream.upstream_path", config="nq_open"))
        return None

    def _request(
        self, record: Record[Any], *, reader: Reader, prefix: str = "", is_annotated: bool | None = None
    ) -> EditRequest | None:
        if is_annotated not in (None, isinstance(record.value, _Annotated)):
            raise UserError(
                f"{record.place}: {_ANNOTATED.name} are split as a whole and cannot be mixed with records of another "
                f"format"
            )
        if isinstance(record.value, _Annotated):
            return _from_annotated(record)
        converts = ((_EasyEdit, self._from_easyedit), (_Fever, self._from_fever))
        found = (convert for schema, convert in converts if isinstance(record.value, schema))
        convert = next(found, self._from_evaluation)
        request = convert(record, f"{prefix}{record.number}")
        new, old = str(request.target), request.metadata["ground_truth"]
        if not new.strip():
            reader.leave_out("no new answer")
        elif normalize_answer(new) in map(normalize_answer, old):
            reader.leave_out("the new answer is the old one")
        else:
            return request
        return None

    def _from_evaluation(self, record: Record[Any], name: str) -> EditRequest:
        value: _Evaluation | _Malmen = record.value
        old: tuple[str, ...] = ()
        if isinstance(value, _Malmen):
            target, *others = (value.ans,)
        elif self.target == "answers":
            target, *others = value.answers
        else:
            (target, *others), old = (value.alt,), value.answers
        return EditRequest(
            id=name,
            prompt=value.src,
            target=target,
            answers=tuple(others),
            subject=within(value.src, value.subject),
            rephrases=(value.rephrase,),
            locality=self._locality(value.loc, value.loc_ans),
            portability=() if value.portability is None else (value.portability.probe(),),
            metadata={"ground_truth": list(old)},
        )

    def _from_fever(self, record: Record[Any], name: str) -> EditRequest:
        value: _Fever = record.value
        return EditRequest(
            id=name,
            prompt=value.prompt,
            target=value.alt,
            rephrases=flat_texts(value.equiv_prompt),
            locality=self._locality(value.unrel_prompt, value.unrel_ans),
            metadata={"ground_truth": []},
        )

    def _from_easyedit(self, record: Record[Any], name: str) -> EditRequest:
        value: _EasyEdit = record.value
        locality: list[Probe] = []
        if value.locality_prompt is not None:
            if value.locality_ground_truth is None:
                record.fail("locality_ground_truth", "is missing, while 'locality_prompt' is given")
            locality += self._locality(value.locality_prompt, value.locality_ground_truth)
        for questions in value.locality.values():
            for question in questions or ():
                locality += self._locality(flat_texts(question.prompt)[0], question.ground_truth)
        return EditRequest(
            id=name,
            prompt=value.prompt,
            target=value.target_new,
            subject=within(value.prompt, value.subject),
            rephrases=flat_texts((*flat_texts(value.rephrase_prompt), *flat_texts(value.rephrase))),
            locality=tuple(locality),
            portability=tuple(answered_probes(record, "portability", value.portability)),
            metadata={"ground_truth": list(flat_texts(value.ground_truth))},
        )

    def _locality(self, question: str, ground_truth: Answers | None) -> tuple[Probe, ...]:
        asked = self.locality_question.replace("{}", question.removeprefix(_NQ_PREFIX))
        return locality_probe(asked, flat_texts(ground_truth), target=self.locality_target)


def _split(facts: Sequence[EditRequest]) -> tuple[list[EditRequest], list[EditRequest], list[EditRequest]]:
    """Returns the edits and the holdout, split as in the official code, and the facts that are in neither."""
    questions = list(islice((question for fact in facts for question in _questions(fact)), _N_QUESTIONS))
    # The official code draws np.random.choice(n, n, replace=False), which is this permutation.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(questions))
    half = len(questions) // 2
    used = {question.fact for question in questions}
    return (
        [questions[index] for index in order[:half]],
        [questions[index] for index in order[half:]],
        [fact for fact in facts if fact.id not in used],
    )


def _questions(fact: EditRequest) -> Iterator[EditRequest]:
    for number, prompt in enumerate((fact.prompt, *fact.rephrases)):
        yield EditRequest(
            id=f"{fact.id}/{number}",
            prompt=prompt,
            target=fact.target,
            answers=fact.answers,
            fact=fact.id,
        )


def _in_other_words(edits: Sequence[EditRequest]) -> list[EditRequest]:
    edited = {request.prompt for request in edits}
    return [request for request in rephrased(edits) if request.prompt not in edited]


def _kept(edits: Sequence[EditRequest]) -> Iterator[EditRequest]:
    """Yields the locality questions that have an answer, without duplicates and edited prompts."""
    seen = {request.prompt for request in edits}
    for request in edits:
        for number, probe in enumerate(request.locality):
            target, *others = probe.metadata["ground_truth"] or [None]
            if target is None or probe.prompt in seen:
                continue
            seen.add(probe.prompt)
            yield EditRequest(
                id=f"{request.id}/locality/{number}", prompt=probe.prompt, target=target, answers=tuple(others)
            )


def _apart(edited: Sequence[EditRequest]) -> Callable[[EditRequest], bool]:
    """Returns a predicate: whether a request shares no question, subject or fact with the edited requests."""
    prompts = {prompt for request in edited for prompt in (request.prompt, *request.rephrases)}
    subjects = {request.subject for request in edited} - {None}
    facts = {request.fact_id for request in edited}

    def is_apart(request: EditRequest) -> bool:
        return (
            request.fact_id not in facts
            and request.subject not in subjects
            and prompts.isdisjoint((request.prompt, *request.rephrases))
        )

    return is_apart


def _from_annotated(record: Record[_Annotated]) -> EditRequest:
    value = record.value
    target = value.output[0].answer if value.output else None
    if target is None or not target.strip():
        record.fail("output[0].answer", "is missing" if target is None else "is empty")
    others = flat_texts(tuple(output.answer or "" for output in value.output))
    rephrases = value.filtered_rephrases
    return EditRequest(
        id=str(value.id),
        prompt=value.input,
        target=target,
        answers=tuple(answer for answer in others if answer != target),
        rephrases=rephrases[:_N_REPHRASES] if len(rephrases) >= _N_REPHRASES else (),
    )
