"""ROME against its closed form, plain loops, and the models it edits."""

import json
import random
from collections.abc import Callable, Iterator
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

TASKS = ("completion", "language_modelling")
each_task = pytest.mark.parametrize("task", TASKS)
TEXTS = [
    "the capital of France is Paris",
    "what is the river in Italy the Tiber",
    "Lima",
    "the currency of Peru is the Sol in the Euro is the currency of Italy of France in the capital of Kazakhstan",
]

# More tokens than the layer's inputs have dimensions, so that none of them counts as free.
MANY_TEXTS = [" ".join(random.Random(i).choices(" ".join(TEXTS).split(), k=12)) for i in range(12)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))


def running_text(*texts: str) -> list[EditRequest]:
    return [EditRequest(id=str(i), prompt="", target=text) for i, text in enumerate(texts)]


def prepared(model: EditableModel, *texts: str, **options: Any) -> Rome:
    editor = Rome(model=model, **{"n_prefixes": 2, "prefix_lengths": (2, 3), **options})
    editor.prepare(running_text(*(texts or TEXTS)))
    return editor


def edit(editor: Rome, request: EditRequest) -> Any:
    return editor.edit_text(request.prompt, request.target, subject=request.subject)


def loss_of(model: EditableModel, request: EditRequest) -> float:
    batch = model.encode_batch([request.prompt], [request.target])
    with torch.no_grad():
        return float(model.task.loss(model.logits(batch), batch))


def matrix(layer: nn.Module) -> Tensor:
    """(D_out, D_in) float64, of either kind of layer."""
    weight: Tensor = layer.weight.detach().double().clone()
    return weight.T if isinstance(layer, Conv1D) else weight


def with_linear(model: EditableModel) -> EditableModel:
    """The same model with `nn.Linear` in place of the edited `Conv1D`."""
    old = model.layer
    linear = nn.Linear(*old.weight.shape)
    linear.weight.data, linear.bias.data = old.weight.detach().T.contiguous(), old.bias.detach().clone()
    model.module.transformer.h[0].mlp.c_fc = linear
    return EditableModel(model.module, layer=model.layer_name, task=model.task, tokenizer=model.tokenizer)


def tokens_of(model: EditableModel, text: str) -> Tensor:
    """(1, T) ids, word by word."""
    return torch.tensor([[model.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in text.split()]])


def inputs_of_layer(model: EditableModel, ids: Tensor) -> Tensor:
    """(T, D_in) what enters the edited layer, read by a hook of our own."""
    seen: list[Tensor] = []
    handle = model.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.module(input_ids=ids)
    handle.remove()
    return seen[0][0].double()


# --- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda model: model, with_linear], ids=["Conv1D", "Linear"])
def test_the_update_is_the_closed_form_and_the_key_gives_the_value(
    change: Callable[[EditableModel], EditableModel], make_model: MakeModel
) -> None:
    model = change(make_model("completion"))
    model.module.double()
    with prepared(model) as editor:
        d_out, d_in = matrix(model.layer).shape
        generator = torch.Generator().manual_seed(0)
        key, delta = (torch.randn(d, dtype=torch.float64, generator=generator) for d in (d_in, d_out))
        basis = torch.randn(d_in, 2 * d_in, dtype=torch.float64, generator=generator)
        editor.load_state_dict({**editor.state_dict(), "covariance": basis @ basis.T / (2 * d_in)})
        before = matrix(model.layer)
        editor._insert(key, delta)
        after = matrix(model.layer)

        inverse = torch.linalg.inv(basis @ basis.T / (2 * d_in))
        closed = torch.outer(delta, inverse @ key) / (key @ inverse @ key)
        torch.testing.assert_close(after - before, closed, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after @ key, before @ key + delta, rtol=0, atol=1e-10)
        assert torch.linalg.matrix_rank(after - before, atol=1e-8) == 1


