"""The examples run as they stand and show what their text says."""

import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def run(name: str) -> dict[str, Any]:
    """Runs an example; returns the names that it leaves."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_page_names_every_example() -> None:
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        assert f"`examples/{example.name}`" in page
        assert example.read_text(encoding="utf-8").startswith("# %% [markdown]\n# # ")


def test_an_edit_is_undone() -> None:
    names = run("edit_and_undo")
    assert names["edited"] == ["Czechia", *names["unedited"][1:]]
    assert names["undone"] == [*names["unedited"], "262"]


@pytest.mark.slow
def test_a_run_is_read() -> None:
    names = run("read_a_run")
    assert len(names["edits"]) >= 30
    assert not names["edits"].score.isna().any()
    assert 0 < len(names["lost"]) < 30


@pytest.mark.slow
def test_three_editors_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    run("compare_editors")
    table = capsys.readouterr().out
    rows = {row.split()[0]: row.split() for row in table.splitlines() if row.endswith("1 ")}
    assert rows.keys() == {"grace", "alphaedit", "ft"}
    assert rows["grace"][1:3] == ["1.000", "1.000"]


@pytest.mark.slow
def test_an_editor_is_written() -> None:
    """In a process of its own: the editor is registered there."""
    command = [sys.executable, str(EXAMPLES / "write_an_editor.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in printed.splitlines() if line.endswith("1 ")] == ["descent", "none"]


@pytest.mark.slow
def test_a_figure_is_drawn() -> None:
    folder = run("figure_for_a_paper")["folder"]
    assert (folder / "retention.pdf").stat().st_size > 5_000
