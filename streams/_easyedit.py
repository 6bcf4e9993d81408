"""Parts of EasyEdit's format that several data sets share."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.data.requests import Probe
from grace_bench.streams._lines import Filled, Record
from grace_bench.streams._natural_questions import Answers, flat_texts

Texts = Filled | Annotated[tuple[Filled, ...], Field(min_length=1)]


class Question(BaseModel):
    """A locality or portability question in KnowEdit's format."""

    model_config = ConfigDict(frozen=True)

    prompt: Texts
    ground_truth: Answers | None = None


Questions = dict[str, tuple[Question, ...] | None]
"""Lists of questions, by kind."""


def answered_probes(record: Record[Any], field: str, asked: Questions) -> list[Probe]:
    """Returns a probe for each question, with the first answer as target; skips questions with no non-blank answer.

    Raises:
        UserError: If a question has no `ground_truth`; the message names the question.
    """
    probes = []
    for kind, questions in asked.items():
        for number, question in enumerate(questions or ()):
            if question.ground_truth is None:
                record.fail(f"{field}.{kind}[{number}].ground_truth", "is missing")
            answers = flat_texts(question.ground_truth)
            if answers:
                probes.append(Probe(prompt=flat_texts(question.prompt)[0], target=answers[0]))
    return probes


class OneHop(BaseModel):
    """A question whose answer follows from the edit."""

    model_config = ConfigDict(frozen=True)

    question: Filled = Field(alias="New Question")
    answer: Filled = Field(alias="New Answer")

    def probe(self) -> Probe:
        """Returns the question as a probe."""
        return Probe(prompt=self.question, target=self.answer)
