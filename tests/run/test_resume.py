"""Nothing is lost: a run that was stopped anywhere and resumed ends with the bytes of one that never was."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from avalanche.evaluation.metric_results import MetricValue

from grace_bench import Schedule
from grace_bench.cli import main
from grace_bench.common.signals import Interruption
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.registry import EDITORS
from grace_bench.results.schema import RunResult
from grace_bench.run.checkpoint import SCHEMA_VERSION
from grace_bench.run.loggers import RunLogger
from grace_bench.run.settings import CapabilitySettings
from helpers import KilledError, sends


class Dies(RunLogger):
    """Ends the run after some of the things it hears of: at once, or by a signal."""

    def __init__(self, after: int, *, by_signal: bool = False) -> None:
        super().__init__()
        self._left = after
        self._by_signal = by_signal

    def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        self._count()

    def after_eval_exp(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
        self._count()

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            if not self._by_signal:
                raise KilledError
            os.kill(os.getpid(), random.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))


def traces(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, times and memory aside."""
    result = json.loads((folder / "result.json").read_bytes())
    result["cost"] = {"extra_parameters": result["cost"]["extra_parameters"]}
    # Hashes of times, among others; the files are compared themselves.
    del result["files"], result["digest"]
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text().split("\n")[:-1]]
    return {
        "result.json": result,
        "edits.jsonl": [json.dumps({**line, "seconds": None}) for line in edits],
        **{
            name: (folder / name).read_bytes()
            for name in ("metrics.jsonl", "predictions.parquet", "editor/editor.safetensors", "editor/editor.json")
        },
    }


# What each keeps differs most: a codebook with values that wait, a replay memory, an adaptor, networks of its own.
QUICKLY = ("grace", "ft_retrain", "lora", "mend")
PAIRS = [
    *(
        pytest.param(name, EDITORS.get(name).supported_tasks[0], marks=() if name in QUICKLY else pytest.mark.slow)
        for name in EDITORS.entries()
    ),
    *(pytest.param("grace", task, marks=pytest.mark.slow) for task in EDITORS.get("grace").supported_tasks[1:]),
]


@pytest.mark.parametrize(("editor", "task"), PAIRS)
def test_a_run_that_dies_again_and_again_ends_as_one_that_never_did(
    tmp_path: Path, run_facts: Callable[..., RunResult], editor: str, task: str
) -> None:
    run_facts(tmp_path / "whole", editor=editor, task=task)
    expected = traces(tmp_path / "whole")
    assert any(json.loads(line)["edited"] for line in expected["edits.jsonl"])
    choice, folder, n_deaths = random.Random(f"{editor}/{task}"), tmp_path / "broken", 0
    while not (folder / "result.json").exists():
        dies = Dies(choice.randint(1, 9), by_signal=choice.random() < 0.3)
        try:
            run_facts(
                folder, editor=editor, task=task, checkpoint_every=choice.randint(1, 3), resume=True, loggers=[dies]
            )
        except (KilledError, KeyboardInterrupt):
            n_deaths += 1
    assert n_deaths >= 2
    assert traces(folder) == expected
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_capability_is_measured_as_if_the_run_had_never_died(
    tmp_path: Path, run_facts: Callable[..., RunResult], capitals: Path
) -> None:
    options: dict[str, Any] = {
        "editor": "grace",
        "task": "completion",
        "capability": CapabilitySettings(tasks=["capitals"], every=4, folders=[capitals]),
    }
    run_facts(tmp_path / "whole", **options)
    expected, folder = traces(tmp_path / "whole"), tmp_path / "broken"
    assert expected["metrics.jsonl"].count(b"CapabilityDrop/stderr") >= 2
    for after in (3, 6, 4):
        with pytest.raises(KilledError):
            run_facts(folder, resume=True, loggers=[Dies(after)], **options)
    run_facts(folder, resume=True, **options)
    assert traces(folder) == expected


