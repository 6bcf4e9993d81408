"""Marks in a leaderboard and comparisons of two editors, on finished runs and in every format."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from grace_bench import run_benchmark
from grace_bench.analysis.compare import compare_editors
from grace_bench.analysis.leaderboard import Leaderboard, Row, render
from grace_bench.analysis.significance import compare, holm
from grace_bench.cli import main
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS
from grace_bench.results.schema import PREDICTIONS
from grace_bench.run.settings import RunSettings, Schedule

SCHEDULE = Schedule(max_edits=12, eval_every=6, max_upstream=None)


@pytest.fixture(scope="session")
def toy_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three editors on toy under two seeds."""
    out = tmp_path_factory.mktemp("toy")

    def grace(**parts: Any) -> EditorStrategy:
        editor: EditorStrategy = EDITORS.get("grace")(eps_init=0.5, replacement="replace_last", **parts)
        return editor

    editors: dict[str, Any] = {"grace": grace, "ft": "ft", "none": "none"}
    for name, editor in editors.items():
        for seed in (0, 1):
            folder = out / f"{name}-s{seed}"
            settings = RunSettings(seed=seed, schedule=SCHEDULE, threads=1)
            run_benchmark("toy", editor=editor, settings=settings, folder=folder, run_id=folder.name)
    return out


@pytest.fixture
def runs(toy_runs: Path, tmp_path: Path) -> Path:
    """A copy of the runs that a test may change."""
    return Path(shutil.copytree(toy_runs, tmp_path / "runs"))


def twin(runs: Path, editor: str, *, of: str = "grace", stream: str | None = None) -> list[Path]:
    """Copies an editor's runs under another editor's name."""
    folders = []
    for seed in (0, 1):
        folder = Path(shutil.copytree(runs / f"{of}-s{seed}", runs / f"{editor}-{stream}-s{seed}"))
        result = json.loads((folder / "result.json").read_text())
        result["editor"]["name"], result["run_id"] = editor, folder.name
        if stream is not None:
            result["stream"]["name"] = stream
        (folder / "result.json").write_text(json.dumps(result))
        folders.append(folder)
    return folders


def rescore(folder: Path, change: Callable[[str, str], float | None]) -> None:
    """Sets scores of the last evaluation by stream and request."""
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    last = max(row["n_edits"] for row in rows)
    for row in rows:
        new = change(row["stream"], row["request_id"]) if row["n_edits"] == last else None
        row["score"] = row["score"] if new is None else new
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS), folder / "predictions.parquet")


