"""A run that failed although it has a result is never reused as a good one."""

from pathlib import Path

import pytest

from grace_bench.cli import main
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.registry import EDITORS


class Misspelt(EDITORS.get("none")):  # type: ignore[misc]
    """Reads an attribute that it does not have."""

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome(loss=self.learning_rte)


@pytest.fixture
def misspelt(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an editor of this process whose `edit` has a typo."""
    monkeypatch.setattr(EDITORS, "_classes", dict(EDITORS._classes))
    EDITORS.register("misspelt")(Misspelt)
    return "misspelt"


def test_a_class_that_no_configuration_can_name_is_one_line_and_breaks_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EDITORS, "_classes", dict(EDITORS._classes))

    class Local(EDITORS.get("none")):  # type: ignore[misc]
        """Defined in a function."""

    EDITORS.register("local")(Local)
    command = ["run", "stream=toy", "max_edits=1", "max_upstream=5", "wandb.mode=disabled", f"out={tmp_path}"]
    assert main([*command, "editor=none"]) == 0
    capsys.readouterr()
    assert main([*command, "editor=local"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("define the class in a module, with options of plain values")


def test_a_run_of_nothing_but_programming_errors_ends_with_exit_code_1_each_time(
    misspelt: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "stream=toy", f"editor={misspelt}", "max_edits=2", "max_upstream=5", "wandb.mode=disabled"]
    for told in ("every edit failed with a programming error in the editor", "failed before (RunFailure: every edit"):
        assert main([*command, f"out={tmp_path}"]) == 1
        lines = capsys.readouterr().err.splitlines()
        assert told in lines[-1]
        assert "no attribute 'learning_rte'" in lines[-1]
    (folder,) = (tmp_path / "toy" / "toy" / misspelt).iterdir()
    assert "learning_rte" in (folder / "tracebacks.txt").read_text(encoding="utf-8")
    assert main([*command, f"out={tmp_path}", "existing=rerun"]) == 1
