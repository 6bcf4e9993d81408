"""What `grace-bench verify` says of sound, foreign and damaged recordings.

The recorder below is written from the description of the official implementation and shares no code with the package.
"""

import json
import math
import random
from collections.abc import Callable, Iterator
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

from grace_bench.editors._grace.traces import replay_file
from grace_bench.errors import UserError
from grace_bench.launch.replay_traces import verify_files
from helpers import each_value_once

GOLDEN = Path(__file__).parents[3].parent / "shared" / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("*/*.json"))
# Of T5 the port below makes recordings that are shorter.
QUICK_FILES = ("bert/edge_cases", "gpt2/paper_settings_cold")
VOCABULARY = 40
LAYERS = {
    "gpt2": "transformer.h[0].mlp.c_fc.weight",
    "bert": "bert.encoder.layer[0].output.dense.weight",
    "t5": "encoder.block[0].layer[1].DenseReluDense.wo.weight",
}
TASKS = {"gpt2": "hallucination", "bert": "scotus", "t5": "qa"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(family: str) -> nn.Module:
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=32)
        return GPT2LMHeadModel(config).eval()
    if family == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        return BertForSequenceClassification(
            BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=32, num_labels=4)
        ).eval()
    return T5ForConditionalGeneration(
        T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0
        )
    ).eval()


class Recorder:
    """GRACE as officially implemented: batches of one, `torch.cdist`, Adam on the values."""

    def __init__(self, family: str, replacement: str, eps_init: float, noise: int | None = None) -> None:
        self.family, self.replacement, self.eps_init, self.noise = family, replacement, eps_init, noise
        self.model = tiny(family)
        self.model.requires_grad_(False)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.radii: list[Tensor] = []
        self.means: list[float] = []
        self.position = -1
        self.capture: list[tuple[Tensor, Tensor]] = []
        self.chosen = -1
        path = LAYERS[family].removesuffix(".weight").replace("[", ".").replace("]", "")
        self.model.get_submodule(path).register_forward_hook(self.hook)

    def distances(self, query: Tensor) -> Tensor:
        keys = torch.stack(self.keys)
        if self.noise is None:
            return torch.cdist(keys, query[None], p=2)[:, 0]
        # Another machine: exact distances, with a rounding error of its own, the same at every call.
        rng = random.Random(f"{self.noise} {len(keys)} {query.tolist()}")
        squares = (keys - query).double().square().sum(dim=1)
        if len(keys) <= 25:
            # The key and the query were computed in two passes.
            ulp = torch.finfo(torch.float32).eps * (keys.norm(dim=1) + query.norm())
            return (squares.sqrt() + torch.tensor([rng.choice((0, 1)) for _ in keys]) * ulp).float()
        ulp = torch.finfo(torch.float32).eps * (keys.square().sum(dim=1) + query.square().sum())
        error = torch.tensor([rng.choice((-2, -1, 0, 1, 2)) for _ in keys])
        return (squares + error * ulp).clamp(min=0).sqrt().float()

    def hook(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        query = args[0].reshape(-1, args[0].shape[-1])[self.position]
        flat = output.reshape(-1, output.shape[-1])
        self.capture = [(query, flat[self.position])]
        if not self.keys:
            return output
        distances = self.distances(query.detach())
        self.chosen = int(distances.argmin())
        if distances[self.chosen] > self.radii[self.chosen]:
            return output
        value, position = self.values[self.chosen], self.position % len(flat)
        rows = {
            "replace_last": [t == position for t in range(len(flat))],
            "replace_all": [True] * len(flat),
            "replace_prompt": [t < position for t in range(len(flat))],
        }[self.replacement]
        return torch.where(torch.tensor(rows)[:, None], value, flat).reshape(output.shape)

    def forward(self, ids: list[int], labels: list[int]) -> tuple[Tensor, Tensor]:
        self.position = len(ids) - 1 if self.family == "gpt2" else -1
        if self.family == "gpt2":
            whole = torch.tensor([ids + labels])
            output = self.model(input_ids=whole, labels=torch.tensor([[-100] * len(ids) + labels]))
            return output.loss, output.logits[0, -1]
        wanted = torch.tensor(labels) if self.family == "bert" else torch.tensor([labels])
        inputs = torch.tensor([ids])
        output = self.model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=wanted)
        return output.loss, output.logits[0] if self.family == "bert" else output.logits[0, -1]

    def edit(self, ids: list[int], labels: list[int], n_iter: int, lr: float) -> dict[str, Any]:
        with torch.no_grad():
            self.forward(ids, labels)
        query, warm = (tensor.detach().clone() for tensor in self.capture[0])
        before = [round(float(radius), 6) for radius in self.radii]
        padded = [-100] * len(ids) + labels if self.family == "gpt2" else labels
        mean = sum(padded) / len(padded)
        distances = self.distances(query) if self.keys else torch.tensor([math.inf])
        nearest, distance = int(distances.argmin()), distances.min()
        if not self.keys or distance > self.eps_init + self.radii[nearest]:
            self.add(query, warm, torch.tensor(self.eps_init), mean)
        elif self.means[nearest] != mean:
            self.add(query, warm, distance / 2, mean)
            self.radii[nearest] = distance / 2 - 1e-5
        elif distance > self.radii[nearest]:
            self.radii[nearest] = distance
        values = [value.clone().requires_grad_() for value in self.values]
        self.values = values
        optimizer = torch.optim.Adam(values, lr=lr)
        losses = []
        for _ in range(n_iter):
            optimizer.zero_grad()
            loss, _ = self.forward(ids, labels)
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        self.values = [value.detach() for value in values]
        after = [round(float(radius), 6) for radius in self.radii]
        grew, moved = len(after) > len(before), before != after[: len(before)]
        op = ("split" if moved else "add") if grew else ("expand" if moved else "hit")
        return {
            "op": op,
            "n_keys": len(after),
            "epsilons": after,
            "chosen_key": self.chosen,
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }

    def add(self, query: Tensor, value: Tensor, radius: Tensor, mean: float) -> None:
        self.keys.append(query)
        self.values.append(value)
        self.radii.append(radius)
        self.means.append(mean)


