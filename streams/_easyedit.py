"""What several data sets have in common in EasyEdit's format."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.streams._lines import Filled
from grace_bench.streams._natural_questions import Answers, flat_texts
from grace_bench.types import Probe

Texts = Filled | Annotated[tuple[Filled, ...], Field(min_length=1)]


class Question(BaseModel):
    """A question beside an edit, as KnowEdit has it."""

    model_config = ConfigDict(frozen=True)

    prompt: Texts
    ground_truth: Answers | None = None

    def probes(self) -> tuple[Probe, ...]:
        """Returns it as a probe with its first answer; none where the list of answers is empty, as it is at times."""
        answers = flat_texts(self.ground_truth)
        return (Probe(prompt=flat_texts(self.prompt)[0], target=answers[0]),) if answers else ()


Questions = dict[str, tuple[Question, ...] | None]
"""Lists of questions, by what they ask about."""


class OneHop(BaseModel):
    """A question whose answer follows from the edit."""

    model_config = ConfigDict(frozen=True)

    question: Filled = Field(alias="New Question")
    answer: Filled = Field(alias="New Answer")

    def probe(self) -> Probe:
        """Returns it as a probe."""
        return Probe(prompt=self.question, target=self.answer)
