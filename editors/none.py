"""The unedited model: every table's floor."""

from torch import Tensor

from grace_bench.editing.about import About
from grace_bench.editing.batch import Answered, EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.registry import register_editor


@register_editor("none")
class Unedited(EditorStrategy):
    """The unedited model: every table's floor."""

    about = About(
        source="–",
        changes="nothing: the unedited model",
        costs="nothing",
        choose="as the floor of every table",
    )
    is_reference = True

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome()

    def answered_by(self, queries: Tensor) -> Answered:
        return Answered([None] * len(queries))
