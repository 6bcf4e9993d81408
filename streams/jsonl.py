"""A stream of the user's own requests."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, get_args

from grace_bench.common.options import check_text
from grace_bench.data.derived import rephrased
from grace_bench.data.requests import EditRequest, Probe, TaskName, is_contrast
from grace_bench.data.stream import AnswerLength, Order, StreamData, StreamMetadata, check_answer_length
from grace_bench.errors import UserError, did_you_mean
from grace_bench.registry import register_stream
from grace_bench.streams._lines import Record
from grace_bench.streams._records import Files, Format, Reader, RecordStream, Source

_DATES = ("date", "time", "timestamp", "time_step", "year")
_ONE_TARGET = "is for tasks that answer in text; a classification has one target"
_REQUEST = Format("EditRequest", EditRequest, frozenset({"id", "prompt", "target"}))


@register_stream("jsonl")
class Jsonl(RecordStream):
    """Your own requests, one JSON object per line with the fields of `EditRequest`.

    `id`, `prompt` and `target` are required, all other fields are optional. The rephrases become the holdout. Answers
    are compared strictly.

    The order of the file is the order of the run if it matters: if two requests with the same prompt or fact have
    different targets, or every request has a date in its metadata (`date`, `time`, `timestamp`, `time_step` or `year`).
    Otherwise the run shuffles the requests.

    Args:
        path: The requests to edit.
        task: `classification`, `qa`, `completion` or `language_modelling`.
        upstream_path: Requests, in the same format, that the model answers correctly and must still answer correctly
            after the edits; without them TRR is not measured.
        label_names: The names of the labels, for classification; a target is an index into them.
        max_new_tokens: The largest number of tokens that free generation may produce; `auto` for as many as the longest
            target takes.
        on_error: `raise`, or `skip` to leave broken records out and count them.

    Raises:
        UserError: If an option is missing, invalid or inconsistent with another.
    """

    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="the user's file", revision="as read", license="the user's"
    )

    def __init__(
        self,
        *,
        path: str | None = None,
        task: str = "completion",
        upstream_path: str | None = None,
        label_names: Sequence[str] = (),
        max_new_tokens: AnswerLength = "auto",
        on_error: str = "raise",
    ) -> None:
        if path is None:
            raise UserError("stream=jsonl needs stream.path=FILE, one request a line")
        check_text("stream.path", path)
        check_text("stream.upstream_path", upstream_path, optional=True)
        tasks = {name: name for name in get_args(TaskName)}
        if task not in tasks:
            hint = did_you_mean(task, tasks)
            raise UserError(f"stream.task={task!r} is not a task{hint} (there are: {', '.join(tasks)})")
        if label_names and task != "classification":
            raise UserError(f"stream.label_names= is for classification, not for {task}")
        check_answer_length("stream.max_new_tokens", max_new_tokens)
        self.path = path
        self.task = tasks[task]
        self.upstream_path = upstream_path
        self.label_names = tuple(label_names)
        self.max_new_tokens = max_new_tokens
        self.on_error = on_error
        # Of the protocols of the other tasks it is no part.
        self.normalise = "strict" if task in ("qa", "completion") else "squad"

    def default_order(self, data: StreamData) -> Order:
        is_dated = all(any(request.metadata.get(name) is not None for name in _DATES) for request in data.edits)
        return "stream" if is_dated or _has_conflicts(data.edits) else self.order

    def sources(self) -> tuple[Source, ...]:
        return tuple(Files(path) for path in (self.path, self.upstream_path) if path is not None)

    def read(self, reader: Reader) -> StreamData:
        edits, upstream = (
            tuple(reader.read(Files(path), [_REQUEST], self._checked, id_fields=["id"])) if path is not None else ()
            for path in (self.path, self.upstream_path)
        )
        return StreamData(edits=edits, upstream=upstream, holdout=tuple(rephrased(edits)), label_names=self.label_names)

    def _checked(self, record: Record[EditRequest]) -> EditRequest:
        request = record.value
        if self.task != "language_modelling":
            _check_filled(record, "prompt", request.prompt)
        self._check_target(record, "target", request.target)
        if request.answers and self.task == "classification":
            record.fail("answers", _ONE_TARGET)
        for name in ("answers", "rephrases"):
            for index, text in enumerate(getattr(request, name)):
                _check_filled(record, f"{name}[{index}]", text)
        if request.subject is not None:
            _check_filled(record, "subject", request.subject)
            if request.subject not in request.prompt:
                record.fail("subject", "does not occur in the prompt, letter by letter")
        for name in ("locality", "portability"):
            for index, probe in enumerate(getattr(request, name)):
                _check_filled(record, f"{name}[{index}].prompt", probe.prompt)
                self._check_answers(record, f"{name}[{index}]", probe)
                if probe.target is not None:
                    self._check_target(record, f"{name}[{index}].target", probe.target)
                elif self.task == "language_modelling":
                    record.fail(f"{name}[{index}].target", "is missing; in language modelling a model gives no answer")
                _check_contrast(record, f"{name}[{index}].metadata", probe.metadata)
        _check_contrast(record, "metadata", request.metadata)
        return request

    def _check_answers(self, record: Record[EditRequest], field: str, probe: Probe) -> None:
        if probe.answers and self.task == "classification":
            record.fail(f"{field}.answers", _ONE_TARGET)
        if probe.answers and probe.target is None:
            record.fail(f"{field}.target", "is missing, while 'answers' is given")
        for index, text in enumerate(probe.answers):
            _check_filled(record, f"{field}.answers[{index}]", text)

    def _check_target(self, record: Record[EditRequest], field: str, target: str | int) -> None:
        if self.task != "classification":
            if isinstance(target, int):
                record.fail(field, f"should be text for {self.task}, not the number {target}")
            _check_filled(record, field, target)
        elif isinstance(target, str):
            record.fail(field, "should be a label's number for classification, not text")
        elif target < 0 or (self.label_names and target >= len(self.label_names)):
            most = f" to {len(self.label_names) - 1}" if self.label_names else " or more"
            record.fail(field, f"is label {target}, but labels are numbered 0{most}")
        elif self.n_model_labels is not None and target >= self.n_model_labels:
            last = self.n_model_labels - 1
            record.fail(field, f"label {target} is none of the model's {self.n_model_labels} (0 to {last})")


def _has_conflicts(requests: Iterable[EditRequest]) -> bool:
    """Whether two requests with the same fact or prompt have different targets, so that one supersedes the other."""
    targets: dict[tuple[str, str], str | int] = {}
    for request in requests:
        # Running text has an empty prompt; its whole text is the target.
        keys = [("fact", request.fact_id), ("prompt", request.prompt)] if request.prompt.strip() else []
        if any(targets.setdefault(key, request.target) != request.target for key in keys):
            return True
    return False


def _check_contrast(record: Record[EditRequest], field: str, metadata: Mapping[str, Any]) -> None:
    if not is_contrast(metadata.get("contrast")):
        record.fail(f"{field}.contrast", "should be a list of two texts")


def _check_filled(record: Record[EditRequest], field: str, text: str) -> None:
    if not text.strip():
        record.fail(field, "is empty")
