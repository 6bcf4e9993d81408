"""The unedited model: every table's floor."""

from grace_bench.registry import register_editor
from grace_bench.strategy import EditBatch, EditorStrategy, EditOutcome


@register_editor("none")
class Unedited(EditorStrategy):
    """The unedited model: every table's floor."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome()
