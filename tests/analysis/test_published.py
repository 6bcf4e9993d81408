"""Published rows under a leaderboard: whose they are, that they are never ranked, and every format."""

import csv
import io
import json
from pathlib import Path

import pytest

from grace_bench.analysis.published import published_rows
from grace_bench.cli import main
from grace_bench.results.schema import RunResult

PAPERS = ("wise", "alphaedit", "ultraedit", "locft", "qaedit")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs on zsRE."""
    for editor, score in (("ft", 0.2), ("grace", 0.9)):
        folder = tmp_path / "runs" / editor
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(result(editor, score).model_dump_json(), encoding="utf-8")
    return tmp_path / "runs"


def result(editor: str, score: float, *, stream: str = "zsre") -> RunResult:
    record = {
        "run_id": f"{stream}/tiny/{editor}/s0",
        "stream": {
            "name": stream,
            "task": "completion",
            "fingerprint": "s0",
            "n_candidates": 9,
            "source": "a test",
            "revision": "1",
            "license": "MIT",
        },
        "model": {
            "name": "tiny",
            "path": "tiny",
            "fingerprint": "m0",
            "layer": "transformer.h.1.mlp.c_proj",
            "dtype": "float32",
            "n_parameters": 1000,
        },
        "editor": {"name": editor},
        "protocol": {
            "split": "edits",
            "main_score": "f1",
            "higher_is_better": True,
            "max_edits": 3,
            "eval_every": 3,
            "max_upstream": None,
            "max_new_tokens": 20,
            "query": "prefix",
            "prefix_length": 8,
        },
        "seed": 0,
        "before": {"ERR": 0.1},
        "metrics": {"ERR": score, "n_edits": 3.0},
        "cost": {
            "seconds_per_edit_p50": 0.1,
            "seconds_per_edit_p95": 0.1,
            "edit_seconds": 1.0,
            "eval_seconds": 1.0,
            "peak_rss_mb": 1.0,
            "peak_gpu_mb": None,
            "extra_parameters": 10,
        },
        "environment": {"python": "3.11"},
    }
    return RunResult.model_validate(record)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_paper_has_rows_with_source_and_confidence(paper: str) -> None:
    for row in published_rows(paper):
        assert row.source
        assert row.where
        assert row.model
        assert row.confidence
        assert row.scores


def test_the_papers_rows_stand_under_the_table_of_their_stream(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(runs), "--published", "wise"]) == 0
    shown = capsys.readouterr().out
    ranked, published = shown.split("published, not ranked")
    assert "Llama-2-7B" not in ranked
    for text in ("reliability (ERR)", "memit_mass", "Llama-2-7B", "WISE (NeurIPS 2024)", "read in the paper's text"):
        assert text in published


def test_a_leaderboard_without_the_option_is_what_it_was(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(runs)]) == 0
    alone = capsys.readouterr().out
    assert main(["leaderboard", str(runs), "--published", "wise"]) == 0
    assert capsys.readouterr().out.startswith(alone)


def test_rows_of_other_streams_are_left_out_and_a_stream_without_rows_says_so(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", str(runs), "--published", "alphaedit"]) == 0
    assert "counterfact" not in capsys.readouterr().out
    for fmt in ("table", "markdown", "latex", "csv", "json"):
        assert main(["leaderboard", str(runs), "--published", "qaedit", "--format", fmt]) == 0
        captured = capsys.readouterr()
        said = captured.err if fmt in ("csv", "json") else captured.out
        assert "no rows of qaedit on zsre" in said


@pytest.mark.parametrize("fmt", ["table", "markdown", "latex", "csv", "json"])
def test_what_others_report_is_marked_in_every_format(
    tmp_path: Path, fmt: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "result.json").write_text(result("ft", 0.2, stream="counterfact").model_dump_json(), encoding="utf-8")
    assert main(["leaderboard", str(tmp_path), "--published", "alphaedit", "--format", fmt]) == 0
    shown = capsys.readouterr().out
    assert shown.count("second-hand") == sum(row.confidence == "second-hand" for row in published_rows("alphaedit"))
    assert shown.count("second-hand") > 0


def test_records_tell_published_rows_apart_and_give_them_no_rank(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", str(runs), "--published", "wise", "--format", "json"]) == 0
    records = json.loads(capsys.readouterr().out)
    own, published = ([r for r in records if r["published"] is which] for which in (False, True))
    assert [(record["editor"], record["rank"]) for record in own] == [("grace", 1), ("ft", 2)]
    assert {record["rank"] for record in published} == {None}
    (grace,) = (r for r in published if r["editor"] == "grace" and r["n_edits"] == 1000)
    assert (grace["published_reliability"], grace["published_locality"], grace["where"]) == (0.93, 1.0, "Table 2")
    assert main(["leaderboard", str(runs), "--published", "wise", "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["published"] for row in rows] == [str(record["published"]) for record in records]
    assert list(rows[0]) == list(records[0])


def test_an_unknown_paper_is_one_line_with_all_there_are(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(runs), "--published", "wize"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "did you mean 'wise'?" in line
    for paper in PAPERS:
        assert paper in line


def test_published_rows_do_not_go_with_a_comparison(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["leaderboard", str(runs), "--published", "wise", "--compare", "ft,grace"]) == 2
    assert "--compare" in capsys.readouterr().err
