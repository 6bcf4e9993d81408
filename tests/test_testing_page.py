"""docs/testing.md says where each promise is tested, and leaves no file of tests out."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "testing.md").read_text(encoding="utf-8")


def test_the_table_of_promises_names_every_file_of_tests() -> None:
    table = PAGE.partition("## Promises and their tests")[2]
    named = set(re.findall(r"`((?:\w+/)*test_\w+\.py)`", table))
    there = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")} - {Path(__file__).name}
    assert named == there
