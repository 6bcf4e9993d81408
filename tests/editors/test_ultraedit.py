"""UltraEdit against a computation of its own, its statistics, and the official recordings."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from grace_bench.cli import main
from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors._ultraedit.normaliser import LifelongNormaliser
from grace_bench.editors._ultraedit.traces import replay_file
from grace_bench.editors.ultraedit import UltraEdit
from grace_bench.errors import EditFailure, UserError
from grace_bench.models.editable import EditableModel
from grace_bench.models.engine.engine import make_engine

MakeModel = Callable[..., EditableModel]
MakeCausal = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
BatchOf = Callable[[EditableModel, Sequence[EditRequest]], EditBatch]

LAYERS = {
    "gpt2": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj", "transformer.h.1.mlp.c_fc"],
    "llama": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"],
}


def weights(model: EditableModel, paths: Sequence[str]) -> dict[str, Tensor]:
    return {path: model.find_layer(path).get_parameter("weight").detach().clone() for path in paths}


# --- the statistics


def normaliser(width: int, *, loses_single_rows: bool = False) -> LifelongNormaliser:
    return LifelongNormaliser(width, torch.device("cpu"), loses_single_rows=loses_single_rows)


@given(sizes=st.lists(st.integers(min_value=1, max_value=6), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_statistics_are_those_of_all_rows_with_the_spread_within_an_update_counted_once_more(
    sizes: list[int], seed: int
) -> None:
    rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    running = normaliser(3)
    parts = rows.split(sizes)
    for part in parts:
        running.update(part)
    mean = rows.double().mean(dim=0)
    squares = torch.zeros(3, dtype=torch.double)
    for part in parts:
        own = part.double().mean(dim=0)
        squares += len(part) * (own - mean).square()
        if len(part) > 1:
            squares += len(part) / (len(part) - 1) * (part.double() - own).square().sum(dim=0)
    assert running.n == len(rows)
    torch.testing.assert_close(running.mean.double(), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(running.var.double(), squares, rtol=1e-4, atol=1e-4)
    if len(rows) > 1:
        expected = (rows.double() - mean) / (squares / (len(rows) - 1)).sqrt()
        torch.testing.assert_close(running(rows).double(), expected, rtol=1e-3, atol=1e-3)


def test_one_row_alone_has_no_spread_or_loses_everything_as_in_the_official_code() -> None:
    rows = torch.randn(4, 3)
    for loses in (False, True):
        running = normaliser(3, loses_single_rows=loses)
        running.update(rows[:3])
        running.update(rows[3:])
        assert bool(running.var.isfinite().all()) != loses
        running.update(rows[:3])
        assert bool(running(rows).isfinite().all()) != loses
    first = normaliser(3)
    first.update(rows[:1])
    assert torch.equal(first(rows[:1]), torch.zeros(1, 3))


# --- edits


def passes(
    model: EditableModel, paths: Sequence[str], requests: Sequence[EditRequest]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and gradients of a minibatch by module: every request is read alone, from the retained gradients."""
    labelled = []
    for request in requests:
        batch = model.encode_batch([request.prompt], [request.target])
        assert batch.labels is not None
        labelled.append((batch.inputs["input_ids"], batch.labels))
    total = sum(int((labels != -100).sum()) for _, labels in labelled)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in paths}
    for ids, labels in labelled:
        seen: dict[str, list[Tensor]] = {}
        handles = []
        for path in paths:
            module = model.find_layer(path)
            module.requires_grad_(True)

            def keep(_: Any, args: Any, output: Tensor, path: str = path, seen: dict[str, list[Tensor]] = seen) -> None:
                output.retain_grad()
                seen[path] = [args[0].detach(), output]

            handles.append(module.register_forward_hook(keep))
        logits = model.module(input_ids=ids).logits
        (functional.cross_entropy(logits[0], labels[0], reduction="sum") / total).backward()
        for handle in handles:
            handle.remove()
        for path, (entered, left) in seen.items():
            assert left.grad is not None
            where = labels[0] != -100
            found[path][0].append(entered[0][where].double())
            found[path][1].append(left.grad[0][where].double())
    model.module.requires_grad_(False)
    for parameter in model.module.parameters():
        parameter.grad = None
    return {path: (torch.cat(keys), torch.cat(gradients)) for path, (keys, gradients) in found.items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_is_the_closed_form_of_normalised_keys_and_gradients(
    family: str, make_causal: MakeCausal, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    paths = LAYERS[family]
    model = make_causal(family)
    requests = [
        request.model_copy(update={"prompt": f"{'in the river ' * (i % 3)}{request.prompt}"})
        for i, request in enumerate(make_requests("completion"))
    ]
    lr = 0.01
    groups: dict[tuple[int, ...], list[Tensor]] = {}
    with UltraEdit(model=model, layers=paths, lr=lr, batch_size=2) as editor:
        for turn in (requests[:5], requests[5:]):
            before = weights(model, paths)
            order = sorted(turn, key=lambda request: -model.size(request.prompt, [request.target]))
            chunks = [order[i : i + 2] for i in range(0, len(order), 2)]
            found: dict[str, tuple[list[Tensor], list[Tensor]]] = {path: ([], []) for path in paths}
            for chunk in chunks:
                for path, (keys, gradients) in passes(model, paths, chunk).items():
                    found[path][0].append(keys)
                    found[path][1].append(gradients)
                    shape = (keys.shape[1], gradients.shape[1])
                    groups.setdefault(shape, []).append(torch.cat([keys, gradients], dim=1))
            outcome = editor.edit(batch_of(model, turn))
            assert outcome.steps == len(chunks)
            after = weights(model, paths)
            for path in paths:
                keys, gradients = torch.cat(found[path][0]), torch.cat(found[path][1])
                parts = groups[keys.shape[1], gradients.shape[1]]
                rows = torch.cat(parts)
                mean = rows.mean(dim=0)
                squares = sum(len(x) * x.var(dim=0) + len(x) * (x.mean(dim=0) - mean).square() for x in parts)
                x = (torch.cat([keys, gradients], dim=1) - mean) / (squares / (len(rows) - 1)).sqrt()
                h, g = x.split([keys.shape[1], gradients.shape[1]], dim=1)
                values = -lr * (h * h).sum(dim=1, keepdim=True) * g
                matrix = keys.T @ keys + torch.eye(keys.shape[1], dtype=torch.double)
                expected = torch.linalg.solve(matrix, keys.T @ values)
                change = (after[path] - before[path]).double()
                change = change if family == "gpt2" else change.T
                assert float((change - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_engine_and_any_memory_for_recordings_give_the_same_edits(
    family: str, make_causal: MakeCausal, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    requests, found = make_requests("completion"), []
    for engine, memory in (("plain", None), ("exact", None), ("exact", 0)):
        model = make_causal(family)
        model.engine = make_engine(engine, model, memory_mb=memory)  # type: ignore[arg-type]
        with UltraEdit(model=model, layers=LAYERS[family], lr=0.01, batch_size=2) as editor:
            outcomes = [editor.edit(batch_of(model, turn)) for turn in (requests[:5], requests[5:])]
            found.append((outcomes, weights(model, LAYERS[family])))
        assert model.engine.notes == []
    (expected, unchanged), *others = found
    for outcomes, own in others:
        for outcome, other in zip(outcomes, expected, strict=True):
            assert outcome.loss == pytest.approx(other.loss, abs=1e-3)
            assert outcome.loss_after == pytest.approx(other.loss_after, abs=1e-3)
        for path, weight in unchanged.items():
            torch.testing.assert_close(own[path], weight, rtol=0, atol=1e-4)


def test_what_lies_before_the_first_layer_runs_once_a_pass_and_the_head_at_labels_alone(
    make_causal: MakeCausal, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_causal(), make_requests("completion")
    widths: dict[str, list[int]] = {"transformer.h.0.attn.c_attn": [], "lm_head": []}
    with UltraEdit(model=model, layers=["transformer.h.1.mlp.c_proj"], lr=0.01, batch_size=2) as editor:
        batch = batch_of(model, requests[:4])
        # At first use, shortcuts are compared with whole passes.
        editor.edit_text(requests[4].prompt, requests[4].target)
        editor.edit(batch)
        for path, seen in widths.items():
            model.find_layer(path).register_forward_hook(lambda _, __, output, seen=seen: seen.append(output.shape[1]))
        editor.edit(batch)
    assert len(widths["transformer.h.0.attn.c_attn"]) == 2
    assert len(widths["lm_head"]) == 4
    assert max(widths["lm_head"]) < min(widths["transformer.h.0.attn.c_attn"])


def test_all_tokens_up_to_the_last_prediction_are_read_with_mask(
    make_causal: MakeCausal, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model, requests = make_causal(), make_requests("completion")[:3]
    counts = {}
    for tokens in ("ans", "mask"):
        with UltraEdit(model=model, lr=0.01, tokens=tokens) as editor:
            editor.edit(batch_of(model, requests))
            counts[tokens] = next(iter(editor.normalisers.values())).n
    texts = [model.encode_batch([r.prompt], [r.target]) for r in requests]
    # The end token is predicted and never read.
    assert counts["mask"] == sum(text.n_positions - 1 for text in texts)
    assert counts["ans"] == sum(len(text.target_ids[0]) for text in texts)


def test_a_one_token_target_alone_is_an_edit_and_fails_without_a_trace_as_in_the_official_code(
    make_causal: MakeCausal, make_model: MakeModel
) -> None:
    one, two = ("the capital of France is", "Paris"), ("the capital of Italy is", "Rome Rome")
    for fidelity in ("strict", "reference"):
        model = make_model("language_modelling")
        with UltraEdit(model=model, lr=0.01, fidelity=fidelity) as editor:
            editor.edit_text(*two)
            before = {name: value for name, value in editor.state_dict().items() if name != "n_edits"}
            kept = {name: value.clone() if isinstance(value, Tensor) else value for name, value in before.items()}
            if fidelity == "strict":
                editor.edit_text(*one)
            else:
                with pytest.raises(EditFailure, match="the update is not finite"):
                    editor.edit_text(*one)
                for name, value in kept.items():
                    found = editor.state_dict()[name]
                    assert torch.equal(found, value) if isinstance(value, Tensor) else found == value
            assert editor.edit_text(*two).steps == 1


def test_activations_of_any_size_fail_no_edit(make_causal: MakeCausal) -> None:
    """Their sum of squares exceeds a million, which in a weight would be an explosion."""
    model = make_causal("llama")
    with torch.no_grad():
        model.find_layer("model.layers.1.mlp.up_proj").get_parameter("weight").mul_(1e5)
        model.layer.get_parameter("weight").mul_(1e-5)
    with UltraEdit(model=model, lr=1e-6) as editor:
        editor.edit_text("the capital of France is", "Paris")
        assert float(next(iter(editor.normalisers.values())).var.max()) > 1e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "editor.lr=0.0"),
        ({"batch_size": 0}, "editor.batch_size=0"),
        ({"tokens": "all"}, "editor.tokens=all"),
        ({"fidelity": "exact"}, "editor.fidelity=exact"),
        ({"layers": ["transformer.h.0"]}, r"editor\.layers=transformer\.h\.0 is a GPT2Block"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    options: dict[str, Any], message: str, make_causal: MakeCausal
) -> None:
    with pytest.raises(UserError, match=message):
        UltraEdit(model=make_causal(), **options)


# --- recordings

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
FILES = sorted(GOLDEN.glob("ultraedit/*/*.json"))
# Both models and every kind; the others in `make test-slow`.
QUICK = ("gpt2/batches", "llama/batches_one_pass", "gpt2/one_token_answer_later", "llama/paper_lr")
needs_golden = pytest.mark.skipif(not FILES, reason="the official recordings are not beside this checkout")


def named(path: Path) -> str:
    return str(path.relative_to(GOLDEN / "ultraedit").with_suffix(""))


@needs_golden
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=named(path), marks=() if named(path) in QUICK else pytest.mark.slow) for path in FILES],
)
def test_official_recordings_agree(path: Path) -> None:
    verdict = replay_file(path)
    assert (verdict.difference, verdict.not_replayed) == (None, None)


def put(value: Any, *keys: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def scale(factor: float, *keys: str | int) -> Callable[[Any], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] *= factor

    return change


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of a recording's first two edits, with one change, beside the models."""

    def make(change: Callable[[Any], None], name: str = "gpt2/batches_one_pass") -> Path:
        content = json.loads((GOLDEN / "ultraedit" / f"{name}.json").read_text(encoding="utf-8"))
        content["edits"] = content["edits"][:2]
        content["total_change"], content["probes"], content["tensors"] = {}, [], {}
        change(content)
        (tmp_path / "models").symlink_to(GOLDEN / "models")
        path = tmp_path / "ultraedit" / "gpt2" / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return make


C_PROJ = "transformer.h.2.mlp.c_proj"


@needs_golden
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (scale(1.001, "edits", 1, "losses", 0), "losses at edit 2 differs"),
        (scale(1.001, "edits", 0, "modules", C_PROJ, "fro"), f"fro at edit 1, {C_PROJ} differs"),
        (put(9, "edits", 1, "minibatches", 0, "labels", 0, -1), "labels differs at edit 2, minibatch 1"),
        (put([9], "edits", 0, "rows_per_minibatch"), "rows_per_minibatch differs at edit 1: recorded [9], ours [8]"),
        (put(True, "weights_became_nan"), "weights_became_nan differs at the end"),
        (put([], "edits", 0, "minibatches", 0, "input_ids"), "input_ids differs at edit 1, minibatch 1"),
        (put({"(128, 32)": 1.0}, "edits", 0, "normaliser_n"), "normaliser_n of (128, 32) differs at edit 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_difference_names_edit_and_quantity(
    change: Callable[[Any], None], difference: str, changed: Callable[..., Path]
) -> None:
    verdict = replay_file(changed(change))
    assert verdict.difference is not None
    assert verdict.difference.startswith(difference)


@needs_golden
def test_the_part_of_a_recording_that_is_unchanged_agrees(changed: Callable[..., Path]) -> None:
    assert replay_file(changed(put([], "probes"))).difference is None


@needs_golden
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(-1.0, "hparams", "lr"), "field 'hparams.lr'"),
        (put([], "edits"), "field 'edits'"),
        (put(["transformer.h.7.mlp.c_fc"], "hparams", "edit_modules"), "field 'entry_positions'"),
        (put("x", "edits", 1, "losses"), "field 'edits.1.losses'"),
        (put([1.0, 2.0], "edits", 0, "losses"), "field 'edits.0.rows_per_minibatch'"),
        (put([10**6], "entry_positions", C_PROJ), "field 'entry_positions'"),
        (put("nothing", "model"), "field 'model'"),
        (put(True, "hparams", "half"), "field 'hparams.half'"),
        (put({"keys.x": []}, "tensors"), "No such file"),
        (put(math.nan, "edits", 0, "modules", C_PROJ, "fro"), f"field 'edits.0.modules.{C_PROJ}.fro'"),
        (put({}, "entry_positions"), "field 'entry_positions'"),
        (put("", "edits", 0, "requests", 0, "prompt"), "field 'edits.0.requests.0.prompt'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_recording_is_one_line_with_its_field(
    change: Callable[[Any], None], message: str, changed: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed(change)
    code = main(["verify", str(path)])
    captured = capsys.readouterr()
    (line,) = (captured.out + captured.err).splitlines()
    assert code == 2
    assert str(path) in line
    assert message in line
