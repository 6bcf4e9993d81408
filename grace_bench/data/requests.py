"""Edit requests: one error to fix, with the texts needed to evaluate the edit."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)

TaskName = Literal["classification", "qa", "completion", "language_modelling"]
Text = Annotated[str, StringConstraints(strip_whitespace=False)]
Name = Annotated[str, StringConstraints(min_length=1)]
Contrast = tuple[Annotated[str, StringConstraints(pattern=r"\S")], Annotated[str, StringConstraints(pattern=r"\S")]]
"""Two answers; the model should find the first one likelier."""


class Probe(BaseModel):
    """A question that shows what else an edit changed.

    Attributes:
        prompt: The input text.
        target: The right answer; None for the unedited model's own answer.
        answers: Further accepted answers besides the target.
        gold: The right answers where the target is the unedited model's own, the preferred one first. They are scored
            beside it, and do not count as accepted.
        group: An id that probes of one request share if any of them answered rightly is enough; None if the probe
            stands alone.
        contrast: Two answers, of which the first should be likelier; None to compare no answers.
        metadata: As in `EditRequest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[str, StringConstraints(min_length=1)]
    target: str | int | None = None
    answers: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()
    group: Name | None = None
    contrast: Contrast | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _read_metadata(self) -> Self:
        _fill_from_metadata(self, self.metadata)
        return self

    @model_serializer(mode="wrap")
    def _without_younger_fields(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out fields that older versions did not have, unless given: fingerprints stay equal across versions."""
        content: dict[str, Any] = serialize(self)
        return {name: value for name, value in content.items() if value or name not in ("answers", "gold", "group")}


class EditRequest(BaseModel):
    """One error to fix: for this prompt the model should give this target.

    Attributes:
        id: An id that is unique within the role of the stream.
        prompt: The input text; empty only for running text, whose target is the whole text.
        target: The desired answer, or the label id for classification.
        answers: Further accepted answers besides the target.
        subject: The entity the prompt is about, for editors that need one; it must occur in the prompt.
        fact: An id of the fact that edits and holdout requests share; None if no other request is about the fact.
        group: An id that requests share if they are to be edited together; None if the request stands alone. The seed
            shuffles a group as a whole. Of probes as in `Probe`.
        step: The time step that the request belongs to; None if the stream has no time steps.
        contrast: Two answers, of which the first should be likelier; None to compare no answers.
        rephrases: The same question in other words; evaluation only.
        locality: Questions whose answers must not change; evaluation only.
        portability: Questions whose answers follow from the edit; evaluation only.
        metadata: Any further information, which does not affect how the request is edited or scored. In files,
            `fact` and `contrast` may also be given here; they are copied to the fields of the same names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    prompt: Text
    target: str | int
    answers: tuple[str, ...] = ()
    subject: str | None = None
    fact: str | None = None
    group: Name | None = None
    step: Name | None = None
    contrast: Contrast | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _read_metadata(self) -> Self:
        _fill_from_metadata(self, self.metadata)
        if self.fact is None and self.metadata.get("fact") is not None:
            self.__dict__["fact"] = str(self.metadata["fact"])
        return self

    @property
    def fact_id(self) -> str:
        """The id of the fact the request is about: `fact` if given, else the request's own id."""
        return self.id if self.fact is None else self.fact


@dataclass(frozen=True)
class Unedited:
    """What the unedited model says to a locality probe.

    Attributes:
        text: Its free answer; None for tasks without free answers.
        tokens: Its most likely token at each position of the reference answer; None if they were not asked for.
    """

    text: str | None = None
    tokens: tuple[int, ...] | None = None


class DerivedRequest(EditRequest):
    """A request made from another, or one whose target is the unedited model's answer; never read from a user's file.

    Attributes:
        probe_of: The id of the edit that this probe belongs to; None if the request is not a probe.
        target_from_model: Whether the target is the unedited model's own answer.
        is_locality: Whether it is a locality probe.
        gold: As in `Probe`.
        unedited: What the unedited model says to a locality probe; None if it was not asked.
    """

    probe_of: str | None = None
    target_from_model: bool = False
    is_locality: bool = False
    gold: tuple[str, ...] = ()
    unedited: Unedited | None = None

    @property
    def reference(self) -> str:
        """The answer along which tokens are compared with the unedited model's: the gold answer, or else the target."""
        return self.gold[0] if self.gold else str(self.target)


def is_contrast(given: Any) -> bool:
    """Returns whether a value is None or a pair of non-blank texts.

    >>> is_contrast(["Rome", "Paris"]), is_contrast(["Rome"])
    (True, False)
    """
    if given is None:
        return True
    return (
        isinstance(given, list | tuple)
        and len(given) == 2
        and all(isinstance(answer, str) and answer.strip() for answer in given)
    )


def content_of(request: EditRequest) -> dict[str, Any]:
    """Returns a request as JSON values for fingerprints and cache keys.

    So that fingerprints stay equal across versions, the fields that older versions read from `metadata` are put there,
    and younger fields are present only if they are given.
    """
    younger = ("group", "step")
    derived = set(DerivedRequest.model_fields) - set(EditRequest.model_fields)
    content = request.model_dump(mode="json", exclude={"fact", "contrast", *derived, *younger})
    content |= _given(request, younger)
    content["metadata"] |= _given(request, ("fact", "contrast", "target_from_model"))
    for kind in ("locality", "portability"):
        for probe, record in zip(getattr(request, kind), content[kind], strict=True):
            del record["contrast"]
            # Gold answers are only scored beside the target.
            record.pop("gold", None)
            record["metadata"] |= _given(probe, ("contrast",))
    return content


def _given(of: BaseModel, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(of, name, None) for name in names}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in values.items() if value}


def _fill_from_metadata(of: Probe | EditRequest, metadata: Mapping[str, Any]) -> None:
    """Copies the contrast from the metadata, unless the field is already set."""
    contrast = metadata.get("contrast")
    if of.contrast is None and contrast is not None and is_contrast(contrast):
        # Bypasses the frozen model's setter: the request is still under construction.
        of.__dict__["contrast"] = tuple(contrast)
