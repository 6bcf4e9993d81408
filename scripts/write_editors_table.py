"""Writes the table of editors in docs/editors.md from their classes."""

from pathlib import Path

from grace_bench.editing.about import markdown_table
from grace_bench.registry import EDITORS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "editors.md"
MARKERS = "<!-- the table of editors, from their classes -->\n", "<!-- end of the table -->\n"


def with_table(page: str) -> str:
    """Returns the text of the page with the table between its markers made anew."""
    before, _, rest = page.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    table = "\n".join(markdown_table({name: EDITORS.get(name) for name in EDITORS.entries()}))
    return f"{before}{MARKERS[0]}\n{table}\n\n{MARKERS[1]}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
