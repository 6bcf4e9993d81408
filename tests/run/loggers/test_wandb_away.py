"""Weights & Biases away: whatever it does, the run goes on, says so once, and leaves the same folder behind."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(sys.executable).with_name("grace-bench")
KEY = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_thisIsNoTokenOfAnyone"
TIMES = {"run_id", "cost", "environment", "files", "digest"}


@dataclass(frozen=True)
class Done:
    """A run that has ended."""

    folder: Path
    err: str
    seconds: float

    @property
    def told(self) -> list[str]:
        """What was said about W&B."""
        return [line for line in self.err.splitlines() if "wandb" in line.lower() or "w&b" in line.lower()]


def run(out: Path, mode: str, **environment: str) -> Done:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    home = {"HOME": str(out), "NETRC": str(out / "no-netrc"), "WANDB_INIT_TIMEOUT": "2"}
    settings = ["stream=toy", "editor=none", "max_edits=3", "eval_every=2", "max_upstream=20"]
    began = time.monotonic()
    done = subprocess.run(
        [SCRIPT, "run", *settings, f"wandb.mode={mode}", f"out={out / 'runs'}"],
        env={**kept, **home, **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (file,) = (out / "runs").rglob("result.json")
    return Done(file.parent, done.stderr, seconds)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(tmp_path_factory.mktemp("undisturbed"), "disabled")


def whole(done: Done, undisturbed: Done) -> None:
    """Asserts that a folder holds what a run without W&B leaves, times apart."""
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (done.folder, undisturbed.folder)
    ]
    assert {name for name in names[0] if not name.startswith("wandb/")} == names[1]
    results = [json.loads((one.folder / "result.json").read_text(encoding="utf-8")) for one in (done, undisturbed)]
    kept = [{name: value for name, value in result.items() if name not in TIMES} for result in results]
    assert kept[0] == kept[1]
    for name in ("edits.jsonl", "metrics.jsonl"):
        lines = [(one.folder / name).read_text(encoding="utf-8").splitlines() for one in (done, undisturbed)]
        records = [[{**json.loads(line), "seconds": 0} for line in part] for part in lines]
        assert records[0] == records[1]
    pd.testing.assert_frame_equal(
        pd.read_parquet(done.folder / "predictions.parquet"),
        pd.read_parquet(undisturbed.folder / "predictions.parquet"),
    )


def logged_offline(done: Done) -> None:
    """Asserts that one line names the offline run, which is there."""
    (line,) = done.told
    assert line.startswith("grace-bench: W&B does not take this run (")
    folder = Path(line.partition("wandb sync ")[2].removesuffix(" sends it"))
    assert folder.parent == done.folder / "wandb"
    (file,) = folder.glob("*.wandb")
    assert file.stat().st_size > 1000


@pytest.fixture
def hanging() -> Iterator[str]:
    """The address of a server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            with suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


class _Unauthorized(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b'{"errors": [{"message": "user is not logged in"}]}')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def unauthorized() -> Iterator[str]:
    """The address of a server that takes no key."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Unauthorized) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_network(tmp_path: Path, undisturbed: Done) -> None:
    # Nothing listens there: the answer is a refusal, at once and every time.
    done = run(tmp_path, "auto", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=KEY)
    logged_offline(done)
    whole(done, undisturbed)


def test_a_wrong_key_and_no_secret_in_the_run_folder_nor_in_what_is_said(
    tmp_path: Path, undisturbed: Done, unauthorized: str
) -> None:
    others = {"DATABASE_PASSWORD": "fake-password-01", "AWS_SECRET_ACCESS_KEY": "fake+key/02"}
    done = run(tmp_path, "auto", WANDB_BASE_URL=unauthorized, WANDB_API_KEY=KEY, HF_TOKEN=TOKEN, **others)
    logged_offline(done)
    assert "user is not logged in" in done.told[0]
    whole(done, undisturbed)
    for secret in (KEY, TOKEN, *others.values()):
        assert secret not in done.err
        # The home as well.
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_a_server_that_hangs(tmp_path: Path, undisturbed: Done, hanging: str) -> None:
    done = run(tmp_path, "online", WANDB_BASE_URL=hanging, WANDB_API_KEY=KEY)
    logged_offline(done)
    whole(done, undisturbed)
    assert done.seconds < undisturbed.seconds + 20


def test_no_wandb(tmp_path: Path, undisturbed: Done) -> None:
    # An interpreter in which `import wandb` fails, as where it is not installed.
    (tmp_path / "wandb.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n")
    done = run(tmp_path, "auto", PYTHONPATH=str(tmp_path))
    assert done.told == ["grace-bench: W&B is off for this run (No module named 'wandb')"]
    assert not (done.folder / "wandb").exists()
    whole(done, undisturbed)
    for command, says in (("resume", "finished before, reused"), ("check", "same")):
        again = subprocess.run(
            [SCRIPT, command, str(done.folder)],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert again.returncode == 0, again.stderr
        assert says in again.stdout + again.stderr


def test_a_process_of_wandb_that_dies_on_the_way(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    settings = ["stream=atlas-qa", "editor=grace", "max_edits=60", "wandb.mode=offline", f"out={tmp_path}"]
    running = subprocess.Popen([SCRIPT, "run", *settings], env=environment, stderr=subprocess.PIPE, text=True)
    while not any(path.read_bytes() for path in tmp_path.rglob("edits.jsonl")):
        assert running.poll() is None
        time.sleep(0.01)
    (service,) = [child for child in psutil.Process(running.pid).children() if "wandb" in child.name()]
    service.kill()
    _, err = running.communicate(timeout=100)
    assert running.returncode == 0
    assert len([line for line in err.splitlines() if "W&B is off for this run" in line]) == 1, err
    assert "Traceback" not in err
    assert len(list(tmp_path.rglob("result.json"))) == 1
