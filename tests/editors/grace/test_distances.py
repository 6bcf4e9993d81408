"""What a run gives an editor that measures by upstream inputs, and what comes of distances and overlap policies."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grace_bench import EditRequest, RunSettings, Schedule, run_benchmark
from grace_bench.data.stream import StreamData
from grace_bench.editing.moments import cached_queries
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, STREAMS
from grace_bench.results.reading import read_edits
from grace_bench.results.schema import RunResult
from helpers import each_value_once

Change = Callable[[Sequence[EditRequest]], Sequence[EditRequest]]


class Toy(STREAMS.get("toy")):  # type: ignore[misc]
    """The toy stream with other upstream requests."""

    def __init__(self, change: Change) -> None:
        super().__init__()
        self._change = change

    def load(self) -> StreamData:
        """Returns the requests."""
        data: StreamData = super().load()
        return replace(data, upstream=tuple(self._change(data.upstream)))


def run(folder: Path, stream: Any = "toy", engine: Any = "exact", **options: Any) -> RunResult:
    settings = RunSettings(schedule=Schedule(max_edits=12, eval_every=6, max_upstream=30), engine=engine)
    options = {"replacement": "replace_last", "eps_init": 0.5, "n_iter": 30, **options}
    editor = partial(EDITORS.get("grace"), **options)
    return run_benchmark(stream, model="toy", editor=editor, settings=settings, folder=folder)


def swapped(requests: Sequence[EditRequest]) -> Sequence[EditRequest]:
    """The same inputs with wrong answers."""
    return [request.model_copy(update={"target": 1 - int(request.target)}) for request in requests]


def test_of_upstream_requests_an_editor_sees_the_inputs_and_no_answers(tmp_path: Path) -> None:
    for name, change in (("right", list), ("wrong", swapped), ("fewer", lambda requests: requests[:50])):
        run(tmp_path / name, Toy(change), distance="mahalanobis")
    right, wrong, fewer = (
        load_file(tmp_path / name / "editor" / "editor.safetensors") for name in ("right", "wrong", "fewer")
    )
    assert all(torch.equal(right[name], wrong[name]) for name in ("whitening", "whitening_mean", "keys", "radii"))
    assert not torch.equal(right["whitening"], fewer["whitening"])


def test_a_stream_without_upstream_inputs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs upstream inputs, and stream 'toy' has none") as caught:
        run(tmp_path / "run", Toy(lambda requests: ()), distance="mahalanobis")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@each_value_once("distance, overlap", ["euclidean", "cosine", "mahalanobis"], ["allow", "shrink"])
def test_both_engines_decide_alike_and_the_policy_holds_in_the_result(
    distance: str, overlap: str, tmp_path: Path
) -> None:
    options = {"distance": distance, "overlap": overlap, "eps_init": 0.002 if distance == "cosine" else 0.5}
    results = [run(tmp_path / engine, engine=engine, **options) for engine in ("exact", "plain")]
    decisions = [
        [
            (record.edited, record.op, record.key, record.n_keys)
            for record in read_edits(tmp_path / engine / "edits.jsonl").values()
        ]
        for engine in ("exact", "plain")
    ]
    assert decisions[0] == decisions[1]
    for result in results:
        assert result.metrics["ES"] == 1.0
        if overlap == "shrink":
            assert result.metrics["codebook_overlap"] == 0.0
            assert result.metrics["codebook_overlap/queries"] == 0.0


@pytest.mark.parametrize("task", ["classification", "qa", "completion", "language_modelling"])
def test_queries_are_the_activations_that_edits_and_answers_are_looked_up_by(task: str, make_model: Any) -> None:
    model: EditableModel = make_model(task)
    prompts = ["what is the capital of Peru", "the river", "what is the currency of France in Italy", "the river"]
    queries = model.queries(prompts)
    for prompt, query in zip(prompts, queries, strict=True):
        alone = model.layer_call(model.encode_batch([prompt])).query[0]
        torch.testing.assert_close(query, alone.float(), atol=1e-4, rtol=1e-4)


def test_queries_of_running_text_are_where_it_is_scored_from(make_model: Any) -> None:
    model: EditableModel = make_model("language_modelling")
    texts = ["the capital of Peru is Lima", "the river of Italy in France"]
    queries = model.queries(["", ""], texts)
    for text, query in zip(texts, queries, strict=True):
        alone = model.layer_call(model.encode_batch([""], [text])).query[0]
        torch.testing.assert_close(query, alone, atol=1e-4, rtol=1e-4)


def test_upstream_inputs_are_read_once_for_a_model_a_layer_and_prompts(
    make_model: Any, calls_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))
    model: EditableModel = make_model("qa")
    prompts = ["what is the capital of Peru", "the river", "what is the currency of France in Italy"]
    expected = model.queries(prompts)
    assert torch.equal(cached_queries(model, prompts), expected)
    again: EditableModel = make_model("qa")
    with calls_of(again, again.layer_name) as calls:
        assert torch.equal(cached_queries(again, prompts), expected)
        assert not calls
        assert torch.equal(cached_queries(again, prompts[:2]), again.queries(prompts[:2]))
        assert calls
    other: EditableModel = make_model("qa", seed=1)
    assert torch.equal(cached_queries(other, prompts), other.queries(prompts))
    assert not torch.equal(cached_queries(other, prompts), expected)
    # Batches of other sizes may differ in the last bit.
    again.task.batch_size = 1
    with calls_of(again, again.layer_name) as calls:
        cached_queries(again, prompts)
        assert len(calls) == len(prompts)


def test_upstream_inputs_need_no_cache_that_can_be_written(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "file"))
    model: EditableModel = make_model("completion")
    assert torch.equal(cached_queries(model, ["the river"]), model.queries(["the river"]))


def test_a_run_that_reads_upstream_inputs_from_the_cache_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    for name in ("computed", "read"):
        run(tmp_path / name, distance="mahalanobis", eps_init=0.4)
    computed, read = (load_file(tmp_path / name / "editor" / "editor.safetensors") for name in ("computed", "read"))
    assert computed.keys() == read.keys()
    assert all(torch.equal(computed[name], read[name]) for name in computed)
