"""Dot plots: each dot stands where the runs say, in the row of its editor and the panel of its protocol."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from grace_bench.analysis.figures.dots import draw_scores, editors_figure, scores_figure
from grace_bench.analysis.figures.drawing import styled
from grace_bench.analysis.figures.of_runs import read_groups
from grace_bench.errors import UserError
from helpers import cli, texts_of

SMALL = ("stream=atlas-qa", "max_edits=2", "eval_every=2", "max_upstream=5", "wandb.mode=disabled")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two editors and two seeds under one protocol, and one of them under another."""
    out = tmp_path_factory.mktemp("runs")
    for options in (("editor=none,ft", "seed=0,1"), ("editor=ft", "edit=all", "edits_at_once=2")):
        code, _, err = cli("run", "-m", *SMALL, *options, f"out={out}")
        assert code == 0, err
    return out


def results(runs: Path, editor: str, *, at_once: int = 1) -> list[dict[str, Any]]:
    found = [json.loads(file.read_bytes()) for file in runs.glob(f"*/*/{editor}/*/result.json")]
    return [result for result in found if result["protocol"]["edits_at_once"] == at_once]


def dots(axes: Any, names: list[str]) -> dict[tuple[str, str], float]:
    """The values of a panel by label and row."""
    return {
        (line.get_label(), names[math.floor(y + 0.5)]): x
        for line in axes.lines
        if not line.get_label().startswith("_")
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    }


def rows(figure: Any) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_editors_stand_in_a_row_each_with_a_panel_for_each_protocol(runs: Path) -> None:
    with styled():
        figure = editors_figure(read_groups([runs]))
    names = rows(figure)
    assert sorted(names) == ["ft", "none"]
    one, two = figure.axes
    for axes, at_once, editors in ((one, 1, ("none", "ft")), (two, 2, ("ft",))):
        assert f"edits_at_once={at_once}" in axes.get_title()
        shown = dots(axes, names)
        assert {row for _, row in shown} == set(editors)
        for editor in editors:
            metrics = [result["metrics"] for result in results(runs, editor, at_once=at_once)]
            for metric in ("TRR", "ERR", "ES", "Holdout"):
                assert shown[metric, editor] == pytest.approx(fmean(m[metric] for m in metrics))


def test_scores_stand_side_by_side_right_after_the_edits_and_at_the_end(runs: Path) -> None:
    group = next(group for group in read_groups([runs]) if len(group.table.rows) == 2)
    with styled():
        figure = scores_figure(group)
    names = rows(figure)
    for axes, metric in zip(figure.axes, ("ES", "ERR"), strict=True):
        assert axes.get_title() == metric
        shown = dots(axes, names)
        for editor in ("none", "ft"):
            metrics = [result["metrics"] for result in results(runs, editor)]
            assert shown["f1", editor] == pytest.approx(fmean(m[metric] for m in metrics))
            for score in ("contains", "token_accuracy"):
                assert shown[score, editor] == pytest.approx(fmean(m[f"{metric}/{score}"] for m in metrics))


def test_both_are_drawn_by_command(runs: Path, tmp_path: Path) -> None:
    for kind in ("editors", "scores"):
        code, out, err = cli("figure", kind, str(runs), "--out", str(tmp_path))
        assert code == 0, err
        svg = next(Path(line) for line in out.splitlines() if line.endswith(".svg"))
        assert "ft" in texts_of(svg)


def test_runs_with_one_score_have_no_figure_of_scores(tmp_path: Path) -> None:
    code, _, err = cli("run", *SMALL, "editor=none", "scores=[]", f"out={tmp_path / 'runs'}")
    assert code == 0, err
    with pytest.raises(UserError, match="no run recorded two scores"):
        draw_scores([tmp_path / "runs"], tmp_path / "figures")
