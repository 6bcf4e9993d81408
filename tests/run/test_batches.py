"""Which requests are edited, and how many at once: `edit` and `edits_at_once`."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from grace_bench import EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.editors.ft import FineTune
from grace_bench.errors import EditFailure, UserError
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.schema import RunResult
from grace_bench.run.loggers import RunLogger

GRACE = partial(EDITORS.get("grace"), replacement="replace_last", eps_init=0.3)
FT = partial(EDITORS.get("ft"), n_iter=20)


class Points(EditStream):
    """Points of the toy stream, in the order given."""

    registered_name = "points"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    task = "classification"
    order = "stream"

    def __init__(self, n: int = 24, requests: tuple[EditRequest, ...] = ()) -> None:
        data = STREAMS.get("toy")().load()
        self._data = StreamData(edits=requests or data.edits[:n], upstream=data.upstream[:30])

    def load(self) -> StreamData:
        return self._data


class Together(FineTune):
    """Fine-tunes on all requests of a batch together."""

    edits_together = True
    sizes: ClassVar[list[int]] = []

    def edit(self, batch: EditBatch) -> EditOutcome:
        self.sizes.append(len(batch.prompts))
        return super().edit(batch)


class Fragile(Together):
    """Cannot edit one of the requests."""

    broken = ""

    def edit(self, batch: EditBatch) -> EditOutcome:
        outcome = super().edit(batch)
        torch.rand(3)
        if self.broken in batch.prompts:
            raise EditFailure("the prompt is not in the table")
        return outcome


class Dies(RunLogger):
    """Ends the run after a number of records."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def after_candidate(self, strategy: EditorStrategy, metric_values: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def _no_sizes() -> None:
    Together.sizes.clear()


def run(folder: Path, editor: Callable[..., Any], *, stream: EditStream | None = None, **options: Any) -> RunResult:
    given = {name: options.pop(name) for name in ("resume", "loggers") if name in options}
    schedule = Schedule(**{"eval_every": 6, **options})
    settings = RunSettings(schedule=schedule, checkpoint_every=1, threads=1)
    return run_benchmark(stream or Points(), model="toy", editor=editor, settings=settings, folder=folder, **given)


