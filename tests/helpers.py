"""What several test modules need and no fixture gives."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import sys
import threading
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml

from grace_bench.cli import main
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.run.loggers import RunLogger


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str


def cli(*arguments: str | Path) -> Done:
    """Runs a command of grace-bench in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def module_at(path: Path, *, name: str | None = None) -> ModuleType:
    """Imports a module that is part of no package: a script, or a file that lies beside tests.

    Args:
        path: The file.
        name: The name to import it under; None for the file's own.
    """
    spec = importlib.util.spec_from_file_location(name or path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_choices(folder: Path, task: str, documents: Path, **fields: Any) -> None:
    """Writes the file of an lm-eval task: a choice between the answers of each document of a JSONL file.

    Args:
        folder: Where `TASK.yaml` is written.
        task: The task's name.
        documents: The JSONL file.
        **fields: How lm-eval reads a document: `doc_to_text`, `doc_to_choice` and so on.
    """
    content = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(documents)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "metric_list": [{"metric": "acc"}],
        **fields,
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


@contextlib.contextmanager
def sends(number: int, *, when: Callable[[], bool]) -> Iterator[None]:
    """Sends this process a signal as soon as a condition holds, unless the block ends before that."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.01):
            if when():
                os.kill(os.getpid(), number)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one JSON object a line."""
    # Other characters that end a line for `splitlines` may stand inside a record.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def texts_of(svg: Path) -> str:
    """All text in an SVG file."""
    return " ".join("".join(node.itertext()) for node in ET.parse(svg).iter() if node.tag.endswith("}text"))


def axes_of(figure: Any, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title() == title)


def each_value_once(names: str, *options: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by several options: as few combinations as show every value are quick, the others slow."""
    values = [list(option) for option in options]
    shown = {tuple(turn % len(option) for option in values) for turn in range(max(map(len, values)))}
    return _parametrised(names, values, shown)


def each_pair_once(names: str, *options: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by several options: enough combinations that every two values meet are quick, others slow."""
    values = [list(option) for option in options]
    places = [*itertools.product(*(range(len(option)) for option in values))]
    pairs = {place: {*itertools.combinations(enumerate(place), 2)} for place in places}
    left, shown = set().union(*pairs.values()), set()
    while left:
        shown.add(best := max(places, key=lambda place: len(pairs[place] & left)))
        left -= pairs[best]
    return _parametrised(names, values, shown)


def _parametrised(names: str, values: Sequence[Sequence[Any]], shown: Set[tuple[int, ...]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(option[i] for option, i in zip(values, place, strict=True)),
                marks=() if place in shown else pytest.mark.slow,
            )
            for place in itertools.product(*(range(len(option)) for option in values))
        ],
    )


class KilledError(Exception):
    """Ends a run as if its process were killed: nothing more is written."""


class Dies(RunLogger):
    """Ends the run at a candidate."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def after_candidate(self, strategy: EditorStrategy, metric_values: Any) -> None:
        if strategy.record is not None and strategy.record.index == self._at:
            raise KilledError
