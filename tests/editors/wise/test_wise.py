"""WISE: what its memories hold, which of them answers, and what an edit trains."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from grace_bench.editing.batch import EditBatch, ProbedBatch
from grace_bench.editors._wise.memory import chosen
from grace_bench.editors._wise.merging import merge
from grace_bench.editors._wise.rows import BEGINNINGS, official_rows
from grace_bench.editors._wise.training import margin_loss
from grace_bench.editors.wise import Wise
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.encoding import IGNORED
from grace_bench.results.schema import RunResult

FACTS = (("what is the capital of Peru", "Lima"), ("the river in France is", "Tiber"), ("currency of Italy", "Sol"))
UPSTREAM = ["what is the river of Kazakhstan", "the currency in France is", "the capital of Rome"]
SHORT: dict[str, Any] = {
    "n_iter": 6,
    "edit_lr": 3.0,
    "act_ratio": 0.5,
    "save_freq": 2,
    "merge_freq": 4,
    "prefix_lengths": [3],
}

MakeCausal = Callable[..., EditableModel]
MakeWise = Callable[..., Wise]


@pytest.fixture
def make_wise(make_causal: MakeCausal) -> MakeWise:
    """Makes the editor on a tiny causal model, ready for its first edit."""

    def make(family: str = "llama", *, engine: str = "exact", **options: Any) -> Wise:
        editor = Wise(model=make_causal(family, engine=engine), **{**SHORT, **options})
        editor.prepare(())
        if editor.needs_upstream_prompts:
            editor.read_upstream(UPSTREAM)
        return editor

    return make


def logits_of(model: EditableModel, prompt: str, target: str | None = None) -> Tensor:
    with torch.no_grad():
        return model.logits(model.encode_batch([prompt], target and [target])).clone()


def same_state(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(value, two[name]) if isinstance(value, Tensor) else value == two[name]
        for name, value in one.items()
    )


# --- merging


def ties_by_entry(original: Tensor, weights: Sequence[Tensor], shares: Sequence[float], density: float) -> Tensor:
    """TIES as a person would do it, one entry at a time."""
    kept = []
    for weight in weights:
        change = (weight - original).flatten().tolist()
        largest = sorted(range(len(change)), key=lambda i: -abs(change[i]))[: int(density * len(change))]
        kept.append([value if i in largest else 0.0 for i, value in enumerate(change)])
    merged = []
    for values in zip(*kept, strict=True):
        total = sum(share * value for share, value in zip(shares, values, strict=True))
        agreeing = [(s, v) for s, v in zip(shares, values, strict=True) if v and (v > 0) == (total >= 0)]
        weight = sum(s for s, _ in agreeing)
        merged.append(sum(s * v for s, v in agreeing) / weight if agreeing else 0.0)
    return original + torch.tensor(merged).view_as(original)


@pytest.mark.parametrize("density", [0.2, 0.53, 1.0])
def test_ties_keeps_the_largest_changes_and_averages_those_of_the_prevailing_sign(density: float) -> None:
    generator = torch.Generator().manual_seed(0)
    original, *weights = torch.randn(4, 5, 7, generator=generator)
    shares = [0.2, 0.2, 0.6]
    merged = merge(original, weights, shares, how="ties", density=density)
    torch.testing.assert_close(merged, ties_by_entry(original, weights, shares, density))


def test_ties_gives_a_single_memory_its_largest_changes_whatever_its_share() -> None:
    original = torch.zeros(4)
    for share in (0.3, 1.0):
        merged = merge(original, [torch.tensor([1.0, -4.0, 2.0, 0.5])], [share], how="ties", density=0.5)
        assert merged.tolist() == [0.0, -4.0, 2.0, 0.0]


def test_other_ways_to_merge_sum_average_and_turn() -> None:
    original, weights = torch.zeros(2), [torch.tensor([4.0, 1.0]), torch.tensor([-2.0, 3.0])]
    assert merge(original, weights, [0.25, 0.25], how="magnitude", density=0.5).tolist() == [1.0, 0.75]
    assert merge(original, weights, [0.25, 0.25], how="magnitude_norm", density=0.5).tolist() == [2.0, 1.5]
    assert merge(original, weights, [0.5, 0.5], how="sign", density=0.5).tolist() == [4.0, 2.0]
    start, end = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    assert merge(start, [end], [0.5], how="linear", density=1.0).tolist() == [1.0, 1.0]
    torch.testing.assert_close(merge(start, [end], [0.5], how="slerp", density=1.0), torch.full((2,), 2.0**0.5))
    assert merge(start, [2 * start], [0.5], how="slerp", density=1.0).tolist() == [3.0, 0.0]


# --- routing


@pytest.mark.parametrize(
    ("distances", "answers"),
    [
        ({"new": 3.0, "memory 0": 1.0}, None),
        ({"new": 4.0, "memory 0": 1.0}, "new"),
        ({"new": 5.0, "memory 0": 6.0}, "memory 0"),
        ({"new": 5.0, "memory 0": 4.9}, "new"),
        # A saved memory must be farther than the one in training even where that is too near to answer.
        ({"new": 3.9, "memory 0": 3.5}, None),
        ({"new": 3.0, "memory 0": 3.5}, "memory 0"),
        ({"new": 0.0, "memory 0": 3.5, "memory 1": 3.6}, "memory 1"),
        ({"new": 0.0, "memory 0": 3.5, "memory 1": 3.4}, "memory 0"),
    ],
)
def test_the_farthest_memory_that_is_far_enough_answers(distances: dict[str, float], answers: str | None) -> None:
    least = {"new": 4.0, "memory 0": 2.5, "memory 1": 2.5}
    names = list(distances)
    found = chosen(names, [least[name] for name in names], torch.tensor(list(distances.values()))[:, None])
    assert (names[int(found)] if int(found) >= 0 else None) == answers


def test_a_prompt_is_routed_by_its_own_tokens_whatever_stands_beside_or_behind_it(make_wise: MakeWise) -> None:
    with make_wise() as editor:
        model, memories = editor.model, editor.memories
        for fact in FACTS:
            editor.edit_text(*fact)
        prompts = [prompt for prompt, _ in FACTS] + UPSTREAM
        targets = ["Rome"] * len(prompts)

        def distances(*batches: Any) -> Tensor:
            found = []
            for batch in batches:
                with model.bypassing():
                    call = model.layer_call(batch)
                found.append(memories.route(call.input, call.in_prompt).distances)
            return torch.cat(found, dim=1)

        alone = distances(*(model.encode_batch([prompt]) for prompt in prompts))
        for side in ("left", "right"):
            torch.testing.assert_close(distances(model.encode_batch(prompts, side=side)), alone)
            torch.testing.assert_close(distances(model.encode_batch(prompts, targets, side=side)), alone)


def test_generated_tokens_come_from_the_memory_that_the_prompt_chose(make_wise: MakeWise) -> None:
    with make_wise() as editor:
        editor.edit_text(*FACTS[0])
        model = editor.model
        inputs = model.encode_batch([FACTS[0][0]]).inputs
        rows = [
            model.module.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=cached)  # type: ignore[operator]
            for cached in (True, False)
        ]
        assert torch.equal(*rows)
        # By hand: the whole sequence with the memory's weight in the layer.
        (candidate,) = editor.memories.answering()
        model.layer.get_parameter("weight").data.copy_(candidate.weight)
        ids = inputs["input_ids"]
        with torch.no_grad(), model.bypassing():
            for _ in range(4):
                ids = torch.cat([ids, model.module(input_ids=ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(rows[0], ids)


def test_a_prompt_that_no_memory_knows_is_answered_bit_for_bit_by_the_unedited_model(make_wise: MakeWise) -> None:
    with make_wise(act_ratio=1e6) as editor:
        before = logits_of(editor.model, UPSTREAM[0], "Rome")
        for fact in FACTS:
            editor.edit_text(*fact)
        assert torch.equal(logits_of(editor.model, UPSTREAM[0], "Rome"), before)


# --- an edit


def trained_by_hand(editor: Wise, prompt: str, target: str, irrelevant: str, *, n_steps: int) -> Tensor:
    """The trained weight, by backpropagation through the whole model with its own weight as the parameter."""
    model = editor.model
    act = ACT2FN[getattr(model.config, "hidden_act", None) or model.config.activation_function]
    weight = model.layer.get_parameter("weight")
    original, mask = weight.detach().clone(), editor.mask_of(0)
    prompts = [f"{context} {prompt}".strip() for context in editor.contexts]
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    owns: dict[int, Tensor] = {}

    def activation(key: int, length: int) -> Tensor:
        own = owns.setdefault(key, seen[-1][1].detach())
        return (act(seen[-1][1]) - act(own))[0, :length].norm(dim=-1).mean()

    weight.requires_grad_()
    for _ in range(n_steps):
        losses, inside = [], []
        for key, text in enumerate(prompts):
            batch = model.encode_batch([text], [target])
            assert batch.labels is not None
            with model.bypassing():
                logits = model.logits(batch)
            losses.append(functional.cross_entropy(logits[0], batch.labels[0], ignore_index=IGNORED))
            inside.append(activation(key, int(batch.query) + 1))
        with model.bypassing():
            model.logits(model.encode_batch([irrelevant]))
        outside = activation(-1, seen[-1][1].shape[1])
        alpha, beta, gamma = editor.act_margin
        hinge = [max(outside - one + gamma, outside * 0) for one in inside]
        low = [max(beta - one, one * 0) for one in inside]

        def mean(values: list[Tensor]) -> Tensor:
            positive = [value for value in values if float(value.detach()) > 0]
            return torch.stack(positive).mean() if positive else torch.zeros(())

        loss = torch.stack(losses).mean() + mean(hinge) + mean([max(outside - alpha, outside * 0)]) + mean(low)
        (gradient,) = torch.autograd.grad(loss, [weight])
        with torch.no_grad():
            stepped = weight - editor.edit_lr * mask * (gradient + 1e-5 * weight)
            weight.copy_(stepped.clamp(original - editor.norm_constraint, original + editor.norm_constraint))
    handle.remove()
    trained = weight.detach().clone()
    with torch.no_grad():
        weight.requires_grad_(False).copy_(original)
    return trained


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_descends_the_loss_of_the_target_and_of_the_activations(make_wise: MakeWise, family: str) -> None:
    with make_wise(family, n_iter=3, edit_lr=0.05, act_margin=[0.01, 1.0, 0.5], norm_constraint=0.02) as editor:
        prompt, target = FACTS[0]
        irrelevant = UPSTREAM[1]
        by_hand = trained_by_hand(editor, prompt, target, irrelevant, n_steps=3)
        trained = editor.edit_one((prompt, target, irrelevant))
        change = by_hand - editor.memories.original
        assert float(change.abs().max()) == pytest.approx(0.02, rel=1e-3)
        assert float((trained.weight - by_hand).norm()) < 1e-3 * float(change.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_changes_the_entries_of_its_mask_alone(make_wise: MakeWise, family: str) -> None:
    with make_wise(family, mask_ratio=0.3, norm_constraint=0.1) as editor:
        editor.edit_text(*FACTS[0])
        new, original, mask = editor.memories.new, editor.memories.original, editor.mask_of(0)
        assert new is not None
        assert 0.25 < float(mask.float().mean()) < 0.35
        assert torch.equal(new[~mask], original[~mask])
        changed = (new - original).abs()[mask]
        assert 0 < float(changed.max()) <= 0.1 + 1e-6


def test_only_the_layer_and_what_follows_it_run_again(make_wise: MakeWise, calls_of: Any) -> None:
    before, after = "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.q_proj"
    with make_wise() as editor:
        # The first edit traces the model and compares gradients.
        editor.edit_text(*FACTS[0])
        with calls_of(editor.model, before) as calls_before, calls_of(editor.model, after) as calls_after:
            editor.edit_text(*FACTS[1])
        # The request is recorded, and the irrelevant prompt read.
        assert len(calls_before) == 2
        assert len(calls_after) == SHORT["n_iter"] + 1


def test_the_engines_make_the_same_edits(make_wise: MakeWise) -> None:
    found = []
    for engine in ("exact", "plain"):
        with make_wise(engine=engine, edit_lr=0.3) as editor:
            for fact in FACTS:
                editor.edit_text(*fact)
            routed = [editor.model.answer([prompt]) for prompt in (*(p for p, _ in FACTS), *UPSTREAM)]
            found.append((editor.memories.new, editor.memories.saved[0], routed))
    for one, two in zip(found[0][:2], found[1][:2], strict=True):
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    assert found[0][2] == found[1][2]


def test_margins_are_means_over_what_violates_them() -> None:
    loss = margin_loss(torch.tensor([6.0, 30.0]), torch.tensor([4.0, 9.0]), [5.0, 20.0, 10.0])
    # γ: 8 and 13; α: 4; β: 14.
    assert float(loss) == pytest.approx((8 + 13) / 2 + 4 + 14)


def test_contexts_continue_five_beginnings_greedily(make_wise: MakeWise) -> None:
    with make_wise(prefix_lengths=[2, 4]) as editor:
        assert len(editor.contexts) == 1 + 2 * len(BEGINNINGS)
        assert editor.contexts[0] == ""
        assert all(text for text in editor.contexts[1:])


# --- saving and merging


def test_memories_are_saved_and_merged_at_their_numbers_of_edits(make_wise: MakeWise) -> None:
    with make_wise(save_freq=1, merge_freq=2) as editor:
        memories, sizes = editor.memories, []
        for fact in (*FACTS, FACTS[0]):
            editor.edit_text(*fact)
            assert memories.new is None
            assert len(memories.saved) == len(memories.least)
            sizes.append(len(memories.saved))
        assert sizes == [1, 1, 2, 2]


@pytest.mark.parametrize("retrieve", [True, False])
def test_merging_joins_the_finished_memories(make_wise: MakeWise, retrieve: bool) -> None:
    with make_wise(save_freq=1, merge_freq=2, retrieve=retrieve) as editor:
        memories = editor.memories
        editor.edit_text(*FACTS[0])
        (first,) = memories.saved
        weights = [first]
        trained = editor.edit_one((*FACTS[1], UPSTREAM[0]))
        weights.append(trained.weight)
        expected = merge(memories.original, weights, [0.5, 0.5], how="ties", density=editor.density)
        merged = memories.saved[0] if retrieve else memories.merged
        assert merged is not None
        assert torch.equal(merged, expected)


def test_in_merge_mode_answers_are_those_of_a_merge_that_leaves_the_memories_alone(make_wise: MakeWise) -> None:
    with make_wise(retrieve=False) as editor:
        memories = editor.memories
        for fact in FACTS:
            editor.edit_text(*fact)
        state = dict(editor.state_dict())
        assert memories.new is not None
        weights = [*memories.saved, memories.new]
        (candidate,) = memories.answering()
        assert torch.equal(
            candidate.weight, merge(memories.original, weights, [0.5, 0.5], how="ties", density=editor.density)
        )
        editor.model.answer([FACTS[0][0]])
        assert same_state(editor.state_dict(), state)


def test_the_reference_merges_when_it_is_evaluated(make_wise: MakeWise) -> None:
    with make_wise(retrieve=False, fidelity="reference", irrelevant="locality") as editor:
        for prompt, target in FACTS:
            editor.edit_text(prompt, target, locality=UPSTREAM[:1])
        assert editor.memories.merged is None
        editor.model.answer([FACTS[0][0]])
        assert editor.memories.merged is not None
        assert editor.memories.new is None
        assert editor.memories.saved == ()


@pytest.mark.parametrize("retrieve", [True, False])
def test_memories_stay_within_their_bound_however_many_edits_fail(make_wise: MakeWise, retrieve: bool) -> None:
    for save_freq, merge_freq in ((1, 1), (2, 4), (2, 6), (3, 3)):
        with make_wise(save_freq=save_freq, merge_freq=merge_freq, retrieve=retrieve) as editor:
            weight = editor.memories.original
            for n_edits in range(1, 14):
                editor.memories.finish(weight + n_edits, 1.0)
                assert editor.extra_parameters <= editor.max_extra_parameters(n_edits)
                assert editor.extra_parameters <= editor.max_extra_parameters(n_edits + 1)


def test_a_failed_edit_leaves_every_memory_as_it_was_and_copies_none(make_wise: MakeWise) -> None:
    with make_wise() as editor:
        for fact in FACTS:
            editor.edit_text(*fact)
        state = dict(editor.state_dict())
        editor._descent = type(editor._descent)(
            edit_lr=1e30, n_iter=4, act_margin=(5.0, 20.0, 10.0), norm_constraint=None
        )
        with pytest.raises(EditFailure):
            editor.edit_text(*FACTS[0])
        after = editor.state_dict()
        assert same_state(after, state)
        assert all(after[name] is value for name, value in state.items() if isinstance(value, Tensor))


def test_replayed_edits_are_part_of_the_state(make_wise: MakeWise) -> None:
    options = {"save_freq": 1, "merge_freq": 2, "replay": True, "n_iter": 3}
    with make_wise(**options) as editor, make_wise(**options) as resumed:
        for fact in FACTS:
            editor.edit_text(*fact)
        assert editor.past.turns == (3,)
        resumed.load_state_dict(editor.state_dict())
        for one in (editor, resumed):
            one.edit_text(*FACTS[0])
        assert same_state(editor.state_dict(), resumed.state_dict())
        undo = editor.undo_point()
        before = editor.past.state_dict()
        editor.edit_text(*FACTS[1])
        undo()
        assert editor.past.state_dict() == before


# --- irrelevant prompts


def test_irrelevant_prompts_are_upstream_prompts_by_default(make_wise: MakeWise, make_causal: MakeCausal) -> None:
    with make_wise() as editor:
        assert editor.needs_upstream_prompts
        assert not editor.needs_locality
        batch = EditBatch(prompts=("a",), targets=("b",), encoded=editor.model.encode_batch(["a"], ["b"]))
        assert editor._irrelevant_prompt(batch, 0) in UPSTREAM
    with Wise(model=make_causal(), **SHORT) as editor:
        editor.prepare(())
        with pytest.raises(UserError, match="read_upstream"):
            editor.edit_text(*FACTS[0])


def test_the_locality_probes_of_an_edit_are_shown_only_on_request(make_wise: MakeWise) -> None:
    with make_wise(irrelevant="locality") as editor:
        assert editor.needs_locality
        assert not editor.needs_upstream_prompts
        encoded = editor.model.encode_batch(["a"], ["b"])
        batch = ProbedBatch(prompts=("a",), targets=("b",), encoded=encoded, locality=(("what is", "the"),))
        assert editor._irrelevant_prompt(batch, 0) == "what is"
        with pytest.raises(EditFailure, match="no locality probe"):
            editor.edit_text(*FACTS[0])
        with pytest.raises(UserError, match="needs no upstream prompts"):
            editor.read_upstream(UPSTREAM)


@pytest.mark.parametrize("irrelevant", ["upstream", "locality"])
def test_a_result_says_whether_the_editor_saw_its_test(
    run_facts: Callable[..., RunResult], tmp_path: Path, irrelevant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import conftest

    monkeypatch.setitem(conftest.SHORT_RUNS, "wise", {**conftest.SHORT_RUNS["wise"], "irrelevant": irrelevant})
    said: list[str] = []
    result = run_facts(tmp_path, editor="wise", task="completion", n_requests=2, say=said.append)
    assert result.protocol.shows_locality == (irrelevant == "locality")
    assert result.editor.model_dump()["irrelevant"] == irrelevant
    assert any("shown the locality probes" in line for line in said) == (irrelevant == "locality")


# --- the official rows


def test_official_rows_count_a_subject_as_inside_and_all_else_as_outside(make_causal: MakeCausal) -> None:
    model = make_causal("llama")
    rows = official_rows(model, "what is the capital of Peru", "Lima", "Peru", ["", "the river of"])
    assert rows.inside is not None
    assert rows.outside is not None
    ids = rows.batch.inputs["input_ids"]
    for row in range(2):
        assert model.tokenizer.decode(ids[row][rows.inside[row]]).strip() == "Peru"
        assert torch.equal(rows.outside[row], ~rows.inside[row])
    assert not bool(rows.inside[2].any() | rows.outside[2].any())
    with pytest.raises(EditFailure, match="do not occur"):
        official_rows(model, "what is the capital of Peru", "Lima", "eru", [""])


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merge_freq": 5}, "editor.merge_freq=5 should be a multiple of editor.save_freq=2"),
        ({"act_margin": [1.0, 2.0]}, r"editor.act_margin=\[1.0, 2.0\] should be three numbers"),
        ({"act_margin": "abc"}, "editor.act_margin=abc should be three numbers"),
        ({"mask_ratio": 1.5}, "editor.mask_ratio=1.5 should be a share"),
        ({"replay": True, "retrieve": False}, "editor.replay=true works with editor.retrieve=true"),
        ({"merge_alg": "tie"}, "editor.merge_alg=tie is not known; did you mean 'ties'"),
        ({"irrelevant": "test"}, "editor.irrelevant=test is not known"),
        ({"edit_lr": 0.0}, "editor.edit_lr=0.0 should be a positive number"),
    ],
)
def test_options_out_of_range_are_refused_in_one_line(
    make_causal: MakeCausal, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Wise(model=make_causal(), **{**SHORT, **options})
    assert "\n" not in str(caught.value)


def test_a_layer_that_is_not_linear_is_refused(make_causal: MakeCausal) -> None:
    with pytest.raises(UserError, match=r"layer=transformer\.h\.1\.mlp is a GPT2MLP"):
        Wise(model=make_causal(layer="transformer.h.1.mlp"))
