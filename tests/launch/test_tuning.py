"""Tuning: what it may look at, what it tries and chooses, and the preset that later runs take."""

import contextlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from omegaconf import OmegaConf

from grace_bench.errors import UserError
from grace_bench.launch.compose import compose
from grace_bench.launch.tuning import quality, search_space, searches
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.reading import read_result
from grace_bench.results.schema import RunResult
from helpers import cli

QUICK = ("stream=toy", "max_edits=5", "max_upstream=40", "wandb.mode=disabled", "editor.n_iter=20")
EMBEDDED = ("toy", "atlas-qa", "atlas-facts", "atlas-drift", "atlas-text")


@dataclass(frozen=True)
class Tuned:
    """A tuning of GRACE's radius and layer on the toy stream."""

    root: Path
    code: int
    out: str

    @property
    def folders(self) -> list[Path]:
        return sorted(path.parent for path in (self.root / "tuning").rglob("result.json"))

    @property
    def results(self) -> list[RunResult]:
        return [read_result(folder / "result.json") for folder in self.folders]

    @property
    def preset(self) -> Path:
        return self.root / "presets" / "toy" / "grace.yaml"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    root = tmp_path_factory.mktemp("tuned")
    with contextlib.chdir(root):
        code, out, err = cli(
            "run", "sweep=tune", *QUICK, "editor=grace", "layer=first,second", "editor.eps_init=0.01,1.0"
        )
    assert code == 0, err
    return Tuned(root, code, out)


