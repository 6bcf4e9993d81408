"""AlphaEdit: what its null space protects, and where it is cached."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grace_bench.data.requests import EditRequest
from grace_bench.editing.batch import EditBatch
from grace_bench.editors.alphaedit import AlphaEdit
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]
MakePrepared = Callable[..., Any]
PassesThrough = Callable[[EditableModel, str, str], tuple[Tensor, Tensor]]
BatchOf = Callable[[EditableModel, Sequence[EditRequest]], EditBatch]

LAYERS = [f"transformer.h.{block}.mlp.c_proj" for block in (0, 1)]
# Fewer tokens than an input of the layer has dimensions: the rest of them is free.
FEW_TEXTS = ["what is the river in Italy the Tiber", "Lima is the capital of Peru", "Paris in France"]
FREE = {"threshold": 1e-6, "threshold_unit": "largest", "l2": 0.01, "n_iter": 8}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))


def null_spaces(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "null-spaces").glob("*"))


def matrix(model: EditableModel, path: str) -> Tensor:
    """(D_out, D_in) of a `Conv1D`."""
    return model.find_layer(path).get_parameter("weight").detach().double().T.clone()


def edited(editor: Any, batch_of: BatchOf, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
    """The change of each layer after two batches."""
    before = {path: matrix(editor.model, path) for path in LAYERS}
    for batch in (requests[:3], requests[3:]):
        editor.edit(batch_of(editor.model, batch))
    return {path: matrix(editor.model, path) - before[path] for path in LAYERS}


def test_what_the_running_text_reads_stays_as_it_was(
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
    passes_through: PassesThrough,
) -> None:
    model = make_causal()
    protected = {path: torch.cat([passes_through(model, path, text)[0] for text in FEW_TEXTS]) for path in LAYERS}
    with make_prepared("alphaedit", model, texts=FEW_TEXTS, layers=LAYERS, **FREE) as editor:
        changes = edited(editor, batch_of, make_requests("completion"))
        for path in LAYERS:
            assert len(protected[path]) < 48
            assert float(changes[path].norm()) > 0.1
            moved = float((protected[path] @ changes[path].T).norm())
            everywhere = float(protected[path].norm() * changes[path].norm())
            assert moved < 1e-4 * everywhere
        # So the model says of these texts what it said.
        logits = [model.module(input_ids=model.encode_batch([text]).inputs["input_ids"]).logits for text in FEW_TEXTS]
    for text, found in zip(FEW_TEXTS, logits, strict=True):
        unedited = model.module(input_ids=model.encode_batch([text]).inputs["input_ids"]).logits
        torch.testing.assert_close(found, unedited, rtol=0, atol=1e-2)


@pytest.mark.parametrize("unit", ["absolute", "largest"])
def test_a_key_in_the_protected_directions_is_not_moved(
    unit: str, make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model = make_causal()
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64, generator=generator))
    spectrum = torch.logspace(1, -5, 48, dtype=torch.float64)
    threshold = 1e-2 if unit == "absolute" else 1e-3
    moments = {path: ((directions * spectrum) @ directions.T).float() for path in LAYERS}
    # 10, the largest, times the second threshold is the first.
    protected = directions[:, spectrum >= 1e-2]
    with make_prepared(
        "alphaedit", model, layers=LAYERS, threshold=threshold, threshold_unit=unit, l2=0.01, n_iter=8
    ) as editor:
        editor.use_moments(moments)
        changes = edited(editor, batch_of, make_requests("completion"))
        for path in LAYERS:
            assert editor.constants()[f"basis.{path}"].shape == (48, int((spectrum < 1e-2).sum()))
            size = float(changes[path].norm())
            assert size > 0.05
            assert float((changes[path] @ protected).norm()) < 1e-4 * size


def test_null_spaces_are_computed_once_for_moments_and_threshold(
    make_causal: MakeModel,
    make_prepared: MakePrepared,
    make_requests: MakeRequests,
    batch_of: BatchOf,
    tmp_path: Path,
) -> None:
    heard: list[tuple[str, int, int]] = []
    changes = []
    for _ in range(2):
        with make_prepared("alphaedit", make_causal(), texts=FEW_TEXTS, layers=LAYERS, **FREE) as editor:
            changes.append(edited(editor, batch_of, make_requests("completion")))
            files = {path: path.stat().st_mtime_ns for path in null_spaces(tmp_path)}
            assert len(files) == 2
            heard.clear()
            train = [EditRequest(id=text, prompt="", target=text) for text in FEW_TEXTS]
            editor.prepare(train, progress=lambda what, done, total: heard.append((what, done, total)))
            assert {path: path.stat().st_mtime_ns for path in null_spaces(tmp_path)} == files, (
                "nothing is written again"
            )
            assert heard == [("null spaces", 1, 2), ("null spaces", 2, 2)], "moments come from the cache too"
    assert all(torch.equal(changes[0][path], changes[1][path]) for path in LAYERS)
    make_prepared("alphaedit", make_causal(), texts=FEW_TEXTS, layers=LAYERS, **{**FREE, "threshold": 1e-5})
    make_prepared("alphaedit", make_causal(), texts=FEW_TEXTS[:1], layers=LAYERS, **FREE)
    assert len(null_spaces(tmp_path)) == 6


def test_a_cached_null_space_is_used(make_causal: MakeModel, make_prepared: MakePrepared, tmp_path: Path) -> None:
    first = make_prepared("alphaedit", make_causal(), texts=FEW_TEXTS, layers=LAYERS, **FREE).constants()
    one, other = null_spaces(tmp_path)
    one.write_bytes(other.read_bytes())
    second = make_prepared("alphaedit", make_causal(), texts=FEW_TEXTS, layers=LAYERS, **FREE).constants()
    assert sum(not torch.equal(first[name], second[name]) for name in first) == 1
    one.write_bytes(other.read_bytes()[:100])
    third = make_prepared("alphaedit", make_causal(), texts=FEW_TEXTS, layers=LAYERS, **FREE).constants()
    assert all(torch.equal(first[name], third[name]) for name in first), "a broken file counts as missing"
    assert one.stat().st_size == other.stat().st_size


def test_an_empty_null_space_is_told_with_the_least_singular_value(
    make_causal: MakeModel, make_prepared: MakePrepared
) -> None:
    with pytest.raises(
        UserError,
        match=r"^editor\.threshold=1e-12 \(absolute\) leaves no direction to write in: the least singular .* is \S+$",
    ):
        make_prepared("alphaedit", make_causal(), layers=LAYERS, threshold=1e-12)


def test_a_layer_without_a_null_space_stays_as_it_is_while_others_are_written(
    make_causal: MakeModel, make_prepared: MakePrepared, make_requests: MakeRequests, batch_of: BatchOf
) -> None:
    model = make_causal()
    with make_prepared("alphaedit", model, layers=LAYERS, l2=0.1, n_iter=8) as editor:
        editor.use_moments({LAYERS[0]: torch.eye(48), LAYERS[1]: 1e-3 * torch.eye(48)})
        changes = edited(editor, batch_of, make_requests("completion"))
    assert not changes[LAYERS[0]].any()
    assert float(changes[LAYERS[1]].norm()) > 0.1


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"threshold": 0}, "threshold=0"),
        ({"threshold": float("nan")}, "threshold=nan"),
        ({"l2": 0.0}, "l2=0.0"),
        ({"threshold_unit": "relative"}, "threshold_unit=relative"),
    ],
    ids=str,
)
def test_an_option_that_is_out_of_range_is_refused_by_name(
    option: dict[str, Any], named: str, make_causal: MakeModel
) -> None:
    with pytest.raises(UserError, match=rf"^editor\.{named} (should be|is not known)"):
        AlphaEdit(model=make_causal(), **option)
