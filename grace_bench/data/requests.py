"""What a request is: one error to fix, with what belongs to it."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

TaskName = Literal["classification", "qa", "completion", "language_modelling"]
Text = Annotated[str, StringConstraints(strip_whitespace=False)]


class Probe(BaseModel):
    """A question put beside an edit, to see what else it changed.

    Attributes:
        prompt: The input text.
        target: The right answer; None stands for whatever the unedited model answers.
        metadata: As in `EditRequest`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: Annotated[str, StringConstraints(min_length=1)]
    target: str | int | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class EditRequest(BaseModel):
    """One error to fix: for this prompt the model should give this target.

    Attributes:
        id: Unique within its stream.
        prompt: The input text; empty only for running text, whose target is the whole text.
        target: The wanted answer, or the label id for classification.
        answers: Other accepted answers, beside the target.
        subject: The entity the prompt is about, for editors that need one; occurs in the prompt.
        rephrases: The same question in other words; evaluation only.
        locality: Questions whose answers must not change; evaluation only.
        portability: Questions whose answers follow from the edit; evaluation only.
        metadata: Anything else. `fact` names the fact that edits and holdout requests share; `contrast` holds two
            answers, of which the first should be the likelier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, StringConstraints(min_length=1)]
    prompt: Text
    target: str | int
    answers: tuple[str, ...] = ()
    subject: str | None = None
    rephrases: tuple[str, ...] = ()
    locality: tuple[Probe, ...] = ()
    portability: tuple[Probe, ...] = ()
    metadata: dict[str, Any] = Field(default_factory=dict)

    @property
    def fact(self) -> str:
        """The fact the request is about: `metadata["fact"]`, else the request's own id."""
        return str(self.metadata.get("fact", self.id))