def test_tuning_never_touches_the_streams_edits(tuned: Tuned) -> None:
    data = STREAMS.get("toy")().load()
    edits, validation = ({request.id for request in role} for role in (data.edits, data.validation))
    assert edits
    assert not edits & validation
    for folder in tuned.folders:
        lines = (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()
        candidates = {json.loads(line)["id"] for line in lines}
        assert candidates
        assert candidates <= validation
        # Nor is one of them scored, in any role.
        assert not set(pd.read_parquet(folder / "predictions.parquet")["request_id"]) & edits
    assert {result.protocol.split for result in tuned.results} == {"validation"}


def test_trials_are_kept_apart_from_runs_on_the_streams_edits_unless_told_otherwise(tuned: Tuned) -> None:
    assert {path.name for path in tuned.root.iterdir()} == {"tuning", "presets"}
    (part,) = searches(["sweep=tune", "stream=toy", "editor=grace", "out=elsewhere"])
    assert [item for item in part if item.startswith("out=")] == ["out=elsewhere"]


@pytest.mark.parametrize("stream", EMBEDDED)
def test_what_tuning_edits_is_not_what_is_edited_later(stream: str) -> None:
    data = STREAMS.get(stream)().load()
    assert data.validation
    assert not {request.id for request in data.validation} & {request.id for request in data.edits}
    assert not {request.prompt for request in data.validation} & {request.prompt for request in data.edits}


def test_every_setting_is_tried_once_with_the_stated_budget(tuned: Tuned) -> None:
    tried = sorted((r.model.layer, r.editor.eps_init, r.editor.replacement) for r in tuned.results)  # type: ignore[attr-defined]
    replacements = search_space("toy", "grace")["editor.replacement"]
    assert tried == sorted(itertools.product(["first", "second"], [0.01, 1.0], replacements))
    assert {result.protocol.max_edits for result in tuned.results} == {5}
    for result in tuned.results:
        assert str(result.editor.eps_init) in tuned.out  # type: ignore[attr-defined]
    assert "best of 8 runs of 5 validation edits" in tuned.out


def test_the_best_by_avg_is_written_and_taken_by_later_runs(tuned: Tuned) -> None:
    preset = yaml.safe_load(tuned.preset.read_text(encoding="utf-8"))
    averages = {
        (r.model.layer, r.editor.eps_init, r.editor.replacement): r.metrics["Avg"]  # type: ignore[attr-defined]
        for r in tuned.results
    }
    chosen = preset["layer"], preset["editor"]["eps_init"], preset["editor"]["replacement"]
    assert averages[chosen] == max(value for value in averages.values() if value is not None)
    assert preset["editor"]["n_iter"] == 20, "what was set by hand belongs to what was chosen"
    assert preset["tuning_budget"] == "8 runs of 5 validation edits"
    with contextlib.chdir(tuned.root):
        config = compose(["stream=toy", "editor=grace", "tuned=presets"])
    assert (config.layer, config.tuning_budget) == (preset["layer"], preset["tuning_budget"])
    assert {name: config.editor.settings[name] for name in preset["editor"]} == preset["editor"]
    assert config.split == "edits"


def test_the_command_line_wins_over_a_preset_of_ones_own(tuned: Tuned) -> None:
    config = compose(["stream=toy", "editor=grace", f"tuned={tuned.root / 'presets'}", "editor.eps_init=9.0"])
    assert config.editor.settings["eps_init"] == 9.0
    assert config.editor.settings["n_iter"] == 20
    assert config.tuning_budget is None


def test_a_preset_holds_for_its_stream_and_editor_and_its_command_only(tuned: Tuned) -> None:
    folder = f"tuned={tuned.root / 'presets'}"
    for others in (["stream=toy", "editor=ft"], ["stream=atlas-qa", "editor=grace"]):
        assert compose([*others, folder]) == compose([*others, "tuned=none"])
    assert compose(["stream=toy", "editor=grace"]).tuning_budget != "8 runs of 5 validation edits"


def test_tuning_again_reuses_the_trials_and_another_choice_sets_the_old_preset_aside(tuned: Tuned) -> None:
    before = tuned.preset.read_text(encoding="utf-8")
    with contextlib.chdir(tuned.root):
        code, out, err = cli(
            "run", "sweep=tune", *QUICK, "editor=grace", "layer=second", "editor.eps_init=0.01", "seed=0"
        )
    assert code == 0, err
    assert ": 2 runs, 0 done, 2 reused, 0 failed" in out
    (aside,) = tuned.preset.parent.glob(".grace.yaml.*")
    assert aside.read_text(encoding="utf-8") == before
    aside.replace(tuned.preset)


@pytest.mark.parametrize("stream", EMBEDDED)
def test_every_editor_of_a_stream_has_the_same_budget(stream: str) -> None:
    task = STREAMS.get(stream).task
    budgets = {}
    for name, editor in EDITORS.classes().items():
        # Toy has no requests for the meta-training of mend.
        if editor.search_space and task in editor.supported_tasks and (name, stream) != ("mend", "toy"):
            budgets[name] = len(list(itertools.product(*search_space(stream, name).values())))
    assert len(budgets) >= 7
    assert len(set(budgets.values())) == 1


@pytest.mark.parametrize(
    ("stream", "editor", "space"),
    [
        (
            "toy",
            "grace",
            {
                "layer": ["second"],
                "editor.eps_init": [0.5, 1.0, 3.0],
                "editor.replacement": ["replace_prompt", "replace_last"],
            },
        ),
        (
            "atlas-text",
            "rome",
            {
                "layer": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"],
                "editor.n_iter": [20, 50, 100],
                "editor.n_prefixes": [2, 10],
            },
        ),
        (
            "atlas-drift",
            "mend",
            {
                "editor.layers": [
                    ["bert.encoder.layer.2.output.dense"],
                    ["bert.encoder.layer.1.output.dense", "bert.encoder.layer.2.output.dense", "bert.pooler.dense"],
                ],
                "editor.c_edit": [0.1, 0.3, 1.0],
                "editor.edit_lr": [0.001, 0.01],
            },
        ),
        ("toy", "mend", {"layer": ["second"], "editor.c_edit": [0.1, 0.3, 1.0], "editor.edit_lr": [0.001, 0.01]}),
        ("jsonl", "none", {}),
    ],
)
def test_a_search_space_is_the_streams_layers_of_the_editors_kind_and_the_editors_values(
    stream: str, editor: str, space: dict[str, list[Any]]
) -> None:
    assert list(search_space(stream, editor).items()) == list(space.items())


SHIPPED = sorted(path.name for path in (files("grace_bench.launch.conf") / "tuned").iterdir() if "_" in path.name)


@pytest.mark.parametrize("name", [name.removesuffix(".yaml") for name in SHIPPED if not name.startswith("__")])
def test_a_shipped_preset_comes_from_its_search_space(name: str) -> None:
    preset = OmegaConf.load(Path(str(files("grace_bench.launch.conf"))) / "tuned" / f"{name}.yaml")
    space = search_space(*name.split("_", 1))
    for option, values in space.items():
        chosen = OmegaConf.select(preset, option)
        if chosen is not None:
            assert chosen in values


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["split=edits"], "split=edits: tuning edits validation requests only"),
        (["editor=none"], "editor 'none' has no search space"),
        (["editor=grace,mend"], "the same budget"),
    ],
)
def test_a_tuning_that_would_not_be_fair_is_refused(overrides: Sequence[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        searches(["sweep=tune", "stream=atlas-text", *overrides, *(["layer=a,b"] if "mend" in overrides[0] else [])])


def test_an_editor_without_a_search_space_takes_the_values_that_are_given() -> None:
    (part,) = searches(["sweep=tune", "stream=toy", "editor=none", "editor.lr=1,2"])
    assert "editor.lr=1,2" in part
    assert "split=validation" in part


def test_perplexity_is_chosen_by_the_geometric_mean_of_what_is_edited_kept_and_right(tuned: Tuned) -> None:
    result = tuned.results[0]

    def scored(**metrics: float | None) -> float:
        return quality(result.model_copy(update={"metrics": metrics}))

    assert scored(Avg=None, ERR=2.0, ARR=4.0, TRR=8.0) > scored(Avg=None, ERR=4.0, ARR=4.0, TRR=5.0)
    assert scored(Avg=None, ERR=4.0, ARR=2.0, TRR=8.0) == pytest.approx(scored(Avg=None, ERR=2.0, ARR=4.0, TRR=8.0))
    assert scored(Avg=float("nan")) < scored(Avg=0.0)
    assert scored(Avg=None, ERR=2.0, ARR=None, TRR=1.0) < scored(Avg=None, ERR=1e9, ARR=1e9, TRR=1e9)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a\n", "should be settings"),
        ("a: [", "cannot be read"),
        ("seed: 1", "'seed'"),
        ("editor: {eps: 1}", "eps"),
    ],
)
def test_a_preset_that_is_no_preset_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "presets" / "toy" / "grace.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        compose(["stream=toy", "editor=grace", f"tuned={tmp_path / 'presets'}"])
    assert "\n" not in str(caught.value)


def test_a_folder_without_presets_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"STREAM/EDITOR.yaml"):
        compose(["stream=toy", f"tuned={tmp_path}"])
