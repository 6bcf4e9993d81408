"""Nothing is lost: a run that was stopped anywhere and resumed ends with the bytes of one that never was."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from avalanche.evaluation.metric_results import MetricValue

from grace_bench import EditableModel, EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.benchmarking import meta_train
from grace_bench.loggers import RunLogger
from grace_bench.registry import EDITORS
from grace_bench.results import RunResult
from grace_bench.strategy import EditorStrategy
from grace_bench.types import EditStream, StreamData, StreamMetadata

MakeModel = Callable[..., EditableModel]
QUICK: dict[str, dict[str, Any]] = {
    "grace": {"n_iter": 10, "eps_init": 0.5},
    "ft": {"n_iter": 10},
    "ft_ewc": {"n_iter": 10},
    "ft_retrain": {"n_iter": 10, "n_epochs": 3, "retrain_every": 3, "memory_size": 4},
    "defer": {"n_iter": 10},
    "memory": {"n_iter": 10},
    "lora": {"n_iter": 10, "lr": 0.01},
    "mend": {"n_steps": 10},
    "rome": {"n_prefixes": 1, "n_iter": 5},
}


class Facts(EditStream):
    """Requests as they are given, each also in other words."""

    registered_name = "facts"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    max_new_tokens = 3

    def __init__(self, task: Any, requests: list[EditRequest], train: list[EditRequest]) -> None:
        self.task = task
        self._requests, self._train = requests, train

    def load(self) -> StreamData:
        again = [
            request.model_copy(update={"id": f"{request.id}/again", "prompt": request.rephrases[0]})
            for request in self._requests
        ]
        return StreamData(
            edits=(*self._requests, *again),
            upstream=tuple(request.model_copy(update={"id": f"{request.id}/up"}) for request in self._train),
            holdout=tuple(
                request.model_copy(update={"id": f"{request.id}/held", "prompt": f"{request.prompt} ?"})
                for request in self._requests
            ),
            train=tuple(self._train),
        )


class Death(Exception):
    """What a killed process never gets to say."""


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
                raise Death
            os.kill(os.getpid(), random.choice([signal.SIGINT, signal.SIGTERM]))


@pytest.fixture
def run_facts(
    make_model: MakeModel,
    make_requests: Callable[[str], list[EditRequest]],
    make_train: Callable[[str], list[EditRequest]],
) -> Callable[..., RunResult]:
    def run(
        folder: Path, *, editor: str = "grace", task: str | None = None, schedule: Any = None, **options: Any
    ) -> RunResult:
        cls = EDITORS.get(editor)
        task = task or cls.supported_tasks[0]
        stream = Facts(task, make_requests(task), make_train(task))
        if cls.needs_meta_training:
            meta_train(stream, model=make_model(task), editor=lambda **given: cls(**given, **QUICK[editor]))
        return run_benchmark(
            stream,
            model=make_model(task),
            editor=lambda **given: cls(**given, **QUICK.get(editor, {})),
            settings=RunSettings(
                schedule=schedule or Schedule(eval_every=4, max_edits=10),
                checkpoint_every=options.pop("checkpoint_every", 1),
                threads=1,
            ),
            folder=folder,
            **options,
        )

    return run


def traces(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, times and memory aside."""
    result = json.loads((folder / "result.json").read_bytes())
    result["cost"] = {"extra_parameters": result["cost"]["extra_parameters"]}
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text().split("\n")[:-1]]
    return {
        "result.json": result,
        "edits.jsonl": [json.dumps({**line, "seconds": None}) for line in edits],
        **{
            name: (folder / name).read_bytes()
            for name in ("metrics.jsonl", "predictions.parquet", "editor/editor.safetensors", "editor/editor.json")
        },
    }


PAIRS = [
    *((name, EDITORS.get(name).supported_tasks[0]) for name in EDITORS.entries()),
    *(("grace", task) for task in EDITORS.get("grace").supported_tasks[1:]),
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
        except (Death, KeyboardInterrupt):
            n_deaths += 1
    assert n_deaths >= 2
    assert traces(folder) == expected
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
