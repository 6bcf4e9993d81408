"""Editor strategies, one module an editor. Write one with `EditorStrategy`, `EditOutcome` and `@register_editor`."""

from typing import TYPE_CHECKING, Any

from grace_bench.registry import EDITORS, register_editor

if TYPE_CHECKING:
    from grace_bench.editing.batch import EditBatch, EditOutcome
    from grace_bench.editing.strategy import EditorStrategy

__all__ = ["EditBatch", "EditOutcome", "EditorStrategy", "register_editor"]


def __getattr__(name: str) -> Any:
    if name in ("EditBatch", "EditOutcome", "EditorStrategy"):
        from grace_bench.editing import strategy

        return getattr(strategy, name)
    return EDITORS.by_class_name(name)
