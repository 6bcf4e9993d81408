"""Figures: what is drawn is what runs and models say, files are the same for the same content, names do no harm."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from PIL import Image

from grace_bench.analysis.figures.drawing import save, styled
from grace_bench.analysis.figures.of_runs import (
    Group,
    curves_figure,
    draw_curves,
    read_groups,
)
from helpers import axes_of, cli, texts_of

SMALL = ("stream=toy", "max_edits=6", "eval_every=2", "max_upstream=40", "wandb.mode=disabled")


def line_of(axes: Any, label: str) -> Any:
    return next(line for line in axes.lines if line.get_label() == label)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    code, _, err = cli("run", "-m", *SMALL, "editor=none,grace,ft", "seed=0,1", f"out={out}")
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def group(runs: Path) -> Group:
    (found,) = read_groups([runs])
    return found


def test_runs_under_two_protocols_have_figures_of_their_own(runs: Path, tmp_path: Path) -> None:
    for name in ("none", "ft"):
        shutil.copytree(runs / "toy" / "toy" / name, tmp_path / "runs" / name)
    (odd, *_) = (tmp_path / "runs" / "ft").glob("*/result.json")
    record = json.loads(odd.read_bytes())
    record["protocol"]["eval_every"] = 7
    odd.write_text(json.dumps(record), encoding="utf-8")
    drawn = draw_curves([tmp_path / "runs"], tmp_path / "figures")
    names = sorted(path.name for path in drawn if path.suffix == ".svg")
    assert names == ["curves-toy-protocol.eval-every-2.svg", "curves-toy-protocol.eval-every-7.svg"]
    assert "protocol.eval_every=7" in texts_of(tmp_path / "figures" / names[1])


def test_curves_show_the_mean_over_seeds_of_what_the_runs_say(runs: Path, group: Group) -> None:
    with styled():
        figure = curves_figure(group)
    for editor in ("none", "grace", "ft"):
        by_seed = [evaluations(folder) for folder in sorted((runs / "toy" / "toy" / editor).iterdir())]
        ends = [lines[-1] for lines in by_seed]
        for metric in ("TRR", "ERR", "ES", "Holdout"):
            line = line_of(axes_of(figure, metric), editor)
            assert line.get_ydata()[-1] == pytest.approx(fmean(end[metric] for end in ends))
            assert line.get_xdata()[-1] == pytest.approx(fmean(end["n_edits"] for end in ends))
            at_two = [fmean(e[metric] for e in lines if e["n_edits"] == 2) for lines in by_seed]
            assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[2] == pytest.approx(fmean(at_two))


def test_bands_reach_from_the_least_to_the_greatest_seed(runs: Path, group: Group) -> None:
    with styled():
        axes = axes_of(curves_figure(group), "TRR")
    at_end = [evaluations(folder)[-1]["TRR"] for folder in (runs / "toy" / "toy" / "ft").iterdir()]
    line = line_of(axes, "ft")
    band = next(c for c in axes.collections if tuple(c.get_facecolor()[0][:3]) == pytest.approx(_rgb(line.get_color())))
    last = [y for x, y in band.get_paths()[0].vertices if x == line.get_xdata()[-1]]
    assert (min(last), max(last)) == pytest.approx((min(at_end), max(at_end)))


def test_counts_have_ticks_at_whole_numbers(group: Group) -> None:
    with styled():
        figure = curves_figure(group)
    counts = [axes.xaxis for axes in figure.axes if axes.get_xlabel() == "edits"]
    assert len(counts) == 5
    for axis in (*counts, axes_of(figure, "keys").yaxis):
        for greatest in (1, 3, 10, 12):
            ticks = axis.get_major_locator().tick_values(0, greatest)
            assert all(tick == round(tick) for tick in ticks)


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def test_only_editors_with_a_codebook_have_a_curve_of_keys(group: Group) -> None:
    with styled():
        axes = axes_of(curves_figure(group), "keys")
    assert [line.get_label() for line in axes.lines] == ["grace"]
    assert axes.get_ylim()[0] == 0


def test_lines_of_editors_differ_without_their_colour_too(group: Group) -> None:
    with styled():
        lines = axes_of(curves_figure(group), "TRR").lines
    assert len({line.get_color() for line in lines}) == 3
    assert len({(str(line.get_linestyle()), line.get_marker(), line.is_dashed()) for line in lines}) == 3


def test_curves_by_command_are_an_svg_and_a_png_that_name_editors_seeds_and_protocol(
    runs: Path, tmp_path: Path
) -> None:
    code, out, err = cli("figure", "curves", str(runs), "--out", str(tmp_path / "made"))
    assert code == 0, err
    svg, png = (Path(line) for line in out.splitlines())
    assert (svg.name, png.name) == ("curves-toy.svg", "curves-toy.png")
    shown = texts_of(svg)
    for word in ("none", "grace", "ft", "TRR", "ERR", "Holdout", "seeds 0, 1", "Protocol 1", "at most 6 edits"):
        assert word in shown
    assert Image.open(png).size[0] > 1000


def test_the_same_runs_give_the_same_bytes(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    assert cli("figure", "curves", str(runs), "--out", str(tmp_path / "a"))[0] == 0
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 9.0)
    assert cli("figure", "curves", str(runs), "--out", str(tmp_path / "b"))[0] == 0
    for name in ("curves-toy.svg", "curves-toy.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_names_are_shown_letter_by_letter(runs: Path, tmp_path: Path) -> None:
    hostile = "$x^{ \\frac </text> & \x1b[1m\x00"
    for file in list(runs.rglob("result.json")):
        copied = tmp_path / "runs" / file.parent.relative_to(runs)
        shutil.copytree(file.parent, copied)
        result = json.loads((copied / "result.json").read_text())
        result["model"]["name"] = hostile
        (copied / "result.json").write_text(json.dumps(result))
    assert cli("figure", "curves", str(tmp_path / "runs"), "--out", str(tmp_path / "made"))[0] == 0
    (svg,) = (tmp_path / "made").glob("*.svg")
    assert "$x^{ \\frac </text> & �[1m�" in texts_of(svg)


def test_other_files_in_the_folder_stay(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "curves-other.svg").write_text("mine")
    (tmp_path / "curves-toy.svg").write_text("old")
    assert cli("figure", "curves", str(runs), "--out", str(tmp_path))[0] == 0
    assert (tmp_path / "curves-other.svg").read_text() == "mine"
    assert (tmp_path / "curves-toy.svg").read_text() != "old"
    assert {path.name for path in tmp_path.iterdir()} == {"curves-other.svg", "curves-toy.svg", "curves-toy.png"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["curves"], "run folders"),
        (["curves", "{tmp}"], "no finished run"),
        (["curves", "{tmp}/nowhere"], "no such file"),
        (["pie"], "pie"),
    ],
)
def test_what_is_missing_is_named_in_one_line(arguments: list[str], named: str, runs: Path, tmp_path: Path) -> None:
    given = [argument.format(tmp=tmp_path, runs=runs) for argument in arguments]
    code, out, err = cli("figure", *given, "--out", str(tmp_path / "made"))
    assert code == 2
    assert named in err
    assert err.count("\n") == 1
    assert not out
    assert not (tmp_path / "made").exists()


def test_a_folder_that_cannot_be_written_is_named(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = cli("figure", "curves", str(runs), "--out", str(tmp_path / "file"))
    assert code == 2
    assert str(tmp_path / "file") in err


def test_perplexities_of_several_magnitudes_are_drawn_on_a_logarithmic_axis(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for file in (tmp_path / "runs").rglob("result.json"):
        result = json.loads(file.read_text())
        result["protocol"] |= {"main_score": "perplexity", "higher_is_better": False}
        file.write_text(json.dumps(result))
        factor = 1e5 if result["editor"]["name"] == "ft" else 2.0
        lines = [{k: v if k == "n_edits" else factor * v for k, v in e.items()} for e in evaluations(file.parent)]
        (file.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = read_groups([tmp_path / "runs"])
    with styled():
        axes = axes_of(curves_figure(found), "TRR")
    assert axes.get_yscale() == "log"
    assert "perplexity" in axes.get_ylabel()
    save(axes.figure, tmp_path, "curves")
    assert "100000" in texts_of(tmp_path / "curves.svg")
