"""Points in the plane: what the stream promises of them, and of the model that ships with it."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import grace_bench.streams
from grace_bench.errors import UserError
from grace_bench.streams import EditRequest
from grace_bench.streams.toy import TURNED, TURNED_FOR_VALIDATION, Toy, parse_point

CHECKPOINT = Path(next(iter(grace_bench.streams.__path__))) / "checkpoints" / "toy"


def class_before(prompt: str) -> int:
    x, y = parse_point(prompt)
    return 1 if y > math.sin(2 * x) else 0


def predicted(folder: Path, requests: tuple[EditRequest, ...]) -> list[int]:
    model, encode = Toy.load_model(folder)
    with torch.inference_mode():
        logits = model(**encode([request.prompt for request in requests]))
    assert logits.shape == (len(requests), 2)
    return logits.argmax(dim=-1).tolist()


def test_edits_and_holdout_are_different_points_of_the_disc_that_turned() -> None:
    data = Toy().load()
    assert len(data.edits) >= 100
    assert not {r.prompt for r in data.edits} & {r.prompt for r in data.holdout}
    for request in (*data.edits, *data.holdout):
        assert TURNED.distance(parse_point(request.prompt)) <= 0
        assert request.target == 1 - class_before(request.prompt)
    assert {r.fact for r in data.edits} == {r.fact for r in data.holdout}


def test_validation_is_another_disc_that_turned() -> None:
    data = Toy().load()
    for request in data.validation:
        assert TURNED_FOR_VALIDATION.distance(parse_point(request.prompt)) <= 0
        assert TURNED.distance(parse_point(request.prompt)) > 0
        assert request.target == 1 - class_before(request.prompt)
    assert not {r.fact for r in data.validation} & {r.fact for r in data.edits}


def test_upstream_holds_both_classes_unchanged_and_away_from_both_discs() -> None:
    data = Toy().load()
    assert {request.target for request in data.upstream} == {0, 1}
    for request in data.upstream:
        point = parse_point(request.prompt)
        assert request.target == class_before(request.prompt)
        assert min(TURNED.distance(point), TURNED_FOR_VALIDATION.distance(point)) > 0


def test_every_load_gives_the_same_requests_with_ids_of_their_own() -> None:
    data = Toy().load()
    assert data == Toy().load()
    everything = (*data.edits, *data.holdout, *data.upstream, *data.validation)
    assert len({request.id for request in everything}) == len(everything)


@given(x=st.integers(-30000, 30000), y=st.integers(-30000, 30000))
def test_a_point_is_read_back_from_its_text(x: int, y: int) -> None:
    assert parse_point(f"({x / 1e4:.4f}, {y / 1e4:.4f})") == (x / 1e4, y / 1e4)


@pytest.mark.parametrize("prompt", ["", "0.1, 0.2", "(0.1)", "(nan, 0)", "(1e5, 0)", "(0.1, 0.2) and more"])
def test_a_prompt_that_is_no_point_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match="should be a point"):
        parse_point(prompt)


def test_the_shipped_model_knows_the_old_world_and_nothing_of_the_new() -> None:
    data = Toy().load()
    figures = json.loads((CHECKPOINT / "figures.json").read_text(encoding="utf-8"))
    for name in ("upstream", "edits", "holdout", "validation"):
        requests = getattr(data, name)
        right = [
            label == request.target for label, request in zip(predicted(CHECKPOINT, requests), requests, strict=True)
        ]
        assert figures[f"{name}_accuracy"] == sum(right) / len(right)
    assert figures["upstream_accuracy"] >= 0.99
    assert figures["edits_accuracy"] <= 0.01


@pytest.mark.slow
def test_pretraining_again_reaches_the_shipped_figures(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    figures = Toy().pretrain(tmp_path, seed=0, progress=lambda *step: seen.append(step))
    assert figures == json.loads((CHECKPOINT / "figures.json").read_text(encoding="utf-8"))
    assert [done for _, done, _ in seen] == list(range(1, seen[-1][2] + 1))
    data = Toy().load()
    assert predicted(tmp_path, data.upstream) == predicted(CHECKPOINT, data.upstream)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{}", "field 'model_type': should be 'point-classifier'"),
        ('{"model_type": "bert"}', "field 'model_type': should be 'point-classifier'"),
        (
            '{"model_type": "point-classifier", "hidden_size": "x"}',
            "field 'hidden_size': should be a positive",
        ),
        ('{"model_type": "point-classifier", "hidden_size": 7}', "holds no point-classifier"),
        ("{", "holds no point-classifier"),
    ],
)
def test_a_folder_with_another_model_is_refused_in_one_line(tmp_path: Path, config: str, says: str) -> None:
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes((CHECKPOINT / "model.safetensors").read_bytes())
    with pytest.raises(UserError) as caught:
        Toy.load_model(tmp_path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="holds no point-classifier"):
        Toy.load_model(tmp_path)
