"""The figures GRACE adds: what is drawn is what runs, models and activations say."""

import json
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from grace_bench.analysis.figures.drawing import save, styled
from grace_bench.analysis.figures.of_runs import Group, read_groups
from grace_bench.editors import Grace
from grace_bench.editors._grace.figures.layers import analogous_layers
from grace_bench.editors._grace.figures.overlap import draw_overlap, overlap_figure
from grace_bench.editors._grace.figures.separability import (
    Pairs,
    activations,
    pair_distances,
    separability,
    separability_figure,
    study,
)
from grace_bench.editors._grace.figures.sweep import sweep_figure
from grace_bench.editors._grace.figures.toy import ToyEdits, edit_toy, toy_figure
from grace_bench.launch.memory_trial import open_trial
from grace_bench.models.editable import EditableModel
from grace_bench.registry import STREAMS
from grace_bench.streams.toy import TURNED, label_before
from helpers import axes_of, cli, texts_of

SMALL = ("stream=toy", "max_edits=6", "eval_every=2", "max_upstream=40", "wandb.mode=disabled")


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    code, _, err = cli("run", "-m", *SMALL, "editor=grace,ft", "seed=0,1", f"out={out}")
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep")
    grid = ("editor.eps_init=0.1,2.0", "layer=first,second", "editor.n_iter=5", "tuned=none")
    code, _, err = cli("run", "-m", *SMALL, "max_edits=3", "editor=grace", *grid, f"out={out}")
    assert code == 0, err
    return out


@pytest.fixture(scope="module")
def group(runs: Path) -> Group:
    (found,) = read_groups([runs])
    return found


@pytest.fixture(scope="module")
def toy() -> ToyEdits:
    return edit_toy(["max_edits=12", "max_upstream=20"], open_trial, resolution=31)


def test_edits_have_ticks_at_whole_numbers(group: Group) -> None:
    with styled():
        counts = [axes.xaxis for axes in overlap_figure(group).axes if axes.get_xlabel() == "edits"]
    assert len(counts) == 2
    for axis in counts:
        for greatest in (1, 3, 10, 12):
            ticks = axis.get_major_locator().tick_values(0, greatest)
            assert all(tick == round(tick) for tick in ticks)


def test_the_sweep_shows_the_end_of_each_run_by_radius_and_layer(sweep: Path) -> None:
    (found,) = read_groups([sweep])
    with styled():
        figure = sweep_figure(found)
    results = [json.loads(path.read_text()) for path in sweep.rglob("result.json")]
    assert len(results) == 4
    for metric, title in {"TRR": "TRR", "ERR": "ERR", "Holdout": "Holdout", "n_keys": "keys"}.items():
        axes = axes_of(figure, title)
        assert axes.get_xscale() == "log"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "2"]
        for container in axes.containers:
            line, layer = container.lines[0], container.get_label()
            expected = {r["editor"]["eps_init"]: r["metrics"][metric] for r in results if r["model"]["layer"] == layer}
            assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == pytest.approx(expected)
        assert {container.get_label() for container in axes.containers} == {"first", "second"}


def test_a_sweep_of_other_settings_too_is_refused(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep, tmp_path / "runs")
    file = next((tmp_path / "runs").rglob("result.json"))
    result = json.loads(file.read_text())
    result["editor"]["n_iter"] = 7
    file.write_text(json.dumps(result))
    code, _, err = cli("figure", "sweep", str(tmp_path / "runs"), "--out", str(tmp_path / "made"))
    assert code == 2
    assert "editor.n_iter" in err
    assert not (tmp_path / "made").exists()


def test_overlap_shows_what_the_runs_measured(runs: Path, group: Group) -> None:
    with styled():
        figure = overlap_figure(group)
    by_seed = [evaluations(folder) for folder in sorted((runs / "toy" / "toy" / "grace").iterdir())]
    for axes, metric in zip(figure.axes, ("codebook_overlap", "codebook_overlap/queries"), strict=True):
        (line,) = axes.lines
        assert line.get_ydata()[-1] == pytest.approx(fmean(lines[-1][metric] for lines in by_seed))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sweep"], "figure sweep needs run folders"),
        (["sweep", "{runs}/toy/toy/ft"], "editor.eps_init"),
        (["overlap", "{runs}/toy/toy/ft"], "codebook_overlap"),
        (["toy", "editor=ft"], "editor=ft"),
        (["toy", "editor.eps_innit=1"], "eps_innit"),
        (["separability", "stream=toy", "distance=manhattan"], "manhattan"),
        (["separability", "stream=toy", "layer=third"], "third"),
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