def edits(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    return [{**json.loads(line), "seconds": None} for line in lines]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def left(folder: Path) -> list[Any]:
    names = ("metrics.jsonl", "predictions.parquet", "editor/editor.safetensors")
    return [edits(folder), *((folder / name).read_bytes() for name in names)]


@pytest.mark.parametrize("editor", [GRACE, FT], ids=["grace", "ft"])
def test_every_request_reached_is_edited(tmp_path: Path, editor: Callable[..., Any]) -> None:
    result = run(tmp_path, editor, edit="all", max_edits=17)
    assert [record["edited"] for record in edits(tmp_path)] == [True] * 17
    assert {record["was_error"] for record in edits(tmp_path)} == {True, False}
    assert (result.protocol.edit, result.protocol.edits_at_once) == ("all", 1)


@pytest.mark.parametrize("editor", [GRACE, FT], ids=["grace", "ft"])
def test_an_editor_of_single_requests_edits_all_requests_alike_however_many_are_reached_together(
    tmp_path: Path, editor: Callable[..., Any]
) -> None:
    run(tmp_path / "one", editor, edit="all")
    run(tmp_path / "eight", editor, edit="all", edits_at_once=8)
    assert left(tmp_path / "one") == left(tmp_path / "eight")


@pytest.mark.parametrize("editor", [GRACE, Together], ids=["grace", "together"])
def test_errors_are_judged_before_the_first_of_their_batch_is_edited(
    tmp_path: Path, editor: Callable[..., Any]
) -> None:
    request = STREAMS.get("toy")().load().edits[0]
    again = tuple(request.model_copy(update={"id": f"{request.id}/{n}"}) for n in range(4))
    run(tmp_path / "one", editor, stream=Points(requests=again))
    run(tmp_path / "two", editor, stream=Points(requests=again), edits_at_once=2)
    assert [record["edited"] for record in edits(tmp_path / "one")] == [True, False, False, False]
    assert [record["edited"] for record in edits(tmp_path / "two")] == [True, True, False, False]


def test_a_batch_is_one_operation_after_which_the_clock_has_moved_by_its_edits(tmp_path: Path) -> None:
    run(tmp_path, Together, edit="all", edits_at_once=8, max_edits=20)
    assert Together.sizes == [8, 8, 4]
    assert [record["n_edits"] for record in edits(tmp_path)] == [8] * 8 + [16] * 8 + [20] * 4
    # Evaluations are due at 6, 12 and 18; the last is at the end.
    assert [evaluation["n_edits"] for evaluation in evaluations(tmp_path)] == [0, 8, 16, 20]


def test_only_errors_of_a_batch_are_edited_and_the_run_ends_at_exactly_max_edits(tmp_path: Path) -> None:
    run(tmp_path, Together, edits_at_once=8, max_edits=5)
    records = edits(tmp_path)
    assert sum(record["edited"] for record in records) == 5
    assert [record["edited"] for record in records] == [record["was_error"] for record in records]
    assert records[-1]["edited"]
    assert sum(Together.sizes) == 5


def test_a_batch_that_fails_is_undone_and_made_one_by_one(tmp_path: Path) -> None:
    broken = Points().load().edits[3]
    fragile = type("Broken", (Fragile,), {"broken": broken.prompt})
    result = run(tmp_path / "batch", fragile, edit="all", edits_at_once=8, max_edits=8)
    assert Together.sizes == [8, *([1] * 8)]
    assert [record["id"] for record in edits(tmp_path / "batch") if record["failed"]] == [broken.id]
    assert result.metrics["n_failed"] == 1
    run(tmp_path / "one", fragile, edit="all", max_edits=8)
    names = ("predictions.parquet", "editor/editor.safetensors")
    last = [(tmp_path / folder / names[1]).read_bytes() for folder in ("batch", "one")]
    assert last[0] == last[1]


def test_a_group_is_never_separated(tmp_path: Path) -> None:
    groups = [None, "a", "a", "b", "b", "b", "b", "b", "b", None, None, "c", "c"]
    points = zip(Points().load().edits, groups, strict=False)
    requests = tuple(point.model_copy(update={"group": group}) for point, group in points)
    run(tmp_path, Together, stream=Points(requests=requests), edit="all", edits_at_once=4)
    assert Together.sizes == [3, 6, 4]


@pytest.mark.parametrize(
    ("editor", "schedule"),
    [
        pytest.param(GRACE, {"edit": "all", "edits_at_once": 5}, marks=pytest.mark.slow),
        (GRACE, {"edits_at_once": 5}),
        (Together, {"edit": "all", "edits_at_once": 5}),
        pytest.param(Together, {"edits_at_once": 5}, marks=pytest.mark.slow),
    ],
    ids=["grace all", "grace errors", "together all", "together errors"],
)
def test_a_run_that_dies_within_a_batch_ends_as_one_that_never_did(
    tmp_path: Path, editor: Callable[..., Any], schedule: dict[str, Any]
) -> None:
    run(tmp_path / "whole", editor, **schedule)
    n_deaths = 0
    while not (tmp_path / "broken" / "result.json").exists():
        try:
            # Each time later: values that are trained together leave their records together.
            run(tmp_path / "broken", editor, resume=True, loggers=[Dies(5 + 4 * n_deaths)], **schedule)
        except KeyboardInterrupt:
            n_deaths += 1
    assert n_deaths >= 2
    assert left(tmp_path / "whole") == left(tmp_path / "broken")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"edit": "some"}, "edit=some"),
        ({"edits_at_once": 0}, "edits_at_once=0"),
        ({"edits_at_once": 1.5}, "edits_at_"),
    ],
)
def test_a_schedule_names_the_option_that_is_wrong(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=f"^{wrong}"):
        Schedule(**options)
