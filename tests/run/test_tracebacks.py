"""A programming error in an editor is told with its place, and never passes for a result."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import RunFailure
from grace_bench.registry import EDITORS
from grace_bench.results.reading import read_result
from grace_bench.run.loggers import RunLogger
from helpers import KilledError

ERROR = "AttributeError: 'Misspelt' object has no attribute 'learning_rte'"


class Misspelt(EDITORS.get("none")):  # type: ignore[misc]
    """Reads an attribute that it does not have, in every edit or in every other one."""

    registered_name = "misspelt"
    every = 1

    def edit(self, batch: EditBatch) -> EditOutcome:
        return EditOutcome(loss=self.learning_rte) if self.n_edits % self.every == 0 else EditOutcome()


class MisspeltAtFlush(Misspelt):
    """Does so when it finishes an edit."""

    is_pending = False

    def edit(self, batch: EditBatch) -> EditOutcome:
        self.is_pending = True
        return EditOutcome()

    def flush(self) -> Sequence[EditOutcome]:
        was_pending, self.is_pending = self.is_pending, False
        return [EditOutcome(loss=self.learning_rte)] if was_pending else []


class Now(Misspelt):
    """Does so in every other edit."""

    every = 2


def run(folder: Path | None, editor: Any, **options: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    strict = options.pop("strict", False)
    settings = RunSettings(
        schedule=Schedule(max_edits=3, max_upstream=10), checkpoint_every=1, threads=1, strict=strict
    )
    try:
        return run_benchmark("toy", editor=editor, settings=settings, folder=folder, say=said.append, **options), said
    except RunFailure as failure:
        return failure, said


@pytest.mark.parametrize("editor", [Misspelt, MisspeltAtFlush])
def test_a_run_in_which_every_edit_failed_with_a_programming_error_fails_once_its_files_are_written(
    tmp_path: Path, editor: type[EditorStrategy]
) -> None:
    error = ERROR.replace("Misspelt", editor.__name__)
    failure, said = run(tmp_path, editor)
    assert isinstance(failure, RunFailure)
    file = tmp_path / "tracebacks.txt"
    assert str(failure) == (
        f"every edit failed with a programming error in the editor, the first: {error} (traceback in {file})"
    )
    assert read_result(tmp_path / "result.json").metrics["n_failed"] == 3
    edits = [line for line in map(json.loads, (tmp_path / "edits.jsonl").read_text().splitlines()) if line["edited"]]
    assert [line["failed"] for line in edits] == [error] * 3
    assert said == [
        f"edit 1 (request '{edits[0]['id']}') failed with a programming error in the editor: {error} "
        f"(traceback in {file})"
    ]
    written = file.read_text()
    for line in edits:
        assert f"edit {line['n_edits']} (request '{line['id']}'):\nTraceback (most recent call last):\n" in written
    assert written.count(f"\n{error}\n") == 3
    assert f'File "{__file__}"' in written


def test_a_run_in_which_some_edits_were_made_ends_with_its_result(tmp_path: Path) -> None:
    result, said = run(tmp_path, Now)
    assert result.metrics["n_failed"] == 2
    assert len(said) == 1
    assert (tmp_path / "tracebacks.txt").read_text().count("Traceback") == 2


def test_edits_that_fail_for_other_reasons_leave_no_tracebacks(tmp_path: Path) -> None:
    class Hopeless(EDITORS.get("none")):  # type: ignore[misc]
        """Raises what numbers raise."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            raise ZeroDivisionError

    result, said = run(tmp_path, Hopeless)
    assert result.metrics["n_failed"] == 3
    assert said == []
    assert not (tmp_path / "tracebacks.txt").exists()


def test_a_strict_run_stops_with_the_cause(tmp_path: Path) -> None:
    failure, _ = run(tmp_path, Misspelt, strict=True)
    assert f"failed: {ERROR}; `grace-bench resume" in str(failure)
    assert (tmp_path / "tracebacks.txt").read_text().count("Traceback") == 1


def test_a_run_without_a_folder_says_it_and_fails_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failure, said = run(None, Misspelt)
    assert str(failure) == f"every edit failed with a programming error in the editor, the first: {ERROR}"
    assert len(said) == 1
    assert [*tmp_path.iterdir()] == []


def test_tracebacks_hold_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_PAT", "fake-secret-of-a-server")

    class Leaking(EDITORS.get("none")):  # type: ignore[misc]
        """Puts a secret into its message."""

        def edit(self, batch: EditBatch) -> EditOutcome:
            raise TypeError("no server takes fake-secret-of-a-server")

    failure, _ = run(tmp_path, Leaking)
    assert "***" in str(failure)
    assert all(b"fake-secret" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_run_that_was_killed_and_resumed_has_each_traceback_once_and_fails_all_the_same(tmp_path: Path) -> None:
    class Dies(RunLogger):
        """Ends the run at the second edit."""

        def after_candidate(self, strategy: EditorStrategy, metric_values: Any) -> None:
            if strategy.record is not None and strategy.record.n_edits == 2:
                raise KilledError

    run(tmp_path / "whole", Misspelt)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", Misspelt, loggers=[Dies()])
    failure, said = run(tmp_path / "killed", Misspelt, resume=True)
    assert isinstance(failure, RunFailure)
    assert [line for line in said if "programming error" in line] == [], "it was said before"
    written = [(tmp_path / name / "tracebacks.txt").read_bytes() for name in ("whole", "killed")]
    assert written[0] == written[1]
