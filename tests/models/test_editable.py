"""An editable model: what can be loaded, which layers can be edited, and that nothing but an editor changes answers."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.pytorch_utils import Conv1D

from grace_bench.data.requests import EditRequest
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel, LayerCall
from grace_bench.models.fingerprint import hash_tensors
from grace_bench.models.loading import pick_device, pick_threads
from grace_bench.registry import EDITORS, STREAMS

MakeModel = Callable[..., EditableModel]
MakeEditor = Callable[..., EditorStrategy]
MakeRequests = Callable[[str], list[EditRequest]]

PROMPTS = ["what is the capital of Kazakhstan", "the river in Italy is", "what is the currency of Peru"]


def refusal(attempt: Callable[[], Any]) -> str:
    """The one line with which an attempt is refused."""
    with pytest.raises(UserError) as caught:
        attempt()
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


@torch.no_grad()
def logits_of(model: EditableModel, prompts: Sequence[str] = PROMPTS) -> Tensor:
    return model.logits(model.encode_batch(list(prompts))).clone()


def first_token_logits(model: EditableModel, request: EditRequest) -> Tensor:
    with torch.no_grad():
        return model.logits(model.encode_batch([request.prompt], [request.target])).clone()


# Which layers can be edited.


def test_a_layer_that_is_not_there_is_answered_with_the_closest_that_is(make_model: MakeModel) -> None:
    model = make_model("classification")
    told = refusal(lambda: EditableModel(model.module, layer="bert.encoder.layer.1.output.dens", task=model.task))
    assert "layer='bert.encoder.layer.1.output.dens'" in told
    assert told.endswith("did you mean 'bert.encoder.layer.1.output.dense'?")


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_layer_named_by_its_parameter_is_told_the_name_of_its_module(make_model: MakeModel, parameter: str) -> None:
    model = make_model("completion")
    told = refusal(lambda: EditableModel(model.module, layer=f"transformer.h.0.mlp.c_fc.{parameter}", task=model.task))
    assert told.endswith("names a parameter; name its module, 'transformer.h.0.mlp.c_fc'")


@pytest.mark.parametrize(
    ("task", "layer", "says"),
    [
        ("classification", "bert.encoder.layer", "is never called"),
        ("qa", "decoder.block.0.layer", "is never called"),
        ("completion", "transformer.h", "is never called"),
        ("classification", "bert.embeddings.word_embeddings", "does not turn activations into activations"),
        ("completion", "transformer.wte", "does not turn activations into activations"),
        ("qa", "encoder", "does not turn activations into activations"),
        ("completion", "transformer", "does not turn activations into activations"),
    ],
)
def test_a_module_that_cannot_be_edited_is_refused_in_one_line(
    task: str, layer: str, says: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    given = make_model(task)
    model = EditableModel(given.module, layer=layer, task=given.task, tokenizer=given.tokenizer)
    (request, *_) = make_requests(task)
    before = first_token_logits(given, request)
    batch = model.encode_batch([request.prompt], [request.target])
    told = refusal(lambda: model.layer_call(batch))
    assert told.startswith(f"layer={layer} ")
    assert says in told
    assert torch.equal(first_token_logits(given, request), before), "the refusal leaves nothing on the module"


# Which checkpoints can be loaded.

LAYERS = {
    "classification": "bert.encoder.layer.1.output.dense",
    "qa": "encoder.block.0.layer.1.DenseReluDense.wo",
    "completion": "transformer.h.0.mlp.c_fc",
}
each_architecture = pytest.mark.parametrize("task", LAYERS)


@pytest.fixture
def save_model(make_model: MakeModel, tmp_path: Path) -> Callable[[str], Path]:
    """Saves a tiny model with its tokenizer, as Hugging Face does."""

    def save(task: str) -> Path:
        model = make_model(task)
        model.module.save_pretrained(tmp_path)  # type: ignore[operator]
        model.tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return save


def load(folder: Path, task: str, **options: Any) -> EditableModel:
    return EditableModel.from_pretrained(folder, task=task, layer=LAYERS[task], device="cpu", **options)  # type: ignore[arg-type]


@each_architecture
def test_a_saved_model_is_loaded_with_the_same_weights_and_answers(
    task: str, save_model: Callable[[str], Path], make_model: MakeModel
) -> None:
    loaded, original = load(save_model(task), task), make_model(task)
    assert loaded.fingerprint == original.fingerprint
    request = EditRequest(id="x", prompt=PROMPTS[0], target=1 if task == "classification" else "Astana")
    assert torch.equal(first_token_logits(loaded, request), first_token_logits(original, request))
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


@pytest.mark.parametrize(
    ("task", "lacking"),
    [
        ("classification", "classifier.weight"),
        ("classification", "bert.encoder.layer.0.attention.self.query.bias"),
        ("qa", "decoder.final_layer_norm.weight"),
        ("qa", "decoder.block.1.layer.1.EncDecAttention.q.weight"),
        ("completion", "transformer.h.1.mlp.c_proj.weight"),
    ],
)
def test_a_checkpoint_that_lacks_a_tensor_is_refused_with_its_name(
    task: str, lacking: str, save_model: Callable[[str], Path]
) -> None:
    weights = save_model(task) / "model.safetensors"
    tensors = load_file(weights)
    del tensors[lacking]
    save_file(tensors, weights, metadata={"format": "pt"})
    told = refusal(lambda: load(weights.parent, task))
    assert f"model={weights.parent}: the checkpoint lacks {lacking}," in told
    assert task in told


def test_a_tensor_of_another_shape_counts_as_lacking(save_model: Callable[[str], Path]) -> None:
    weights = save_model("classification") / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.weight"] = tensors["classifier.weight"][:3].clone()
    save_file(tensors, weights, metadata={"format": "pt"})
    told = refusal(lambda: load(weights.parent, "classification"))
    assert str(weights.parent) in told
    assert "classifier.weight" in told


def test_a_model_without_the_tasks_head_is_refused(word_tokenizer: Any, tmp_path: Path) -> None:
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=len(word_tokenizer),
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    told = refusal(lambda: load(tmp_path, "classification"))
    assert "the checkpoint lacks" in told
    assert "which classification needs" in told


@each_architecture
def test_a_folder_without_a_tokenizer_is_refused(
    task: str, save_model: Callable[[str], Path], make_model: MakeModel
) -> None:
    folder = save_model(task)
    (folder / "tokenizer.json").unlink()
    assert f"model={folder}: the folder holds no tokenizer" in refusal(lambda: load(folder, task))
    ids_only = load(folder, task, tokenizer=False)
    assert ids_only.tokenizer is None
    assert ids_only.fingerprint == make_model(task).fingerprint


@pytest.mark.parametrize("n_bytes", [0, 7, 300, -1])
def test_a_truncated_weights_file_is_refused(n_bytes: int, save_model: Callable[[str], Path]) -> None:
    weights = save_model("completion") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:n_bytes])
    assert f"model={weights.parent}: cannot be loaded" in refusal(lambda: load(weights.parent, "completion"))


@pytest.mark.parametrize(
    ("name", "task"),
    [("toy", "qa"), ("toy", "completion"), ("atlas-qa", "classification"), ("atlas-qa", "completion")],
)
def test_a_shipped_model_is_refused_for_another_task_than_its_own(name: str, task: Any) -> None:
    told = refusal(lambda: EditableModel.from_pretrained(name, task=task))
    assert told.startswith(f"model={name} was trained for ")
    assert told.endswith(f"not for {task}")


def test_a_checkpoint_that_says_of_itself_what_it_was_trained_for_is_held_to_it(
    save_model: Callable[[str], Path],
) -> None:
    config = save_model("classification") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text("utf-8")), "grace_bench_stream": "atlas-qa"}), "utf-8")
    assert "was trained for qa (stream atlas-qa)" in refusal(lambda: load(config.parent, "classification"))


# What changes a model's answers, and what does not.


@pytest.mark.parametrize("task", ["classification", "qa", "completion"])
def test_train_and_to_change_nothing_and_dropout_stays_off(
    task: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    model = make_model(task)
    (request, *_) = make_requests(task)
    assert any(isinstance(part, nn.Dropout) and part.p > 0 for part in model.module.modules())
    before = first_token_logits(model, request)
    assert model.train() is model
    assert model.train(True).to(torch.float16).to("meta").to(dtype=torch.float64, device="meta") is model
    assert not any(part.training for part in model.module.modules())
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    for _ in range(2):
        assert torch.equal(first_token_logits(model, request), before)


def test_a_module_in_training_mode_is_put_into_eval_mode(make_model: MakeModel) -> None:
    given = make_model("classification")
    model = EditableModel(
        given.module.train(), layer=given.layer_name, task="classification", tokenizer=given.tokenizer
    )
    assert not any(part.training for part in model.module.modules())
    assert torch.equal(logits_of(model), logits_of(model))


def test_querying_nests_and_the_last_state_is_that_of_the_inner_pass(make_model: MakeModel) -> None:
    model = make_model("classification")
    seen: list[Any] = []

    def observe(call: LayerCall) -> Tensor:
        seen.append(call.state)
        return call.output

    handle = model.intercept(observe)
    with model.querying(torch.tensor([0])) as outer:
        logits_of(model, PROMPTS[:1])
        model.module(**model.encode_batch(PROMPTS[:1]).inputs)
    handle.remove()
    assert seen[0] is not outer
    assert seen[1] is outer
    assert model.last_state is outer


def test_bypassing_nests(make_model: MakeModel) -> None:
    model = make_model("classification")
    before = logits_of(model)
    handle = model.intercept(lambda call: torch.zeros_like(call.output))
    changed = logits_of(model)
    assert not torch.equal(changed, before)
    with model.bypassing():
        with model.bypassing():
            assert torch.equal(logits_of(model), before)
        assert torch.equal(logits_of(model), before), "leaving the inner context does not end the outer one"
        with pytest.raises(ZeroDivisionError), model.bypassing():
            raise ZeroDivisionError
        assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), changed)
    handle.remove()
    assert torch.equal(logits_of(model), before)


each_editor = pytest.mark.parametrize("name", list(EDITORS.entries()))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("grace", "ft") else pytest.mark.slow) for name in EDITORS.entries()],
)
def test_suspending_nests(
    make_editor: MakeEditor, name: str, make_model: MakeModel, make_requests: MakeRequests
) -> None:
    task = EDITORS.get(name).supported_tasks[0]
    model, (request, *_) = make_model(task), make_requests(task)
    before = first_token_logits(model, request)
    with make_editor(name, model) as editor:
        editor.edit_text(request.prompt, request.target, subject=request.subject)
        edited = first_token_logits(model, request)
        with editor.suspended():
            with editor.suspended():
                assert torch.equal(first_token_logits(model, request), before)
            assert torch.equal(first_token_logits(model, request), before)
        assert torch.equal(first_token_logits(model, request), edited)


@each_editor
def test_a_suspended_editor_refuses_to_be_saved_and_stays_suspended(
    make_editor: MakeEditor, name: str, make_model: MakeModel, make_requests: MakeRequests, tmp_path: Path
) -> None:
    task = EDITORS.get(name).supported_tasks[0]
    model, (request, *_) = make_model(task), make_requests(task)
    before = first_token_logits(model, request)
    with make_editor(name, model) as editor:
        editor.edit_text(request.prompt, request.target, subject=request.subject)
        edited = first_token_logits(model, request)
        with editor.suspended():
            with pytest.raises(RuntimeError, match="suspended"):
                editor.save_pretrained(tmp_path)
            assert torch.equal(first_token_logits(model, request), before)
        assert torch.equal(first_token_logits(model, request), edited)
    assert not list(tmp_path.iterdir())


# Layers of any kind.


class TupleLinear(nn.Linear):
    """A linear layer that hands on something beside its activations, as attention blocks do."""

    def forward(self, activations: Tensor) -> tuple[Tensor, str]:  # type: ignore[override]
        return super().forward(activations), "attention weights"


class WordClassifier(nn.Module):
    """Tells words apart by the mean of their vectors after one layer."""

    def __init__(self, kind: str, *, wrapped: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight, bias = torch.randn(6, 8, generator=generator), torch.randn(6, generator=generator)
        self.vectors = nn.Embedding(32, 8)
        self.vectors.weight.data = torch.randn(32, 8, generator=generator)
        self.layer = {"Linear": nn.Linear(8, 6), "Conv1D": Conv1D(6, 8), "tuple": TupleLinear(8, 6)}[kind]
        self.layer.weight.data = weight.T.contiguous() if kind == "Conv1D" else weight
        self.layer.bias.data = bias
        self.head = nn.Linear(6, 3, bias=False)
        self.head.weight.data = torch.randn(3, 6, generator=generator)
        self.wrapped = wrapped

    def forward(self, words: Tensor) -> Any:
        given = self.layer(self.vectors(words))
        if isinstance(self.layer, TupleLinear):
            given, note = given
            assert note == "attention weights", "what stands beside the activations stays there"
        logits = self.head(given.tanh().mean(dim=1))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


def letters(prompts: Sequence[str]) -> dict[str, Tensor]:
    """The first four letters of every prompt."""
    return {"words": torch.tensor([[ord(letter) % 32 for letter in f"{prompt:4}"[:4]] for prompt in prompts])}


KINDS = ("Linear", "Conv1D", "tuple")


def classifier(kind: str, **options: Any) -> EditableModel:
    return EditableModel(WordClassifier(kind, **options), layer="layer", task="classification", encode=letters)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_of_any_kind_is_seen_and_changed_alike(kind: str) -> None:
    model = classifier(kind)
    plain = WordClassifier("Linear")
    words = letters(PROMPTS)["words"]
    entering = plain.vectors(words).detach()
    leaving = entering @ plain.layer.weight.detach().T + plain.layer.bias.detach()
    calls: list[LayerCall] = []

    def answer(call: LayerCall) -> Tensor:
        calls.append(call)
        rows = torch.tensor([True, False, True])
        return call.replace(torch.full((3, 6), 2.0), rows, "replace_last")

    before = logits_of(model)
    handle = model.intercept(answer)
    changed = logits_of(model)
    (call,) = calls
    assert torch.equal(call.input, entering)
    assert torch.allclose(call.output, leaving, atol=1e-6)
    assert call.position.tolist() == [3, 3, 3]
    assert torch.equal(call.query, entering[:, -1])
    leaving[[0, 2], -1] = 2.0
    assert torch.allclose(changed, plain.head(leaving.tanh().mean(dim=1)), atol=1e-6)
    handle.remove()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("wrapped", [False, True], ids=["logits", "object with logits"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("editor", ["grace", "ft"])
def test_any_module_that_takes_encoded_text_can_be_edited_and_scored(editor: str, kind: str, wrapped: bool) -> None:
    model = classifier(kind, wrapped=wrapped)
    before = [int(label) for label in logits_of(model).argmax(dim=-1)]
    wanted = (before[0] + 1) % 3
    requests = [EditRequest(id=text, prompt=text, target=wanted) for text in PROMPTS]
    options = {"replacement": "replace_last", "eps_init": 0.1} if editor == "grace" else {}
    with EDITORS.get(editor)(model=model, **options) as strategy:
        strategy.edit_text(PROMPTS[0], wanted)
        items = model.score(requests)
        after = [int(label) for label in logits_of(model).argmax(dim=-1)]
        assert after[0] == wanted
        assert [item.score for item in items] == [float(label == wanted) for label in after]
    assert [int(label) for label in logits_of(model).argmax(dim=-1)] == before


# Fingerprints, lengths, devices and threads.


def test_a_fingerprint_names_the_weights(make_model: MakeModel) -> None:
    one, same = make_model("classification"), make_model("classification")
    assert one.fingerprint == same.fingerprint
    assert make_model("classification", seed=1).fingerprint != one.fingerprint
    changed = make_model("classification")
    with torch.no_grad():
        weights = changed.module.get_parameter("bert.encoder.layer.0.output.dense.weight")
        weights[3, 5] = weights[3, 5].nextafter(torch.tensor(torch.inf))
    assert changed.fingerprint != one.fingerprint, "one bit of one weight is enough"


def test_a_fingerprint_tells_names_shapes_and_dtypes_apart() -> None:
    zeros = torch.zeros(2, 3)
    others = [{"b": zeros}, {"a": zeros.T}, {"a": zeros.to(torch.int32)}, {"a": zeros, "b": zeros}, {}]
    hashes = [hash_tensors(tensors) for tensors in [{"a": zeros}, *others]]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors({"a": zeros, "b": zeros + 1}) == hash_tensors({"b": zeros + 1, "a": zeros.T.contiguous().T})


@pytest.mark.parametrize(
    ("limit", "longest"), [(5, 5), (512, 512), (int(1e30), None)], ids=["5", "512", "no limit of its own"]
)
def test_where_the_architecture_has_no_limit_inputs_are_cut_at_the_tokenizers(
    limit: int, longest: int | None, make_model: MakeModel
) -> None:
    given = make_model("qa")
    tokenizer = copy.deepcopy(given.tokenizer)
    tokenizer.model_max_length = limit
    model = EditableModel(given.module, layer=given.layer_name, task=given.task, tokenizer=tokenizer)
    assert model.max_length == longest
    text = "the capital of " * 10 + "Peru"
    n_tokens = len(tokenizer.encode(text))
    assert n_tokens == 32
    assert model.encode_batch([text]).inputs["input_ids"].shape[1] == min(n_tokens, longest or n_tokens)


@pytest.mark.parametrize(("task", "longest"), [("classification", 32), ("completion", 48)])
def test_an_architecture_with_a_limit_has_its_own(task: str, longest: int, make_model: MakeModel) -> None:
    assert make_model(task).max_length == longest


@pytest.mark.parametrize("device", ["meta", "gpu", "cuda:99", ""])
def test_a_device_that_cannot_hold_a_model_is_refused(device: str) -> None:
    assert refusal(lambda: pick_device(device)).startswith(f"device={device}: ")


def test_the_devices_that_are_there_are_taken() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in {"cpu", "cuda", "mps"}


@pytest.mark.parametrize("threads", [0, -1, (os.cpu_count() or 1) + 1])
def test_threads_that_are_not_there_are_refused(threads: int) -> None:
    assert f"threads={threads} should be auto or from 1 to" in refusal(lambda: pick_threads(nn.Linear(2, 2), threads))


def test_a_tiny_model_gets_one_thread_unless_told_otherwise() -> None:
    assert pick_threads(nn.Linear(2, 2), "auto") == 1
    assert pick_threads(nn.Linear(2, 2), os.cpu_count() or 1) == (os.cpu_count() or 1)


# Asking.


def test_an_edited_model_answers_what_it_was_asked() -> None:
    model = EditableModel.from_pretrained("atlas-qa", task="qa")
    edited, other = STREAMS.get("atlas-qa")().load().edits[:2]
    before = model.answer([edited.prompt, other.prompt])
    assert before[0] != edited.target
    with EDITORS.get("grace")(model=model, eps_init=1e-3) as editor:
        editor.edit_text(edited.prompt, edited.target)
        assert model.answer([edited.prompt, other.prompt]) == [edited.target, before[1]]
    assert model.answer([edited.prompt, other.prompt]) == before