def test_regions_before_and_after_are_the_models_own_answers(toy: ToyEdits) -> None:
    stream = STREAMS.get("toy")()
    model = EditableModel.from_pretrained("toy", task="classification", device="cpu")
    grid = [(x, y) for y in toy.axis for x in toy.axis]
    assert toy.before.ravel().tolist() == model.answer([f"({x:.4f}, {y:.4f})" for x, y in grid])
    settings = {name: value for name, value in toy.settings.items() if name != "seed"}
    editor = Grace(model=model, seed=toy.seed, **settings)
    wanted = {request.id: request.target for request in stream.load().edits}
    for request in toy.edited:
        editor.edit_text(request.prompt, wanted[request.id])
    assert toy.after.ravel().tolist() == model.answer([f"({x:.4f}, {y:.4f})" for x, y in grid])
    assert (toy.after != toy.before).any()
    # Where no ball holds a point, the model answers as before.
    assert (toy.after == toy.before)[(toy.outside > 0).all(axis=0)].all()


def test_balls_bound_what_their_keys_answer(toy: ToyEdits) -> None:
    second = EditableModel.from_pretrained("toy", task="classification", device="cpu")
    rows, columns = np.nonzero(toy.entry >= 0)
    assert len(rows)
    hidden = dict(second.module.named_modules())["first"]
    keys = hidden(torch.tensor(toy.keys, dtype=torch.float32)).relu()
    for row, column in zip(rows, columns, strict=True):
        entry = toy.entry[row, column]
        assert toy.outside[entry, row, column] <= 0
        query = hidden(torch.tensor([[toy.axis[column], toy.axis[row]]], dtype=torch.float32)).relu()
        assert entry == (keys - query).norm(dim=1).argmin()


def test_wanted_regions_turn_inside_the_disc_only(toy: ToyEdits) -> None:
    for row, y in enumerate(toy.axis):
        for column, x in enumerate(toy.axis):
            turned = (x - TURNED.x) ** 2 + (y - TURNED.y) ** 2 <= TURNED.radius**2
            assert toy.wanted[row, column] == (1 - label_before((x, y)) if turned else label_before((x, y)))


def test_the_toy_figure_has_before_wanted_after_and_the_balls(toy: ToyEdits, tmp_path: Path) -> None:
    with styled():
        figure = toy_figure(toy)
    assert [axes.get_title() for axes in figure.axes] == ["before", "wanted", "after", "balls, enlarged"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"x1"}
    assert figure.axes[0].get_ylabel() == "x2"
    stars = [tuple(line.get_xydata()[0]) for line in figure.axes[3].lines if line.get_marker() == "*"]
    assert stars == [tuple(key) for key in toy.keys]
    svg, _ = save(figure, tmp_path, "toy")
    assert f"{len(toy.edited)} edits, {len(toy.keys)} keys" in texts_of(svg)


def _pairs(positive: Any) -> Pairs:
    n = len(positive)
    # Every pair is of two inputs of its own, so that resampling facts resamples pairs.
    return Pairs(
        first=np.arange(n), second=np.arange(n, 2 * n), positive=np.asarray(positive), group=np.tile(np.arange(n), 2)
    )


def _roc(distances: Any, positive: Any) -> Any:
    return separability(
        np.asarray(distances), _pairs(positive), layer="a", distance="euclidean", question="same answer", seed=0
    )


def test_the_area_is_the_chance_that_a_pair_that_wants_the_same_is_nearer() -> None:
    generator = np.random.default_rng(0)
    # Rounded, for ties.
    positive = generator.random(300) < 0.3
    distances = np.round(generator.normal(size=300) + np.where(positive, 0.0, 0.7), 1)
    found = _roc(distances, positive)
    nearer = mannwhitneyu(distances[~positive], distances[positive]).statistic
    assert found.auc == pytest.approx(nearer / (positive.sum() * (~positive).sum()))
    assert found.auc_low < found.auc < found.auc_high
    assert (found.n_positive, found.n_negative) == (positive.sum(), (~positive).sum())
    for rates in (found.false_positive_rate, found.true_positive_rate):
        assert (rates[0], rates[-1]) == (0.0, 1.0)
        assert (np.diff(rates) >= 0).all()


def test_what_is_told_apart_has_an_area_of_one_and_what_is_not_of_a_half() -> None:
    apart = _roc([0.1, 0.2, 0.3, 1.0, 2.0, 3.0], [True] * 3 + [False] * 3)
    assert (apart.auc, apart.auc_low, apart.auc_high, apart.strict_rate) == (1.0, 1.0, 1.0, 1.0)
    assert _roc([1.0] * 6, [True, False] * 3).auc == 0.5
    generator = np.random.default_rng(1)
    chance = _roc(generator.random(4000), generator.random(4000) < 0.5)
    assert chance.auc == pytest.approx(0.5, abs=0.03)
    assert chance.auc_low < 0.5 < chance.auc_high


