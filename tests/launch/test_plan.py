"""`grace-bench plan`: it counts what the run then does, adds up what it says, and leaves nothing behind."""

import json
import math
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from grace_bench.cli import main
from grace_bench.launch import plan as planning
from grace_bench.launch.plan import Forecast, plan_benchmark
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule

SETTINGS = RunSettings(seed=2, schedule=Schedule(max_edits=12, eval_every=5, max_upstream=20))


@pytest.fixture(scope="module", params=["grace", pytest.param("ft", marks=pytest.mark.slow)])
def planned(request: pytest.FixtureRequest) -> tuple[str, Forecast]:
    return request.param, plan_benchmark("atlas-drift", editor=request.param, settings=SETTINGS)


def test_the_counts_are_those_of_the_run(planned: tuple[str, Forecast], tmp_path: Path) -> None:
    editor, forecast = planned
    result = run_benchmark("atlas-drift", editor=editor, settings=SETTINGS, folder=tmp_path)
    clocks = [json.loads(line)["n_edits"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    requests = {
        (evaluation.n_edits, stream): n
        for evaluation in forecast.counts.evaluations
        for stream, n in evaluation.requests.items()
    }
    assert [evaluation.n_edits for evaluation in forecast.counts.evaluations] == clocks == [0, 5, 10, 12]
    assert forecast.counts.edits == result.metrics["n_edits"] == 12
    assert result.metrics["n_candidates"] == 12, "every candidate is an error, so that nothing is left to chance"
    assert requests == Counter((row["n_edits"], row["stream"]) for row in rows)
    assert forecast.counts.rows == len(rows)


def test_the_time_is_the_sum_of_its_phases_and_within_its_range(planned: tuple[str, Forecast]) -> None:
    forecast = planned[1]
    assert forecast.seconds == pytest.approx(sum(phase.seconds for phase in forecast.phases))
    assert all(phase.seconds >= 0 and math.isfinite(phase.seconds) for phase in forecast.phases)
    assert 0 < forecast.seconds_low <= forecast.seconds <= forecast.seconds_high < math.inf
    assert 100 < forecast.rss_mb < 100_000
    assert sum(forecast.memory_mb.values()) == pytest.approx(forecast.rss_mb)
    assert forecast.memory_mb["weights of the model"] > 0
    assert forecast.disk_mb > 0


def test_edits_trained_together_are_tried_together_also_where_time_is_left_for_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "_SHARE", 0.0)
    monkeypatch.setattr(planning, "_LEAST_SECONDS", 0.0)
    forecasts = {editor: plan_benchmark("atlas-drift", editor=editor, settings=SETTINGS) for editor in ("grace", "ft")}
    assert {editor: forecast.trial_edits for editor, forecast in forecasts.items()} == {"grace": 12, "ft": 1}
    monkeypatch.setattr(planning, "_MOST_SECONDS", 0.0)
    assert plan_benchmark("atlas-drift", editor="grace", settings=SETTINGS).trial_edits == 1, "none takes too long"


def test_a_plan_of_one_run_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "stream=toy", "editor=grace", "max_edits=4"]) == 0
    assert "of memory" in capsys.readouterr().out
    assert [*tmp_path.iterdir()] == []


def test_a_plan_of_a_sweep_says_each_and_the_sum_and_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "-m", "stream=toy", "editor=grace,none", "max_edits=4"]) == 0
    said = capsys.readouterr().out
    assert "grace on toy" in said
    assert "none on toy" in said
    assert "2 runs, one after the other" in said
    assert [*tmp_path.iterdir()] == []


def test_a_stream_that_ends_before_the_most_edits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    forecast = plan_benchmark("toy", editor="grace", settings=RunSettings(schedule=Schedule(max_edits=5000)))
    assert forecast.counts.edits < 5000
    assert any("likely to end" in note for note in forecast.notes)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["max_edits=0"], "max_edits"),
        (["editor=grac"], "grac"),
        (["editor.eps=1"], "editor.eps"),
        (["--fast"], "--fast"),
        (["-m", "bogus=1,2"], "bogus"),
    ],
)
def test_a_broken_option_is_one_line_and_exit_code_2(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "stream=toy", *options]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert len(said.splitlines()) == 1