def rows_of(runs: Path, **options: Any) -> dict[str, Row]:
    (table,) = Leaderboard.read([runs], **options).tables
    return {row.name: row for row in table.rows}


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["leaderboard", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- marks in a leaderboard ------------------------------------------------------------------------------------------


def test_every_row_is_compared_with_the_first_in_the_score_that_ranks(runs: Path) -> None:
    first, *others = rows_of(runs).values()
    assert (first.comparison, first.p_holm, first.mark) == (None, None, "")
    for row in others:
        folders = {name: [runs / f"{name}-s{seed}" for seed in (0, 1)] for name in (row.name, first.name)}
        assert row.comparison == compare(
            folders[row.name],
            folders[first.name],
            names=(row.name, first.name),
            streams=("upstream", "edited"),
            metric="Avg",
        )
    p_values = [row.comparison.p_value for row in others if row.comparison is not None]
    assert [row.p_holm for row in others] == holm(p_values)


def test_a_clear_difference_carries_no_mark_and_none_at_all_carries_one(runs: Path) -> None:
    twin(runs, "a_twin")
    rows = rows_of(runs)
    assert {name: row.mark for name, row in rows.items()} == {"a_twin": "", "grace": "≈", "ft": "", "none": ""}
    assert rows["none"].p_holm is not None
    assert rows["none"].p_holm < 0.05


def test_a_row_without_predictions_is_marked_as_not_compared_with_the_reason(runs: Path) -> None:
    path = runs / "ft-s1" / "predictions.parquet"
    path.unlink()
    rows = rows_of(runs)
    assert (rows["ft"].mark, rows["ft"].comparison, rows["ft"].p_holm) == ("?", None, None)
    assert rows["ft"].not_compared == f"{path}: no such file"
    assert rows["none"].mark == ""
    markdown = str(render(Leaderboard.read([runs]), "markdown"))
    assert re.search(r"\| ft \| .*\| \? 0\.\d+ ± ", markdown)
    assert "\n? not compared with the first row: " in markdown


def test_rows_without_a_common_seed_are_not_compared(runs: Path) -> None:
    shutil.rmtree(runs / "grace-s0")
    shutil.rmtree(runs / "none-s1")
    rows = rows_of(runs)
    assert (rows["none"].mark, rows["none"].not_compared) == ("?", "none and grace have no seed in common")
    assert rows["ft"].comparison is not None
    assert rows["ft"].comparison.n_seeds == 1


def test_a_result_under_another_name_is_not_taken_for_the_run_beside_it(runs: Path) -> None:
    copy = runs / "ft-s0" / "kept.json"
    shutil.copy(runs / "none-s0" / "result.json", copy)
    (table,) = Leaderboard.read([runs / "grace-s0", copy]).tables
    assert {row.name: row.not_compared for row in table.rows} == {
        "grace": None,
        "none": "the run folders are not known",
    }


def test_perplexity_ranks_and_compares_by_err(runs: Path) -> None:
    for path in runs.glob("*/result.json"):
        result = json.loads(path.read_text())
        result["protocol"] |= {"main_score": "perplexity", "higher_is_better": False}
        result["metrics"]["Avg"] = None
        path.write_text(json.dumps(result))
        rescore(path.parent, lambda stream, _: 10.0 if stream == "edited" else None)
    (table,) = Leaderboard.read([runs]).tables
    compared = [row.comparison for row in table.rows[1:]]
    assert {(c.metric, c.difference) for c in compared if c is not None} == {("ERR", 0.0)}
    assert [row.mark for row in table.rows] == ["", "≈", "≈"]


def test_the_marks_and_their_meaning_stand_in_every_format_for_people(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin(runs, "a_twin")
    for fmt, mark in (("table", "≈"), ("markdown", "≈"), ("latex", r"$\approx$")):
        code, out, _ = cli(capsys, str(runs), "--format", fmt)
        assert code == 0
        (line,) = (line for line in out.splitlines() if re.match(r"[| ]*grace ", line))
        assert f"{mark} 0." in line or f"{mark} 1." in line
        assert out.count(mark) == 2
        meaning = next(line for line in out.splitlines() if f"{mark} Avg not significantly off" in line)
        assert "Holm" in meaning


def test_the_figures_behind_the_marks_stand_in_csv_and_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from_json = json.loads(cli(capsys, str(runs), "--format", "json")[1])
    from_csv = list(csv.DictReader(io.StringIO(cli(capsys, str(runs), "--format", "csv")[1])))
    for record, texts, row in zip(from_json, from_csv, rows_of(runs).values(), strict=True):
        names = ("difference", "low", "high", "p_value", "n_items", "n_seeds", "n_unpaired", "n_nan")
        figures = [getattr(row.comparison, name, None) for name in names]
        assert [record[f"vs_first_{name}"] for name in names] == figures
        assert [texts[f"vs_first_{name}"] for name in names] == ["" if x is None else str(x) for x in figures]
        assert record["vs_first_p_holm"] == row.p_holm


# --- two editors -----------------------------------------------------------------------------------------------------


def test_two_editors_are_compared_in_every_score_of_single_items(runs: Path) -> None:
    entries = compare_editors(Leaderboard.read([runs]), "ft", "grace")
    assert [entry.metric for entry in entries] == ["TRR", "ERR", "Avg", "Holdout"]
    sides = [[runs / f"{name}-s{seed}" for seed in (0, 1)] for name in ("ft", "grace")]
    streams = {"TRR": ["upstream"], "ERR": ["edited"], "Avg": ["upstream", "edited"], "Holdout": ["holdout"]}
    for entry in entries:
        found = compare(*sides, names=("ft", "grace"), metric=entry.metric, streams=streams[entry.metric])
        assert (entry.comparison, entry.p_holm) == (found, found.p_value)


def test_the_difference_in_trr_is_that_of_the_results(runs: Path) -> None:
    rows = rows_of(runs)
    (trr, *_) = compare_editors(Leaderboard.read([runs]), "ft", "grace")
    assert trr.comparison is not None
    assert trr.comparison.difference == pytest.approx(rows["ft"].cells["TRR"].mean - rows["grace"].cells["TRR"].mean)


def test_rows_of_an_editor_with_several_settings_are_compared_each_and_corrected_together(runs: Path) -> None:
    for seed in (0, 1):
        folder = Path(shutil.copytree(runs / f"grace-s{seed}", runs / f"wide-s{seed}"))
        result = json.loads((folder / "result.json").read_text())
        result["editor"]["eps_init"], result["run_id"] = 9.0, folder.name
        (folder / "result.json").write_text(json.dumps(result))
        rescore(folder, lambda stream, name: 0.0 if stream == "upstream" and "1" in name else None)
    leaderboard = Leaderboard.read([runs])
    trr = [entry for entry in compare_editors(leaderboard, "grace", "none") if entry.metric == "TRR"]
    assert len(trr) == 2
    assert [entry.p_holm for entry in trr] == holm([e.comparison.p_value for e in trr if e.comparison is not None])
    (among, *_) = compare_editors(leaderboard, "grace", "grace")
    assert {name.partition(" ")[0] for name in among.names} == {"grace"}
    assert len(set(among.names)) == 2


@pytest.mark.parametrize("fmt", ["table", "markdown", "csv", "json", "latex"])
def test_every_format_tells_difference_interval_p_value_and_n_on_every_shared_stream(
    fmt: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for editor in ("grace", "ft"):
        twin(runs, editor, of=editor, stream="toy|2")
    twin(runs, "none", of="none", stream="alone")
    code, out, err = cli(capsys, str(runs), "--compare", "ft, grace", "--format", fmt)
    assert (code, err) == (0, "")
    assert "alone" not in out
    (trr, *_) = compare_editors(Leaderboard.read([runs]), "ft", "grace")
    found = trr.comparison
    assert found is not None
    if fmt in ("csv", "json"):
        records: Sequence[dict[str, Any]] = json.loads(out) if fmt == "json" else list(csv.DictReader(io.StringIO(out)))
        assert [record["stream"] for record in records] == ["toy"] * 4 + ["toy|2"] * 4
        for name in ("difference", "low", "high", "p_value", "n_items", "n_seeds", "n_unpaired", "n_nan"):
            assert float(records[0][name]) == getattr(found, name)
        assert str(records[0]["significant"]) == str(trr.is_significant)
        return
    escaped = {"table": "toy|2", "markdown": r"toy\|2", "latex": r"toy\textbar{}2"}[fmt]
    assert out.count(f"{escaped} ") == 4
    line = next(line for line in out.splitlines() if "TRR (accuracy)" in line)
    for text in (f"{found.difference:+.3f}", f"{found.low:+.3f} to {found.high:+.3f}", f"{found.p_value:.4f}"):
        assert text in line
    assert re.search(rf"\b{found.n_items}\b.*\b2\b", line)


def test_a_run_that_was_measured_otherwise_is_left_to_a_comparison_of_its_own(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (before, *_) = compare_editors(Leaderboard.read([runs]), "ft", "grace")
    for seed in (0, 1):
        path = runs / f"none-s{seed}" / "result.json"
        record = json.loads(path.read_bytes())
        record["protocol"]["eval_every"] = 99
        path.write_text(json.dumps(record), encoding="utf-8")
    (after, *_) = compare_editors(Leaderboard.read([runs]), "ft", "grace")
    assert after.comparison == before.comparison
    assert after.conditions.startswith("protocol.eval_every=")
    assert f"toy ({after.conditions})" in cli(capsys, str(runs), "--compare", "ft,grace", "--format", "table")[1]
    (record, *_) = json.loads(cli(capsys, str(runs), "--compare", "ft,grace", "--format", "json")[1])
    assert record["conditions"] == after.conditions


def test_what_cannot_be_compared_is_missing_with_its_reason(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in runs.glob("ft-*"):
        table = pq.read_table(folder / "predictions.parquet")
        pq.write_table(table.filter(pc.not_equal(table["stream"], "holdout")), folder / "predictions.parquet")
    _, out, _ = cli(capsys, str(runs), "--compare", "ft,grace", "--format", "markdown")
    assert re.search(r"\| Holdout \(accuracy\) \| – \| – \| – \| – \| – \| – \| – \|", out)
    assert "– ft and grace have no scores of the same requests in holdout" in out
    record = json.loads(cli(capsys, str(runs), "--compare", "ft,grace", "--format", "json")[1])[-1]
    assert (record["metric"], record["difference"], record["significant"]) == ("Holdout", None, None)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("grce,ft", "no run of editor 'grce'; did you mean 'grace'?"),
        ("grace", "'grace' should be two editors, separated by a comma"),
        ("grace,ft,none", "'grace,ft,none' should be two editors"),
        ("grace,grace", "no two rows of grace and grace"),
    ],
)
def test_what_cannot_be_asked_is_answered_in_one_line(
    asked: str, told: str, toy_runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = cli(capsys, str(toy_runs), "--compare", asked)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_editors_that_share_no_stream_are_refused(runs: Path) -> None:
    twin(runs, "elsewhere", stream="other")
    with pytest.raises(UserError, match="no two rows of elsewhere and ft were measured alike"):
        compare_editors(Leaderboard.read([runs]), "elsewhere", "ft")
