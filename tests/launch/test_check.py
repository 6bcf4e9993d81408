"""`check` says of a finished run what still is as recorded, and notices whatever was changed since."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch

from grace_bench.cli import main
from grace_bench.launch.check import Checker, Finding, _compared
from grace_bench.models.zoo import resolve_model
from grace_bench.registry import STREAMS
from grace_bench.results.schema import PREDICTIONS, RUN_FILES, digest_of

FILES = (*RUN_FILES, "result.json")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, requests, and a run of the one on the others."""
    folder = tmp_path_factory.mktemp("made")
    data = STREAMS.get("toy")().load()
    for name, requests in (("edits", data.edits[:30]), ("upstream", data.upstream[:20])):
        (folder / f"{name}.jsonl").write_text("".join(f"{request.model_dump_json()}\n" for request in requests))
    shutil.copytree(resolve_model("toy").path, folder / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        options = [
            "stream=jsonl",
            "stream.task=classification",
            "editor=grace",
            "editor.replacement=replace_last",
            "max_edits=8",
            "eval_every=3",
            "seed=2",
        ]
        paths = [f"stream.path={folder}/edits.jsonl", f"stream.upstream_path={folder}/upstream.jsonl"]
        assert main(["run", *options, *paths, f"model={folder}/model", "layer=second", f"out={folder}/runs"]) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of the run, with the model and the requests where they were."""
    (config,) = made.rglob("config.yaml")
    return Path(shutil.copytree(config.parent, tmp_path / "run"))


@pytest.fixture
def moved(made: Path, run: Path) -> Path:
    """The run with a model and requests of its own, beside it."""
    for name in ("model", "edits.jsonl", "upstream.jsonl"):
        source, target = made / name, run.parent / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(run.parent)))
    return run


def check(folder: Path) -> dict[str, Finding]:
    return {finding.what: finding for finding in Checker().check(folder)}


def failing(folder: Path) -> set[str]:
    return {what for what, finding in check(folder).items() if not finding.holds}


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content, indent=2))


def change_line(path: Path, number: int, **values: Any) -> None:
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **values})
    path.write_text("".join(f"{line}\n" for line in lines))


def test_a_run_that_nobody_touched_holds_in_every_point_and_is_left_as_it_is(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(run)
    assert main(["check", str(run)]) == 0
    folder, *lines, told, _ = capsys.readouterr().out.splitlines()
    assert folder == str(run)
    assert {line.split()[0] for line in lines} == {"same", "note"}
    assert told == f"{len(lines) - 1} same"
    assert snapshot(run) == before
    said = check(run)
    assert {*FILES, "configuration", "stream", "model", "layer", "editor", "counts", "metrics"} <= said.keys()
    result = json.loads((run / "result.json").read_bytes())
    assert said["model"].told == result["model"]["fingerprint"][:12]
    assert said["stream"].told == result["stream"]["fingerprint"][:12]


@pytest.mark.parametrize("editor", ["none", "grace"])
@pytest.mark.parametrize("is_right", [False, True])
def test_a_run_without_upstream_data_holds_although_evaluations_had_nothing_to_score(
    editor: str, is_right: bool, made: Path, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in next(made.rglob("runs/**/edits.jsonl")).open()]
    chosen = {record["id"] for record in records if record["was_error"] is not is_right}
    lines = [line for line in (made / "edits.jsonl").open() if json.loads(line)["id"] in chosen]
    assert lines
    (tmp_path / "edits.jsonl").write_text("".join(lines))
    options = ["stream=jsonl", "stream.task=classification", f"editor={editor}", "eval_every=2", "layer=second"]
    paths = [f"stream.path={tmp_path}/edits.jsonl", f"model={made}/model", f"out={tmp_path}/runs"]
    assert main(["run", *options, *paths]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_bytes())["metrics"]["TRR"] is None
    assert failing(result.parent) == set()
    # What was scored, though, must still be there.
    rows = pd.read_parquet(result.parent / "predictions.parquet")
    if not is_right:
        rewrite_predictions(result.parent, rows[rows.n_edits < rows.n_edits.max()])
        assert "evaluations of predictions.parquet" in failing(result.parent)


def first_edit(run: Path) -> int:
    return next(i for i, line in enumerate((run / "edits.jsonl").open()) if json.loads(line)["edited"])


def change_score_after(run: Path) -> None:
    change_line(run / "edits.jsonl", first_edit(run), score_after=0.25)


def undo_an_edit(run: Path) -> None:
    change_line(run / "edits.jsonl", first_edit(run), edited=False)


def change_seconds(run: Path) -> None:
    change_line(run / "edits.jsonl", first_edit(run), seconds=1000.0)


def swap_candidates(run: Path) -> None:
    first, second = (json.loads(line)["id"] for line in (run / "edits.jsonl").read_text().splitlines()[:2])
    change_line(run / "edits.jsonl", 0, id=second)
    change_line(run / "edits.jsonl", 1, id=first)


def better_line(run: Path) -> None:
    change_line(run / "metrics.jsonl", -1, TRR=0.125)


def better_result(run: Path) -> None:
    change_json(run / "result.json", lambda result: result["metrics"].update(TRR=0.125))


def faster_result(run: Path) -> None:
    change_json(run / "result.json", lambda result: result["cost"].update(eval_seconds=0.0))


def other_schedule(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("eval_every: 3", "eval_every: 4"))


def other_out(run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(re.sub("^out: .*$", "out: elsewhere", config.read_text(), flags=re.MULTILINE))


def rewrite_predictions(run: Path, rows: pd.DataFrame) -> None:
    pq.write_table(pa.Table.from_pandas(rows, schema=PREDICTIONS, preserve_index=False), run / "predictions.parquet")


def drop_a_prediction(run: Path) -> None:
    rows = pd.read_parquet(run / "predictions.parquet")
    rewrite_predictions(
        run, rows.drop(rows[(rows.stream == "edited") & (rows.n_edits == rows.n_edits.max())].index[:1])
    )


def change_a_prediction(run: Path) -> None:
    rows = pd.read_parquet(run / "predictions.parquet")
    rows.loc[rows[(rows.stream == "upstream") & (rows.n_edits == 3)].index[0], "score"] = 0.5
    rewrite_predictions(run, rows)


def change_the_editor(run: Path) -> None:
    path = run / "editor" / "editor.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)


def change_the_editors_settings(run: Path) -> None:
    change_json(run / "editor" / "editor.json", lambda header: header["settings"].update(eps_init=7.0))


ES, TRR = "ES, from edits.jsonl", "TRR, from predictions.parquet"


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (change_score_after, {"edits.jsonl", ES}),
        (undo_an_edit, {"edits.jsonl", "n_edits of each candidate", "counts", "seconds of the edits"}),
        (change_seconds, {"edits.jsonl", "seconds of the edits"}),
        (swap_candidates, {"edits.jsonl", "order of the candidates"}),
        (better_line, {"metrics.jsonl", "metrics", TRR, "Avg, from TRR and ERR"}),
        (better_result, {"result.json", "metrics"}),
        (faster_result, {"result.json"}),
        (other_schedule, {"config.yaml", "configuration", "settings"}),
        (other_out, {"config.yaml"}),
        (drop_a_prediction, {"predictions.parquet", "edited requests that ERR is taken over"}),
        (change_a_prediction, {"predictions.parquet", TRR}),
        (change_the_editor, {"editor/editor.safetensors"}),
        (change_the_editors_settings, {"editor/editor.json", "editor"}),
    ],
)
def test_what_was_changed_is_named_and_so_is_what_no_longer_follows(
    run: Path, change: Callable[[Path], None], noticed: set[str]
) -> None:
    change(run)
    assert failing(run) == noticed


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_anywhere_or_gone_is_named_with_what_is_wrong(run: Path, name: str) -> None:
    content, choice = (run / name).read_bytes(), random.Random(name)
    for length in (0, choice.randrange(1, len(content)), len(content) - 2):
        (run / name).write_bytes(content[:length])
        finding = check(run)[name]
        assert finding.verdict == "differs", length
        assert finding.told
        assert "\n" not in finding.told
    if name != "result.json":
        (run / name).unlink()
        assert check(run)[name].told == "is not there"


def test_other_weights_and_other_requests_are_noticed(moved: Path) -> None:
    assert failing(moved) == {"config.yaml", "configuration"}, "the paths are others"
    weights = moved.parent / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, weights)
    requests = moved.parent / "edits.jsonl"
    requests.write_text("".join(requests.read_text().splitlines(keepends=True)[1:]))
    said = check(moved)
    assert said["model"].verdict == said["stream"].verdict == said["editor"].verdict == "differs"
    assert re.fullmatch(r"recorded [0-9a-f]{12}, now [0-9a-f]{12}", said["model"].told)
    assert "saved for other weights" in said["editor"].told
    assert said["order of the candidates"].verdict == "differs"


def swap_ids(vocabulary: dict[str, int]) -> None:
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


@pytest.mark.parametrize("changed", ["config.json", "tokenizer.json"])
def test_another_configuration_or_tokenizer_of_the_same_weights_is_noticed(
    changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(resolve_model("atlas-text").path, tmp_path / "model"))
    options = ["stream=atlas-text", "editor=none", "max_edits=2", "eval_every=2", "max_upstream=2", "seed=0"]
    options += ["wandb.mode=disabled", f"model={model}", f"out={tmp_path / 'runs'}"]
    assert main(["run", *options]) == 0
    (config,) = (tmp_path / "runs").rglob("config.yaml")
    run, what = config.parent, "model's configuration and tokenizer"
    assert check(run)[what].verdict == "same"
    if changed == "config.json":
        change_json(model / changed, lambda config: config.update(layer_norm_epsilon=0.01))
    else:
        change_json(model / changed, lambda tokenizer: swap_ids(tokenizer["model"]["vocab"]))
    said = check(run)
    assert (said["model"].verdict, said[what].verdict) == ("same", "differs")
    change_json(run / "result.json", lambda result: result["model"].pop("config_fingerprint"))
    assert check(run)[what].told == "no hash was recorded"


def test_what_cannot_be_checked_says_why_and_is_no_success(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(moved.parent / "model")
    (moved.parent / "upstream.jsonl").unlink()
    said = check(moved)
    unchecked = {what for what, finding in said.items() if finding.verdict == "not checked"}
    assert unchecked == {"stream", "model", "editor"}
    assert f"{moved.parent}/upstream.jsonl" in said["stream"].told
    assert f"{moved.parent}/model: no such folder" in said["model"].told
    assert main(["check", str(moved)]) == 1
    assert "3 not checked" in capsys.readouterr().out


def test_another_environment_is_told_of_and_is_no_failure(run: Path) -> None:
    def elsewhere(result: dict[str, Any]) -> None:
        result["environment"].update(torch="1.0", threads=64, git={"commit": "0" * 40, "modified": True})
        result["digest"] = digest_of(result)

    change_json(run / "result.json", elsewhere)
    said = check(run)
    assert failing(run) == set()
    assert said["torch"].verdict == said["threads"].verdict == said["git"].verdict == "note"
    assert said["torch"].told.startswith("recorded 1.0, now ")
    assert said["threads"].told == "recorded 64, now 1"
    assert said["git"].told.startswith("recorded commit 000000000000, modified true, now ")


def test_a_result_that_records_no_hashes_is_checked_as_far_as_it_goes(run: Path) -> None:
    def earlier(result: dict[str, Any]) -> None:
        for name in ("configuration", "files", "digest"):
            del result[name]
        result["environment"] = {"python": "3.11.0"}

    change_json(run / "result.json", earlier)
    said = check(run)
    assert failing(run) == set()
    assert said["edits.jsonl"].told == "no hash was recorded"
    assert said["configuration"].verdict == "same", "its first digits stand in the id"
    change_score_after(run)
    assert failing(run) == {ES}


def test_a_path_without_a_run_is_one_line_and_the_others_are_checked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["check", str(tmp_path / "empty"), str(run), str(tmp_path / "nowhere")]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"grace-bench: {tmp_path / 'empty'}: holds no finished run (no result.json in it or below it) "
        f"(and 1 more of the paths)\n"
    )
    assert str(run) in captured.out


def test_a_run_from_python_without_a_configuration_is_checked_as_far_as_its_files_go(
    tmp_path: Path, run_facts: Callable[..., Any]
) -> None:
    run_facts(tmp_path, editor="ft", task="language_modelling", checkpoint_every=1000)
    said = check(tmp_path)
    assert {what: finding.verdict for what, finding in said.items() if not finding.holds} == dict.fromkeys(
        ("stream", "model", "editor"), "not checked"
    )
    assert said["config.yaml"].verdict == "note"
    assert said[TRR].verdict == "same"


@pytest.mark.parametrize(
    ("recorded", "now", "told"),
    [
        ({"eval_every": 3}, {"eval_every": 4}, "eval_every: recorded 3, now 4"),
        ({"strict": True}, {"strict": 1}, "strict: recorded true, now 1"),
        ({"strict": 0}, {"strict": False}, "strict: recorded 0, now false"),
        ({"n": 1}, {"n": None}, "n: recorded 1, now null"),
        ({"n": None}, {"n": 0.5}, "n: recorded null, now 0.5"),
        ({"n": None}, {}, "n: recorded null, now nothing"),
        ({}, {"n": False}, "n: recorded nothing, now false"),
        ({"a": 1, "b": 2.5}, {"a": 2, "b": "2.5"}, "a (and 1 more): recorded 1, now 2"),
        ([1, 2, 2], [1, True, 2], "item 1: recorded 2, now true"),
        ([1, 2], [1], "recorded 2 items, now 1"),
        ("a", None, "recorded a, now null"),
        (float("nan"), 0.0, "recorded NaN, now 0.0"),
    ],
)
def test_a_difference_names_the_place_the_recorded_value_and_the_value_now(recorded: Any, now: Any, told: str) -> None:
    finding = _compared("settings", recorded, now)
    assert (finding.verdict, finding.told) == ("differs", told)


@pytest.mark.parametrize(("recorded", "now"), [(1, 1.0), (0.1 + 0.2, 0.3), (float("nan"), None), ([True], [True])])
def test_equal_numbers_are_the_same_whatever_their_type(recorded: Any, now: Any) -> None:
    assert _compared("settings", recorded, now).verdict == "same"


def test_a_wrong_count_at_the_first_candidate_is_told_in_numbers(run: Path) -> None:
    assert first_edit(run) == 0, "the first candidate is edited"
    change_line(run / "edits.jsonl", 0, n_edits=2)
    assert check(run)["n_edits of each candidate"].told == "item 0: recorded 2, now 1"


def test_a_run_of_batches_holds_and_a_wrong_count_in_it_is_noticed(tmp_path: Path) -> None:
    options = ["stream=atlas-facts", "editor=ultraedit", "edit=all", "edits_at_once=3", "max_edits=7", "max_upstream=5"]
    assert main(["run", *options, f"out={tmp_path}"]) == 0
    (result,) = tmp_path.rglob("result.json")
    assert failing(result.parent) == set()
    change_line(result.parent / "edits.jsonl", 4, n_edits=7)
    assert "n_edits of each candidate" in failing(result.parent)