@pytest.mark.parametrize("task", ["classification", pytest.param("language_modelling", marks=pytest.mark.slow)])
def test_what_is_kept_between_evaluations_never_shows_in_the_result(
    tmp_path: Path, run_facts: Callable[..., RunResult], task: str
) -> None:
    settings = {"task": task, "schedule": Schedule(eval_every=1, max_edits=10), "batch_size": 4}
    run_facts(tmp_path / "whole", **settings)
    run_facts(tmp_path / "nothing kept", engine_memory_mb=0, **settings)
    for after in (11, 7, 9):
        with pytest.raises(KilledError):
            run_facts(tmp_path / "broken", resume=True, loggers=[Dies(after)], **settings)
    run_facts(tmp_path / "broken", resume=True, **settings)
    assert traces(tmp_path / "whole") == traces(tmp_path / "nothing kept") == traces(tmp_path / "broken")


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory, run_facts: Callable[..., RunResult]) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("died")
    run_facts(root / "whole", task="qa")
    with pytest.raises(KilledError):
        run_facts(root / "stopped", task="qa", checkpoint_every=2, loggers=[Dies(17)])
    return root / "stopped", traces(root / "whole")


@pytest.fixture
def stopped(tmp_path: Path, died: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """A run that died with two checkpoints and lines after the newest, and what it should have come to."""
    folder, expected = died
    return shutil.copytree(folder, tmp_path / "stopped"), expected


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damaged(content: bytes, choice: random.Random) -> bytes:
    """The content cut, or with a byte changed, anywhere."""
    place = choice.randrange(len(content))
    changed = bytes([content[place] ^ 0x55]) + content[place + 1 :]
    return content[:place] + choice.choice([b"", changed])


def test_a_checkpoint_that_is_cut_or_changed_anywhere_is_recognised_and_the_one_before_it_used(
    tmp_path: Path, run_facts: Callable[..., RunResult], stopped: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = stopped
    choice = random.Random(0)
    names = [path.relative_to(folder).as_posix() for path in files_of(folder / "checkpoint")]
    names = [name for name in names if re.search("/0[0-9]+/", name)]
    assert sum(name.endswith("manifest.json") for name in names) == 2
    newest = max(path.name for path in folder.glob("checkpoint/0*"))
    starts = set()
    # All files of the newest checkpoint, one of the older.
    of_newest = [name for name in names if name.startswith(f"checkpoint/{newest}")]
    for name in [*of_newest, next(name for name in names if name not in of_newest)]:
        spoiled = tmp_path / "spoiled"
        shutil.copytree(folder, spoiled)
        (spoiled / name).write_bytes(damaged((spoiled / name).read_bytes(), choice))
        said: list[str] = []
        run_facts(spoiled, task="qa", resume=True, say=said.append)
        (line,) = said
        assert traces(spoiled) == expected, name
        starts.add(re.findall("resumed at [0-9]+ edits|started anew", line)[0])
        if name.startswith(f"checkpoint/{newest}"):
            assert f"dropped checkpoint {newest} ({Path(name).name} is not whole)" in line
        shutil.rmtree(spoiled)
    assert len(starts) > 1, starts


RUN_FILES = ("edits.jsonl", "metrics.jsonl", "checkpoint/predictions.arrows")


def recorded(folder: Path) -> list[dict[str, int]]:
    """How much of each file of the run the checkpoints recorded, the newest first."""
    manifests = sorted(folder.glob("checkpoint/0*/manifest.json"), reverse=True)
    files = [json.loads(path.read_bytes())["run_files"] for path in manifests]
    return [{name: prefix["size"] for name, prefix in found.items()} for found in files]


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_file_of_the_run_that_is_cut_or_changed_is_made_again_from_the_checkpoint_before_or_the_run_is_refused(
    tmp_path: Path, run_facts: Callable[..., RunResult], stopped: tuple[Path, dict[str, Any]], name: str
) -> None:
    folder, expected = stopped
    choice = random.Random(name)
    newest, older = (sizes[name] for sizes in recorded(folder))
    whole = (folder / name).read_bytes()
    assert len(whole) >= newest >= older > 0
    if newest > older:
        spoiled = tmp_path / "spoiled"
        shutil.copytree(folder, spoiled)
        (spoiled / name).write_bytes(whole[:older] + damaged(whole[older:newest], choice))
        said: list[str] = []
        run_facts(spoiled, task="qa", resume=True, say=said.append)
        (line,) = said
        assert re.search(rf"resumed at \d+ edits; dropped checkpoint \d+ \({name} was cut or changed\)", line)
        assert traces(spoiled) == expected
    for content in (damaged(whole[:older], choice), b"", None):
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        before = {path: path.read_bytes() for path in files_of(folder)}
        says = f"{folder / name}: was cut or changed since the run's checkpoints; put the file back as it was"
        with pytest.raises(UserError, match=re.escape(says)):
            run_facts(folder, task="qa", resume=True)
        assert {path: path.read_bytes() for path in files_of(folder)} == before
    (folder / name).write_bytes(whole)
    run_facts(folder, task="qa", resume=True)
    assert traces(folder) == expected


def test_lines_after_the_checkpoint_and_a_checkpoint_that_was_being_written_are_dropped_and_named(
    tmp_path: Path, run_facts: Callable[..., RunResult], stopped: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = stopped
    newest = max((folder / "checkpoint").glob("0*"))
    shutil.copytree(newest, newest.with_name(".000009.partial"))
    (newest.with_name(".000009.partial") / "manifest.json").unlink()
    sizes = recorded(folder)[0]
    for name, more in (("edits.jsonl", b'{"index": 98}\n{"index": 99'), ("metrics.jsonl", b"{}\n{}\n")):
        (folder / name).write_bytes((folder / name).read_bytes()[: sizes[name]] + more)
    said: list[str] = []
    run_facts(folder, task="qa", resume=True, say=said.append)
    (line,) = said
    assert "a checkpoint that was being written" in line
    assert "1 line and half a line of edits.jsonl, 2 lines of metrics.jsonl" in line
    assert traces(folder) == expected


def test_a_checkpoint_names_only_what_is_on_disk_already(
    tmp_path: Path, run_facts: Callable[..., RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}
    fsync, replace = os.fsync, Path.replace

    def note(handle: int) -> None:
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def check(path: Path, target: Path) -> Path:
        if (path / "manifest.json").is_file():
            for name, prefix in json.loads((path / "manifest.json").read_bytes())["run_files"].items():
                assert synced[(tmp_path / name).stat().st_ino] >= prefix["size"]
            assert all(synced[inner.stat().st_ino] == inner.stat().st_size for inner in path.iterdir())
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "replace", check)
    run_facts(tmp_path, task="qa", editor="none", checkpoint_every=2)
    assert synced


def test_the_size_of_a_checkpoint_does_not_depend_on_what_was_written_so_far(
    tmp_path: Path, run_facts: Callable[..., RunResult]
) -> None:
    sizes: list[tuple[int, int]] = []

    class Weigh(RunLogger):
        """Notes the size of the newest checkpoint and of the files of the run."""

        def after_candidate(self, strategy: EditorStrategy, metric_values: list[MetricValue]) -> None:
            newest = max(tmp_path.glob("checkpoint/0*"))
            state, manifest = (json.loads((newest / name).read_bytes()) for name in ("state.json", "manifest.json"))
            # What the editor and the protocol hold by nature: indices, times and scores, no text of theirs.
            del state["run"], state["environment"], manifest["identity"]
            written = sum((tmp_path / name).stat().st_size for name in RUN_FILES)
            sizes.append((len(json.dumps(state)) + len(json.dumps(manifest)), written))

    run_facts(tmp_path, task="qa", editor="none", checkpoint_every=1, loggers=[Weigh()])
    assert len(sizes) >= 10
    (first, little), (last, much) = sizes[0], sizes[-1]
    assert much > little + 5000
    # Numbers have more digits.
    assert abs(last - first) < 20


def test_when_checkpoints_are_written_never_shows_in_the_result(
    tmp_path: Path, run_facts: Callable[..., RunResult], died: tuple[Path, dict[str, Any]]
) -> None:
    _, after_every_edit = died
    for every in (3, 1000):
        run_facts(tmp_path / str(every), task="qa", checkpoint_every=every)
        assert traces(tmp_path / str(every)) == after_every_edit


def test_a_state_leaves_edits_pending_that_are_pending(
    tmp_path: Path, run_facts: Callable[..., RunResult], stopped: tuple[Path, dict[str, Any]]
) -> None:
    # Otherwise the tests above would not show that such states are complete.
    states = [json.loads(path.read_bytes()) for path in stopped[0].glob("checkpoint/0*/state.json")]
    assert any(state["run"]["backlog"]["candidates"] for state in states)
    assert any(state["run"]["editor"].get("pending") for state in states)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def test_a_checkpoint_of_another_schema_version_is_refused_and_nothing_is_touched(
    run_facts: Callable[..., RunResult], stopped: tuple[Path, dict[str, Any]]
) -> None:
    folder, _ = stopped
    for manifest in folder.glob("checkpoint/0*/manifest.json"):
        rewritten(manifest, lambda content: content.update(schema_version=99, news="of a later version"))
    before = {path: path.read_bytes() for path in files_of(folder)}
    with pytest.raises(UserError, match=f"schema version 99, this grace-bench reads {SCHEMA_VERSION}"):
        run_facts(folder, task="qa", resume=True)
    assert {path: path.read_bytes() for path in files_of(folder)} == before


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"schedule": Schedule(eval_every=4, max_edits=11)}, "another configuration: max_edits=10, not 11"),
        ({"editor": "ft"}, "another configuration: editor.name=grace, not ft"),
        ({"model_seed": 1}, "the model's weights are not the ones that the run began with"),
        ({"n_requests": 5}, "the stream's requests are not the ones that the run began with"),
    ],
)
def test_a_checkpoint_of_another_configuration_model_or_data_is_refused_and_nothing_is_touched(
    run_facts: Callable[..., RunResult], stopped: tuple[Path, dict[str, Any]], changed: dict[str, Any], says: str
) -> None:
    folder, _ = stopped
    before = {path: path.read_bytes() for path in files_of(folder)}
    with pytest.raises(UserError, match=re.escape(says)):
        run_facts(folder, **{"task": "qa", "resume": True, **changed})
    assert {path: path.read_bytes() for path in files_of(folder)} == before


