"""What a request is: one error to fix, with what belongs to it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

TaskName = Literal["classification", "qa", "completion", "language_modelling"]
Text = Annotated[str, StringConstraints(strip_whitespace=False)]
Contrast = tuple[Annotated[str, StringConstraints(pattern=r"\S")], Annotated[str, StringConstraints(pattern=r"\S")]]
"""Two answers, of which the first should be the likelier."""


class Probe(BaseModel):
    """A question asked beside an edit, to see what else the edit changed.

    Attributes:
        prompt: The input text.
        target: The right answer; None stands for whatever the unedited model answers.
        contrast: Two answers, of which the first should be the likelier; None if the probe compares none.
        metadata: As in `EditRequest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[str, StringConstraints(min_length=1)]
    target: str | int | None = None
    contrast: Contrast | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _read_metadata(self) -> Self:
        _fill_from_metadata(self, self.metadata)
        return self


class EditRequest(BaseModel):
    """One error to fix: for this prompt the model should give this target.

    Attributes:
        id: Unique within its stream.
        prompt: The input text; empty only for running text, whose target is the whole text.
        target: The wanted answer, or the label id for classification.
        answers: Other accepted answers, beside the target.
        subject: The entity the prompt is about, for editors that need one; occurs in the prompt.
        fact: Names the fact that edits and holdout requests share; None if the request stands for itself.
        contrast: Two answers, of which the first should be the likelier; None if the request compares none.
        rephrases: The same question in other words; evaluation only.
        locality: Questions whose answers must not change; evaluation only.
        portability: Questions whose answers follow from the edit; evaluation only.
        metadata: Whatever else the user wants to keep; nothing obeys it. Files may still name `fact` and `contrast`
            here, which become the fields of these names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(min_length=1)]
    prompt: Text
    target: str | int
    answers: tuple[str, ...] = ()
    subject: str | None = None
    fact: str | None = None
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
        """The fact the request is about: `fact`, else the request's own id."""
        return self.id if self.fact is None else self.fact


class DerivedRequest(EditRequest):
    """A request that was made from another, or whose target is the unedited model's to give; never read from a file.

    Attributes:
        probe_of: The id of the request whose probe it is; None if it is no probe.
        target_from_model: Whether its target stands for the unedited model's own answer.
    """

    probe_of: str | None = None
    target_from_model: bool = False


def is_contrast(given: Any) -> bool:
    """Returns whether a value is two texts, or None.

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
    """Returns a request as JSON values, as fingerprints and cache keys have always named its content.

    Fields that older versions read from `metadata` stand there.
    """
    content = request.model_dump(mode="json", exclude={"fact", "contrast", "probe_of", "target_from_model"})
    content["metadata"] |= _given(request, ("fact", "contrast", "target_from_model"))
    for kind in ("locality", "portability"):
        for probe, record in zip(getattr(request, kind), content[kind], strict=True):
            del record["contrast"]
            record["metadata"] |= _given(probe, ("contrast",))
    return content


def _given(of: BaseModel, names: tuple[str, ...]) -> dict[str, Any]:
    values = {name: getattr(of, name, None) for name in names}
    return {name: [*value] if isinstance(value, tuple) else value for name, value in values.items() if value}


def _fill_from_metadata(of: Probe | EditRequest, metadata: Mapping[str, Any]) -> None:
    """Sets the contrast that metadata names, where the field names none."""
    contrast = metadata.get("contrast")
    if of.contrast is None and contrast is not None and is_contrast(contrast):
        # Past the frozen model's own setter: the request is still being made.
        of.__dict__["contrast"] = tuple(contrast)
