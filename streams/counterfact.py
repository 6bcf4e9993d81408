"""CounterFact in EasyEdit's format."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.errors import UserError
from grace_bench.options import check_whole
from grace_bench.registry import register_stream
from grace_bench.requests import rephrased
from grace_bench.streams._lines import Filled, Record, read_records
from grace_bench.types import EditRequest, EditStream, Probe, StreamData, StreamMetadata, TaskName


class _Portability(BaseModel):
    model_config = ConfigDict(frozen=True)

    question: Filled = Field(alias="New Question")
    answer: Filled = Field(alias="New Answer")


class _CounterFactRecord(BaseModel):
    model_config = ConfigDict(frozen=True)

    case_id: int | str
    prompt: Filled
    target_new: Filled
    subject: Filled
    ground_truth: Filled | None = None
    rephrase_prompt: Filled | None = None
    locality_prompt: Filled | None = None
    locality_ground_truth: Filled | None = None
    portability: _Portability | None = None


@register_stream("counterfact")
class CounterFact(EditStream):
    """Counterfactual completions in EasyEdit's format: JSON lines, or the JSON array that EasyEdit ships.

    A record has `case_id prompt target_new subject` and may have `ground_truth rephrase_prompt
    locality_prompt locality_ground_truth portability`; other fields are ignored. The rephrases become the
    holdout. The locality prompts become upstream, each once and without those that are edited; what
    must be kept there is the unedited model's own answer, so these requests carry
    `metadata["target_from_model"]`, and the data set's answer until the model's takes its place.

    Args:
        path: The file.
        max_new_tokens: The longest answer that free generation may give.

    Raises:
        UserError: If no path is given.
    """

    task: TaskName = "completion"
    metadata: ClassVar[StreamMetadata] = StreamMetadata(
        source="CounterFact (Meng et al. 2022), the user's file in EasyEdit's format",
        revision="as read",
        license="MIT",
        citation="Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022",
    )

    def __init__(self, *, path: str | None = None, max_new_tokens: int = 8) -> None:
        if path is None:
            raise UserError("stream=counterfact needs stream.path=FILE, CounterFact in EasyEdit's format")
        check_whole("stream.max_new_tokens", max_new_tokens, least=1)
        self.path = path
        self.max_new_tokens = max_new_tokens

    def load(self) -> StreamData:
        """Returns the requests in the order of the file."""
        records = read_records(self.path, _CounterFactRecord, id_field="case_id", array=True)
        edits = tuple(map(_request, records))
        edited = {request.prompt for request in edits}
        upstream: dict[str, EditRequest] = {}
        for record in records:
            prompt, answer = record.value.locality_prompt, record.value.locality_ground_truth
            if prompt is not None and answer is not None and prompt not in edited:
                upstream.setdefault(
                    prompt,
                    EditRequest(
                        id=f"{record.value.case_id}/locality",
                        prompt=prompt,
                        target=answer,
                        metadata={"target_from_model": True},
                    ),
                )
        return StreamData(edits=edits, upstream=tuple(upstream.values()), holdout=tuple(rephrased(edits)))


def _request(record: Record[_CounterFactRecord]) -> EditRequest:
    value = record.value
    if value.subject not in value.prompt:
        record.fail("subject", "does not occur in the prompt, letter by letter")
    for given, other in (
        ("locality_prompt", "locality_ground_truth"),
        ("locality_ground_truth", "locality_prompt"),
    ):
        if getattr(value, given) is not None and getattr(value, other) is None:
            record.fail(other, f"is missing, while '{given}' is given")
    return EditRequest(
        id=str(value.case_id),
        prompt=value.prompt,
        target=value.target_new,
        subject=value.subject,
        rephrases=(value.rephrase_prompt,) if value.rephrase_prompt is not None else (),
        locality=(Probe(prompt=value.locality_prompt),) if value.locality_prompt is not None else (),
        portability=(
            (Probe(prompt=value.portability.question, target=value.portability.answer),)
            if value.portability is not None
            else ()
        ),
        metadata={"ground_truth": value.ground_truth} if value.ground_truth is not None else {},
    )
