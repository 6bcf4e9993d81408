"""ROME and R-ROME against their closed form on recorded activations, and the models they edit."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors.rome import Rome
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakePrepared = Callable[..., Any]
PassesThrough = Callable[[EditableModel, str, str], tuple[Tensor, Tensor]]
BatchOf = Callable[..., EditBatch]

TASKS = ("completion", "language_modelling")
each_task = pytest.mark.parametrize("task", TASKS)
each_editor = pytest.mark.parametrize("name", ["rome", "r_rome"])
TEXTS = [
    "the capital of France is Paris",
    "what is the river in Italy the Tiber",
    "Lima",
    "the currency of Peru is the Sol in the Euro is the currency of Italy of France in the capital of Kazakhstan",
]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))


def edit(editor: Any, request: EditRequest) -> Any:
    return editor.edit_text(request.prompt, request.target, subject=request.subject)


def loss_of(model: EditableModel, request: EditRequest) -> float:
    batch = model.encode_batch([request.prompt], [request.target])
    with torch.no_grad():
        return float(model.task.loss(model.logits(batch), batch))


def matrix(layer: nn.Module) -> Tensor:
    """(D_out, D_in) float64, of either kind of layer."""
    weight: Tensor = layer.weight.detach().double().clone()
    return weight.T if isinstance(layer, Conv1D) else weight


# --- the update ------------------------------------------------------------------------------------------------------


VARIANTS = [
    pytest.param("rome", {}, id="rome"),
    pytest.param("rome", {"second_moments": False}, id="rome-without-moments"),
    pytest.param("r_rome", {}, id="r_rome"),
    pytest.param("r_rome", {"prompt_key": True}, id="r_rome-prompt-key"),
    pytest.param("r_rome", {"second_moments": False}, id="r_rome-without-moments"),
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_update_is_the_published_one_at_the_recorded_keys(
    name: str,
    options: dict[str, Any],
    family: str,
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    passes_through: PassesThrough,
    make_requests: MakeRequests,
) -> None:
    model, request = make_causal(family), make_requests("completion")[0]
    texts = [" ".join(chosen) for chosen in itertools.product(TEXTS[:3], repeat=3)]
    path = model.layer_name
    with make_prepared(name, model, texts=texts, clamp=2.0, **options) as editor:
        assert editor.contexts[0] == ""
        assert len(editor.contexts) == 3
        prompts = [f"{text}. {request.prompt}" if text else request.prompt for text in editor.contexts]
        # The prompts end with the subject.
        recorded = [passes_through(model, path, prompt) for prompt in prompts]
        keys, outputs = (torch.stack([pair[i][-1] for pair in recorded]) for i in (0, 1))
        tokens = torch.cat([passes_through(model, path, text)[0] for text in texts])
        moments = tokens.T @ tokens / len(tokens)
        ridge = 1e-6 * moments.diagonal().mean() * torch.eye(len(moments))
        if torch.linalg.eigvalsh(moments)[0] < ridge[0, 0]:
            moments = moments + ridge
        if options.get("second_moments") is False:
            moments = torch.eye(len(moments), dtype=torch.float64)

        before = matrix(model.layer)
        (value,) = editor.edit_facts([editor.encode(request.prompt, request.target, request.subject)])
        change = matrix(model.layer) - before
        after = torch.stack([passes_through(model, path, prompt)[1][-1] for prompt in prompts])

    torch.testing.assert_close(value.initial.double(), outputs[0], rtol=0, atol=1e-5)
    delta = value.delta.double()
    assert 0 < float(delta.norm()) <= 2.0 * float(outputs[0].norm()) * (1 + 1e-5)
    # Where the direction comes from, which key gets the value, what it gave before, and what it is to give.
    mean_key, key, given, wanted = {
        ("rome", False): (keys.mean(dim=0), keys[0], outputs[0], outputs[0] + delta),
        ("r_rome", True): (keys[0], keys[0], outputs[0], outputs[0] + delta),
        ("r_rome", False): (keys.mean(dim=0), keys.mean(dim=0), outputs.mean(dim=0), outputs[0] + delta),
    }[name, bool(options.get("prompt_key"))]
    direction = torch.linalg.solve(moments, mean_key)
    direction = direction / direction.norm()
    published = torch.outer((wanted - given) / (key @ direction), direction)
    torch.testing.assert_close(change, published, rtol=0, atol=2e-3 * float(published.abs().max()))
    # The key gives its value in the edited model: for R-ROME, that is the mean over contexts.
    reached = after.mean(dim=0) if name == "r_rome" and not options.get("prompt_key") else after[0]
    torch.testing.assert_close(reached, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


@each_editor
def test_without_prefixes_both_editors_are_one(
    name: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    weights = []
    for one in ("rome", name):
        model = make_causal()
        with make_prepared(one, model, n_prefixes=0) as editor:
            edit(editor, make_requests("completion")[0])
            weights.append(matrix(model.layer))
    torch.testing.assert_close(*weights, rtol=0, atol=1e-5)


def test_the_update_has_rank_one_and_changes_nothing_but_the_layers_weight(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    model = make_causal()
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with make_prepared("rome", model) as editor:
        before = matrix(model.layer)
        edit(editor, make_requests("completion")[0])
        singular = torch.linalg.svdvals(matrix(model.layer) - before)
        assert singular[1] < 1e-5 * singular[0]
        changed = {name for name, now in model.module.state_dict().items() if not torch.equal(now, weights[name])}
        assert changed == {f"{model.layer_name}.weight"}


def test_a_conv1d_and_a_linear_layer_of_the_same_weights_are_edited_alike(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    weights = []
    for is_linear in (False, True):
        model = make_causal()
        if is_linear:
            old = model.layer
            linear = nn.Linear(*old.weight.shape)
            linear.weight.data, linear.bias.data = old.weight.detach().T.contiguous(), old.bias.detach().clone()
            model.module.transformer.h[1].mlp.c_proj = linear
            model = EditableModel(model.module, layer=model.layer_name, task=model.task, tokenizer=model.tokenizer)
        with make_prepared("rome", model) as editor:
            before = matrix(model.layer)
            edit(editor, make_requests("completion")[0])
            weights.append(matrix(model.layer) - before)
    assert float(weights[0].norm()) > 0.1
    torch.testing.assert_close(*weights, rtol=0, atol=1e-3 * float(weights[0].abs().max()))


def test_a_value_is_never_further_than_the_clamp_from_the_layers_own(
    make_causal: MakeModel, make_prepared: MakePrepared, passes_through: PassesThrough, make_requests: MakeRequests
) -> None:
    model, request = make_causal(), make_requests("completion")[0]
    with make_prepared("rome", model, clamp=0.25, n_prefixes=0) as editor:
        before = passes_through(model, model.layer_name, request.prompt)[1][-1]
        edit(editor, request)
        after = passes_through(model, model.layer_name, request.prompt)[1][-1]
    assert float((after - before).norm()) == pytest.approx(0.25 * float(before.norm()), rel=1e-3)


def test_the_kl_term_keeps_what_follows_the_subjects_description(
    make_model: MakeModel, make_prepared: MakePrepared
) -> None:
    drifts = []
    for kl_weight in (0.0, 100.0):
        model = make_model("completion")
        ids = model.encode_batch(["Kazakhstan is a"]).inputs["input_ids"]
        before = model.module(input_ids=ids).logits[0, 0].log_softmax(-1)
        with make_prepared("rome", model, kl_weight=kl_weight, lr=0.05, n_prefixes=0) as editor:
            # The subject comes first, so that its key is the same here and in its description.
            editor.edit_text("Kazakhstan the capital is", "Astana", subject="Kazakhstan")
            after = model.module(input_ids=ids).logits[0, 0].log_softmax(-1)
        drifts.append(float((after.exp() * (after - before)).sum()))
    assert drifts[1] < 0.5 * drifts[0]


# --- second moments --------------------------------------------------------------------------------------------------


@each_task
def test_the_factor_is_that_of_the_mean_over_tokens(
    task: str, make_model: MakeModel, make_prepared: MakePrepared, passes_through: PassesThrough
) -> None:
    model = make_model(task)
    texts = [" ".join(chosen) for chosen in itertools.product(TEXTS[:3], repeat=3)]
    keys = torch.cat([passes_through(model, model.layer_name, text)[0] for text in texts])
    expected = keys.T @ keys / len(keys)
    with make_prepared("rome", model, texts=texts) as editor:
        factor = editor.constants()["factor"]
    torch.testing.assert_close(factor @ factor.T, expected, rtol=1e-3, atol=1e-4 * float(expected.diagonal().mean()))


@each_editor
def test_without_second_moments_no_text_is_needed(
    name: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    with make_prepared(name, make_causal(), texts=(), second_moments=False) as editor:
        edit(editor, make_requests("completion")[0])
        assert editor.constants() == {}


def test_it_prepares_on_the_unedited_model(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    model, request = make_causal(), make_requests("completion")[0]
    with make_prepared("rome", model) as editor:
        factor, contexts = editor.constants()["factor"], editor.contexts
        edit(editor, request)
        edited = matrix(model.layer)
        editor.prepare([EditRequest(id="0", prompt="", target=text) for text in TEXTS[:1]])
        assert torch.equal(matrix(model.layer), edited)
        assert not torch.equal(editor.constants()["factor"], factor), "the text is another"
        assert editor.contexts == contexts


def test_progress_ends_at_the_number_of_texts(make_model: MakeModel) -> None:
    heard: list[tuple[str, int, int]] = []
    editor = Rome(model=make_model("completion"))
    train = [EditRequest(id=text, prompt="", target=text) for text in TEXTS]
    editor.prepare(train, progress=lambda what, done, total: heard.append((what, done, total)))
    assert heard[-1] == ("second moments", 4, 4)


def test_running_text_is_read_from_lines_and_from_records(
    make_model: MakeModel, make_prepared: MakePrepared, tmp_path: Path
) -> None:
    plain, records = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text("\n".join([*TEXTS[:2], "", *TEXTS[2:]]) + "\n", encoding="utf-8")
    fields = ("Text", "text", "text", "Text")
    lines = [json.dumps({"Corpus": "C4", field: text}) for field, text in zip(fields, TEXTS, strict=True)]
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    expected = make_prepared("rome", make_model("completion"), texts=TEXTS).constants()["factor"]
    for path in (plain, records):
        found = make_prepared("rome", make_model("completion"), texts=(), text_path=str(path)).constants()["factor"]
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "the"}\n{"text": 3}\n', ":2: field 'text': should be text"),
        ('{"text": "the"}\n\n{"texts": "the"}\n', ":3: field 'Text': is missing"),
        ('{"text": " "}\n', ":1: field 'text': should be text that is not empty"),
        ("[1]\n", ":1: should be a JSON object"),
        ("the\n", ":1: is not JSON"),
        ("\n", ": holds no text"),
        (b'{"text": "\xff"}\n', ":1: is not UTF-8"),
        (None, ": cannot be read"),
    ],
)
def test_bad_running_text_is_told_in_one_line(
    content: str | bytes | None, message: str, make_model: MakeModel, make_prepared: MakePrepared, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        make_prepared("rome", make_model("completion"), text_path=str(path))
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "qa"])
def test_a_task_without_a_causal_model_is_refused(task: str, make_model: MakeModel) -> None:
    with pytest.raises(UserError, match=rf"^editor 'rome' does not work on {task} \(it does on completion, .*\)$"):
        Rome(model=make_model(task))


def test_a_layer_that_is_not_linear_is_refused(make_model: MakeModel) -> None:
    tiny = make_model("completion")
    model = EditableModel(tiny.module, layer="transformer.h.0.mlp", task=tiny.task, tokenizer=tiny.tokenizer)
    with pytest.raises(UserError, match=r"^layer=transformer.h.0.mlp is a GPT2MLP: .*linear layer.*$"):
        Rome(model=model)


def test_without_running_text_it_asks_for_a_file(make_model: MakeModel) -> None:
    with pytest.raises(
        UserError, match=r"^editor 'rome' needs running text .* give editor.text_path=FILE, or editor.text=model$"
    ):
        Rome(model=make_model("completion")).prepare(())


def test_an_edit_before_it_was_prepared_says_so(make_model: MakeModel, make_requests: MakeRequests) -> None:
    with pytest.raises(UserError, match=r"^editor 'rome' .* call prepare\(\)$"):
        edit(Rome(model=make_model("completion")), make_requests("completion")[0])


@each_editor
@pytest.mark.parametrize("subject", [None, "", "Astana"])
def test_a_request_whose_prompt_lacks_the_subject_fails_and_changes_nothing(
    name: str, subject: str | None, make_causal: MakeModel, make_prepared: MakePrepared, batch_of: BatchOf
) -> None:
    model = make_causal()
    before = matrix(model.layer)
    requests = [
        EditRequest(id=str(i), prompt="the capital of France is", target="Paris", subject=given)
        for i, given in enumerate(("France", subject))
    ]
    batch = batch_of(model, requests)
    with (
        make_prepared(name, model) as editor,
        pytest.raises(EditFailure, match=r"^the subject .* does not occur in the prompt$"),
    ):
        editor.edit(batch)
    assert torch.equal(matrix(model.layer), before)


def test_a_subject_that_does_not_fit_into_the_model_fails(make_model: MakeModel, make_prepared: MakePrepared) -> None:
    with (
        make_prepared("rome", make_model("language_modelling")) as editor,
        pytest.raises(EditFailure, match=r"was cut off$"),
    ):
        editor.edit_text(f"France is {'the ' * 60}", "Paris", subject="France")


@each_editor
@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"n_iter": 0}, "n_iter=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0"),
        ({"weight_decay": float("nan")}, "weight_decay=nan"),
        ({"clamp": 0}, "clamp=0"),
        ({"n_prefixes": -1}, "n_prefixes=-1"),
        ({"prefix_lengths": (5, 0)}, "prefix_lengths=0"),
        ({"prefix_lengths": (48,)}, "prefix_lengths=48"),
        ({"second_moments": "no"}, "second_moments=no"),
        ({"text_path": ""}, "text_path="),
        ({"n_texts": 0}, "n_texts=0"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    name: str, option: dict[str, Any], named: str, make_model: MakeModel, make_prepared: MakePrepared
) -> None:
    with pytest.raises(UserError, match=f"^editor.{named} should be "):
        make_prepared(name, make_model("completion"), **option)


def test_prompt_key_is_true_or_false(make_model: MakeModel, make_prepared: MakePrepared) -> None:
    with pytest.raises(UserError, match=r"^editor\.prompt_key=2 should be "):
        make_prepared("r_rome", make_model("completion"), prompt_key=2)


# --- edits -----------------------------------------------------------------------------------------------------------


@each_task
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_editor
def test_an_edit_makes_the_target_likelier(
    name: str,
    task: str,
    dtype: torch.dtype,
    make_model: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
) -> None:
    request, model = make_requests(task)[0], make_model(task, dtype=dtype)
    before = loss_of(model, request)
    with make_prepared(name, model, n_prefixes=0) as editor:
        outcome = edit(editor, request)
        assert model.layer.weight.dtype == dtype
        assert loss_of(model, request) < before - 0.1
        assert outcome.loss < outcome.loss_first
        assert 0 < outcome.steps < editor.n_iter


def test_a_batch_is_edited_row_after_row(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    requests = make_requests("completion")[:2]
    weights = []
    for together in (False, True):
        model = make_causal()
        with make_prepared("rome", model) as editor:
            if together:
                editor.edit(batch_of(model, requests))
            else:
                for request in requests:
                    edit(editor, request)
            weights.append(matrix(model.layer))
    assert torch.equal(*weights)


def test_rollback_is_exact_and_keeps_what_was_prepared(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    model, requests = make_causal(), make_requests("completion")
    before = matrix(model.layer)
    with make_prepared("rome", model) as editor:
        for request in requests[:2]:
            edit(editor, request)
        edited = matrix(model.layer)
        assert not torch.equal(edited, before)
        editor.rollback()
        assert torch.equal(matrix(model.layer), before)
        for request in requests[:2]:
            edit(editor, request)
        assert torch.equal(matrix(model.layer), edited)


def test_a_seed_decides_the_contexts_and_every_bit_of_an_edit(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    request = make_requests("completion")[0]
    runs = []
    for seed, world in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(world)
        model = make_causal()
        with make_prepared("rome", model, seed=seed) as editor:
            edit(editor, request)
            runs.append((editor.contexts, matrix(model.layer)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_contexts_are_as_long_as_asked_and_hold_no_special_token(
    make_model: MakeModel, make_prepared: MakePrepared
) -> None:
    model = make_model("completion")
    editor = make_prepared("rome", model, n_prefixes=4, prefix_lengths=(3, 7))
    assert editor.contexts[0] == ""
    assert len(editor.contexts) == 9
    for text in editor.contexts[1:]:
        assert not any(special in text for special in model.tokenizer.all_special_tokens)
    assert max(len(text.split()) for text in editor.contexts[1:5]) <= 3
    assert 3 < max(len(text.split()) for text in editor.contexts[5:]) <= 7


def test_what_answering_needs_is_the_weights_alone(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests
) -> None:
    with make_prepared("rome", make_causal()) as editor:
        edit(editor, make_requests("completion")[0])
        layer = editor.model.layer_name
        assert set(editor.answering_state()) == {"n_edits", f"weights.{layer}.weight", f"weights.{layer}.bias"}
        assert set(editor.state_dict()) - set(editor.answering_state()) == {"factor", "contexts"}
        assert editor.extra_parameters == 0 == editor.max_extra_parameters(1)
