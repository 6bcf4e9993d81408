"""What decides how later edits are grouped survives a stop, whichever way an earlier flush went."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from grace_bench import EditableModel, EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.registry import EDITORS, STREAMS
from helpers import Dies, KilledError


class Together(EDITORS.get("none")):  # type: ignore[misc]
    """Changes nothing, reports as its loss how many edits were finished together, and cannot finish the fifth one."""

    registered_name = "together"

    waiting: Sequence[str] = ()

    @property
    def n_pending(self) -> int:
        return len(self.waiting)

    def edit(self, batch: EditBatch) -> EditOutcome:
        self.waiting = [*self.waiting, batch.prompts[0]]
        return EditOutcome()

    def flush(self) -> Sequence[EditOutcome]:
        waiting, self.waiting = self.waiting, ()
        if _SPOILED in waiting:
            raise ValueError("no such island")
        return [EditOutcome(loss=float(len(waiting)))] * len(waiting)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "waiting": [*self.waiting]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.waiting = [*state["waiting"]]


class Points(EditStream):
    """Points whose labels the model gets wrong."""

    registered_name = "points"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    task = "classification"

    def load(self) -> StreamData:
        return StreamData(edits=_REQUESTS)


def wrong_points(n: int) -> tuple[EditRequest, ...]:
    prompts = list(dict.fromkeys(request.prompt for request in STREAMS.get("toy")().load().edits))[:n]
    said = EditableModel.from_pretrained("toy", task="classification").answer(prompts)
    return tuple(
        EditRequest(id=str(i), prompt=prompt, target=1 - int(label))
        for i, (prompt, label) in enumerate(zip(prompts, said, strict=True))
    )


_REQUESTS = wrong_points(40)
# The seed's order is that of the run.
_SPOILED = ""


@pytest.fixture(autouse=True)
def spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from grace_bench.data.benchmark import EditBenchmark

    order = EditBenchmark.from_stream(Points(), seed=0).data.edits
    monkeypatch.setitem(globals(), "_SPOILED", order[4].prompt)


def carry_out(folder: Path, **options: Any) -> None:
    settings = RunSettings(schedule=Schedule(eval_every=50), checkpoint_every=1, threads=1)
    run_benchmark(Points(), model="toy", editor=Together, settings=settings, folder=folder, **options)


def traces(folder: Path) -> list[Any]:
    edits = [json.loads(line) for line in (folder / "edits.jsonl").read_text().splitlines()]
    names = ("metrics.jsonl", "predictions.parquet", "editor/editor.safetensors")
    return [[{**line, "seconds": None} for line in edits], *((folder / name).read_bytes() for name in names)]


def test_a_run_stopped_after_a_flush_that_raised_groups_later_edits_as_if_it_had_not_been_stopped(
    tmp_path: Path,
) -> None:
    carry_out(tmp_path / "whole")
    expected = traces(tmp_path / "whole")
    groups = [line["loss"] for line in expected[0]]
    assert groups == [1.0] * 4 + [None] + [1.0] * 27 + [8.0] * 8, "one by one as far as the flush that raised went"
    assert [line["failed"] for line in expected[0] if line["failed"]] == ["ValueError: no such island"]
    for index in (2, 5, 31):
        stopped = tmp_path / str(index)
        with contextlib.suppress(KilledError):
            carry_out(stopped, loggers=[Dies(index)])
        assert not (stopped / "result.json").exists()
        carry_out(stopped, resume=True)
        assert traces(stopped) == expected, index
