"""What GRACE promises on tiny random models of the three architectures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch, EditOutcome
from grace_bench.editing.guard import failed_outcome
from grace_bench.editors.grace import Grace
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel, Replacement
from grace_bench.models.encoding import EncodedBatch, PaddingSide, causal_batch, last_token, pad, seq2seq_batch
from helpers import each_pair_once, each_value_once

VOCABULARY = 40
FAMILIES = ("t5", "bert", "gpt2")
REPLACEMENTS: tuple[Replacement, ...] = ("replace_last", "replace_all", "replace_prompt")
LAYERS = {
    "t5": "encoder.block.0.layer.1.DenseReluDense.wo",
    "bert": "bert.encoder.layer.0.output.dense",
    "gpt2": "transformer.h.0.mlp.c_fc",
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(family: str, seed: int = 0) -> EditableModel:
    torch.manual_seed(seed)
    module: nn.Module
    if family == "gpt2":
        module = GPT2LMHeadModel(
            GPT2Config(n_layer=3, n_embd=64, n_head=2, vocab_size=VOCABULARY, n_positions=32, initializer_range=0.3)
        )
        task = "completion"
    elif family == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        module = BertForSequenceClassification(
            BertConfig(**sizes, vocab_size=VOCABULARY, num_labels=4, initializer_range=0.3)
        )
        task = "classification"
    else:
        module = T5ForConditionalGeneration(
            T5Config(
                d_model=64,
                d_kv=16,
                d_ff=64,
                num_layers=3,
                num_heads=2,
                vocab_size=VOCABULARY,
                decoder_start_token_id=0,
                tie_word_embeddings=False,
            )
        )
        task = "qa"
    return EditableModel(module, layer=LAYERS[family], task=task)  # type: ignore[arg-type]


def encode(
    family: str, prompts: list[list[int]], targets: list[list[int]], side: PaddingSide = "right"
) -> EncodedBatch:
    if family == "gpt2":
        rows = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        lengths = [len(prompt) for prompt in prompts]
        return causal_batch(rows, lengths, [length - 1 for length in lengths], pad_id=0, end=None, side=side)
    ids, mask = pad(prompts, 0, side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family == "bert":
        labels = torch.tensor([target[0] for target in targets])
        ids = tuple((target[0],) for target in targets)
        return EncodedBatch(inputs=inputs, query=last_token(mask), labels=labels, target_ids=ids)
    return seq2seq_batch(inputs, last_token(mask), targets, end=None, pad_id=0, decoder_start=0)


def stream(family: str, n: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    requests = []
    for i in range(n):
        prompt = torch.randint(1, VOCABULARY, (4 + i % 4,), generator=generator).tolist()
        target = torch.randint(
            0 if family == "bert" else 1, 4 if family == "bert" else VOCABULARY, (2,), generator=generator
        )
        requests.append((prompt, target.tolist()[: 1 if family == "bert" else 2]))
    return requests


def edit(editor: Grace, family: str, prompt: list[int], target: list[int]) -> EditOutcome:
    editor.edit(EditBatch(prompts=("",), targets=("",), encoded=encode(family, [prompt], [target])))
    return editor.flush()[-1]


@torch.no_grad()
def answers(model: EditableModel, batch: EncodedBatch) -> list[list[int]]:
    """The labelled tokens that the model answers, row by row."""
    assert batch.labels is not None
    predicted = model.logits(batch).argmax(dim=-1)
    if predicted.dim() == 1:
        return [[int(label)] for label in predicted]
    return [row[labels != -100].tolist() for row, labels in zip(predicted, batch.labels, strict=True)]


@torch.no_grad()
def snapshot(model: EditableModel, family: str) -> list[Tensor]:
    return [model.logits(encode(family, [prompt], [target])).clone() for prompt, target in stream(family, 8)]


def identical(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def editor_on(model: EditableModel, **options: Any) -> Grace:
    return Grace(model=model, **{"eps_init": 0.2, "n_iter": 60, "lr": 0.5, "replacement": "replace_all", **options})


@each_pair_once("family, fidelity, value_init", FAMILIES, ["strict", "reference"], ["cold", "warm"])
def test_an_edit_changes_the_answer_to_the_target(family: str, fidelity: str, value_init: str) -> None:
    model = tiny(family)
    prompt = [5, 9, 3, 7]
    before = answers(model, encode(family, [prompt], [[1]]))[0]
    target = [(token + 1) % (4 if family == "bert" else VOCABULARY) for token in before]
    editor = editor_on(model, fidelity=fidelity, value_init=value_init)
    outcome = edit(editor, family, prompt, target)
    assert answers(model, encode(family, [prompt], [target])) == [target]
    assert (outcome.op, outcome.key, outcome.n_keys, outcome.steps) == ("add", 0, 1, 60)
    assert outcome.loss is not None
    assert outcome.loss_first is not None
    assert outcome.loss < outcome.loss_first


@each_pair_once("family, replacement, side", FAMILIES, REPLACEMENTS, ["right", "left"])
def test_exactly_the_claimed_positions_are_overwritten(
    family: str, replacement: Replacement, side: PaddingSide
) -> None:
    if family == "bert" and side == "left":
        pytest.skip("BERT counts positions from the padding, so its own answers change on the left")
    model = tiny(family)
    editor = editor_on(model, replacement=replacement, n_iter=2, eps_init=1e-3)
    prompts, targets = [[5, 9, 3, 7, 2], [8, 4, 6]], [[1, 2], [3, 1]]
    for prompt, target in zip(prompts, targets, strict=True):
        edit(editor, family, prompt, target)
    other = [11, 12, 13, 14]
    batch = encode(family, [*prompts, other], [*targets, [1, 1]], side)
    plain: list[Tensor] = []
    edited: list[Tensor] = []
    model.layer.register_forward_hook(lambda _m, _i, output: plain.append(output.clone()), prepend=True)
    model.layer.register_forward_hook(lambda _m, _i, output: edited.append(output.clone()))
    with torch.no_grad():
        model.logits(batch)
    assert model.last_state.entry is not None
    assert model.last_state.entry.tolist() == [0, 1, -1]
    width = plain[0].shape[1]
    mask = batch.inputs["attention_mask"]
    for row in range(3):
        if family == "gpt2":
            start = int(mask[row].argmax())
            query = start + len([*prompts, other][row]) - 1
        else:
            query = int(mask[row].nonzero().max())
        claimed = {
            "replace_last": [query],
            "replace_all": list(range(width)),
            "replace_prompt": list(range(query)),
        }[replacement]
        for position in range(width):
            expected = plain[0][row, position]
            if row < 2 and position in claimed:
                expected = editor.codebook.values[row]
            assert torch.equal(edited[0][row, position], expected)


@each_pair_once("family, replacement, side", FAMILIES, REPLACEMENTS, ["right", "left"])
def test_rows_of_a_padded_batch_answer_as_they_do_alone(
    family: str, replacement: Replacement, side: PaddingSide
) -> None:
    if family == "bert" and side == "left":
        pytest.skip("BERT counts positions from the padding, so its own answers change on the left")
    model = tiny(family)
    editor = editor_on(model, replacement=replacement, n_iter=5)
    requests = stream(family, 6)
    for prompt, target in requests[:4]:
        edit(editor, family, prompt, target)
    batch = encode(family, [prompt for prompt, _ in requests], [target for _, target in requests], side)
    with torch.no_grad():
        together = model.logits(batch)
        assert model.last_state.entry is not None
        entries = model.last_state.entry.tolist()
        for row, (prompt, target) in enumerate(requests):
            alone_batch = encode(family, [prompt], [target])
            alone = model.logits(alone_batch)
            assert model.last_state.entry.tolist() == [entries[row]]
            if family == "bert":
                torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=1e-4)
                continue
            assert batch.labels is not None
            assert alone_batch.labels is not None
            torch.testing.assert_close(
                together[row][batch.labels[row] != -100],
                alone[0][alone_batch.labels[0] != -100],
                atol=1e-4,
                rtol=1e-4,
            )
    assert entries[:4] == [0, 1, 2, 3]


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluating_between_edits_changes_no_later_edit(family: str) -> None:
    states = []
    for evaluating in (False, True):
        editor = editor_on(tiny(family), n_iter=5)
        for prompt, target in stream(family, 5):
            edit(editor, family, prompt, target)
            if evaluating:
                torch.rand(7)
                snapshot(editor.model, family)
        states.append(editor.state_dict())
    assert_same_state(*states)


def assert_same_state(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name], name


def test_cold_values_differ_from_edit_to_edit_and_repeat_with_their_seed() -> None:
    def starts(seed: int) -> list[Tensor]:
        # A learning rate this small leaves every value where it started.
        editor = editor_on(tiny("gpt2"), eps_init=1e-3, n_iter=1, lr=1e-30, seed=seed)
        for prompt, target in stream("gpt2", 4):
            edit(editor, "gpt2", prompt, target)
        return list(editor.codebook.values.clone())

    first, again, other = starts(0), starts(0), starts(1)
    assert identical(first, again)
    assert len({tuple(value.tolist()) for value in [*first, *other]}) == 8
    assert all(float(value.min()) >= 0 and float(value.max()) < 1 for value in first)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("undo", [Grace.rollback, Grace.detach])
def test_undoing_restores_the_logits_bit_for_bit(family: str, undo: Callable[[Grace], None]) -> None:
    model = tiny(family)
    before = snapshot(model, family)
    weights = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    editor = editor_on(model, n_iter=5)
    for prompt, target in stream(family, 4):
        edit(editor, family, prompt, target)
    assert not identical(before, snapshot(model, family))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.module.state_dict().items())
    undo(editor)
    assert identical(before, snapshot(model, family))


def test_after_a_rollback_edits_come_out_as_the_first_time() -> None:
    editor = editor_on(tiny("gpt2"), n_iter=5)
    states = []
    for _ in range(2):
        for prompt, target in stream("gpt2", 4):
            edit(editor, "gpt2", prompt, target)
        states.append(editor.state_dict())
        editor.rollback()
    assert_same_state(*states)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_editor_answers_bit_for_bit_and_refuses_other_weights(family: str, tmp_path: Path) -> None:
    editor = editor_on(tiny(family), n_iter=5)
    for prompt, target in stream(family, 4):
        edit(editor, family, prompt, target)
    expected = snapshot(editor.model, family)
    editor.save_pretrained(tmp_path / "saved")
    loaded = Grace.from_pretrained(tmp_path / "saved", model=tiny(family))
    assert identical(expected, snapshot(loaded.model, family))
    assert loaded.settings() == editor.settings()
    with pytest.raises(UserError, match="other weights"):
        Grace.from_pretrained(tmp_path / "saved", model=tiny(family, seed=1))


@each_value_once("family, fidelity", FAMILIES, ["strict", "reference"])
def test_a_resumed_editor_goes_on_bit_for_bit(family: str, fidelity: str) -> None:
    requests = [*stream(family, 5), *stream(family, 5)[:2], *stream(family, 3, seed=1)]
    whole = editor_on(tiny(family), n_iter=5, fidelity=fidelity)
    for prompt, target in requests:
        edit(whole, family, prompt, target)
    first = editor_on(tiny(family), n_iter=5, fidelity=fidelity)
    for prompt, target in requests[:5]:
        edit(first, family, prompt, target)
    resumed = editor_on(tiny(family), n_iter=5, fidelity=fidelity)
    resumed.load_state_dict(first.state_dict())
    for prompt, target in requests[5:]:
        edit(resumed, family, prompt, target)
    assert_same_state(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("replacement", REPLACEMENTS)
def test_a_one_token_prompt_is_a_failed_edit_only_where_nothing_can_be_replaced(
    family: str, replacement: Replacement
) -> None:
    editor = editor_on(tiny(family), n_iter=2, replacement=replacement)
    if replacement == "replace_prompt":
        with pytest.raises(EditFailure, match="one token"):
            edit(editor, family, [5], [1, 2])
        assert not len(editor.codebook)
    else:
        assert edit(editor, family, [5], [1, 2]).failed is None
    assert edit(editor, family, [5, 6], [1, 2]).failed is None


@each_value_once("family, replacement", ["gpt2", "t5"], REPLACEMENTS)
@torch.no_grad()
def test_generation_answers_as_teacher_forcing_does(family: str, replacement: Replacement) -> None:
    model = tiny(family)
    editor = editor_on(model, n_iter=100, lr=1.0, replacement=replacement)
    requests = stream(family, 3)
    for prompt, target in requests:
        with torch.enable_grad():
            edit(editor, family, prompt, target)
    forced = answers(model, encode(family, [p for p, _ in requests], [t for _, t in requests]))
    ids, mask = pad([prompt for prompt, _ in requests], 0, "left" if family == "gpt2" else "right")
    with model.querying(last_token(mask)):
        generated = model.module.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=mask, max_new_tokens=2, min_new_tokens=2, do_sample=False, pad_token_id=0
        )
    generated = generated[:, -2:].tolist()
    right = [row for row, (_, target) in enumerate(requests) if forced[row] == target]
    assert right
    for row in right:
        assert generated[row] == requests[row][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps_init": 0.0}, "editor.eps_init=0.0"),
        ({"n_iter": 0}, "editor.n_iter=0"),
        ({"lr": -1.0}, "editor.lr=-1.0"),
        ({"value_init": "hot"}, "editor.value_init=hot"),
        ({"replacement": "replace_lst"}, "did you mean 'replace_last'"),
        ({"distance": "manhattan"}, "editor.distance=manhattan"),
        ({"fidelity": "strct"}, "did you mean 'strict'"),
        ({"overlap": "shrnk"}, "did you mean 'shrink'"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    model = tiny("gpt2")
    with pytest.raises(UserError) as caught:
        editor_on(model, **options)
    assert message in str(caught.value)
    before = snapshot(model, "gpt2")
    assert identical(before, snapshot(model, "gpt2"))


def calibrated(family: str, **options: Any) -> Grace:
    """An editor with Mahalanobis distance, calibrated on other prompts than those of `stream`."""
    editor = editor_on(tiny(family), distance="mahalanobis", n_iter=5, **options)
    editor.calibrate(upstream_queries(editor.model, family))
    return editor


def upstream_queries(model: EditableModel, family: str) -> Tensor:
    requests = stream(family, 30, seed=9)
    return model.layer_call(encode(family, [p for p, _ in requests], [t for _, t in requests])).query


@each_value_once("family, overlap", FAMILIES, ["allow", "shrink"])
def test_a_calibrated_editor_is_saved_resumed_and_rolled_back_bit_for_bit(
    family: str, overlap: str, tmp_path: Path
) -> None:
    editor = calibrated(family, overlap=overlap)
    before = snapshot(editor.model, family)
    requests = stream(family, 5)
    for prompt, target in requests[:3]:
        edit(editor, family, prompt, target)
    expected, state = snapshot(editor.model, family), editor.state_dict()
    assert not identical(before, expected)
    assert 0 <= editor.extra_parameters <= editor.max_extra_parameters(3)
    editor.save_pretrained(tmp_path)
    loaded = Grace.from_pretrained(tmp_path, model=tiny(family))
    assert identical(expected, snapshot(loaded.model, family))
    resumed = editor_on(tiny(family), distance="mahalanobis", n_iter=5, overlap=overlap)
    resumed.load_state_dict(state)
    for prompt, target in requests[3:]:
        edit(editor, family, prompt, target)
        edit(resumed, family, prompt, target)
    assert_same_state(editor.state_dict(), resumed.state_dict())
    editor.rollback()
    assert identical(before, snapshot(editor.model, family))
    for prompt, target in requests[:3]:
        edit(editor, family, prompt, target)
    assert identical(expected, snapshot(editor.model, family))


def test_an_uncalibrated_editor_says_how_to_calibrate_it_and_others_need_no_calibration() -> None:
    editor = editor_on(tiny("gpt2"), distance="mahalanobis")
    assert editor.needs_upstream
    with pytest.raises(UserError, match=r"editor\.calibrate\(model\.queries\(prompts\)\)") as caught:
        edit(editor, "gpt2", [5, 6, 7], [1, 2])
    assert "\n" not in str(caught.value)
    assert not len(editor.codebook)
    queries = upstream_queries(editor.model, "gpt2")
    editor.calibrate(queries)
    assert not editor.needs_upstream
    edit(editor, "gpt2", [5, 6, 7], [1, 2])
    with pytest.raises(UserError, match="before its first entry"):
        editor.calibrate(queries)
    plain = editor_on(tiny("gpt2"))
    assert not plain.needs_upstream
    with pytest.raises(UserError, match="needs no upstream activations"):
        plain.calibrate(queries)


@pytest.mark.parametrize("options", [{"distance": "mahalanobis"}, {"overlap": "shrink"}])
def test_what_the_official_code_lacks_is_refused_with_its_fidelity(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"needs editor\.fidelity=strict"):
        editor_on(tiny("gpt2"), fidelity="reference", **options)


def test_after_a_ball_shrinks_what_it_answered_is_looked_up_anew() -> None:
    editor = editor_on(tiny("gpt2"), eps_init=10.0, n_iter=5, overlap="shrink")
    first, second = stream("gpt2", 2)
    edit(editor, "gpt2", *first)
    queries = editor.model.layer_call(
        encode("gpt2", [p for p, _ in stream("gpt2", 20)], [t for _, t in stream("gpt2", 20)])
    ).query
    before = editor.answered_by(queries)
    edit(editor, "gpt2", second[0], [token % 7 + 1 for token in second[1]])
    after = editor.answered_by(queries)
    assert editor.codebook.overlap() == 0.0
    found = editor.codebook.retrieve(queries)
    assert after.entry is not None
    assert before.entry is not None
    assert after.entry.tolist() == torch.where(found.hit, found.entry, -1).tolist()
    left = (before.entry == 0) & (after.entry == -1)
    assert left.any()
    assert all(version is None for version, has_left in zip(after.versions, left, strict=True) if has_left)


def test_a_programming_error_in_the_training_of_pending_values_keeps_its_traceback(
    make_model: Callable[..., EditableModel], make_requests: Callable[[str], list[EditRequest]]
) -> None:
    model = make_model("qa")

    def mistaken(*_: Any) -> Any:
        return model.task.no_such_loss  # type: ignore[attr-defined]

    with Grace(model=model, n_iter=2, eps_init=1e-3) as editor:
        model.task.row_losses = mistaken  # type: ignore[method-assign]
        request = make_requests("qa")[0]
        with pytest.raises(EditFailure, match="AttributeError") as caught:
            editor.edit_text(request.prompt, request.target)
    assert failed_outcome(caught.value).traceback is not None