def record(
    folder: Path,
    family: str = "gpt2",
    *,
    replacement: str = "replace_last",
    n_edits: int = 8,
    seed: int = 0,
    foreign: bool = False,
) -> dict[str, Any]:
    """Records a stream with repeats and contradictions, saves its model in `folder`, and returns the record."""
    rng = random.Random(seed)
    recorder = Recorder(family, replacement, 0.3, seed if foreign else None)
    recorder.model.save_pretrained(folder / "model")
    edits: list[dict[str, list[int]]] = []
    for _ in range(n_edits):
        ids = [rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(4, 9))]
        labels = [rng.randrange(4)] if family == "bert" else [rng.randrange(1, VOCABULARY) for _ in range(2)]
        if edits and rng.random() < 0.3:
            earlier = rng.choice(edits)
            ids, labels = earlier["input_ids"], rng.choice((labels, earlier["labels"]))
        elif edits and rng.random() < 0.3:
            ids = [rng.randrange(1, VOCABULARY), *rng.choice(edits)["input_ids"][1:]]
        edits.append({"input_ids": ids, "labels": labels})
    settings = {"eps_init": 0.3, "n_iter": 4, "lr": 0.5, "value_init": "warm", "replacement": replacement}
    trace = [recorder.edit(edit["input_ids"], edit["labels"], 4, 0.5) for edit in edits]
    probes = [edit["input_ids"] for edit in edits[-4:]] + [[3, 1, 4, 1, 5]]
    with torch.no_grad():
        logits = [recorder.forward(probe, [1] if family == "bert" else [1, 2])[1].tolist() for probe in probes]
    return {
        "source": "an independent port",
        "torch": torch.__version__,
        "transformers": "5",
        "family": family,
        "layer": LAYERS[family],
        "task": TASKS[family],
        "seed": seed,
        "grace": {**settings, "eps_expand": "coverage", "distance": "euclidean"},
        "edits": edits,
        "trace": trace,
        "probes": probes,
        "probe_last_logits": [[round(number, 5) for number in row] for row in logits],
    }


