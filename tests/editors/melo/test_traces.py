"""What `grace-bench verify` says of the official recordings of MELO, and of damaged ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from grace_bench.editors._melo.traces import replay_file
from grace_bench.errors import UserError
from grace_bench.launch.replay_traces import verify_files

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("melo/*/*.json"))
# Batches, splits that drop points, and a decoder; the others in `make test-slow`.
QUICK = ("melo/gpt2/batches", "melo/llama/singles_small_radius")

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


def changed(folder: Path, change: Callable[[dict[str, Any]], None], *, n_edits: int = 1) -> Path:
    """The first edits of a recording, changed, in a folder of its own beside the models."""
    (folder / "models").symlink_to(GOLDEN / "models")
    source = GOLDEN / "melo" / "t5" / "singles_small_radius"
    content = json.loads(source.with_suffix(".json").read_text(encoding="utf-8"))
    content["edits"] = content["edits"][:n_edits]
    content |= {"probes": [], "history_after_all_edits": [], "final_cluster_label_sums": []}
    tensors = load_file(source.with_suffix(".safetensors"))
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("lora_A_initial")}
    content["tensors"] = {name: content["tensors"][name] for name in kept}
    change(content)
    path = folder / "melo" / "t5" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    save_file(kept, path.with_suffix(".safetensors"))
    return path


@needs_golden
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda content: content["edits"][0]["losses"].__setitem__(7, 9.0), "losses at edit 1, pass 8 differs by"),
        (lambda content: content["edits"][1]["radii"].__setitem__(0, 0.4), "radii at edit 2 differs by"),
        (lambda content: content["edits"][1].__setitem__("block", 0), "block at edit 2: 1, where 0 was recorded"),
        (
            lambda content: content["edits"][0]["ops"][0].__setitem__("op", "update"),
            "op of ops.0 at edit 1: add, where",
        ),
    ],
)
def test_a_difference_names_the_edit_and_the_quantity(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], difference: str
) -> None:
    def shortened(content: dict[str, Any]) -> None:
        change(content)
        content["final_cluster_label_sums"] = [359, 247]

    verdict = replay_file(changed(tmp_path, shortened, n_edits=2))
    assert verdict.difference is not None
    assert verdict.difference.startswith(difference)


@needs_golden
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("hparams"), "field 'hparams'"),
        (lambda content: content["hparams"].__setitem__("num_block", 0), "field 'hparams.num_block'"),
        (lambda content: content["hparams"].__setitem__("num_block", 3), "field 'tensors.lora_A_initial"),
        (lambda content: content["hparams"].__setitem__("grace_layer", "nowhere"), "field 'hparams.grace_layer'"),
        (lambda content: content["hparams"]["target_modules"].__setitem__(0, "shared"), "field 'edits.0.lora'"),
        (lambda content: content["edits"][0]["labels"].append([1]), "field 'edits.0.labels'"),
        (lambda content: content["edits"][0]["labels"][0].__setitem__(0, 9999), "field 'edits.0.labels'"),
        (lambda content: content["edits"][0]["input_ids"][0].__setitem__(0, 9999), "field 'edits.0.input_ids'"),
        (lambda content: content["edits"][0]["losses"].pop(), "field 'edits.0.losses'"),
        (lambda content: content["edits"][0]["ops"][0].__setitem__("op", "merge"), "field 'edits.0.ops.0.op'"),
        (lambda content: content.__setitem__("model", "gone"), "field 'model'"),
        (lambda content: content["tensors"].__setitem__("queries", []), "field 'tensors.queries'"),
    ],
)
def test_a_damaged_record_is_one_line_with_its_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = changed(tmp_path, change)
    said: list[str] = []
    assert verify_files([path], said.append) == 2
    (line,) = said
    assert line.startswith(f"{path}: ")
    assert message in line


@needs_golden
def test_a_missing_tensor_file_is_one_line(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda content: None)
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(UserError, match="record"):
        replay_file(path)