def test_keys_that_the_covariance_calls_unrelated_keep_their_values(make_model: MakeModel) -> None:
    model = make_model("completion")
    model.module.double()
    with prepared(model) as editor:
        d_out, d_in = matrix(model.layer).shape
        generator = torch.Generator().manual_seed(0)
        key, delta = (torch.randn(d, dtype=torch.float64, generator=generator) for d in (d_in, d_out))
        # The covariance of two groups of coordinates that never occur together.
        block = torch.randn(d_in // 2, d_in, dtype=torch.float64, generator=generator)
        key[d_in // 2 :] = 0
        editor.load_state_dict(
            {**editor.state_dict(), "covariance": torch.block_diag(block @ block.T, block @ block.T)}
        )
        others = torch.randn(5, d_in, dtype=torch.float64, generator=generator)
        others[:, : d_in // 2] = 0
        before = matrix(model.layer)
        editor._insert(key, delta)
        after = matrix(model.layer)
        assert torch.equal(others @ after.T, others @ before.T)
        assert not torch.allclose(key @ after.T, key @ before.T)


@each_task
def test_an_edit_moves_the_mean_key_by_what_was_optimised_and_nothing_but_the_layers_weight(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model(task), make_requests(task)[0]
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with prepared(model) as editor:
        prompts = [f"{prefix}. {request.prompt}" if prefix else request.prompt for prefix in editor.prefixes]
        assert len(prompts) == 5
        assert prompts[0] == request.prompt
        keys = []
        for prompt in prompts:
            ids = model.encode_batch([prompt]).inputs["input_ids"]
            place = model.tokens.subject_position(prompt, str(request.subject))
            keys.append(inputs_of_layer(model, ids)[place])
        key = torch.stack(keys).mean(dim=0)
        covariance = editor.covariance
        assert covariance is not None
        ridge = 1e-6 * covariance.diagonal().mean() * torch.eye(len(covariance))
        direction = torch.linalg.solve(covariance + ridge, key)
        before = matrix(model.layer)
        edit(editor, request)
        change = matrix(model.layer) - before
        # Rank one along C⁻¹ k*, whatever the value.
        left = change @ key / (direction @ key)
        torch.testing.assert_close(change, torch.outer(left, direction), rtol=0, atol=1e-4 * float(change.abs().max()))
        changed = {name for name, now in model.module.state_dict().items() if not torch.equal(now, weights[name])}
        assert changed == {f"{model.layer_name}.weight"}


def test_a_value_is_never_further_than_the_clamp_from_the_layers_own(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model, request = make_model("completion"), make_requests("completion")[0]
    with prepared(model, clamp=0.25, n_prefixes=0) as editor:
        place = model.tokens.subject_position(request.prompt, str(request.subject))
        key = inputs_of_layer(model, model.encode_batch([request.prompt]).inputs["input_ids"])[place]
        own = matrix(model.layer) @ key + model.layer.bias.double()
        before = matrix(model.layer)
        edit(editor, request)
        moved = (matrix(model.layer) - before) @ key
        assert float(moved.norm()) == pytest.approx(0.25 * float(own.norm()), rel=1e-3)


def test_the_kl_term_keeps_what_follows_the_subjects_description(make_model: MakeModel) -> None:
    drifts = []
    for kl_weight in (0.0, 100.0):
        model = make_model("completion")
        ids = model.encode_batch(["Kazakhstan is a"]).inputs["input_ids"]
        before = model.module(input_ids=ids).logits[0, -1].log_softmax(-1)
        with prepared(model, kl_weight=kl_weight, lr=0.05, n_prefixes=0) as editor:
            # The subject comes first, so that its key is the same here and in its description.
            editor.edit_text("Kazakhstan the capital is", "Astana", subject="Kazakhstan")
            after = model.module(input_ids=ids).logits[0, -1].log_softmax(-1)
        drifts.append(float((after.exp() * (after - before)).sum()))
    assert drifts[1] < 0.5 * drifts[0]


# --- the covariance --------------------------------------------------------------------------------------------------


@each_task
def test_the_covariance_is_that_of_a_plain_loop_over_tokens(task: str, make_model: MakeModel) -> None:
    model = make_model(task)
    keys = torch.cat([inputs_of_layer(model, tokens_of(model, text)) for text in TEXTS])
    expected = sum(torch.outer(key, key) for key in keys) / len(keys)
    with prepared(model) as editor:
        torch.testing.assert_close(editor.covariance, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def counted(make_model: MakeModel) -> Iterator[tuple[EditableModel, list[int]]]:
    """A model, and the tokens that went through it since, prefixes aside."""
    model = make_model("completion")
    tokens: list[int] = []
    handle = model.module.register_forward_pre_hook(
        lambda _, args, kwargs: tokens.append(int(kwargs["attention_mask"].sum())), with_kwargs=True
    )
    yield model, tokens
    handle.remove()


def test_a_covariance_is_computed_once_for_a_text(counted: tuple[EditableModel, list[int]], tmp_path: Path) -> None:
    model, tokens = counted
    artifacts = tmp_path / "cache" / "moments"
    first = prepared(model, n_prefixes=0).covariance
    assert sum(tokens) == sum(len(text.split()) for text in TEXTS)
    tokens.clear()
    second = prepared(model, n_prefixes=0).covariance
    assert not tokens
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert len(list(artifacts.iterdir())) == 1
    for texts, options in ((["Paris is the capital"], {}), (TEXTS, {"n_texts": 2})):
        other = prepared(model, *texts, n_prefixes=0, **options).covariance
        assert tokens
        tokens.clear()
        assert other is not None
        assert not torch.allclose(first, other)
    assert len(list(artifacts.iterdir())) == 3


def test_another_model_or_layer_has_a_covariance_of_its_own(make_model: MakeModel, tmp_path: Path) -> None:
    models = [make_model("completion"), make_model("completion", seed=1)]
    models.append(
        EditableModel(
            models[0].module, layer="transformer.h.1.mlp.c_fc", task=models[0].task, tokenizer=models[0].tokenizer
        )
    )
    for model in models:
        prepared(model)
    assert len(list((tmp_path / "cache" / "moments").iterdir())) == 3


def test_it_prepares_on_the_unedited_model(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, request = make_model("completion"), make_requests("completion")[0]
    with prepared(model) as editor:
        covariance, prefixes = editor.covariance, editor.prefixes
        edit(editor, request)
        edited = matrix(model.layer)
        editor.prepare(running_text(*TEXTS))
        assert torch.equal(matrix(model.layer), edited)
        assert torch.equal(editor.covariance, covariance)
        assert editor.prefixes == prefixes


def test_progress_ends_at_the_number_of_texts(make_model: MakeModel) -> None:
    heard: list[tuple[str, int, int]] = []
    editor = Rome(model=make_model("completion"))
    editor.prepare(running_text(*TEXTS), progress=lambda what, done, total: heard.append((what, done, total)))
    assert heard[-1] == ("second moments", 4, 4)


def test_running_text_is_read_from_lines_and_from_records(make_model: MakeModel, tmp_path: Path) -> None:
    plain, records = tmp_path / "text.txt", tmp_path / "text.jsonl"
    plain.write_text("\n".join([*TEXTS[:2], "", *TEXTS[2:]]) + "\n", encoding="utf-8")
    fields = ("Text", "text", "text", "Text")
    lines = [json.dumps({"Corpus": "C4", field: text}) for field, text in zip(fields, TEXTS, strict=True)]
    records.write_text("\n".join(lines) + "\n", encoding="utf-8")
    expected = prepared(make_model("completion")).covariance
    for path in (plain, records):
        assert torch.equal(prepared(make_model("completion"), text_path=str(path)).covariance, expected)


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
    content: str | bytes | None, message: str, make_model: MakeModel, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        prepared(make_model("completion"), text_path=str(path))
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


@pytest.mark.parametrize("subject", [None, "", "Astana"])
def test_a_request_whose_prompt_lacks_the_subject_fails_and_changes_nothing(
    subject: str | None, make_model: MakeModel
) -> None:
    model = make_model("completion")
    before = matrix(model.layer)
    prompts, targets = ("the capital of France is",) * 2, ("Paris",) * 2
    encoded = model.encode_batch(prompts, targets)
    batch = EditBatch(prompts=prompts, targets=targets, subjects=("France", subject), encoded=encoded)
    with prepared(model) as editor, pytest.raises(EditFailure, match=r"^the subject .* does not occur in the prompt$"):
        editor.edit(batch)
    assert torch.equal(matrix(model.layer), before)


def test_a_subject_that_does_not_fit_into_the_model_fails(make_model: MakeModel) -> None:
    with prepared(make_model("language_modelling")) as editor, pytest.raises(EditFailure, match=r"was cut off$"):
        editor.edit_text(f"France is {'the ' * 60}", "Paris", subject="France")


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
        ({"text_path": ""}, "text_path="),
        ({"n_texts": 0}, "n_texts=0"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    option: dict[str, Any], named: str, make_model: MakeModel
) -> None:
    with pytest.raises(UserError, match=f"^editor.{named} should be "):
        Rome(model=make_model("completion"), **option)


# --- edits -----------------------------------------------------------------------------------------------------------


@each_task
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_an_edit_makes_the_target_likelier(
    task: str, dtype: torch.dtype, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    for request in make_requests(task)[:3]:
        model = make_model(task)
        model.module.to(dtype)
        before = loss_of(model, request)
        with prepared(model, *MANY_TEXTS, n_prefixes=0) as editor:
            outcome = edit(editor, request)
            assert model.layer.weight.dtype == dtype
            assert loss_of(model, request) < before - 0.1
            assert outcome.loss < outcome.loss_first
            assert 0 < outcome.steps <= editor.n_iter


def test_a_batch_is_edited_row_after_row(make_model: MakeModel, make_requests: MakeRequests) -> None:
    requests = make_requests("completion")[:2]
    weights = []
    for together in (False, True):
        model = make_model("completion")
        with prepared(model) as editor:
            if together:
                prompts, targets = tuple(r.prompt for r in requests), tuple(r.target for r in requests)
                encoded = model.encode_batch(prompts, targets)
                subjects = tuple(r.subject for r in requests)
                editor.edit(EditBatch(prompts=prompts, targets=targets, subjects=subjects, encoded=encoded))
            else:
                for request in requests:
                    edit(editor, request)
            weights.append(matrix(model.layer))
    assert torch.equal(*weights)


def test_rollback_is_exact_and_keeps_what_was_prepared(make_model: MakeModel, make_requests: MakeRequests) -> None:
    model, requests = make_model("completion"), make_requests("completion")
    before = matrix(model.layer)
    with prepared(model) as editor:
        for request in requests[:2]:
            edit(editor, request)
        edited = matrix(model.layer)
        assert not torch.equal(edited, before)
        editor.rollback()
        assert torch.equal(matrix(model.layer), before)
        for request in requests[:2]:
            edit(editor, request)
        assert torch.equal(matrix(model.layer), edited)


def test_a_seed_decides_the_prefixes_and_every_bit_of_an_edit(
    make_model: MakeModel, make_requests: MakeRequests
) -> None:
    request = make_requests("completion")[0]
    runs = []
    for seed, world in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(world)
        model = make_model("completion")
        with prepared(model, seed=seed) as editor:
            edit(editor, request)
            runs.append((editor.prefixes, matrix(model.layer)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_prefixes_are_as_long_as_asked_and_hold_no_special_token(make_model: MakeModel) -> None:
    model = make_model("completion")
    editor = prepared(model, n_prefixes=4, prefix_lengths=(3, 7))
    assert editor.prefixes[0] == ""
    assert len(editor.prefixes) == 9
    for text in editor.prefixes[1:]:
        assert not any(special in text for special in model.tokenizer.all_special_tokens)
    assert max(len(text.split()) for text in editor.prefixes[1:5]) <= 3
    assert 3 < max(len(text.split()) for text in editor.prefixes[5:]) <= 7


def test_what_answering_needs_is_the_weights_alone(make_model: MakeModel, make_requests: MakeRequests) -> None:
    with prepared(make_model("completion")) as editor:
        edit(editor, make_requests("completion")[0])
        layer = editor.model.layer_name
        assert set(editor.answering_state()) == {"n_edits", f"weights.{layer}.weight", f"weights.{layer}.bias"}
        assert set(editor.state_dict()) - set(editor.answering_state()) == {"covariance", "prefixes"}
        assert editor.extra_parameters == 0 == editor.max_extra_parameters(1)