def write(folder: Path, content: dict[str, Any], name: str = "record.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.skipif(not GOLDEN_FILES, reason="the official recordings are not beside this checkout")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            id=f"{path.parent.name}-{path.stem}",
            marks=() if f"{path.parent.name}/{path.stem}" in QUICK_FILES else pytest.mark.slow,
        )
        for path in GOLDEN_FILES
    ],
)
def test_official_recordings_agree(path: Path) -> None:
    assert replay_file(path).difference is None


@each_value_once("family, replacement", ["gpt2", "bert", "t5"], ["replace_last", "replace_all", "replace_prompt"])
def test_an_independent_port_agrees(tmp_path: Path, family: str, replacement: str) -> None:
    path = write(tmp_path, record(tmp_path, family, replacement=replacement, n_edits=10))
    assert replay_file(path).difference is None


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("family", ["gpt2", pytest.param("bert", marks=pytest.mark.slow)])
def test_a_recording_of_a_machine_that_rounds_otherwise_agrees(tmp_path: Path, family: str, seed: int) -> None:
    content = record(tmp_path, family, n_edits=50, seed=seed, foreign=True)
    assert content["trace"][-1]["n_keys"] > 25
    assert replay_file(write(tmp_path, content)).difference is None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("sound")
    return folder, json.dumps(record(folder, n_edits=12))


Change = Callable[[dict[str, Any]], None]


def changed(key: str, function: Callable[[Any], Any], index: int = 5) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["trace"][index][key] = function(content["trace"][index][key])

    return change


def changed_logit(content: dict[str, Any]) -> None:
    content["probe_last_logits"][2][7] += 0.01


def changed_radius(content: dict[str, Any]) -> None:
    content["trace"][7]["epsilons"][1] += 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("op", lambda op: "hit" if op != "hit" else "add"), "op differs at edit 6: recorded"),
        (changed("n_keys", lambda n: n + 1), "n_keys differs at edit 6: recorded"),
        (changed("chosen_key", lambda key: key + 1), "chosen_key differs at edit 6: recorded"),
        (changed("epsilons", lambda radii: radii[:-1]), "epsilons differs at edit 6: recorded"),
        (changed("epsilons", lambda radii: []), "epsilons differs at edit 6: recorded 0 numbers"),
        (changed_radius, "epsilons[1] differs at edit 8: recorded"),
        (changed("loss_first", lambda loss: loss * 1.01), "loss_first differs at edit 6: recorded"),
        (changed("loss_last", lambda loss: loss * 1.01), "loss_last differs at edit 6: recorded"),
        (changed_logit, "probe_last_logits[7] differs at probe 3: recorded"),
        (lambda content: content.update(layer="transformer.h[1].mlp.c_fc"), "differs at edit"),
    ],
)
def test_a_changed_number_is_found(sound: tuple[Path, str], change: Change, message: str) -> None:
    content = json.loads(sound[1])
    change(content)
    path = write(sound[0], content)
    lines: list[str] = []
    assert verify_files([path], lines.append) == 1
    (line,) = lines
    assert line.startswith(f"{path}: ")
    assert message in line


def dropped(key: str) -> Change:
    return lambda content: content.pop(key)


