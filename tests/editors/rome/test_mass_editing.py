"""What MEMIT, EMMET and AlphaEdit have in common: batches written into several layers, and everything a run does."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench import RunSettings, Schedule, run_benchmark
from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.editing.batch import EditBatch
from grace_bench.editors._rome.facts import Fact, at_facts, mean_keys
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS, STREAMS

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakePrepared = Callable[..., Any]
PassesThrough = Callable[[EditableModel, str, str], tuple[Tensor, Tensor]]
BatchOf = Callable[[EditableModel, Sequence[EditRequest]], EditBatch]

LAYERS = {"gpt2": "transformer.h.{}.mlp.c_proj", "llama": "model.layers.{}.mlp.down_proj"}
OPTIONS: dict[str, dict[str, Any]] = {
    "memit": {"moment_weight": 1.0},
    "emmet": {"moment_weight": 2.0, "ridge": 0.01},
    "alphaedit": {"threshold": 0.05, "threshold_unit": "largest", "l2": 0.1},
}
VARIANTS = [
    *(pytest.param(name, options, id=name) for name, options in OPTIONS.items()),
    pytest.param("memit", {"moment_weight": 1.0, "history": True}, id="memit-history"),
    pytest.param("memit", {"moment_weight": 0.1, "prune": True, "clamp": 20.0}, id="memit-prune"),
    pytest.param("memit", {"moment_weight": 1.0, "rect": 0.4}, id="memit-rect"),
    pytest.param("memit", {"moment_weight": 1.0, "ends_only": True, "history": True}, id="memit-ends_only"),
]
each_editor = pytest.mark.parametrize("name", list(OPTIONS))
# Those that keep another state or write other layers; what changes the update alone is slow.
QUICK = ("memit-history", "memit-ends_only", "emmet", "alphaedit")
each_variant = pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(*variant.values, id=variant.id, marks=() if variant.id in QUICK else pytest.mark.slow)
        for variant in VARIANTS
    ],
)


def layers_of(family: str = "gpt2", blocks: Sequence[int] = (0, 1)) -> list[str]:
    return [LAYERS[family].format(block) for block in blocks]


def matrix(model: EditableModel, path: str) -> Tensor:
    """(D_out, D_in) float64, of either kind of layer."""
    layer = model.find_layer(path)
    weight: Tensor = layer.get_parameter("weight").detach().double().clone()
    return weight.T if isinstance(layer, Conv1D) else weight


def keys_at(editor: Any, path: str, facts: Sequence[Fact]) -> Tensor:
    return mean_keys(at_facts(editor.model_at(path), path, facts)[0])


def weights_of(model: EditableModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name] for name, value in a.items()
    )


# --- the update ------------------------------------------------------------------------------------------------------


def published_change(
    name: str, keys: Tensor, residuals: Tensor, moments: Tensor, past: Tensor, options: dict[str, Any]
) -> Tensor:
    """The formulas of the papers and their code, with plain inverses; keys and residuals are rows."""
    k, r, identity = keys.T, residuals.T, torch.eye(len(moments), dtype=torch.float64)
    if name == "memit":
        known = past if options.get("history") else 0.0
        return r @ k.T @ torch.linalg.inv(options["moment_weight"] * moments + known + k @ k.T)
    if name == "emmet":
        inverse = torch.linalg.inv(options["moment_weight"] * moments + options["ridge"] * identity)
        # EasyEdit's softening is 0.1.
        return (
            r @ torch.linalg.inv(k.T @ inverse @ k + 0.1 * torch.eye(k.shape[1], dtype=torch.float64)) @ k.T @ inverse
        )
    left, singular, _ = torch.linalg.svd(moments)
    free = left[:, singular < options["threshold"] * singular[0]]
    projection = free @ free.T
    return torch.linalg.solve(projection @ (k @ k.T + past) + options["l2"] * identity, projection @ k @ r.T).T


@pytest.mark.parametrize(
    ("name", "options", "family"),
    # Each editor on one family, in turn.
    [
        pytest.param(
            *variant.values, family, id=f"{variant.id}-{family}", marks=() if (i + j) % 2 == 0 else pytest.mark.slow
        )
        for i, variant in enumerate(VARIANTS[: len(OPTIONS) + 1])
        for j, family in enumerate(LAYERS)
    ],
)
def test_every_layer_gets_the_published_update_at_keys_measured_on_the_way(
    name: str,
    options: dict[str, Any],
    family: str,
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    passes_through: PassesThrough,
) -> None:
    paths, requests = layers_of(family), make_requests("completion")[:4]
    block = paths[-1].rpartition(".mlp")[0]
    model, reference = make_causal(family), make_causal(family)
    texts = [" ".join([request.prompt, str(request.target)] * 3) for request in make_requests("completion")]
    texts += [f"{text} {other}" for text in texts for other in ("Lima Rome Sol", "Seine Paris", "Euro Tenge France in")]
    moments, past = {}, {path: torch.zeros(48, 48, dtype=torch.float64) for path in paths}
    for path in paths:
        tokens = torch.cat([passes_through(reference, path, text)[0] for text in texts])
        moments[path] = tokens.T @ tokens / len(tokens)
        smallest, mean = torch.linalg.eigvalsh(moments[path])[0], moments[path].diagonal().mean()
        if smallest < 1e-6 * mean and name != "alphaedit":
            moments[path] += 1e-6 * mean * torch.eye(48)
    with make_prepared(name, model, texts=texts, layers=paths, **options) as editor:
        for batch in (requests[:2], requests[2:]):
            before = {path: matrix(model, path) for path in paths}
            values = editor.edit_facts([editor.encode(r.prompt, r.target, r.subject) for r in batch])
            wanted = torch.stack([value.optimised for value in values])
            for index, path in enumerate(paths):
                rows, given = [], []
                for request in batch:
                    prompts = [f"{text}. {request.prompt}" if text else request.prompt for text in editor.contexts]
                    # The prompts end with the subject.
                    found = [passes_through(reference, path, prompt)[0][-1] for prompt in prompts]
                    rows.append(found[0] / 2 + torch.stack(found[1:]).mean(dim=0) / 2)
                    given.append(passes_through(reference, block, request.prompt)[1][-1])
                keys, residuals = torch.stack(rows), (wanted - torch.stack(given)) / (len(paths) - index)
                published = published_change(name, keys, residuals, moments[path], past[path], options)
                past[path] += keys.T @ keys
                change = matrix(model, path) - before[path]
                assert float(published.norm()) > 1e-2
                torch.testing.assert_close(change, published, rtol=0, atol=5e-3 * float(published.abs().max()))
                # What follows is measured on the weights as edited so far; ours, so that rounding does not add up.
                layer = reference.find_layer(path)
                layer.load_state_dict(model.find_layer(path).state_dict())


@each_variant
def test_all_layers_change_and_nothing_else_and_all_are_rolled_back_bit_for_bit(
    name: str,
    options: dict[str, Any],
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
) -> None:
    model, requests, paths = make_causal(), make_requests("completion"), layers_of(blocks=(0, 1, 2))
    before = weights_of(model)
    expected = {paths[0], paths[2]} if options.get("ends_only") else {*paths}
    edited = []
    with make_prepared(name, model, layers=paths, n_iter=4, **options) as editor:
        for _ in range(2):
            for batch in (requests[:3], requests[3:]):
                editor.edit(batch_of(model, batch))
            edited.append(weights_of(model))
            changed = {key for key, weight in edited[-1].items() if not torch.equal(weight, before[key])}
            assert changed == {f"{path}.weight" for path in expected}
            editor.rollback()
            assert same(weights_of(model), before)
    assert same(*edited), "after a rollback an editor edits as it did at first"
    assert same(weights_of(model), before)


@each_editor
def test_the_order_within_a_batch_changes_nothing_beyond_rounding(
    name: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    paths, changes = layers_of(), []
    for order in ((0, 1, 2, 3), (2, 0, 3, 1)):
        model, requests = make_causal(), make_requests("completion")
        before = {path: matrix(model, path) for path in paths}
        with make_prepared(name, model, layers=paths, **OPTIONS[name]) as editor:
            editor.edit(batch_of(model, [requests[index] for index in order]))
            changes.append({path: matrix(model, path) - before[path] for path in paths})
    for path in paths:
        largest = float(changes[0][path].abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(changes[1][path], changes[0][path], rtol=0, atol=2e-3 * largest)


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_what_earlier_batches_wrote_moves_less_with_their_keys_remembered(
    name: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests, path = make_causal(), make_requests("completion"), layers_of()[1]
    options = {"memit": {"moment_weight": 0.01, "history": True}, "alphaedit": {**OPTIONS[name], "l2": 0.01}}[name]
    moved = []
    with make_prepared(name, model, layers=[path], **options) as editor:
        facts = [editor.encode(r.prompt, r.target, r.subject) for r in requests]
        keys = keys_at(editor, path, facts[:3])
        editor.edit_facts(facts[:3])
        state = copied(editor.state_dict())
        for remembers in (True, False):
            editor.load_state_dict(state)
            if not remembers:
                editor.past.clear()
            before = matrix(model, path)
            editor.edit_facts(facts[3:])
            moved.append((keys @ (matrix(model, path) - before).T).norm(dim=1))
    with_history, without = moved
    # Every earlier key, hence also their median and the furthest.
    assert bool((with_history < 0.5 * without).all()), (with_history, without)


@pytest.mark.parametrize("token", ["subject_last", "subject_first", "subject_first_after_last"])
def test_keys_are_those_of_the_fact_token_half_of_the_bare_prompt(
    token: str, make_causal: MakeModel, make_prepared: MakePrepared, passes_through: PassesThrough
) -> None:
    model, path = make_causal("llama"), layers_of("llama")[0]
    prompt, subject = "what is the capital of Kazakhstan Peru in Italy", "Kazakhstan Peru"
    # Counted from the end of the prompt.
    place = {"subject_last": -3, "subject_first": -4, "subject_first_after_last": -2}[token]
    with make_prepared("memit", model, layers=[path], fact_token=token) as editor:
        found = [
            passes_through(model, path, f"{text}. {prompt}" if text else prompt)[0][place] for text in editor.contexts
        ]
        (key,) = keys_at(editor, path, [editor.encode(prompt, "Astana", subject)])
    torch.testing.assert_close(key, found[0] / 2 + torch.stack(found[1:]).mean(dim=0) / 2, rtol=1e-5, atol=1e-5)


def test_after_a_subject_that_ends_the_prompt_there_is_only_its_last_token(
    make_causal: MakeModel, make_prepared: MakePrepared
) -> None:
    path, keys = layers_of()[0], []
    for token in ("subject_last", "subject_first_after_last"):
        with make_prepared("memit", make_causal(), layers=[path], fact_token=token) as editor:
            keys.append(keys_at(editor, path, [editor.encode("the river of Italy", "Tiber", "Italy")]))
    assert torch.equal(*keys)


# --- models ----------------------------------------------------------------------------------------------------------


@each_editor
def test_conv1d_and_linear_layers_of_the_same_weights_are_edited_alike(
    name: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    paths, changes = layers_of(), []
    for is_linear in (False, True):
        model = make_causal()
        for block in model.module.transformer.h if is_linear else ():
            old = block.mlp.c_proj
            linear = nn.Linear(*old.weight.shape)
            linear.weight.data, linear.bias.data = old.weight.detach().T.contiguous(), old.bias.detach().clone()
            block.mlp.c_proj = linear
        model = EditableModel(model.module, layer=model.layer_name, task=model.task, tokenizer=model.tokenizer)
        before = {path: matrix(model, path) for path in paths}
        with make_prepared(name, model, layers=paths, n_iter=8, **OPTIONS[name]) as editor:
            editor.edit(batch_of(model, make_requests("completion")[:2]))
            changes.append({path: matrix(model, path) - before[path] for path in paths})
    for path in paths:
        largest = float(changes[0][path].abs().max())
        assert largest > 1e-3
        torch.testing.assert_close(changes[1][path], changes[0][path], rtol=0, atol=5e-3 * largest)


@each_editor
def test_both_engines_make_the_same_edits(
    name: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    found = []
    for engine in ("exact", "plain"):
        model, requests = make_causal("llama", engine=engine), make_requests("completion")
        with make_prepared(name, model, layers=layers_of("llama"), n_iter=4, **OPTIONS[name]) as editor:
            outcomes = [editor.edit(batch_of(model, batch)) for batch in (requests[:3], requests[3:])]
            answers = [score.text for score in model.score(requests)]
            found.append((outcomes, answers, [matrix(model, path) for path in layers_of("llama")]))
    for exact, plain in zip(found[0][0], found[1][0], strict=True):
        assert exact.steps == plain.steps
        assert (exact.loss_first, exact.loss) == pytest.approx((plain.loss_first, plain.loss), abs=1e-3)
    assert found[0][1] == found[1][1]
    torch.testing.assert_close(found[0][2], found[1][2], rtol=0, atol=1e-3)


def test_what_comes_before_the_first_rewritten_layer_runs_no_more_often_for_more_layers(
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
    calls_of: Callable[..., Any],
) -> None:
    counts = []
    for blocks in ([1], [1, 2]):
        model, requests = make_causal("llama"), make_requests("completion")
        with make_prepared("memit", model, layers=layers_of("llama", blocks), n_iter=3, **OPTIONS["memit"]) as editor:
            editor.edit(batch_of(model, requests[:2]))  # The engine checks at first use what it assumes.
            with calls_of(model, "model.layers.0.self_attn.q_proj") as early:
                editor.edit(batch_of(model, requests[:2]))
        counts.append(len(early))
    # To cache what precedes the facts, to record the facts behind it, and to record what all keys are read from.
    assert counts == [3, 3]


def test_edits_too_small_for_bfloat16_add_up(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests, path = (
        make_causal("llama", dtype=torch.bfloat16),
        make_requests("completion"),
        layers_of("llama")[1],
    )
    unedited = matrix(model, path)
    with make_prepared("memit", model, layers=[path], moment_weight=30000.0, n_iter=4) as editor:
        masters = [editor.weight_of(path).clone()]
        for request in requests * 2:
            editor.edit(batch_of(model, [request]))
            masters.append(editor.weight_of(path).clone())
        assert editor.weight_of(path).dtype == torch.float32
        assert torch.equal(matrix(model, path), masters[-1].bfloat16().double())
        updates = [after - before for before, after in itertools.pairwise(masters)]
        vanishing = [
            float(((masters[0] + update).bfloat16() == masters[0].bfloat16()).float().mean()) for update in updates
        ]
        assert min(vanishing) > 0.7, "one edit alone is lost in the rounding of most elements"
        n_changed = [float((master.bfloat16().double() != unedited).float().mean()) for master in masters]
        assert n_changed[0] == 0.0
        assert n_changed[-1] > 1.5 * n_changed[1]
        editor.rollback()
        assert torch.equal(matrix(model, path), unedited)


# --- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.slow)],
)
@each_variant
def test_an_unprepared_editor_resumes_from_a_state_with_the_same_bytes(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
) -> None:
    requests, paths = make_requests("completion"), layers_of()
    model, fresh = make_causal(dtype=dtype), make_causal(dtype=dtype)
    with make_prepared(name, model, layers=paths, n_iter=4, **options) as editor:
        for batch in (requests[:2], requests[2:4]):
            editor.edit(batch_of(model, batch))
        state = copied(editor.state_dict())
        remembers = name == "alphaedit" or options.get("history", False)
        assert {key for key in state if key.startswith("past.")} == {f"past.{path}" for path in paths if remembers}
        # Plain values survive JSON, as in a checkpoint.
        state = {k: v if isinstance(v, Tensor) else json.loads(json.dumps(v)) for k, v in state.items()}
        with EDITORS.get(name)(model=fresh, **json.loads(json.dumps(editor.settings()))) as resumed:
            resumed.load_state_dict(state)
            assert same(weights_of(fresh), weights_of(model))
            for one, on in ((editor, model), (resumed, fresh)):
                one.edit(batch_of(on, requests[4:]))
            assert same(weights_of(fresh), weights_of(model))
            assert same(resumed.state_dict(), editor.state_dict())
            resumed.rollback()
            assert same(weights_of(fresh), weights_of(make_causal(dtype=dtype)))


@each_editor
def test_a_saved_editor_holds_the_weights_of_every_layer_and_answers_alike(
    name: str,
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
    tmp_path: Path,
) -> None:
    model, fresh, requests = make_causal(), make_causal(), make_requests("completion")
    with make_prepared(name, model, layers=layers_of(), n_iter=6, **OPTIONS[name]) as editor:
        editor.edit(batch_of(model, requests[:3]))
        editor.save_pretrained(tmp_path)
        assert editor.extra_parameters == 0
        with EDITORS.get(name).from_pretrained(tmp_path, model=fresh) as loaded:
            assert same(weights_of(fresh), weights_of(model))
            assert loaded.settings() == editor.settings()


# --- failures --------------------------------------------------------------------------------------------------------


@each_editor
@pytest.mark.parametrize("subject", [None, "", "Astana"])
def test_a_request_whose_prompt_lacks_the_subject_fails_and_changes_nothing(
    name: str,
    subject: str | None,
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
) -> None:
    model, requests = make_causal(), make_requests("completion")
    before = weights_of(model)
    batch = batch_of(model, [requests[0], requests[1].model_copy(update={"subject": subject})])
    with make_prepared(name, model, layers=layers_of(), **OPTIONS[name]) as editor:
        with pytest.raises(EditFailure, match=r"^the subject .* does not occur in the prompt$"):
            editor.edit(batch)
        assert same(weights_of(model), before)
        assert editor.past == {}


class Few(EditStream):
    """A stream of the given requests and running text."""

    registered_name = "few"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    max_new_tokens = 3
    task = "completion"

    def __init__(self, requests: Sequence[EditRequest], train: Sequence[EditRequest]) -> None:
        self._data = StreamData(edits=tuple(requests), upstream=tuple(train), train=tuple(train))

    def load(self) -> StreamData:
        return self._data


@each_editor
def test_in_a_run_one_request_of_a_batch_fails_with_its_reason_and_the_others_are_edited(
    name: str,
    make_causal: MakeModel,
    make_requests: MakeRequests,
    make_train: MakeRequests,
    tmp_path: Path,
) -> None:
    requests = make_requests("completion")
    # The model reads 48 tokens, and a prompt is cut at its start.
    long = f"Italy is {'the ' * 60}capital"
    requests[1] = requests[1].model_copy(update={"prompt": long, "subject": "Italy"})
    layers = layers_of("llama")
    options = {"layers": layers, "n_prefixes": 0, "n_iter": 4, **OPTIONS[name]}
    result = run_benchmark(
        Few(requests, make_train("completion")),
        model=make_causal("llama"),
        editor=lambda **given: EDITORS.get(name)(**given, **options),
        settings=RunSettings(schedule=Schedule(edit="all", edits_at_once=3), threads=1),
        folder=tmp_path,
    )
    records = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    reasons = {record["id"]: record["failed"] for record in records}
    assert reasons == {
        request.id: "the prompt is too long: the subject 'Italy' was cut off" if index == 1 else None
        for index, request in enumerate(requests)
    }
    assert result.metrics["n_failed"] == 1


# --- what they refuse ------------------------------------------------------------------------------------------------


@each_editor
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"n_iter": 0}, "n_iter=0"),
        ({"lr": -1.0}, "lr=-1.0"),
        ({"kl_weight": float("nan")}, "kl_weight=nan"),
        ({"weight_decay": -0.5}, "weight_decay=-0.5"),
        ({"clamp": 0}, "clamp=0"),
        ({"n_prefixes": -1}, "n_prefixes=-1"),
        ({"prefix_lengths": (48,)}, "prefix_lengths=48"),
        ({"fact_token": "subject"}, "fact_token=subject"),
        ({"text": "wikipedia"}, "text=wikipedia"),
        ({"text_path": ""}, "text_path="),
        ({"moments_path": ""}, "moments_path="),
        ({"n_texts": 0}, "n_texts=0"),
        ({"seed": -1}, "seed=-1"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    name: str, option: dict[str, Any], named: str, make_causal: MakeModel
) -> None:
    with pytest.raises(UserError, match=rf"^editor\.{named} (should be|is not known)") as caught:
        EDITORS.get(name)(model=make_causal(), **option)
    assert "\n" not in str(caught.value)


@each_editor
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("transformer.h.1.mlp", "{}=transformer.h.1.mlp is a GPT2MLP: editor '{}' rewrites a linear layer"),
        ("transformer.h.1.ln_2", "{}=transformer.h.1.ln_2 is a LayerNorm: editor '{}' rewrites a linear layer"),
        ("lm_head", "{}=lm_head is in no numbered block, at whose end editor '{}' would optimise values"),
        (
            "transformer.h.1.mlp.c_fc",
            "{}=transformer.h.1.mlp.c_fc gives 48 numbers a token, where the hidden state has 32: editor '{}' rewrites",
        ),
    ],
)
@pytest.mark.parametrize("option", ["layer", "editor.layers"])
def test_a_layer_that_cannot_be_written_is_named_with_its_option(
    name: str, path: str, message: str, option: str, make_causal: MakeModel
) -> None:
    is_option = option == "editor.layers"
    model = make_causal() if is_option else make_causal(layer=path)
    with pytest.raises(UserError) as caught:
        EDITORS.get(name)(model=model, layers=[*layers_of()[:1], path] if is_option else None)
    assert str(caught.value).startswith(message.format(option, name))
    assert "\n" not in str(caught.value)


@each_editor
def test_an_edit_before_it_was_prepared_says_so(
    name: str, make_causal: MakeModel, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model = make_causal()
    with pytest.raises(UserError, match=rf"^editor '{name}' .* call prepare\(\)$"):
        EDITORS.get(name)(model=model).edit(batch_of(model, make_requests("completion")[:1]))


@each_editor
def test_a_layer_that_the_text_never_reaches_is_named(
    name: str, make_causal: MakeModel, make_train: MakeRequests
) -> None:
    model = make_causal()
    (path,) = layers_of(blocks=[1])
    with torch.no_grad():
        before = model.find_layer("transformer.h.1.mlp.c_fc")
        before.get_parameter("weight").zero_()
        before.get_parameter("bias").zero_()
    editor = EDITORS.get(name)(model=model, layers=[path], n_prefixes=1)
    with pytest.raises(UserError, match=rf"^editor\.layers={path} gets nothing but zeros over the text"):
        editor.prepare(make_train("completion"))


# --- a stream of questions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["r_rome", "memit"])
def test_questions_in_zsres_form_are_edited_in_a_causal_model(
    name: str, make_causal: MakeModel, make_requests: MakeRequests, make_train: MakeRequests, tmp_path: Path
) -> None:
    requests = make_requests("completion")
    records = [
        {
            "subject": request.subject,
            "src": f"{request.prompt} ?",
            "rephrase": request.rephrases[0],
            "alt": request.target,
            "answers": ["Paris"],
            "pred": "Rome",
            "loc": "nq question: what is the river of France",
            "loc_ans": "Seine",
        }
        for request in requests
    ]
    path, text = tmp_path / "zsre.json", tmp_path / "text.txt"
    path.write_text(json.dumps(records), encoding="utf-8")
    text.write_text("\n".join(f"{r.prompt} {r.target}" for r in make_train("completion")), encoding="utf-8")
    options: dict[str, Any] = {"text_path": str(text), "n_prefixes": 0, "n_iter": 10, "clamp": 4.0}
    if name == "memit":
        options |= {"layers": layers_of("llama"), "moment_weight": 0.01}
    result = run_benchmark(
        STREAMS.get("zsre")(path=str(path), task="completion"),
        model=make_causal("llama", layer=layers_of("llama")[0]),
        editor=lambda **given: EDITORS.get(name)(**given, **options),
        settings=RunSettings(schedule=Schedule(edit="all", edits_at_once=3), threads=1),
        folder=tmp_path / "run",
    )
    edits = [json.loads(line) for line in (tmp_path / "run" / "edits.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(edits) == len(requests)
    assert [record["failed"] for record in edits] == [None] * 6
    assert result.metrics["n_failed"] == 0
    assert all(record["steps"] > 0 for record in edits)
    n_before, n_after = (
        sum(record["target"] in record[text].split() for record in edits) for text in ("before_text", "after_text")
    )
    assert n_after > n_before


@pytest.mark.parametrize(("name", "kept"), [("memit", 1), ("emmet", 1), ("alphaedit", 3)])
def test_the_matrices_of_each_layer_are_counted_before_a_run(
    name: str, kept: int, make_editor: Callable[..., Any], make_model: Callable[..., EditableModel]
) -> None:
    with make_editor(name, make_model("completion")) as editor:
        sizes = [editor.weight_of(path).shape[1] ** 2 for path in editor.paths]
        options = {"history": True} if getattr(editor, "history", False) else {}
        assert editor.matrix_bytes() == {
            "second moments": 4 * sum(sizes),
            "factors and projections": 8 * ((kept + len(options)) * sum(sizes) + 2 * max(sizes)),
        }
