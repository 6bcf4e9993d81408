"""The same runs by any score of the panel: in a leaderboard, a report, figures and tuning."""

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.analysis.leaderboard import Leaderboard
from grace_bench.analysis.scorings import scorings
from grace_bench.analysis.significance import compare
from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.launch.tuning import quality
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.metric_info import metric_infos
from grace_bench.results.reading import read_evaluations, read_result
from grace_bench.results.rescored import recorded_scores, rescored, rescored_evaluations
from grace_bench.results.schema import YOUNG_COLUMNS

COUNTRIES = ("France", "Italy", "Peru", "Spain", "Japan", "Kenya")
TARGETS = ("Lima", "Euro", "Sol of Peru", "Tenge", "Ishim", "Lima")
EDITORS_TRIED = {
    "grace": partial(EDITORS.get("grace"), eps_init=0.5, n_iter=20),
    "ft": partial(EDITORS.get("ft"), n_iter=5, lr=0.01),
    "none": EDITORS.get("none"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file are made once."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def runs(store: Path, tmp_path: Path, make_model: Callable[..., EditableModel]) -> Path:
    """A copy of finished runs of three editors on questions."""
    if not (store / "runs").is_dir():
        _run_on_questions(store, make_model)
    return Path(shutil.copytree(store / "runs", tmp_path / "runs"))


@pytest.fixture
def text_runs(store: Path, make_model: Callable[..., EditableModel]) -> list[Path]:
    """Finished runs of two editors on running text."""
    if not (store / "text_runs").is_dir():
        _run_on_texts(store, make_model)
    return [store / "text_runs" / name for name in ("ft", "none")]


def _run_on_questions(folder: Path, make_model: Callable[..., EditableModel]) -> None:
    records = [
        {
            "id": str(i),
            "prompt": f"what is the capital of {country}",
            "target": target,
            "contrast": [target, "the river"],
            "rephrases": [f"the capital of {country} is"],
            "locality": [{"prompt": f"the currency in {country} is", "target": "Euro"}],
        }
        for i, (country, target) in enumerate(zip(COUNTRIES, TARGETS, strict=True))
    ]
    upstream = [{"id": "u", "prompt": "the river is", "target": "Sol"}]
    files = {"questions": folder / "questions.jsonl", "upstream": folder / "upstream.jsonl"}
    for path, rows in zip(files.values(), (records, upstream), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = RunSettings(schedule=Schedule(edit="all", eval_every=3, score_after="all"), threads=1)
    for name, editor in EDITORS_TRIED.items():
        stream = STREAMS.get("jsonl")(
            path=str(files["questions"]), upstream_path=str(files["upstream"]), task="completion"
        )
        model = make_model("completion")
        run_benchmark(stream, model=model, editor=editor, settings=settings, folder=folder / "runs" / name)


def _run_on_texts(folder: Path, make_model: Callable[..., EditableModel]) -> None:
    path = folder / "texts.jsonl"
    rows = [
        {"id": str(i), "prompt": f"the capital of {country}", "target": f"is {target}"}
        for i, (country, target) in enumerate(zip(COUNTRIES, TARGETS, strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = RunSettings(schedule=Schedule(eval_every=3), threads=1)
    for name in ("ft", "none"):
        stream = STREAMS.get("jsonl")(path=str(path), task="language_modelling")
        run_benchmark(
            stream,
            model=make_model("language_modelling"),
            editor=EDITORS_TRIED[name],
            settings=settings,
            folder=folder / "text_runs" / name,
        )


def final_rows(folder: Path) -> list[dict[str, Any]]:
    rows = pq.read_table(folder / "predictions.parquet").to_pylist()
    return [row for row in rows if row["n_edits"] == len(COUNTRIES)]


def mean_of(folder: Path, stream: str, column: str) -> float:
    return fmean(row[column] for row in final_rows(folder) if row["stream"] == stream)


def values(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert main(["leaderboard", *arguments, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("score", ["exact_match", "contains", "token_accuracy", "contrast", "f1"])
def test_a_leaderboard_by_a_score_shows_the_means_of_that_column(
    runs: Path, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    for record in values(capsys, str(runs), "--score", score):
        assert record["main_score"] == score
        folder = runs / record["editor"]
        for stream, metric in {
            "edited": "ERR",
            "holdout": "Holdout",
            "upstream": "TRR",
            "locality": "Locality",
        }.items():
            if score == "contrast" and stream in ("upstream", "locality"):
                assert record.get(f"{metric}_mean") is None
                continue
            assert record[f"{metric}_mean"] == pytest.approx(mean_of(folder, stream, score), abs=1e-6)
        edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
        assert record["ES_mean"] == pytest.approx(fmean(edit["scores_after"][score] for edit in edits))


def test_what_was_scored_right_after_edits_has_columns_of_its_own_by_every_score(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for score in (None, "token_accuracy"):
        for record in values(capsys, str(runs), *(["--score", score] if score else [])):
            metrics = read_result(runs / record["editor"] / "result.json").metrics
            for stream in ("holdout", "locality"):
                name = f"ES/{stream}"
                recorded = metrics[f"{name}/{score}" if score else name]
                assert record[f"{name}_mean"] == recorded
                assert recorded is not None
    assert main(["leaderboard", str(runs)]) == 0
    assert "ES/locality" in capsys.readouterr().out


def test_four_scorings_rank_the_same_runs_each_by_its_own_values(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders = {}
    for score in ("f1", "token_accuracy", "contrast", "token_agreement"):
        records = values(capsys, str(runs), "--score", score)
        metric = records[0]["ranked_by"]
        figures = [record[f"{metric}_mean"] for record in records]
        assert figures == sorted(figures, reverse=True)
        orders[score] = ([record["editor"] for record in records], metric)
    assert orders["f1"][1] == "Avg"
    # Upstream has no contrast, and only locality is compared with the unedited model.
    assert orders["contrast"][1] == "ERR"
    assert orders["token_agreement"] == ([*orders["token_agreement"][0]], "Locality")
    assert orders["token_agreement"][0][0] in ("none", "grace"), "the unedited model agrees with itself"


def test_the_statistics_of_a_score_are_those_of_its_own_items(runs: Path) -> None:
    board = Leaderboard.read([runs], score="token_accuracy")
    (table,) = board.tables
    first, *others = table.rows
    for row in others:
        assert row.comparison is not None
        by_editor = [
            fmean([mean_of(runs / editor, stream, "token_accuracy") for stream in ("upstream", "edited")])
            for editor in (row.editor, first.editor)
        ]
        assert row.comparison.difference == pytest.approx(by_editor[0] - by_editor[1])


def test_runs_that_lack_a_score_are_named_and_the_others_are_shown(
    runs: Path, text_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["leaderboard", str(runs), *map(str, text_runs), "--score", "token_accuracy"]) == 0
    shown = capsys.readouterr().out
    assert "has no score token_accuracy (it has perplexity, perplexity_weighted, perplexity_outliers)" in shown
    assert main(["leaderboard", str(runs), "--score", "perplexity"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no score perplexity (it has f1, exact_match" in line
    assert main(["leaderboard", str(runs), "--score", "token_acuracy"]) == 2
    assert "did you mean 'token_accuracy'" in capsys.readouterr().err


def test_a_run_made_before_scores_were_recorded_is_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = runs / "ft" / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.drop_columns([name for name in table.column_names if name in YOUNG_COLUMNS]), path)
    assert main(["leaderboard", str(runs)]) == 0
    assert "not compared" not in capsys.readouterr().out, "its main score is in an older column"
    assert main(["leaderboard", str(runs), "--score", "token_accuracy"]) == 0
    assert "column 'token_accuracy' should be double" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_perplexity_of_all_tokens_weighs_texts_by_their_tokens(text_runs: list[Path]) -> None:
    found = compare(
        text_runs[:1],
        text_runs[1:],
        names=("ft", "none"),
        streams=("edited",),
        metric="ERR",
        score="perplexity_weighted",
    )
    sides = []
    for folder in text_runs:
        rows = {row["request_id"]: row for row in final_rows(folder) if row["stream"] == "edited"}
        assert {row["n_tokens"] for row in rows.values()} != {1}
        sides.append(rows)
    weights = np.array([row["n_tokens"] for row in sides[0].values()])
    logs = [np.log([rows[name]["perplexity"] for name in sides[0]]) for rows in sides]
    assert found.difference == pytest.approx(float(np.average(logs[0] - logs[1], weights=weights)))
    results = [rescored(read_result(folder / "result.json"), "perplexity_weighted") for folder in text_runs]
    errs = [result.metrics["ERR"] for result in results]
    assert math.log(errs[0] / errs[1]) == pytest.approx(found.difference)  # type: ignore[operator]
    assert results[0].protocol.higher_is_better is False


def test_an_evaluation_by_another_score_keeps_the_costs(runs: Path) -> None:
    result = read_result(runs / "grace" / "result.json")
    lines = read_evaluations(runs / "grace" / "metrics.jsonl")
    last, by_score = lines[-1], rescored_evaluations(lines, result.protocol, "contains")[-1].metrics
    assert by_score["ERR"] == last.metrics["ERR/contains"]
    assert by_score["n_keys"] == last.metrics["n_keys"]
    assert by_score["Avg"] == pytest.approx((by_score["TRR"] + by_score["ERR"]) / 2)  # type: ignore[operator]
    assert rescored_evaluations(lines, result.protocol, None) is lines
    assert rescored(result, "f1").metrics == result.metrics


def test_the_main_score_of_locality_is_read_where_it_was_recorded(runs: Path) -> None:
    result = read_result(runs / "ft" / "result.json")
    as_in_wise = result.model_copy(
        update={
            "protocol": result.protocol.model_copy(update={"locality_score": "token_agreement"}),
            "metrics": {**result.metrics, "Locality": 0.25, "Locality/f1": 0.75},
        }
    )
    assert rescored(as_in_wise, "token_agreement").metrics["Locality"] == 0.25
    assert rescored(as_in_wise, "f1").metrics["Locality"] == 0.75
    assert rescored(as_in_wise, "f1").metrics["ERR"] == result.metrics["ERR"]


def test_scorings_say_how_far_the_scores_of_a_run_lie_apart(runs: Path) -> None:
    rows = [[read_result(runs / name / "result.json")] for name in EDITORS_TRIED]
    found = {one.metric.name: one for one in scorings(rows, metric_infos())}
    err = found["ERR"]
    for (result,), line, apart in zip(rows, err.values, err.apart, strict=True):
        by_name = dict(zip(err.scores, line, strict=True))
        assert by_name["token_accuracy"] == result.metrics["ERR/token_accuracy"]
        assert by_name["f1"] == result.metrics["ERR"]
        known = [value for value in line if value is not None]
        assert apart == pytest.approx(max(known) - min(known))
    assert "agreement" in found["Locality"].scores
    assert "agreement" not in err.scores


def test_the_report_and_the_figures_are_drawn_by_a_score(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = {}
    for score in ("contrast", "f1"):
        assert main(["report", str(runs), "--out", str(tmp_path / score), "--score", score]) == 0
        pages[score] = (tmp_path / score / "index.html").read_text(encoding="utf-8")
        assert f"{score}, higher is better" in pages[score]
    assert "How far the scores of the same runs lie apart" in pages["f1"]
    assert "ERR at the end, by every score" in pages["f1"]
    assert main(["figure", "curves", str(runs), "--out", str(tmp_path / "figures"), "--score", "contrast"]) == 0
    assert "contrast" in (tmp_path / "figures" / "curves-jsonl-tiny.svg").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["figure", "overlap", str(runs), "--out", str(tmp_path / "figures"), "--score", "f1"]) == 2
    assert "figure overlap shows no scores" in capsys.readouterr().err


def test_tuning_chooses_by_a_score(runs: Path) -> None:
    results = {name: read_result(runs / name / "result.json") for name in EDITORS_TRIED}
    for score in ("token_accuracy", "contrast"):
        for result in results.values():
            by_score = rescored(result, score)
            expected = by_score.metrics["Avg"] if by_score.metrics["Avg"] is not None else by_score.metrics["ERR"]
            assert quality(by_score) == expected
    with pytest.raises(UserError, match="has no score fluency"):
        rescored(results["ft"], "fluency")
    assert "f1" in recorded_scores(results["ft"], metric_infos())


def test_a_tuning_by_fluency_needs_trials_that_record_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "sweep=tune", "stream=atlas-text", "editor=ft", "score=fluency"]) == 2
    assert "add scores=[fluency]" in capsys.readouterr().err
    assert main(["run", "sweep=tune", "stream=atlas-text", "editor=ft", "score=fluent"]) == 2
    assert "score=fluent is no score; did you mean 'fluency'" in capsys.readouterr().err
