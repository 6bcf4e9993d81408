"""Scoring only what changed, and training values together, never change a result."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from grace_bench.data.benchmark import EditExperience, eval_stream
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors.grace import Grace
from grace_bench.evaluation.rescoring import Rescorer
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.engine.engine import EngineName, ExactEngine
from grace_bench.models.tasks.base import ItemScore
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule

MakeModel = Callable[..., EditableModel]
CallsOf = Callable[[EditableModel, str], AbstractContextManager[list[None]]]
MakeRequests = Callable[[str], list[EditRequest]]
DECISIONS = (
    "id",
    "was_error",
    "edited",
    "n_edits",
    "op",
    "key",
    "n_keys",
    "steps",
    "before_text",
    "after_text",
    "failed",
)


def run_on_toy(folder: Path, engine: EngineName, **schedule: Any) -> tuple[list[dict[str, Any]], ...]:
    settings = RunSettings(seed=1, schedule=Schedule(max_upstream=60, **schedule), engine=engine)
    # A point is one position, so there is nothing before it to replace.
    editor = partial(Grace, replacement="replace_last")
    run_benchmark("toy", editor=editor, settings=settings, folder=folder)
    names = ("edits.jsonl", "metrics.jsonl")
    edits, metrics = ([json.loads(line) for line in (folder / name).read_text().splitlines()] for name in names)
    return edits, metrics, pq.read_table(folder / "predictions.parquet").to_pylist()


@pytest.mark.parametrize(
    "eval_every", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(50, marks=pytest.mark.slow)]
)
def test_the_exact_engine_decides_and_scores_as_the_plain_one(tmp_path: Path, eval_every: int) -> None:
    exact, plain = (
        run_on_toy(tmp_path / name, name, max_edits=20, eval_every=eval_every) for name in ("exact", "plain")
    )
    for ours, theirs in zip(exact[0], plain[0], strict=True):
        assert {name: ours[name] for name in DECISIONS} == {name: theirs[name] for name in DECISIONS}
        for name in ("score_before", "score_after", "distance"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4)
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)
    ops = {record["op"] for record in exact[0]}
    assert {"add", "expand"} <= ops, "some edits meet entries that wait for their values"
    for ours, theirs in zip(exact[1], plain[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    for ours, theirs in zip(exact[2], plain[2], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_values_trained_together_are_those_trained_alone(make_model: MakeModel, make_requests: MakeRequests) -> None:
    for task in ("classification", "qa", "completion"):
        values, losses = [], []
        for engine in ("exact", "plain"):
            model = make_model(task)
            model = EditableModel(
                model.module, layer=model.layer_name, task=model.task, tokenizer=model.tokenizer, engine=engine
            )
            with Grace(model=model, n_iter=10, lr=0.1, eps_init=1e-3) as editor:
                outcomes = []
                for request in make_requests(task)[:5]:
                    editor.edit(_batch(model, request))
                    assert editor.n_pending <= 5 if engine == "exact" else not editor.n_pending
                outcomes = editor.flush()
                values.append(editor.codebook.values.clone())
                losses.append([outcome.loss for outcome in outcomes])
        torch.testing.assert_close(*values, rtol=0, atol=1e-3)
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_second_evaluation_without_an_edit_asks_the_model_nothing(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model("qa"), make_requests("qa")
    passes: list[int] = []
    model.module.get_encoder().register_forward_hook(lambda *_: passes.append(1))  # type: ignore[operator]
    with Grace(model=model, n_iter=5, eps_init=1e-3) as editor:
        rescorer = Rescorer(editor)
        first = rescorer.score(requests)
        assert passes
        passes.clear()
        assert rescorer.score(requests) == first
        assert not passes
        editor.edit_text(requests[0].prompt, requests[0].target)
        passes.clear()
        again = rescorer.score(requests)
        n_asked = len(passes)
        assert [item.entry for item in again] == [0, *[-1] * (len(requests) - 1)]
        fresh = model.score(requests)
        assert again == fresh
        assert 0 < n_asked <= 3, "only the edited request was generated and scored again"


BEFORE_THE_LAYER = {
    "classification": "bert.encoder.layer.0.output.dense",
    "language_modelling": "transformer.h.0.attn.c_proj",
}


def evaluate(rescorer: Rescorer, requests: Sequence[EditRequest]) -> list[ItemScore]:
    with rescorer.evaluation():
        return rescorer.score(requests)


@pytest.mark.parametrize("task", BEFORE_THE_LAYER)
def test_what_an_evaluation_scores_again_starts_at_the_layer(
    task: str, make_model: MakeModel, make_requests: MakeRequests, calls_of: CallsOf
) -> None:
    model, requests = make_model(task), make_requests(task)
    with Grace(model=model, n_iter=5, eps_init=1e-3) as editor:
        rescorer = Rescorer(editor)
        evaluate(rescorer, requests)
        for request in requests[:4]:
            editor.edit(_batch(model, request))
        editor.flush()
        with calls_of(model, BEFORE_THE_LAYER[task]) as early:
            again = evaluate(rescorer, requests)
        assert not early
        assert {item.entry for item in again} == {-1, 0, 1, 2, 3}
        assert again == model.score(requests)


@pytest.mark.parametrize("task", ["classification", "qa", pytest.param("language_modelling", marks=pytest.mark.slow)])
def test_scores_depend_neither_on_memory_nor_on_an_interruption(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    """To the last bit, whatever was edited and asked for in between; nor do the batches, which larger models show."""
    requests = make_requests(task)
    # What is edited, and what is asked for after it: streams, some of which grow, and single requests.
    steps = [((), range(6)), ((0,), range(6)), ((1, 4), (1,)), ((2,), range(4)), ((0, 3, 5), range(6)), ((), (2, 5, 3))]

    def follow(memory: int, *, is_interrupted: bool = False) -> tuple[list[Any], int]:
        """The scores and batches of each step, and the bytes that are kept in the end."""
        model = make_model(task, batch_size=4)
        model.engine = ExactEngine(model, memory=memory)
        batches: list[Any] = []
        told: list[Any] = []
        score_batch = model.task.score_batch

        def note(model: EditableModel, chosen: Sequence[EditRequest]) -> list[ItemScore]:
            batches.append([request.id for request in chosen])
            return score_batch(model, chosen)

        model.task.score_batch = note  # type: ignore[method-assign]
        with Grace(model=model, n_iter=5, lr=0.3, eps_init=0.3) as editor:
            rescorer = Rescorer(editor)
            for edited, asked in steps:
                for number in edited:
                    editor.edit(_batch(model, requests[number]))
                editor.flush()
                chosen = [requests[number] for number in asked]
                told.append(evaluate(rescorer, chosen) if len(chosen) > 1 else rescorer.score(chosen))
                told.append([*batches])
                if is_interrupted:
                    state = rescorer.state_dict()
                    queries = state.pop("queries")
                    rescorer.load_state_dict({**json.loads(json.dumps(state)), "queries": queries})
                    model.engine.forget()
            return told, model.engine.kept_bytes

    told, wide = follow(2**30)
    assert (wide > 0) == (task != "qa"), "answers that are generated start at their prompt"
    for memory in (0, wide // 2, max(0, wide - 1)):
        again, kept = follow(memory)
        assert again == told
        assert kept <= memory
    assert follow(2**30, is_interrupted=True)[0] == told


@pytest.mark.parametrize(("n_edited", "n_asked"), [(1, 1), (2, 2), (3, 6)])
def test_few_of_a_batch_are_scored_again_without_the_rest_of_it(
    n_edited: int, n_asked: int, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model("classification"), make_requests("classification")
    n_rows = 0

    def count(call: LayerCall) -> Tensor:
        nonlocal n_rows
        n_rows += len(call.output)
        return call.output

    with Grace(model=model, n_iter=5, eps_init=1e-3) as editor:
        rescorer = Rescorer(editor)
        evaluate(rescorer, requests)
        for _ in range(2):
            for request in requests[:n_edited]:
                editor.edit_text(request.prompt, request.target)
            handle, n_rows = model.intercept(count), 0
            again = evaluate(rescorer, requests)
            handle.remove()
            assert n_rows == n_asked
            assert [item.entry for item in again] == [*range(n_edited), *[-1] * (len(requests) - n_edited)]


def test_a_batch_of_the_last_time_that_holds_too_much_for_now_is_made_anew(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, requests = make_model("classification"), make_requests("classification")
    sizes: list[int] = []

    def note(call: LayerCall) -> Tensor:
        sizes.append(len(call.output))
        return call.output

    with Grace(model=model, n_iter=5, eps_init=1e-3) as editor:
        rescorer = Rescorer(editor)
        evaluate(rescorer, requests)
        for request in requests:
            editor.edit_text(request.prompt, request.target)
        model.task.batch_size = 2
        model.intercept(note)
        evaluate(rescorer, requests)
    assert sizes == [2, 2, 2]


def test_avalanche_evaluates_edits_that_waited_as_finished(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, requests = make_model("qa"), make_requests("qa")[:2]
    with Grace(model=model, n_iter=60, lr=0.3, eps_init=1e-3) as editor:
        rescorer = Rescorer(editor)
        for request in requests:
            editor.train(EditExperience(request), eval_streams=[])
        assert editor.n_pending == 2
        editor.eval([*eval_stream("edited", requests)])
        assert not editor.n_pending
        assert rescorer.score(requests) == model.score(requests)


def _batch(model: EditableModel, request: EditRequest) -> EditBatch:
    encoded = model.encode_batch([request.prompt], [request.target])
    return EditBatch(prompts=(request.prompt,), targets=(request.target,), encoded=encoded)
