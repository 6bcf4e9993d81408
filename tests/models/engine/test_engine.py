"""Engines: the same answers whichever computes them, and how much of the model each of them runs for it."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.encoding import EncodedBatch
from grace_bench.models.engine.engine import Engine, make_engine

MakeModel = Callable[..., EditableModel]
CallsOf = Callable[[EditableModel, str], AbstractContextManager[list[None]]]

# A module inside one that ends before the layer, which a replay hands out without running it, and one behind the layer.
EARLY = {
    "classification": "bert.encoder.layer.0.output.dense",
    "qa": "encoder.block.0.layer.0.SelfAttention.q",
    "completion": "transformer.h.0.attn.c_attn",
}
LATE = {
    "classification": "classifier",
    "qa": "decoder.block.1.layer.1.EncDecAttention.q",
    "completion": "transformer.h.1.attn.c_attn",
}
PROMPTS = {
    "first": ["what is the capital of Kazakhstan", "the river in Italy is"],
    "second": ["what is the currency of Peru", "the capital in France is"],
    "third": ["the river in France is", "what is the river of Italy"],
}
each_task = pytest.mark.parametrize("task", EARLY)


def encode(model: EditableModel, name: str = "first") -> EncodedBatch:
    """A new batch each time, of equal contents for equal names."""
    targets: list[str | int] = [1, 3] if model.task.name == "classification" else ["Astana", "Tiber"]
    return model.encode_batch(PROMPTS[name], targets)


def use(model: EditableModel, engine: str, memory_mb: int | None = None) -> Engine:
    model.engine = make_engine(engine, model, memory_mb=memory_mb)  # type: ignore[arg-type]
    return model.engine


@torch.no_grad()
def evaluate(model: EditableModel, batches: Sequence[EncodedBatch], *, passes: int = 1) -> list[Tensor]:
    """The logits of some batches, each run so many times in one evaluation."""
    with model.engine.remembering():
        return [model.labelled_logits(batch)[0] for batch in batches for _ in range(passes)]


def warm_up(model: EditableModel) -> None:
    """Has the engine look at the model, which it does at first use."""
    evaluate(model, [encode(model, "third")])
    model.repeated(encode(model, "third"))


def change(weights: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


# Plain.


@each_task
def test_the_plain_engine_runs_the_whole_model_for_each_answer_and_never_more(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    use(model, "plain")
    batch = encode(model)
    with ExitStack() as stack:
        counts = [stack.enter_context(calls_of(model, path)) for path in (EARLY[task], model.layer_name, LATE[task])]

        def assert_ran(n: int) -> None:
            assert [len(count) for count in counts] == [n, n, n]

        model.labelled_logits(batch)
        assert_ran(1)
        repeated = model.repeated(batch)
        assert_ran(1)
        for n in range(2, 5):
            repeated()
            assert_ran(n)
        model.layer_call(batch)
        assert_ran(5)
        evaluate(model, [batch, batch])
        evaluate(model, [batch])
        assert_ran(8)


@each_task
def test_the_plain_engine_scores_the_batch_that_it_was_given(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    use(model, "plain")
    batch = encode(model)
    logits, aligned = model.labelled_logits(batch)
    repeated = model.repeated(batch)
    assert aligned is repeated.batch is batch
    assert torch.equal(logits, model.logits(batch))
    assert torch.equal(repeated(), logits)


def test_an_engine_that_is_not_there_is_refused_by_name(make_model: MakeModel) -> None:
    with pytest.raises(UserError, match="engine"):
        make_engine("exakt", make_model("qa"))  # type: ignore[arg-type]


# Repeated passes.


@each_task
def test_a_batch_that_is_run_many_times_runs_what_comes_before_the_layer_once(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    warm_up(model)
    batch = encode(model)
    with calls_of(model, EARLY[task]) as early, calls_of(model, LATE[task]) as late:
        repeated = model.repeated(batch)
        for _ in range(5):
            repeated()
        model.repeated(batch)()
    assert len(early) == 1
    assert len(late) == 6


@each_task
def test_asking_for_the_layer_runs_nothing_behind_it(task: str, make_model: MakeModel, calls_of: CallsOf) -> None:
    model, plain = make_model(task), make_model(task)
    use(plain, "plain")
    for name in PROMPTS:
        batch = encode(model, name)
        with calls_of(model, LATE[task]) as late:
            seen = model.layer_call(batch)
        assert not late
        expected = plain.layer_call(batch)
        assert torch.equal(seen.input, expected.input)
        assert torch.equal(seen.output, expected.output)
        assert torch.equal(seen.position, expected.position)
        model.repeated(batch)()


@each_task
def test_asking_for_the_layer_and_then_running_the_batch_runs_what_comes_before_once(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    warm_up(model)
    batch = encode(model)
    with calls_of(model, EARLY[task]) as early:
        model.layer_call(batch)
        model.repeated(batch)()
        model.layer_call(batch)
    assert len(early) == 1


@each_task
def test_two_batches_that_are_run_in_turn_keep_their_own_answers(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    batches = [encode(model, "first"), encode(model, "second")]
    with torch.no_grad():
        expected = [model.labelled_logits(batch)[0] for batch in batches]
        both = [model.repeated(batch) for batch in batches]
        for _ in range(2):
            for repeated, logits in zip(both, expected, strict=True):
                assert torch.equal(repeated(), logits)


@each_task
def test_replaying_starts_over_when_other_modules_are_rewritten(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    batch = encode(model)
    early = model.find_layer(EARLY[task])
    with torch.no_grad():
        for rewritten in ([model.layer], [model.layer, early], [early], []):
            model.engine.rewrites(rewritten)
            repeated = model.repeated(batch)
            for seed, part in enumerate(rewritten):
                change(part, seed)
                assert torch.equal(repeated(), model.labelled_logits(batch)[0])


@each_task
def test_a_batch_that_was_made_ready_before_the_layer_is_rewritten_answers_with_its_new_weights(
    task: str, make_model: MakeModel
) -> None:
    model = make_model(task)
    batch = encode(model)
    repeated = model.repeated(batch)
    with torch.no_grad():
        before = repeated()
        model.engine.rewrites([model.layer])
        change(model.layer, 0)
        assert torch.equal(repeated(), model.labelled_logits(batch)[0])
        assert not torch.equal(repeated(), before)


# Remembered evaluations.


@each_task
def test_an_evaluation_that_comes_again_runs_what_comes_before_the_layer_no_more(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    warm_up(model)
    with calls_of(model, EARLY[task]) as early:
        first = evaluate(model, [encode(model, "first"), encode(model, "second")])
        assert len(early) == 2
        for _ in range(3):
            again = evaluate(model, [encode(model, "first"), encode(model, "second")])
            assert all(map(torch.equal, again, first))
        assert len(early) == 2


@each_task
def test_outside_of_a_remembered_evaluation_nothing_is_kept(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    warm_up(model)
    with calls_of(model, EARLY[task]) as early:
        for n in range(1, 4):
            model.labelled_logits(encode(model))
            assert len(early) == n


@each_task
def test_what_an_evaluation_did_not_use_is_dropped_and_computed_anew(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    warm_up(model)
    both = ["first", "second"]
    expected = evaluate(model, [encode(model, name) for name in both])
    with calls_of(model, EARLY[task]) as early:
        evaluate(model, [encode(model, "first")])
        assert not early
        again = evaluate(model, [encode(model, name) for name in both])
        assert len(early) == 1
    assert all(map(torch.equal, again, expected))


@each_task
def test_an_evaluation_that_broke_off_keeps_what_it_used(task: str, make_model: MakeModel, calls_of: CallsOf) -> None:
    model = make_model(task)
    warm_up(model)

    def break_off() -> None:
        with model.engine.remembering():
            model.labelled_logits(encode(model))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    with calls_of(model, EARLY[task]) as early:
        evaluate(model, [encode(model)])
        assert not early
        model.labelled_logits(encode(model))
        assert len(early) == 1, "outside of the evaluation nothing is remembered"


@each_task
def test_without_memory_nothing_is_kept_and_the_answers_are_right(
    task: str, make_model: MakeModel, calls_of: CallsOf
) -> None:
    model = make_model(task)
    expected = evaluate(model, [encode(model)])
    use(model, "exact", memory_mb=0)
    warm_up(model)
    with calls_of(model, EARLY[task]) as early:
        for n in range(1, 4):
            assert all(map(torch.equal, evaluate(model, [encode(model)]), expected))
            assert len(early) == n


def test_recordings_take_no_more_memory_than_they_are_given(make_model: MakeModel, calls_of: CallsOf) -> None:
    model = make_model("qa")
    model.engine = make_engine("exact", model, memory_mb=1)
    # Room for some of these recordings: batches of another length are other batches.
    batches = [model.encode_batch([PROMPTS["first"][0]] * n, ["Astana"] * n) for n in range(120, 126)]
    expected = evaluate(model, batches)
    with calls_of(model, EARLY["qa"]) as early:
        again = evaluate(model, batches)
    assert all(map(torch.equal, again, expected))
    assert 0 < len(early) < len(batches), "some fit, not all"


@each_task
def test_batches_that_differ_in_their_mask_alone_are_told_apart(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    batch = encode(model)
    mask = batch.inputs["attention_mask"].clone()
    mask[:, 1] = 0
    other = replace(batch, inputs={**batch.inputs, "attention_mask": mask})
    for _ in range(2):
        kept, alike = evaluate(model, [batch, other])
        assert not torch.equal(kept, alike)
        with torch.no_grad():
            assert torch.equal(kept, model.labelled_logits(batch)[0])
            assert torch.equal(alike, model.labelled_logits(other)[0])


# Any use of an engine.

ACTIONS = st.sampled_from(["evaluate", "train", "ask", "edit", "release", "rewrite", "rewrite early", "write before"])


@pytest.fixture
def twins(make_model: MakeModel) -> Callable[[int], list[EditableModel]]:
    """One model twice, of an exact engine with some memory and of a plain one."""

    def make(memory_mb: int) -> list[EditableModel]:
        # T5 has no pruned tail, whose rounding would hide a wrong bit.
        pair = [make_model("qa"), make_model("qa")]
        for model, engine in zip(pair, ("exact", "plain"), strict=True):
            use(model, engine, memory_mb)
        return pair

    return make


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    actions=st.lists(st.tuples(ACTIONS, st.sampled_from(sorted(PROMPTS)), st.integers(0, 9)), max_size=12),
    memory_mb=st.sampled_from([0, 1, 100]),
)
def test_whatever_is_done_to_a_model_both_engines_give_the_same_bits(
    actions: list[tuple[str, str, int]], memory_mb: int, twins: Callable[[int], list[EditableModel]]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        both = [play_through(model, actions) for model in twins(memory_mb)]
    for exact, plain in zip(*both, strict=True):
        assert torch.equal(exact, plain)


def play_through(model: EditableModel, actions: Sequence[tuple[str, str, int]]) -> list[Tensor]:
    """Everything that a model answers while something is done to it."""
    answers: list[Tensor] = []
    batches = {name: encode(model, name) for name in PROMPTS}
    handles: list[Any] = []
    early = model.find_layer(EARLY["qa"])
    model.engine.rewrites([])
    for action, name, seed in actions:
        batch = batches[name]
        if action == "evaluate":
            answers += evaluate(model, [encode(model, other) for other in PROMPTS if other >= name], passes=2)
        elif action == "train":
            answers += trained(model, batch, seed)
        elif action == "ask":
            call = model.layer_call(batch)
            answers += [call.input, call.output, call.position]
        elif action == "edit":
            handles.append(model.intercept(replacing(seed)))
        elif action == "release" and handles:
            handles.pop().remove()
        elif action == "rewrite":
            model.engine.rewrites([model.layer])
            change(model.layer, seed)
        elif action == "rewrite early":
            model.engine.rewrites([early, model.layer])
            change(early, seed)
        elif action == "write before":
            change(early, seed)
    return answers


def trained(model: EditableModel, batch: EncodedBatch, seed: int) -> list[Tensor]:
    """A value trained in place of what the layer gives, for two steps, and its losses."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(1, model.layer_call(batch).output.shape[-1], generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([value], lr=1.0)

    def answer(call: LayerCall) -> Tensor:
        rows = torch.ones(len(call.position), dtype=torch.bool)
        return call.replace(value.expand(len(rows), -1), rows, "replace_prompt")

    handle = model.intercept(answer)
    repeated, losses = model.repeated(batch), []
    for _ in range(2):
        optimizer.zero_grad()
        loss = model.task.loss(repeated(), repeated.batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    handle.remove()
    return [value.detach(), *losses]


def replacing(seed: int) -> Callable[[LayerCall], Tensor]:
    def answer(call: LayerCall) -> Tensor:
        value = torch.randn(call.output.shape[-1], generator=torch.Generator().manual_seed(seed))
        rows = torch.arange(len(call.position)) % 2 == seed % 2
        return call.replace(value.expand(len(rows), -1), rows, "replace_last")

    return answer