def test_a_strict_radius_holds_one_wrong_pair_in_a_thousand() -> None:
    wrong = np.linspace(1, 2, 2000)
    right = np.array([0.5, 0.6, 1.0001, 1.5])
    found = _roc(np.concatenate([right, wrong]), [True] * 4 + [False] * 2000)
    assert found.strict_rate == 0.75


def test_distances_between_activations_are_those_of_the_definitions() -> None:
    points = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    x = points.double().numpy()
    euclidean = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    upstream = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 9)
    assert pair_distances(points, "euclidean", upstream=upstream) == pytest.approx(euclidean, abs=1e-5)
    assert pair_distances(points, "cosine", upstream=upstream) == pytest.approx(1 - unit @ unit.T, abs=1e-5)
    # With so many samples there is next to nothing to shrink.
    precision = np.linalg.inv(np.cov(upstream.numpy(), rowvar=False))
    steps = x[:, None] - x[None]
    expected = np.sqrt(np.einsum("ijk,kl,ijl->ij", steps, precision, steps))
    found = pair_distances(points, "mahalanobis", upstream=upstream)
    scale = np.median(found[expected > 0] / expected[expected > 0])
    assert found == pytest.approx(scale * expected, rel=0.1, abs=1e-3)


def test_activations_are_what_enters_the_layer_at_the_query() -> None:
    requests = STREAMS.get("toy")().load().edits[:5]
    model = EditableModel.from_pretrained("toy", task="classification", device="cpu")
    points = torch.tensor([[float(n) for n in request.prompt.strip("()").split(",")] for request in requests])
    assert activations(model, "first", requests).tolist() == points.tolist()
    assert activations(model, "second", requests) == pytest.approx(model.module.first(points).relu(), abs=1e-6)


def test_layers_at_the_same_place_of_all_blocks_are_compared() -> None:
    drift = EditableModel.from_pretrained("atlas-drift", task="classification", device="cpu")
    assert analogous_layers(drift) == [f"bert.encoder.layer.{block}.output.dense" for block in range(3)]
    toy = EditableModel.from_pretrained("toy", task="classification", device="cpu")
    assert analogous_layers(toy) == ["second"]


def test_pairs_are_of_an_edit_with_another_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_bench.editors._grace.figures.separability.MAX_INPUTS", 90)
    found = study(
        ["stream=atlas-drift", "layer=bert.encoder.layer.2.output.dense", "distance=euclidean", "device=cpu"],
        open_trial,
    )
    assert found.n_inputs == {"edits": 30, "holdout": 30, "upstream": 30}
    answer, fact = found.curves
    assert (answer.question, fact.question) == ("same answer", "same fact")
    assert answer.n_positive + answer.n_negative == 30 * 29 // 2 + 30 * 60
    assert 0 < fact.n_positive < answer.n_positive
    assert fact.n_negative == answer.n_negative
    assert fact.auc > 0.5


def test_separability_by_command_prints_and_writes_the_areas_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grace_bench.editors._grace.figures.separability.MAX_INPUTS", 60)
    settings = ("stream=toy", "layer=first,second", "distance=euclidean,mahalanobis", "device=cpu")
    code, out, err = cli("figure", "separability", *settings, "--out", str(tmp_path))
    assert code == 0, err
    record = json.loads((tmp_path / "separability-toy.json").read_text())
    assert [(c["layer"], c["distance"]) for c in record["curves"] if c["question"] == "same fact"] == [
        (layer, distance) for layer in ("first", "second") for distance in ("euclidean", "mahalanobis")
    ]
    for curve in record["curves"]:
        assert f"{curve['auc']:.3f}" in out
        assert f"{curve['auc']:.3f} [" in texts_of(tmp_path / "separability-toy.svg")
    assert len((tmp_path / "separability-toy.csv").read_text().splitlines()) == 1 + len(record["curves"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert cli("figure", "separability", *settings, "--out", str(tmp_path))[0] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_curves_drawn_are_the_curves_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grace_bench.editors._grace.figures.separability.MAX_INPUTS", 45)
    found = study(["stream=toy", "distance=euclidean", "device=cpu"], open_trial)
    with styled():
        figure = separability_figure(found)
    for curve in found.curves:
        axes = axes_of(figure, f"{curve.question} · {curve.distance}")
        line = next(line for line in axes.lines if line.get_label().startswith("second"))
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(curve.auc, abs=0.01)


def test_a_group_without_codebooks_is_passed_over_beside_one_that_has_them(runs: Path, tmp_path: Path) -> None:
    assert [path.name for path in draw_overlap([runs], tmp_path)] == ["overlap-toy.svg", "overlap-toy.png"]


def test_balls_too_small_for_the_grid_leave_the_regions_alone() -> None:
    edits = edit_toy(["max_edits=2", "max_upstream=5", "editor.eps_init=0.0001"], open_trial, resolution=11)
    with styled():
        figure = toy_figure(edits)
    assert (edits.entry == -1).all()
    assert len(figure.axes[3].collections) == 0
