"""The table of editors is made from their classes."""

from pathlib import Path

import pytest

from grace_bench.editing.about import About, markdown_table
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.registry import EDITORS
from helpers import module_at

ROOT = Path(__file__).parents[2]


class Plain(EditorStrategy):
    """An editor of somebody else's, which does not describe itself."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome()


@pytest.mark.parametrize("name", [name for name, entry in EDITORS.entries().items() if entry.origin == "grace_bench"])
def test_every_editor_says_what_a_user_weighs(name: str) -> None:
    about = EDITORS.get(name).about
    assert all((about.source, about.changes, about.costs, about.choose))
    assert "|" not in "".join(vars(about).values())


def test_the_page_has_the_table_of_the_classes() -> None:
    script = module_at(ROOT / "scripts" / "write_editors_table.py")
    page = (ROOT / "docs" / "editors.md").read_text(encoding="utf-8")
    assert script.with_table(page) == page, "run python scripts/write_editors_table.py"


def test_an_editor_that_does_not_describe_itself_is_left_out_of_the_table() -> None:
    rome = EDITORS.get("rome")
    header, _, *rows = markdown_table({"plain": Plain, "rome": rome})
    assert header.startswith("| editor | source |")
    assert len(rows) == 1
    assert rows[0].startswith("| `rome` | Meng et al., NeurIPS 2022 |")
    assert "the subject of each request" in rows[0]


def test_an_editor_that_describes_itself_in_another_type_is_refused() -> None:
    class Wrong(Plain):
        """An editor."""

        about = "fast"  # type: ignore[assignment]

    assert Wrong.check_class() == "about of Wrong is 'fast': set it to an About(...)"
    assert About(source="s", changes="c", costs="c", choose="c").needs == ""
