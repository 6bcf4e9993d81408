"""`grace-bench moments`: it caches what a run then needs, says what it did, and resumes."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import GPT2LMHeadModel

from grace_bench.cli import main

LAYERS = ("transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj")
MODEL = "model=atlas-text"
TEXTS = ["The river of the town", "A town in the north", "It lies at the sea, and has a market"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "running text.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@contextmanager
def passes() -> Iterator[list[None]]:
    """A list that grows by one with each forward pass of a language model."""
    seen: list[None] = []

    def see(module: nn.Module, _: object) -> None:
        if isinstance(module, GPT2LMHeadModel):
            seen.append(None)

    handle = register_module_forward_pre_hook(see)
    yield seen
    handle.remove()


def moments(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[tuple[str, str, str, str, str]]:
    """Carries out the command; layer, width, tokens, how, and file of each line that it prints."""
    assert main(["moments", *overrides]) == 0
    said = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\S+)  width (\d+)  ([\d,]+) tokens  (\w+)[^/]*  (/.*)", line) for line in said]
    assert all(found), said
    return [(match[1], match[2], match[3], match[4], match[5]) for match in found if match]


def test_all_layers_are_computed_once_and_cached(capsys: pytest.CaptureFixture[str], text: Path, cache: Path) -> None:
    given = (MODEL, f"layers=[{','.join(LAYERS)}]", f"text={text}")
    first = moments(capsys, *given)
    assert [line[0] for line in first] == [*LAYERS]
    assert {line[1] for line in first} == {"512"}
    assert [line[3] for line in first] == ["computed", "computed"]
    assert {Path(line[4]) for line in first} == {*(cache / "moments").iterdir()}
    with passes() as seen:
        again = moments(capsys, *given)
    assert [line[3] for line in again] == ["cached", "cached"]
    assert [(*line[:3], line[4]) for line in again] == [(*line[:3], line[4]) for line in first]
    assert not seen


def test_what_it_caches_is_what_a_run_with_the_same_settings_needs(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    settings = ["editor=rome", "stream=atlas-text", "editor.n_prefixes=0", "editor.n_texts=40"]
    (line,) = moments(capsys, *settings)
    before = Path(line[4]).stat()
    run = ["run", *settings, "max_edits=1", "max_upstream=1", "eval_every=1", "wandb.mode=disabled"]
    assert main(run) == 0
    assert [*map(str, (cache / "moments").iterdir())] == [line[4]]
    assert (Path(line[4]).stat().st_ino, Path(line[4]).stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_without_a_stream_it_caches_the_same_as_with_it(capsys: pytest.CaptureFixture[str], text: Path) -> None:
    layer = f"layer={LAYERS[0]}"
    with_stream = moments(capsys, "stream=atlas-text", "editor=rome", layer, f"editor.text_path={text}")
    alone = moments(capsys, MODEL, layer, f"editor.text_path={text}")
    named = moments(capsys, MODEL, "editor=rome", layer, f"text={text}")
    assert alone[0][4] == named[0][4] == with_stream[0][4]
    assert [line[3] for line in (*alone, *named)] == ["cached", "cached"]


def test_the_streams_requests_for_training_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = moments(capsys, "stream=atlas-text", "editor.n_texts=5")
    assert [again[4] for again in moments(capsys, "stream=atlas-text", "text=train", "editor.n_texts=5")] == [line[4]]
    assert moments(capsys, "stream=atlas-text", "editor.n_texts=6")[0][4] != line[4]


def test_texts_are_sampled_from_the_model_by_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    given = (MODEL, "text=model", "editor.n_texts=3")
    files = [moments(capsys, *given, *more)[0][4] for more in ([], ["seed=1"], ["seed=2", "editor.seed=1"])]
    assert files[0] != files[1] == files[2]


def test_files_of_others_are_checked_and_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for layer, width in zip(LAYERS, (512, 500), strict=True):
        fields = {"mom2.count": 7, "mom2.mom2": np.eye(width, dtype=np.float32)}
        np.savez(tmp_path / f"{layer}_float32_mom2_100000.npz", **fields)
    (line,) = moments(capsys, MODEL, f"layers=[{LAYERS[0]}]", f"editor.moments_path={tmp_path}")
    assert line[1:4] == ("512", "7", "read")
    assert main(["moments", MODEL, f"layers=[{','.join(LAYERS)}]", f"editor.moments_path={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith(f"field 'mom2.mom2': has 500 numbers a side, layer={LAYERS[1]} takes 512")


def test_an_interrupted_command_says_so_and_resumes(
    capsys: pytest.CaptureFixture[str], text: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("grace_bench.editing.moments._TOKENS_A_BATCH", 1)
    given = (MODEL, f"layers=[{','.join(LAYERS)}]", f"text={text}")
    whole = [Path(line[4]).read_bytes() for line in moments(capsys, *given)]
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "other"))

    def interrupt(module: nn.Module, _: object) -> None:
        if isinstance(module, GPT2LMHeadModel):
            handle.remove()
            os.kill(os.getpid(), signal.SIGINT)

    handle = register_module_forward_pre_hook(interrupt)
    assert main(["moments", *given]) == 130
    assert "grace-bench: interrupted with second moments of 1 of 3 texts; the same command goes on there\n" in (
        capsys.readouterr().err
    )
    with passes() as seen:
        resumed = moments(capsys, *given)
    assert len(seen) == 2
    assert [Path(line[4]).read_bytes() for line in resumed] == whole
