"""Reference runs: what reducing keeps, what `check` says of a reduced run, and one's own runs ranked beside them."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grace_bench.analysis import reference
from grace_bench.analysis.leaderboard import Leaderboard
from grace_bench.analysis.report import read_runs, render_report
from grace_bench.common.files import hash_file
from grace_bench.errors import UserError
from grace_bench.launch.check import Checker, Finding
from grace_bench.results.reading import ITEM_COLUMNS, find_result_files, read_predictions, read_result
from grace_bench.results.reduced import reduce_run
from grace_bench.results.schema import PREDICTIONS, digest_of
from helpers import cli, module_at

ROOT = Path(__file__).parents[2]
PROTOCOL = ("stream=toy", "max_edits=6", "eval_every=6", "max_upstream=20", "wandb.mode=disabled")
KEPT = {"config.yaml", "metrics.jsonl", "predictions.parquet", "result.json"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two editors with two seeds, and one of another protocol."""
    out = tmp_path_factory.mktemp("runs")
    assert cli("run", "-m", *PROTOCOL, "editor=none,grace", "seed=0,1", f"out={out}").code == 0
    assert cli("run", *PROTOCOL, "editor=grace", "edit=all", f"out={out}").code == 0
    return out


@pytest.fixture(scope="module")
def shipped(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, reduced."""
    out = tmp_path_factory.mktemp("leaderboard")
    for file in find_result_files([runs]):
        reduce_run(file.parent, out)
    return out


@pytest.fixture
def with_reference(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "reference_folder", lambda: shipped)


@pytest.fixture
def one(shipped: Path, tmp_path: Path) -> Path:
    """A copy of a reduced run, beside the items of all of them."""
    (folder,) = (file.parent for file in shipped.rglob("result.json") if "grace" in str(file) and is_first(file))
    shutil.copytree(shipped / "items", tmp_path / "items")
    return Path(shutil.copytree(folder, tmp_path / "run"))


def is_first(file: Path) -> bool:
    result = read_result(file)
    return result.seed == 0 and result.protocol.edit == "errors"


def failing(folder: Path) -> set[str]:
    return {finding.what for finding in findings(folder) if not finding.holds}


def findings(folder: Path) -> list[Finding]:
    return Checker().check(folder)


def change(folder: Path, edit: Callable[[Any], None], *, sealed: bool) -> None:
    """Changes a result, with the digest that then belongs to it or the old one."""
    path = folder / "result.json"
    record = json.loads(path.read_bytes())
    edit(record)
    path.write_text(json.dumps({**record, "digest": digest_of(record)} if sealed else record))


# --- reducing --------------------------------------------------------------------------------------------------------


def test_a_reduced_run_has_the_record_and_the_last_scores(runs: Path, shipped: Path) -> None:
    files = find_result_files([runs])
    assert len(files) == 5
    for file in files:
        whole, folder = read_result(file), shipped / file.parent.relative_to(runs)
        reduced = read_result(folder / "result.json")
        assert {path.name for path in folder.iterdir()} == KEPT
        assert reduced.reduced_from == whole.digest
        assert set(reduced.files) == KEPT - {"result.json"}
        varying = {"files", "digest", "reduced_from"}
        assert reduced.model_dump(exclude=varying) == whole.model_dump(exclude=varying)
        before, after = (
            read_predictions(path / "predictions.parquet", columns=PREDICTIONS.names) for path in (file.parent, folder)
        )
        lost = dict.fromkeys(("text", "entry", "distance"))
        last = [row | lost for row in before if row["n_edits"] == whole.metrics["n_edits"]]
        assert after == sorted(last, key=lambda row: [row[name] for name in ITEM_COLUMNS])


def test_runs_of_the_same_items_share_them(shipped: Path, runs: Path) -> None:
    folders = [file.parent for file in find_result_files([shipped])]
    used = Counter(pq.read_schema(folder / "predictions.parquet").metadata[b"items"].decode() for folder in folders)
    assert {path.stem for path in (shipped / "items").iterdir()} == set(used)
    assert len(used) < len(folders)
    for folder in folders:
        assert not {*ITEM_COLUMNS} & {*pq.read_schema(folder / "predictions.parquet").names}


def test_conditions_on_the_rows_of_a_reduced_run_are_those_on_any_run(one: Path) -> None:
    path = one / "predictions.parquet"
    rows = read_predictions(path, columns=["request_id", "score"], filters=[("stream", "=", "edited")])
    whole = read_predictions(path, columns=["stream", "request_id", "score"])
    assert rows == [
        {"request_id": row["request_id"], "score": row["score"]} for row in whole if row["stream"] == "edited"
    ]
    assert 0 < len(rows) < len(whole)


def test_a_reduced_run_may_have_no_items(one: Path, tmp_path: Path) -> None:
    path = one / "predictions.parquet"
    table = pq.read_table(path)
    items = tmp_path / "items" / f"{table.schema.metadata[b'items'].decode()}.parquet"
    pq.write_table(pq.read_table(items).slice(0, 0), tmp_path / "empty")
    digest = hash_file(tmp_path / "empty")
    (tmp_path / "empty").rename(items.with_stem(digest))
    pq.write_table(table.slice(0, 0).replace_schema_metadata({"items": digest}), path)
    assert read_predictions(path, columns=["stream", "score"]) == []


def test_items_that_are_gone_changed_or_of_another_run_are_refused(one: Path, tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            read_predictions(one / "predictions.parquet", columns=["n_edits"])
        return str(caught.value)

    def name_items(name: str) -> None:
        path = one / "predictions.parquet"
        table = pq.read_table(path).replace_schema_metadata({"items": name})
        pq.write_table(table, path)

    digest = pq.read_schema(one / "predictions.parquet").metadata[b"items"].decode()
    file = tmp_path / "items" / f"{digest}.parquet"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert refusal() == f"{file}: was changed; its name is the SHA-256 of what it held"
    file.unlink()
    assert f"lacks items/{digest}.parquet of the folder that the run was taken from" in refusal()
    assert failing(one) >= {"predictions.parquet"}
    short = pq.read_table(BytesIO(content)).slice(1)
    pq.write_table(short, tmp_path / "short")
    other = hash_file(tmp_path / "short")
    (tmp_path / "short").rename(file.with_stem(other))
    name_items(other)
    assert f"has {len(short) + 1} rows, and there are {len(short)} items" in refusal()
    for name in ("../../run/predictions", "0" * 63, ""):
        name_items(name)
        assert "metadata 'items' should be a SHA-256 in hexadecimal digits" in refusal()


def test_the_record_of_a_run_as_it_ended_says_nothing_of_reducing(runs: Path) -> None:
    for file in find_result_files([runs]):
        record = json.loads(file.read_bytes())
        assert "reduced_from" not in record
        assert read_result(file).model_dump_json(indent=2) + "\n" == file.read_text(encoding="utf-8")


def test_reducing_again_writes_nothing_and_a_new_result_replaces_the_old(runs: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(find_result_files([runs])[0].parent, tmp_path / "run"))
    first = reduce_run(run, tmp_path / "out")
    written = (first / "predictions.parquet").stat().st_mtime_ns
    assert reduce_run(run, tmp_path / "out") == first
    assert (first / "predictions.parquet").stat().st_mtime_ns == written
    change(run, lambda record: record["cost"].update(peak_rss_mb=1.0), sealed=True)
    reduce_run(run, tmp_path / "out")
    assert read_result(first / "result.json").cost.peak_rss_mb == 1.0


def test_what_cannot_be_reduced_is_refused(one: Path, runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reduced before"):
        reduce_run(one, tmp_path / "out")
    with pytest.raises(UserError, match=r"result\.json: No such file"):
        reduce_run(tmp_path, tmp_path / "out")
    for name in ("../elsewhere", "/elsewhere", "", "toy/.hidden"):
        run = Path(shutil.copytree(find_result_files([runs])[0].parent, tmp_path / "run2", dirs_exist_ok=True))
        change(run, lambda record, name=name: record.update(run_id=name), sealed=True)  # type: ignore[misc]
        with pytest.raises(UserError, match="field 'run_id'"):
            reduce_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- check -----------------------------------------------------------------------------------------------------------


def test_a_reduced_run_passes_and_what_it_lacks_is_a_note(shipped: Path, one: Path) -> None:
    done = cli("check", shipped)
    assert done.code == 0, done.out
    of = {finding.what: finding for finding in findings(one)}
    assert of["reduced"].verdict == of["edits.jsonl"].verdict == of["editor/editor.json"].verdict == "note"
    for what in ("stream", "model", "editor, from config.yaml", "TRR, from predictions.parquet", "before", "metrics"):
        assert of[what].verdict == "same"


def test_a_stream_or_model_that_is_not_here_is_a_note_only_in_a_reduced_run(one: Path) -> None:
    config = one / "config.yaml"
    config.write_text(config.read_text().replace("model: null", "model: /nowhere"))
    of = {finding.what: finding for finding in findings(one)}
    assert of["model"].verdict == "note"
    assert of["model"].told.startswith("not checked: ")
    # But the file is no longer the one that was recorded.
    assert of["config.yaml"].verdict == "differs"


@pytest.mark.parametrize("sealed", [False, True])
def test_a_metric_changed_by_hand_is_noticed(one: Path, sealed: bool) -> None:
    change(one, lambda record: record["metrics"].update(ERR=1.5), sealed=sealed)
    assert failing(one) == {"metrics"} | (set() if sealed else {"result.json"})


def test_changed_predictions_are_noticed_whatever_is_sealed(one: Path) -> None:
    path = one / "predictions.parquet"
    rows = read_predictions(path, columns=PREDICTIONS.names)
    for row in rows:
        if row["stream"] == "edited":
            row.update(request_id=f"another-{row['request_id']}", score=0.25)
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS), path)
    assert failing(one) == {
        "predictions.parquet",
        "ERR, from predictions.parquet",
        "edited requests that are no candidates",
    }


def test_other_settings_of_the_editor_are_noticed(one: Path) -> None:
    change(one, lambda record: record["editor"].update(eps_init=0.125), sealed=True)
    assert failing(one) == {"editor, from config.yaml"}


def test_a_listed_file_that_is_gone_is_noticed(one: Path) -> None:
    (one / "metrics.jsonl").unlink()
    assert failing(one) == {"metrics.jsonl"}


# --- ranking ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("with_reference")
def test_own_runs_are_ranked_among_the_reference_runs_with_statistics(runs: Path) -> None:
    own = runs / "toy" / "toy" / "grace"
    board = Leaderboard.read([own], reference=True)
    table, other = board.tables
    assert {row.name for row in table.rows} == {"grace", "grace (reference)", "none (reference)"}
    assert {row.name for row in other.rows} == {"grace", "grace (reference)"}
    assert (table.conditions["protocol.edit"], other.conditions["protocol.edit"]) == ('"errors"', '"all"')
    by_name = {row.name: row for row in table.rows}
    assert by_name["grace"].seeds == by_name["grace (reference)"].seeds == (0, 1)
    for first, second in zip(by_name["grace"].results, by_name["grace (reference)"].results, strict=True):
        assert first.metrics == second.metrics
    assert not any(row.not_compared for row in table.rows)
    twin = by_name["grace (reference)"].comparison
    assert twin is not None
    assert (twin.difference, twin.n_seeds, twin.p_value) == (0.0, 2, 1.0)


@pytest.mark.usefixtures("with_reference")
def test_programs_tell_reference_rows_apart_and_see_no_column_without_them(runs: Path) -> None:
    rows = json.loads(cli("leaderboard", runs, "--reference", "--format", "json").out)
    assert {(row["editor"], row["reference"]) for row in rows} == {
        (editor, is_reference) for editor in ("none", "grace") for is_reference in (False, True)
    }
    assert "reference" not in json.loads(cli("leaderboard", runs, "--format", "json").out)[0]
    assert "(reference): runs that ship" in cli("leaderboard", runs, "--reference").out
    compared = cli("leaderboard", runs / "toy/toy/grace", "--reference", "--compare", "grace,none", "--format", "csv")
    assert compared.code == 0
    assert "none (reference)" in compared.out


def test_without_runs_of_ones_own_the_reference_runs_stand_alone(
    runs: Path, shipped: Path, with_reference: None
) -> None:
    shown = {row.name for table in Leaderboard.read([], reference=True).tables for row in table.rows}
    assert shown == {"none (reference)", "grace (reference)"}
    # The folder itself is not taken for runs of one's own beside itself.
    assert len(reference.find_runs([shipped], reference=True)) == len(find_result_files([runs]))
    for command in (["leaderboard"], ["report", "--out", str(runs / "no")]):
        done = cli(*command)
        assert done.code == 2
        assert "required: runs" in done.err


@pytest.mark.usefixtures("with_reference")
def test_the_report_shows_reference_runs_without_their_edits(runs: Path, tmp_path: Path) -> None:
    assert cli("report", runs / "toy/toy/grace", "--reference", "--out", tmp_path).code == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "grace (reference)" in page
    assert "A reduced run: its single edits are not here." in page
    read = read_runs([runs / "toy/toy/grace"], reference=True)[0]
    assert {run.edits is None for run in read if run.is_reference} == {True}
    assert "edits lost" in render_report([run for run in read if not run.is_reference])


def test_runs_packed_for_the_wheel_are_the_same_runs(
    runs: Path, shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(shipped, tmp_path / "leaderboard"))
    (folder / "__init__.py").touch()
    monkeypatch.setattr(reference, "files", lambda package: folder)
    whole = [reference.find_runs([runs], reference=True), cli("leaderboard", runs, "--reference").out]
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pack = module_at(ROOT / "setup.py").pack
    pack(folder)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"__init__.py", "runs.tar.xz"}
    unpacked = reference.reference_folder()
    assert unpacked is not None
    assert unpacked != folder
    after = {path.relative_to(unpacked): path.read_bytes() for path in unpacked.rglob("*") if path.is_file()}
    assert after == {path: content for path, content in before.items() if path.name != "__init__.py"}
    found = reference.find_runs([runs], reference=True)
    assert [run.result for run in found] == [run.result for run in whole[0]]
    assert cli("leaderboard", runs, "--reference").out == whole[1]
    # The same runs give the same archive, wherever and whenever it is made.
    archive = (folder / "runs.tar.xz").read_bytes()
    again = Path(shutil.copytree(unpacked, tmp_path / "again"))
    pack(again)
    assert (again / "runs.tar.xz").read_bytes() == archive


def test_reference_runs_of_other_streams_are_left_out(shipped: Path, tmp_path: Path, with_reference: None) -> None:
    (file, *_) = find_result_files([shipped])
    run = Path(shutil.copytree(file.parent, tmp_path / "run"))
    change(run, lambda record: record["stream"].update(name="another"), sealed=True)
    assert [found.is_reference for found in reference.find_runs([run], reference=True)] == [False]


def test_no_reference_runs_is_one_line(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (None, tmp_path, tmp_path / "gone"):
        monkeypatch.setattr(reference, "reference_folder", lambda folder=folder: folder)
        for command in (["leaderboard", str(runs)], ["report", str(runs), "--out", str(tmp_path / "page")]):
            done = cli(*command, "--reference")
            assert done.code == 2
            assert done.err == "grace-bench: --reference: no reference runs came with this installation\n"
