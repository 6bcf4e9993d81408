"""A user's own requests."""

from collections.abc import Sequence
from typing import ClassVar, get_args

from grace_bench.errors import UserError, did_you_mean
from grace_bench.options import check_whole
from grace_bench.registry import register_stream
from grace_bench.requests import rephrased
from grace_bench.streams._lines import Record, read_records
from grace_bench.types import EditRequest, EditStream, StreamData, StreamMetadata, TaskName


@register_stream("jsonl")
class Jsonl(EditStream):
    """Your own requests, one JSON object a line with the fields of `EditRequest`.

    `id`, `prompt` and `target` are required; `answers`, `subject`, `rephrases`, `locality`, `portability` and
    `metadata` are not. The rephrases become the holdout.

    Args:
        path: The requests to edit.
        task: `classification`, `qa`, `completion` or `language_modelling`.
        upstream_path: Requests that the model answers rightly and must go on answering, in the same format;
            without them TRR is not measured.
        label_names: The names of the labels, for classification; a target is an index into them.
        max_new_tokens: The longest answer that free generation may give.

    Raises:
        UserError: If an option does not fit the others.
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
        max_new_tokens: int = 16,
    ) -> None:
        if path is None:
            raise UserError("stream=jsonl needs stream.path=FILE, one request a line")
        tasks = {name: name for name in get_args(TaskName)}
        if task not in tasks:
            hint = did_you_mean(task, tasks)
            raise UserError(f"stream.task={task!r} is no task{hint} (there are: {', '.join(tasks)})")
        if label_names and task != "classification":
            raise UserError(f"stream.label_names= is for classification, not for {task}")
        check_whole("stream.max_new_tokens", max_new_tokens, least=1)
        self.path = path
        self.task = tasks[task]
        self.upstream_path = upstream_path
        self.label_names = tuple(label_names)
        self.max_new_tokens = max_new_tokens

    def load(self) -> StreamData:
        """Returns the requests in the order of the file."""
        edits = self._read(self.path)
        return StreamData(
            edits=edits,
            upstream=self._read(self.upstream_path) if self.upstream_path is not None else (),
            holdout=tuple(rephrased(edits)),
            label_names=self.label_names,
        )

    def _read(self, path: str) -> tuple[EditRequest, ...]:
        records = read_records(path, EditRequest, id_field="id")
        for record in records:
            self._check(record)
        return tuple(record.value for record in records)

    def _check(self, record: Record[EditRequest]) -> None:
        request = record.value
        if self.task != "language_modelling":
            _check_filled(record, "prompt", request.prompt)
        self._check_target(record, "target", request.target)
        if request.answers and self.task == "classification":
            record.fail("answers", "is for tasks that answer in text; a classification has one target")
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
                if probe.target is not None:
                    self._check_target(record, f"{name}[{index}].target", probe.target)
                elif self.task == "language_modelling":
                    record.fail(f"{name}[{index}].target", "is missing; in language modelling a model gives no answer")

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


def _check_filled(record: Record[EditRequest], field: str, text: str) -> None:
    if not text.strip():
        record.fail(field, "is empty")