def test_a_checkpoint_of_another_tokenizer_under_the_same_weights_is_refused(
    run_facts: Callable[..., RunResult],
    stopped: tuple[Path, dict[str, Any]],
    word_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(word_tokenizer, "clean_up_tokenization_spaces", True)
    with pytest.raises(
        UserError, match="the model's configuration or tokenizer is not the one that the run began with"
    ):
        run_facts(stopped[0], task="qa", resume=True)


SMALL = ("stream=toy", "max_edits=12", "eval_every=5", "max_upstream=20", "checkpoint_every=2", "wandb.mode=disabled")


def grace_bench(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "grace_bench", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def folder_in(out: Path) -> Path:
    (config,) = out.rglob("config.yaml")
    return config.parent


def has_checkpoint(out: Path, number: int) -> bool:
    # Not further down: a checkpoint's folder has another name while it is written, and may be gone when it is opened.
    return any(int(path.name) >= number for path in out.glob("*/*/*/*/checkpoint/0*"))


def wait_for_checkpoint(running: "subprocess.Popen[str]", out: Path, number: int) -> None:
    while not has_checkpoint(out, number):
        assert running.poll() is None, running.communicate()
        time.sleep(0.01)


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    """A disk that takes no file larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_real_process_is_killed_refused_interrupted_and_resumed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "editor=grace", "editor.n_iter=300", "seed=1"]
    assert main(["run", *options, f"out={tmp_path / 'whole'}"]) == 0
    expected = traces(folder_in(tmp_path / "whole"))
    out = tmp_path / "runs"
    first = grace_bench("run", *options, f"out={out}")
    wait_for_checkpoint(first, out, 3)
    # It must not end while the others are refused.
    first.send_signal(signal.SIGSTOP)
    folder = folder_in(out)
    capfd.readouterr()
    for command in (["run", *options, f"out={out}"], ["resume", str(folder)]):
        assert main(command) == 2
        assert re.fullmatch(
            rf"grace-bench: {folder}: process {first.pid} on \S+ \(since [-0-9 :]+\) is at work on it\n",
            capfd.readouterr().err,
        )
    first.kill()
    first.communicate()

    # The lock of a dead process is no obstacle, and neither is an unfinished run to one that is told to resume.
    with sends(signal.SIGTERM, when=lambda: has_checkpoint(out, 5)):
        code = main(["run", *options, f"out={out}", "existing=resume"])
    said, err = capfd.readouterr()
    assert code == 130, err
    assert re.match(rf"{folder}: resumed at \d+ edits", said)
    assert re.search(r"grace-bench: interrupted at \d+ edits; `grace-bench resume \S+` goes on\n$", err)
    assert main(["run", *options, f"out={out}"]) == 2
    assert f"`grace-bench resume {folder}` or existing=resume goes on with it" in capfd.readouterr().err
    assert main(["resume", str(folder)]) == 0
    found = traces(folder)
    for result in (found["result.json"], expected["result.json"]):
        # The folder of all runs, and in which way Python was started.
        result["environment"].pop("command")
    assert found == expected
    assert {path.name for path in folder.iterdir()} == {path.name for path in folder_in(tmp_path / "whole").iterdir()}


def test_a_full_disk_is_told_of_in_one_line_and_the_run_goes_on_once_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "editor=none"]
    assert main(["run", *options, f"out={tmp_path / 'whole'}"]) == 0
    capsys.readouterr()
    with files_of_at_most(5000):
        code = main(["run", *options, f"out={tmp_path / 'runs'}"])
    (folder,) = (path.parent for path in (tmp_path / "runs").rglob("config.yaml"))
    lines = capsys.readouterr().err.splitlines()
    assert code == 1
    assert lines[-1].startswith(f"grace-bench: {folder}: ")
    assert "File too large" in lines[-1]
    assert "Traceback" not in "".join(lines)
    assert main(["resume", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"{folder}: retried, after it failed (OSError: [Errno 27] File too large)" in said
    assert traces(folder)["metrics.jsonl"] == traces(folder_in(tmp_path / "whole"))["metrics.jsonl"]
    assert not (folder / "error.json").exists()


def test_existing_resume_says_of_each_run_of_a_sweep_what_became_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "editor=none", f"out={tmp_path}"]
    assert main(["run", *options, "seed=0"]) == 0
    finished = folder_in(tmp_path)
    assert main(["run", *options, "seed=1"]) == 0
    unfinished = finished.with_name(finished.name.replace("-s0", "-s1"))
    (unfinished / "result.json").unlink()
    capsys.readouterr()
    assert main(["run", "-m", *options, "seed=0,1,2", "existing=resume"]) == 0
    said = capsys.readouterr().out
    assert f"finished before, reused: {finished}" in said
    assert re.search(
        rf"{unfinished}: started anew, without a whole checkpoint; dropped \d+ lines of edits.jsonl, \d+ lines",
        said,
    )
    assert f"{finished.with_name(finished.name.replace('-s0', '-s2'))}: started\n" in said
    assert len(list(tmp_path.rglob("result.json"))) == 3
    assert main(["resume", str(finished), str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert f"finished before, reused: {finished}" in captured.out
    assert captured.err == f"grace-bench: {tmp_path / 'nothing' / 'config.yaml'}: No such file or directory\n"


def test_what_a_process_left_that_was_killed_right_after_its_result_is_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "editor=none", f"out={tmp_path}"]
    assert main(["run", *options]) == 0
    folder = folder_in(tmp_path)
    before = {path: path.read_bytes() for path in files_of(folder)}
    (folder / "checkpoint" / "000001").mkdir(parents=True)
    for name in (".lock", ".owner.json"):
        (folder / name).write_text("")
    capsys.readouterr()
    assert main(["run", *options]) == 0
    assert capsys.readouterr().out == f"finished before, reused: {folder}\n"
    assert {path: path.read_bytes() for path in files_of(folder)} == before
    assert not (folder / "checkpoint").exists()


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            interruption.can_defer = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interruption.is_requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_wandb_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    options = [*SMALL[:-1], "wandb.mode=offline", "editor=none", f"out={tmp_path}"]
    assert main(["run", *options]) == 0
    folder = folder_in(tmp_path)
    (folder / "result.json").unlink()
    # A segment is named by the second in which it began.
    time.sleep(1)
    assert main(["resume", str(folder)]) == 0
    segments = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    assert len(segments) == 2
    assert {name.rsplit("-", 1)[1] for name in segments} == {(folder / "wandb" / "run-id").read_text()}


def test_a_configuration_that_was_changed_since_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *SMALL, "editor=none", f"out={tmp_path}"]) == 0
    folder = folder_in(tmp_path)
    (folder / "result.json").unlink()
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("eval_every: 5", "eval_every: 6"))
    before = {path: path.read_bytes() for path in files_of(folder)}
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 2
    assert f"{config}: was changed since the run began" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files_of(folder)} == before


def test_a_folder_that_cannot_be_written_to_is_told_of_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *SMALL, "editor=none", f"out={tmp_path}"]) == 0
    folder = folder_in(tmp_path)
    (folder / "result.json").unlink()
    folder.chmod(0o500)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write everywhere")
        capsys.readouterr()
        assert main(["resume", str(folder)]) == 2
        assert capsys.readouterr().err == f"grace-bench: {folder}: Permission denied\n"
    finally:
        folder.chmod(0o700)
