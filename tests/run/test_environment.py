"""What a result was computed with: the versions, and which code, as git knows it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from grace_bench.run import environment
from grace_bench.run.environment import describe_environment, git_state


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    git_state.cache_clear()
    yield
    git_state.cache_clear()


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a package and an ignored virtual environment."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "module.py").write_text("one = 1\n")
    (folder / "notes.txt").write_text("of the day\n")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "installed.py").write_text("two = 2\n")
    (folder / ".gitignore").write_text(".venv/\n__pycache__/\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "Begun")
    return folder


def test_code_in_a_checkout_has_its_commit_and_is_unmodified_whatever_else_changed(checkout: Path) -> None:
    (checkout / "notes.txt").write_text("of another day\n")
    (checkout / "package" / "__pycache__").mkdir()
    (checkout / "package" / "__pycache__" / "module.pyc").write_text("")
    assert git_state(checkout / "package") == {"commit": git(checkout, "rev-parse", "HEAD"), "modified": False}


@pytest.mark.parametrize("name", ["module.py", "new.py"])
def test_code_that_was_changed_or_added_is_told_of(checkout: Path, name: str) -> None:
    (checkout / "package" / name).write_text("one = 11\n")
    state = git_state(checkout / "package")
    assert state is not None
    assert state["modified"]


def test_code_that_git_does_not_follow_has_no_commit(checkout: Path, tmp_path: Path) -> None:
    assert git_state(checkout / ".venv") is None, "a virtual environment inside a repository is none of its code"
    assert git_state(tmp_path) is None


def test_in_a_hook_of_git_the_code_is_asked_about_and_not_the_hooks_repository(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init", "-q")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert git_state(checkout / "package") == {"commit": commit, "modified": False}


@pytest.mark.parametrize("script", [None, "#!/bin/sh\nexec sleep 60\n", "#!/bin/sh\necho no >&2\nexit 128\n"])
def test_git_that_is_missing_hangs_or_refuses_is_no_obstacle_and_says_nothing(
    checkout: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    script: str | None,
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setattr(environment, "_GIT_SECONDS", 0.3)
    if script is not None:
        (programs / "git").write_text(script)
        (programs / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs) if script is None else f"{programs}:{os.environ['PATH']}")
    assert git_state(checkout / "package") is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_checkout_of_somebody_elses_is_passed_over_in_silence(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in (checkout, *checkout.rglob("*")):
        os.chown(path, 12345, 12345)
    assert git_state(checkout / "package") is None
    assert capfd.readouterr() == ("", "")


def test_classes_from_elsewhere_are_named_with_the_state_of_their_code(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "own_editor.py").write_text("class Own:\n    pass\n")
    git(checkout, "add", "own_editor.py")
    git(checkout, "commit", "-qm", "An editor")
    monkeypatch.syspath_prepend(checkout)
    from own_editor import Own  # type: ignore[import-not-found]

    described = describe_environment(torch.device("cpu"), threads=1, classes=[Own])
    state = {"commit": git(checkout, "rev-parse", "HEAD"), "modified": False}
    assert described["plugins"] == {"own_editor": {"version": None, "git": state}}


def test_an_environment_has_versions_device_threads_and_what_decides_rounding() -> None:
    described = describe_environment(torch.device("cpu"), threads=3)
    versions = {"grace_bench", "python", "torch", "transformers", "tokenizers", "avalanche", "numpy", "datasets"}
    assert all(described[name][0].isdigit() for name in versions)
    assert described["device"] == "cpu"
    assert described["threads"] == 3
    assert described["interop_threads"] == torch.get_num_interop_threads()
    assert described["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert described["processor"]
    assert described["deterministic_algorithms"] is False
    assert described["plugins"] == {}
