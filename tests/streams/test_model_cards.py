"""The cards of the models that ship: what their figures and their configuration say."""

import json
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import grace_bench.streams
from grace_bench.registry import STREAMS

CHECKPOINTS = Path(next(iter(grace_bench.streams.__path__))) / "checkpoints"


@pytest.mark.parametrize(
    "folder", sorted(path for path in CHECKPOINTS.iterdir() if path.is_dir()), ids=lambda f: f.name
)
def test_a_card_says_what_the_files_say(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|$", card, re.MULTILINE)) == {
        name: f"{value:.4f}" for name, value in figures.items()
    }
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        sizes = [weights.get_tensor(name).size for name in weights.keys()]  # noqa: SIM118 - it is no mapping
    assert f"{sum(sizes):,} parameters" in card
    assert f"grace-bench pretrain {folder.name}\n" in card
    assert folder.name in STREAMS.entries()
