"""What `grace-bench verify` says of the official recordings of ROME's family, and of damaged ones."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from grace_bench.cli import main
from grace_bench.editors._rome.traces import replay_file
from grace_bench.errors import UserError
from grace_bench.launch.replay_traces import verify_files

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden"
FAMILIES = ("memit", "alphaedit", "rrome", "emmet")
GOLDEN_FILES = [path for family in FAMILIES for path in sorted(GOLDEN.glob(f"{family}/*/*.json"))]
# Both models, every editor and every rule for the token; the others in `make test-slow`.
QUICK = (
    *("memit/gpt2/first_token", "memit/gpt2/paper_settings", "memit/llama/first_token", "alphaedit/llama/batches"),
    *("emmet/gpt2/batches", "rrome/llama/prompt_keys"),
)

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
    assert verdict.difference is None
    # The token of this one lies in the padding.
    assert (verdict.not_replayed is not None) == (named(path) == "memit/llama/first_token")


def shortened(folder: Path, name: str) -> tuple[Path, str]:
    """The first edit of a recording, in a folder of its own beside the models."""
    (folder / "models").symlink_to(GOLDEN / "models")
    content = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True)
    (edit,) = content["edits"] = content["edits"][:1]
    content["total_change"] = edit.get("change") or edit["layers"]
    content["probes"] = []
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    kept = {key: tensor[:1].clone() for key, tensor in tensors.items() if key != "probe_logits_after"}
    content["tensors"] = {key: content["tensors"][key] for key in kept}
    save_file(kept, path.with_suffix(".safetensors"))
    return path, json.dumps(content)


@pytest.fixture(scope="module")
def memit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return shortened(tmp_path_factory.mktemp("memit"), "memit/gpt2/first_token")


@pytest.fixture(scope="module")
def rrome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return shortened(tmp_path_factory.mktemp("rrome"), "rrome/gpt2/prompt_keys")


Change = Callable[[dict[str, Any]], None]


def put(value: Any, *keys: str | int) -> Change:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def scaled(*keys: str | int) -> Change:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] *= 1.05

    return change


def dropped(*keys: str | int) -> Change:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def said_of(recording: tuple[Path, str], change: Change) -> tuple[int, str]:
    """The exit code of `verify` and what it says of a recording with a change."""
    path, text = recording
    content = json.loads(text)
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    lines: list[str] = []
    code = verify_files([path], lines.append)
    (line,) = lines
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    return code, line.removeprefix(f"{path}: ")


def stopped_early(content: dict[str, Any]) -> None:
    value = content["edits"][0]["z"][0]
    value["n_updates"], value["losses"] = 3, value["losses"][:4]


LAYER = ("edits", 0, "layers", "1")


@needs_golden
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled("edits", 0, "z", 0, "losses", 3, 1), "losses at edit 1, request 1, pass 4 differs by "),
        pytest.param(scaled(*LAYER, "fro"), "fro at edit 1, layer 1 differs by ", marks=pytest.mark.slow),
        pytest.param(
            scaled("edits", 0, "z", 0, "z_norm"), "z_norm at edit 1, request 1 differs", marks=pytest.mark.slow
        ),
        pytest.param(scaled(*LAYER, "key_norms", 0), "key_norms at edit 1, layer 1 differs", marks=pytest.mark.slow),
        (stopped_early, "n_updates differs at edit 1, request 1: recorded 3, ours 19"),
        (put([1, 2], "edits", 0, "z", 0, "lookup_idxs"), "lookup_idxs differs at edit 1, request 1: recorded [1, 2]"),
        (put([1, 2], "edits", 0, "z", 0, "target_ids"), "target_ids differs at edit 1, request 1: recorded [1, 2]"),
    ],
)
def test_a_changed_number_is_found(memit: tuple[Path, str], change: Change, message: str) -> None:
    code, line = said_of(memit, change)
    assert code == 1
    assert line.startswith(message)


@needs_golden
@pytest.mark.slow
def test_a_changed_element_of_romes_weight_is_found(rrome: tuple[Path, str]) -> None:
    def change(content: dict[str, Any]) -> None:
        entries = content["edits"][0]["change"]["entries"]
        entries[0] += 0.05 * max(map(abs, entries))

    code, line = said_of(rrome, change)
    assert code == 1
    assert line.startswith("entries at edit 1 differs by ")


@needs_golden
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dropped("edits"), ["'edits'", "required"]),
        (dropped("hparams", "v_lr"), ["'hparams.v_lr'", "required"]),
        (dropped("total_change", "1"), ["'total_change'", "1"]),
        (dropped("entry_positions", "1"), ["'entry_positions'", "1"]),
        (put("many", "edits", 0, "z", 0, "n_updates"), ["'edits.0.z.0.n_updates'", "integer"]),
        (put(math.nan, "edits", 0, "z", 0, "losses", 3, 0), ["'edits.0.z.0.losses.3.0'", "finite"]),
        (put([], "edits"), ["'edits'"]),
        (put([], "hparams", "layers"), ["'hparams.layers'"]),
        (put([9], "hparams", "layers"), ["'entry_positions'", "layer 9"]),
        (put("transformer.g.{}.mlp", "hparams", "rewrite_module_tmp"), ["'hparams.rewrite_module_tmp'", "not in the"]),
        (put("transformer.h.{}.ln_1", "hparams", "rewrite_module_tmp"), ["'hparams.", "transformer.h.1.ln_1"]),
        (put("a text without a place", "context_templates", 1, 0), ["'context_templates'"]),
        (dropped("edits", 0, "layers", "1"), ["'edits.0.layers'", "layer 1"]),
        (put({"fro": 1.0, "entries": []}, "edits", 0, "layers", "2"), ["layer 2"]),
        (put(0.0, "hparams", "v_lr"), ["'hparams.v_lr'", "greater than 0"]),
        (put("middle", "hparams", "fact_token"), ["'hparams.fact_token'", "subject_last"]),
        (put(None, "hparams", "mom2_update_weight"), ["'hparams'", "moment_weight"]),
        (put("{", "hparams", "rewrite_module_tmp"), ["'hparams.rewrite_module_tmp'"]),
        (put("../gpt2", "model"), ["'model'"]),
        (put("other", "model"), ["'model'", "models/other"]),
        (put([], "edits", 0, "requests"), ["'edits.0.z'", "1 values for 0 requests"]),
        (put([], "edits", 0, "z", 0, "losses"), ["'edits.0.z.0.losses'", "0 passes for 19 updates"]),
        (put([[10**6], 1], "entry_positions", "1"), ["'entry_positions"]),
        (put([-1], "entry_positions", "1"), ["'entry_positions", "greater than or equal to 0"]),
        (put([10**9] * 16, "entry_positions", "1"), ["'entry_positions'", "1000000000"]),
        (put(["float32", 1], "tensors", "extra"), ["'tensors.extra'", "missing"]),
        (put("no subject here", "edits", 0, "requests", 0, "prompt"), ["'edits.0.requests.0.prompt'", "{}"]),
        (put([{"input_ids": [10**6], "argmax_after": 0}], "probes"), ["'probes.0.input_ids'", "270"]),
        (put([{"input_ids": [], "argmax_after": 0}], "probes"), ["'probes.0.input_ids'"]),
        (put([], "context_templates"), ["'context_templates'"]),
    ],
)
def test_a_damaged_record_is_refused_by_field(memit: tuple[Path, str], change: Change, words: list[str]) -> None:
    code, line = said_of(memit, change)
    assert code == 2, line
    for word in words:
        assert word in line


@needs_golden
def test_requests_and_values_must_be_as_many(memit: tuple[Path, str]) -> None:
    def change(content: dict[str, Any]) -> None:
        content["edits"][0]["requests"] *= 2

    code, line = said_of(memit, change)
    assert code == 2
    assert line == "field 'edits.0.z': 1 values for 2 requests"


@needs_golden
@pytest.mark.parametrize("field", ["request", "change", "losses"])
def test_an_edit_of_rome_needs_its_fields(field: str, rrome: tuple[Path, str]) -> None:
    code, line = said_of(rrome, dropped("edits", 0, field))
    assert code == 2
    assert line == f"field 'edits.0.{field}': Field required"


@needs_golden
def test_truncated_missing_and_foreign_files_are_refused(memit: tuple[Path, str], tmp_path: Path) -> None:
    path, text = memit
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    lines: list[str] = []
    assert verify_files([path, tmp_path / "absent.json"], lines.append) == 2
    assert [line.partition(": ")[0] for line in lines] == [str(path), str(tmp_path / "absent.json")]
    assert "No such file" in lines[1]
    alone = tmp_path / "alone.json"
    alone.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"alone\.json: .*"):
        replay_file(alone)
    alone.with_suffix(".safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"alone\.json: .*"):
        replay_file(alone)
    alone.with_suffix(".safetensors").write_bytes(path.with_suffix(".safetensors").read_bytes())
    with pytest.raises(UserError, match=r"alone\.json: field 'model': there is no folder models/gpt2"):
        replay_file(alone)


@needs_golden
def test_the_command_line_says_a_line_a_file(memit: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, text = memit
    path.write_text(text, encoding="utf-8")
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: agrees\n"
    fault = GOLDEN / "memit/llama/first_token.json"
    assert main(["verify", str(fault)]) == 0
    assert capsys.readouterr().out.startswith(f"{fault}: not replayed: it documents a fault: ")
