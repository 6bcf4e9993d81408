"""What several data sets have in common in EasyEdit's format."""

from pydantic import BaseModel, ConfigDict, Field

from grace_bench.streams._lines import Filled
from grace_bench.types import Probe


class OneHop(BaseModel):
    """A question whose answer follows from the edit."""

    model_config = ConfigDict(frozen=True)

    question: Filled = Field(alias="New Question")
    answer: Filled = Field(alias="New Answer")

    def probe(self) -> Probe:
        """Returns it as a probe."""
        return Probe(prompt=self.question, target=self.answer)
