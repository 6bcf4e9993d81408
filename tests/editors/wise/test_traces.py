"""What `grace-bench verify` says of the official recordings of WISE, and of damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from grace_bench.editors._wise.traces import replay_file
from grace_bench.errors import UserError
from grace_bench.launch.replay_traces import verify_files

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("wise/*/*.json"))
# On another processor than that of the recordings a replay is made seven times; the others are in `make test-slow`.
QUICK = ("wise/llama/merge_magnitude",)

needs_golden = pytest.mark.skipif(not GOLDEN_FILES, reason="the official recordings are not beside this checkout")


def named(path: Path) -> str:
    return str(path.relative_to(GOLDEN).with_suffix(""))


@needs_golden
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=named(path), marks=() if named(path) in QUICK else pytest.mark.slow)
        for path in GOLDEN_FILES
    ],
)
def test_official_recordings_agree(path: Path) -> None:
    verdict = replay_file(path)
    assert (verdict.difference, verdict.not_replayed) == (None, None)


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The first edit of a recording with its first two passes, changed, in a folder of its own beside the models."""
    (folder / "models").symlink_to(GOLDEN / "models")
    source = GOLDEN / "wise" / "llama" / "retrieve"
    content = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    first = content["edits"][0]
    content["hparams"]["n_iter"] = first["n_updates"] = 1
    first["losses"] = first["losses"][:1]
    # What the other passes made is left out; what the first pass shows is left.
    first |= {"routing": [], "editing_activation": [0.0], "editing_min_act": 0.0}
    change_of_one_pass = {"fro": 0.0, "entries": [0.0] * len(content["entry_positions"])}
    first["new_weight_change"] = change_of_one_pass
    content |= {"edits": [first], "probes": [], "final_memory_min_acts": [], "final_editing_min_act": 0.0}
    content["hparams"]["edit_lr"] = 1e-9
    masks = load_file(source.with_suffix(".safetensors"))["masks"][:1].contiguous()
    content["tensors"] = {"masks": ["uint8", *masks.shape]}
    change(content)
    path = folder / "wise" / "llama" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    save_file({"masks": masks}, path.with_suffix(".safetensors"))
    return path


@needs_golden
def test_the_first_pass_of_a_recording_agrees_by_itself(tmp_path: Path) -> None:
    assert replay_file(changed(tmp_path, lambda record: None)).difference is None


@needs_golden
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda edit: edit["losses"][0].__setitem__(1, 3.0), "losses at edit 1, pass 1 differs by"),
        (lambda edit: edit["input_ids"][0].__setitem__(-1, 9), "input_ids at edit 1 is"),
        (lambda edit: edit.__setitem__("mask_ones", 1), "mask_ones at edit 1 is 1 in the record"),
        (lambda edit: edit.__setitem__("saved", True), "saved at edit 1 is True in the record"),
        (lambda edit: edit.__setitem__("editing_activation", [3.0]), "editing_activation at edit 1 differs by 3"),
        (lambda edit: edit["new_weight_change"].__setitem__("fro", 1.0), "fro at edit 1, new differs by 1"),
    ],
)
def test_a_difference_names_edit_and_quantity(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], difference: str
) -> None:
    verdict = replay_file(changed(tmp_path, lambda record: change(record["edits"][0])))
    assert verdict.difference is not None
    assert difference in verdict.difference


@needs_golden
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record["edits"][0].pop("losses"), "field 'edits.0.losses'"),
        (lambda record: record["hparams"].__setitem__("merge_alg", "tie"), "field 'hparams.merge_alg'"),
        (lambda record: record["hparams"].__setitem__("merge_freq", 7), "field 'hparams.merge_freq'"),
        (lambda record: record.__setitem__("context_templates", ["no place"]), "field 'context_templates'"),
        (lambda record: record.__setitem__("weight_name", "model.layers.9.weight"), "field 'weight_name'"),
        (lambda record: record.__setitem__("entry_positions", [10**6]), "field 'entry_positions'"),
        (
            lambda record: record["edits"].append(record["edits"][0]) or record["hparams"].__setitem__("save_freq", 1),
            "field 'tensors.masks'",
        ),
        (lambda record: record["tensors"].__setitem__("gone", ["float32"]), "field 'tensors.gone'"),
    ],
)
def test_a_damaged_recording_is_one_line_that_names_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(UserError, match=message) as caught:
        replay_file(path)
    assert str(path) in str(caught.value)
    said: list[str] = []
    assert verify_files([path], said.append) == 2
    assert len(said) == 1