def put(value: Any, *keys: str | int) -> Change:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dropped("trace"), ["'trace'", "required"]),
        (dropped("grace"), ["'grace'", "required"]),
        (put("many", "trace", 3, "n_keys"), ["'trace.3.n_keys'", "integer"]),
        (put("add", "trace", 3, "epsilons"), ["'trace.3.epsilons'", "array"]),
        (put(math.nan, "trace", 3, "loss_last"), ["'trace.3.loss_last'", "finite"]),
        (put("moved", "trace", 3, "op"), ["'trace.3.op'", "'add', 'expand', 'split' or 'hit'"]),
        (put([], "edits"), ["'edits'"]),
        (put([], "edits", 2, "input_ids"), ["'edits.2.input_ids'"]),
        (put([], "edits", 2, "labels"), ["'edits.2.labels'"]),
        (put([], "trace"), ["'trace'", "0 steps for 12 edits"]),
        (put([], "probe_last_logits"), ["'probe_last_logits'", "0 rows for 5 probes"]),
        (put([3, VOCABULARY], "edits", 2, "input_ids"), ["'edits.2.input_ids'", "40"]),
        (put([3, -1], "edits", 2, "input_ids"), ["'edits.2.input_ids.1'", "greater than or equal to 0"]),
        (put([VOCABULARY], "edits", 2, "labels"), ["'edits.2.labels'", "40"]),
        (put([1] * 40, "probes", 1), ["'probes.1'", "42 tokens", "32"]),
        (put("transformer.h[0].mlp.c_fk.weight", "layer"), ["'layer'", "did you mean 'transformer.h.0.mlp.c_fc'"]),
        (put("transformer.h", "layer"), ["'layer'", "transformer.h"]),
        (put("transformer", "layer"), ["'layer'", "transformer"]),
        (put("bert", "family"), ["'task'", "bert"]),
        (put("qa", "task"), ["'task'", "gpt2"]),
        (put("cold", "grace", "value_init"), ["'initial_values'", "missing"]),
        (put(0.0, "grace", "eps_init"), ["'grace.eps_init'", "greater than 0"]),
        (put(0, "grace", "n_iter"), ["'grace.n_iter'", "greater than or equal to 1"]),
        (put(1, "surprise"), ["'surprise'"]),
    ],
)
def test_a_damaged_record_is_refused_by_field(sound: tuple[Path, str], change: Change, words: list[str]) -> None:
    content = json.loads(sound[1])
    change(content)
    path = write(sound[0], content)
    with pytest.raises(UserError) as caught:
        replay_file(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    lines: list[str] = []
    assert verify_files([path], lines.append) == 2
    assert len(lines) == 1
    assert "\n" not in lines[0]


@pytest.mark.parametrize("given", [[[0.5] * 64] * 2, [[0.5] * 63] * 20])
def test_initial_values_that_do_not_fit_are_refused(sound: tuple[Path, str], given: list[list[float]]) -> None:
    content = json.loads(sound[1])
    content["grace"]["value_init"] = "cold"
    content["initial_values"] = given
    with pytest.raises(UserError, match="'initial_values"):
        replay_file(write(sound[0], content))


def test_truncated_text_and_missing_files_are_refused(sound: tuple[Path, str], tmp_path: Path) -> None:
    folder, text = sound
    truncated = folder / "truncated.json"
    truncated.write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(UserError, match="EOF"):
        replay_file(truncated)
    with pytest.raises(UserError, match="No such file"):
        replay_file(folder / "absent.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"bytes\.json"):
        replay_file(tmp_path / "bytes.json")
    with pytest.raises(UserError, match="folder 'model'"):
        replay_file(write(tmp_path, json.loads(text)))


@pytest.mark.parametrize("damage", ["config", "weights", "no weights", "another family"])
def test_a_damaged_model_is_refused(sound: tuple[Path, str], tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, record(tmp_path, n_edits=2))
    weights = tmp_path / "model" / "model.safetensors"
    if damage == "config":
        (tmp_path / "model" / "config.json").write_text("{", encoding="utf-8")
    elif damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no weights":
        weights.unlink()
    else:
        tiny("bert").save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"record\.json"):
        replay_file(path)
    lines: list[str] = []
    assert verify_files([path], lines.append) == 2
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_the_worst_file_decides_the_exit_code_and_every_file_has_its_line(sound: tuple[Path, str]) -> None:
    folder, text = sound
    good = write(folder, json.loads(text), "good.json")
    content = json.loads(text)
    changed_logit(content)
    different = write(folder, content, "different.json")
    absent = folder / "absent.json"
    lines: list[str] = []
    assert verify_files([good], lines.append) == 0
    assert lines == [f"{good}: agrees"]
    assert verify_files([different, good], lines.append) == 1
    assert verify_files([absent, different, good], lines.append) == 2
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        str(path) for path in (different, good, absent, different, good)
    ]
