"""Runs killed with SIGKILL at random points, their files torn, and resumed: the end is that of a run left alone."""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from grace_bench.cli import main

pytestmark = pytest.mark.slow
N_KILLS = 8
OPTIONS = (
    "stream=atlas-qa",
    "max_edits=40",
    "eval_every=10",
    "max_upstream=100",
    "checkpoint_every=4",
    "wandb.mode=disabled",
    "existing=resume",
)


def start(out: Path, editor: str) -> Any:
    """A process of its own that goes on with the run; its imports are done already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grace_bench.launch.run_folder", "grace_bench.run.run_benchmark"])
    process = context.Process(target=main, args=(["run", *OPTIONS, f"editor={editor}", f"out={out}"],))
    process.start()
    return process


def wait_until_at_work(process: Any, out: Path) -> None:
    while process.is_alive() and not any(
        json.loads(path.read_text() or "{}").get("pid") == process.pid for path in out.rglob(".owner.json")
    ):
        time.sleep(0.005)


def traces(out: Path) -> dict[str, Any]:
    """All that a finished run leaves, times, memory and the command aside."""
    (path,) = out.rglob("result.json")
    result = json.loads(path.read_bytes())
    del result["cost"], result["environment"]["command"], result["files"], result["digest"]
    edits = [json.loads(line) for line in (path.parent / "edits.jsonl").read_text().split("\n")[:-1]]
    names = ("metrics.jsonl", "predictions.parquet", "editor/editor.safetensors", "editor/editor.json")
    return {
        "result.json": result,
        "edits.jsonl": [{**line, "seconds": None} for line in edits],
        **{name: (path.parent / name).read_bytes() for name in names},
    }


def tear(out: Path, choice: random.Random) -> str | None:
    """Cuts a file of the run where a loss of power may: its newest checkpoint anywhere, a file that grew after that."""
    folders = sorted(out.rglob("checkpoint/0*"))
    if not folders:
        return None
    run = folders[-1].parent.parent
    manifest = json.loads((folders[-1] / "manifest.json").read_bytes())
    least = {run / name: prefix["size"] for name, prefix in manifest["run_files"].items()}
    path = choice.choice(sorted([*folders[-1].iterdir(), *least]))
    content = path.read_bytes()
    path.write_bytes(content[: choice.randrange(least.get(path, 0), len(content) + 1)])
    return path.name


@pytest.mark.parametrize("editor", ["grace", "ft_retrain", "lora"])
def test_runs_killed_at_random_points_end_with_the_bytes_of_one_left_alone(
    tmp_path: Path, editor: str, capfd: pytest.CaptureFixture[str]
) -> None:
    choice = random.Random(editor)
    whole = start(tmp_path / "whole", editor)
    wait_until_at_work(whole, tmp_path / "whole")
    started = time.monotonic()
    whole.join()
    assert whole.exitcode == 0
    seconds, expected = time.monotonic() - started, traces(tmp_path / "whole")

    n_kills, n_torn, n_runs = 0, 0, 0
    while n_kills < N_KILLS:
        out = tmp_path / str(n_runs)
        n_runs += 1
        while not any(out.rglob("result.json")):
            process = start(out, editor)
            wait_until_at_work(process, out)
            process.join(choice.uniform(0, 0.6 * seconds))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), capfd.readouterr().err
            if process.exitcode:
                n_kills += 1
                n_torn += choice.random() < 0.5 and tear(out, choice) is not None
        assert traces(out) == expected
    with capfd.disabled():
        print(f"\n| {editor} | {n_kills} | {n_torn} | {n_runs} | all |")
