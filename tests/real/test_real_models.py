"""Three edits an editor on real pretrained weights and real data: what is edited holds, what is not is left alone."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.stream import EditStream
from grace_bench.evaluation.capability import CapabilityTasks
from grace_bench.models.editable import EditableModel
from grace_bench.models.fingerprint import hash_tensors
from grace_bench.registry import EDITORS
from grace_bench.results.schema import RunResult
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings, Schedule
from grace_bench.streams.counterfact import CounterFact
from grace_bench.streams.hallucination import Hallucination
from grace_bench.streams.scotus import Scotus
from helpers import write_choices

pytestmark = pytest.mark.real
# Two processes share the work: what is alike in load, and no fixture that both would make.
facts, texts = (pytest.mark.xdist_group(name) for name in ("facts", "texts"))

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")
MIDDLE, LATE = "model.layers.15.mlp.down_proj", "model.layers.27.mlp.down_proj"

# Fewer steps than in a run that is reported: enough for three edits to have their effect.
GRACE: dict[str, Any] = {"n_iter": 15}
FT: dict[str, Any] = {"lr": 1e-3, "n_iter": 15}
DEFER: dict[str, Any] = {"lr": 0.03, "n_iter": 15}
ROME: dict[str, Any] = {
    "n_prefixes": 2,
    "n_iter": 10,
    "text_path": str(SHARED / "openwebtext_c4_sample.jsonl"),
    "n_texts": 4,
}
RIVALS: tuple[tuple[str, dict[str, Any]], ...] = (("grace", GRACE), ("ft", FT), ("defer", DEFER))


def folder_of(name: str) -> Path:
    folder = REPOSITORY / "models" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"no models/{name}: python scripts/fetch_model.py {name} makes it")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Callable[[str, str], EditableModel]:
    loaded = EditableModel.from_pretrained(folder_of("smollm2-135m"), layer=MIDDLE, task="completion")

    def at(layer: str, task: str) -> EditableModel:
        return EditableModel(loaded.module, layer=layer, task=task, tokenizer=loaded.tokenizer, name="smollm2-135m")

    return at


@pytest.fixture(scope="session")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Scotus]:
    """MiniLM with a head trained on some cases of the earlier era, and the stream with those as upstream."""
    if not SHARED.is_dir():
        pytest.skip(f"the real data sets are not at {SHARED}")
    folder = tmp_path_factory.mktemp("scotus")
    stream = Scotus(
        path=first_records("scotus_1991_2009.jsonl", 20, folder),
        upstream_path=first_records("scotus_1946_1982.jsonl", 24, folder),
    )
    figures = stream.pretrain(folder / "model", base=str(folder_of("minilm")))
    # It has learned its own era better than the later one.
    assert figures["upstream_accuracy"] > figures["edits_accuracy"] + 0.1
    return folder / "model", stream


@pytest.fixture(scope="session")
def hallucination(tmp_path_factory: pytest.TempPathFactory) -> Hallucination:
    records = first_records("wikibio_hallucination_edit.jsonl", 12, tmp_path_factory.mktemp("wikibio"))
    return Hallucination(path=records, upstream_path=str(SHARED / "openwebtext_c4_sample.jsonl"))


@pytest.fixture(scope="session")
def unedited(smollm2: Callable[[str, str], EditableModel], hallucination: Hallucination) -> RunResult:
    """What every rival below is compared with; without edits the layer does not matter."""
    return three_edits(hallucination, smollm2(LATE, "language_modelling"), "none")


def first_records(name: str, n: int, folder: Path) -> str:
    """The beginning of a file: the unedited model is asked about every record of a stream."""
    path = folder / name
    path.write_bytes(b"".join((SHARED / name).read_bytes().splitlines(keepends=True)[:n]))
    return str(path)


def three_edits(stream: EditStream, model: EditableModel, editor: str, **options: Any) -> RunResult:
    settings = RunSettings(schedule=Schedule(max_edits=3, eval_every=3, max_upstream=6), threads=1, batch_size=16)
    before = hash_tensors(model.module.state_dict())
    result = run_benchmark(stream, model=model, editor=partial(EDITORS.get(editor), **options), settings=settings)
    assert result.metrics["n_edits"] == 3
    assert result.metrics["n_failed"] == 0
    # Bit for bit the model it was.
    assert hash_tensors(model.module.state_dict()) == before
    return result


def value(result: RunResult, name: str) -> float:
    number = result.metrics[name]
    assert number is not None
    assert math.isfinite(number)
    return number


@facts
@needs_shared
@pytest.mark.parametrize(
    ("editor", "options", "layer"),
    [*((*rival, MIDDLE) for rival in RIVALS), ("rome", ROME, MIDDLE), ("grace", {"n_iter": 30}, LATE)],
)
def test_counterfact_is_edited_into_a_real_language_model(
    smollm2: Callable[[str, str], EditableModel], editor: str, options: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    stream = CounterFact(path=first_records("counterfact_edit.jsonl", 12, tmp_path))
    result = three_edits(stream, smollm2(layer, "completion"), editor, **options)
    assert result.before["TRR"] == 1.0
    # How many a rival holds is for a table; that the edits have an effect is not.
    assert value(result, "ES") >= 1 / 3
    if editor == "grace":
        assert value(result, "ES") == value(result, "ERR/exact_match") == value(result, "ERR/contrast") == 1.0
        assert value(result, "TRR") == value(result, "Locality") == 1.0


@texts
@needs_shared
@pytest.mark.parametrize(
    # These prompts are ten times as long, and any step in the right direction shows.
    ("editor", "options", "layer"),
    [*((name, {**options, "n_iter": 6}, LATE) for name, options in RIVALS), ("grace", {"n_iter": 6}, MIDDLE)],
)
def test_hallucinations_of_a_real_language_model_become_less_likely(
    smollm2: Callable[[str, str], EditableModel],
    hallucination: Hallucination,
    unedited: RunResult,
    editor: str,
    options: dict[str, Any],
    layer: str,
) -> None:
    result = three_edits(hallucination, smollm2(layer, "language_modelling"), editor, **options)
    assert value(result, "ES") < value(unedited, "ES")
    if editor == "grace":
        assert value(result, "ERR") < value(unedited, "ERR")
        assert value(result, "TRR") == pytest.approx(value(unedited, "TRR"), rel=1e-4)


@texts
@needs_shared
@pytest.mark.parametrize(("editor", "options"), RIVALS)
def test_a_real_bert_that_meets_a_later_era_is_corrected(
    minilm: tuple[Path, Scotus], editor: str, options: dict[str, Any]
) -> None:
    folder, stream = minilm
    model = EditableModel.from_pretrained(folder, task="classification")
    assert model.layer_name == "bert.encoder.layer.4.output.dense"
    result = three_edits(stream, model, editor, **options)
    # One value in place of a layer's output cannot turn every answer (docs/results.md).
    assert value(result, "ES") >= 2 / 3
    if editor == "grace":
        assert value(result, "ERR") == value(result, "ES")
        assert value(result, "TRR") == result.before["TRR"]


def lm_eval(model: Path, tasks: Path, out: Path) -> float:
    """What the command `lm_eval` says of a model's grammar."""
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"),
        *("--tasks", "grammar", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "16"),
        *("--output_path", str(out)),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    (results,) = out.rglob("results_*.json")
    return float(json.loads(results.read_text())["results"]["grammar"]["acc,none"])


@facts
@needs_shared
def test_capability_is_what_the_command_lm_eval_says_of_the_model_before_and_of_its_export_after(
    smollm2: Callable[[str, str], EditableModel], tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    pair = {"doc_to_text": "", "target_delimiter": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}"}
    write_choices(tasks, "grammar", SHARED / "blimp_sample.jsonl", doc_to_target=0, **pair)
    model = smollm2(MIDDLE, "completion")
    model.task.batch_size = 16
    capability = CapabilityTasks(["grammar"], folders=[tasks])
    assert capability.measure(model)["grammar"].value == lm_eval(folder_of("smollm2-135m"), tasks, tmp_path / "before")
    with EDITORS.get("ft")(model=model, lr=3e-3, n_iter=20) as editor:
        editor.edit_text("The capital of Peru is", "Rome")
        after = capability.measure(model)["grammar"].value
        editor.export(tmp_path / "exported")
    assert after == lm_eval(tmp_path / "exported", tasks, tmp_path / "after")
