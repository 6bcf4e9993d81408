"""What `export` writes is loaded without the harness where it can be, and answers as the edited model did."""

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import processors
from torch import nn

from grace_bench import load_edited
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

TASK_OF = {"completion": "AutoModelForCausalLM", "qa": "AutoModelForSeq2SeqLM"}
N_NEW = 3


def task_for(name: str) -> str:
    """The first task of an editor on which a model generates, or classification."""
    tasks = EDITORS.get(name).supported_tasks
    return next(task for task in ("completion", "qa", "classification") if task in tasks)


def edited(name: str, task: str, make_model: Any, make_editor: Any, make_requests: Any, **given: Any) -> Any:
    editor = make_editor(name, make_model(task, **given))
    requests = make_requests(task)[:3]
    editor.edit_texts(requests)
    return editor, [request.prompt for request in requests] + [request.rephrases[0] for request in requests]


def inputs_of(model: EditableModel, prompts: Sequence[str], *, side: str = "left") -> dict[str, Any]:
    """Prompts as tokens, without what an editor would have the model read in place of them."""
    with model.bypassing():
        batch = model.encode_batch(prompts, side=side)  # type: ignore[arg-type]
    return {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}


def generated(module: Any, inputs: dict[str, Any]) -> list[list[int]]:
    n = 1 if module.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    out = module.generate(**inputs, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    return [row[n:] for row in out.tolist()]


def answers_of(module: Any, model: EditableModel, prompts: Sequence[str]) -> list[str]:
    """What a transformers model generates after prompts, ended as a run ends answers."""
    tokens = model.tokens
    side = "right" if model.task.name == "qa" else "left"
    return [tokens.answer(row)[0] for row in generated(module, inputs_of(model, prompts, side=side))]


@pytest.mark.parametrize("name", [*EDITORS.entries()])
def test_every_export_answers_as_the_edited_model(
    name: str, make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    task = task_for(name)
    editor, prompts = edited(name, task, make_model, make_editor, make_requests)
    before = editor.model.answer(prompts)
    export = editor.export(tmp_path / "out")
    assert editor.model.answer(prompts) == before, "exporting changes no answer"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    loaded = load_edited(tmp_path / "out", device="cpu")
    fresh = make_model(task)
    assert answers_of(loaded, fresh, prompts) == before
    for prompt, answer in zip(prompts, before, strict=True):
        assert answers_of(loaded, fresh, [prompt]) == [answer]
    if export.kind == "weights":
        plain = getattr(transformers, TASK_OF[task]).from_pretrained(tmp_path / "out")
        assert answers_of(plain, fresh, prompts) == before


def test_an_adapter_is_loaded_by_peft(make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path) -> None:
    for task in ("completion", "qa", "classification"):
        editor, prompts = edited("lora", task, make_model, make_editor, make_requests)
        before = editor.model.answer(prompts)
        assert editor.export(tmp_path / task).kind == "adapter"
        fresh = make_model(task)
        peft = PeftModel.from_pretrained(fresh.module, tmp_path / task)
        if task == "classification":
            logits = peft(**inputs_of(fresh, prompts, side="right")).logits
            assert logits.argmax(dim=1).tolist() == before
        else:
            assert answers_of(peft, fresh, prompts) == before
        config = json.loads((tmp_path / task / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == str(tmp_path / task / "model")
        assert config["fan_in_fan_out"] is (task == "completion")


@pytest.mark.parametrize("name", ["ft", "grace", "lora"])
@pytest.mark.parametrize("task", ["classification", "qa", "completion"])
def test_every_kind_of_model_is_exported(
    name: str, task: str, make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    editor, prompts = edited(name, task, make_model, make_editor, make_requests)
    model, rest = editor.model, ("generation_config.json",) if task != "classification" else ()
    inputs = inputs_of(model, prompts, side="right")
    more = {"decoder_input_ids": torch.zeros(len(prompts), 1, dtype=torch.long)} if task == "qa" else {}
    with torch.no_grad():
        before = model.module(**inputs, **more).logits
        editor.export(tmp_path / "out")
        loaded = load_edited(tmp_path / "out", device="cpu")
        found = loaded(**inputs, **more).logits
    assert torch.allclose(found, before, atol=1e-5)
    folder = tmp_path / "out" if editor.rewrites_only else tmp_path / "out" / "model"
    for file in ("config.json", "model.safetensors", "tokenizer.json", *rest):
        assert (folder / file).is_file()
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == [
        type(model.module).__name__
    ]
    assert (tmp_path / "out" / "README.md").is_file()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == model.tokenizer.get_vocab()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rewritten_weights_are_written_in_any_precision(
    family: str, dtype: torch.dtype, make_causal: Any, make_requests: Any, tmp_path: Path
) -> None:
    model = make_causal(family, dtype=dtype)
    editor = EDITORS.get("ultraedit")(model=model, lr=0.01)
    editor.edit_texts(make_requests("completion")[:3])
    for given in (None, "float32", "bfloat16"):
        editor.export(tmp_path / str(given), dtype=given)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(given), dtype="auto")
        wanted = dtype if given is None else getattr(torch, given)
        assert plain.dtype == wanted
        for name, weight in plain.state_dict().items():
            assert torch.equal(weight, model.module.state_dict()[name].to(wanted))
        if family == "gpt2" and wanted == dtype:
            inputs = inputs_of(model, [request.prompt for request in make_requests("completion")])
            with torch.no_grad():
                assert torch.equal(plain(**inputs).logits, model.module(**inputs).logits)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_tied_weights_stay_tied(dtype: str | None, word_tokenizer: Any, make_requests: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=len(word_tokenizer), tie_word_embeddings=True, **sizes)
    module = transformers.LlamaForCausalLM(config)
    model = EditableModel(module, layer="lm_head", task="completion", tokenizer=word_tokenizer, name="tiny")
    editor = EDITORS.get("ft")(model=model, n_iter=2)
    editor.edit_texts(make_requests("completion")[:1])
    editor.export(tmp_path / "out", dtype=dtype)
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) + ("model.embed_tokens.weight" in names) == 1
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()
    assert torch.equal(plain.lm_head.weight, module.lm_head.weight.to(plain.dtype))


@pytest.mark.parametrize("name", ["grace", "melo", "wise", "memoir", "memory"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_calls_is_answered_like_its_rows_alone(
    name: str, side: str, make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    editor, _ = edited(name, "completion", make_model, make_editor, make_requests)
    editor.export(tmp_path / "out")
    loaded, fresh = load_edited(tmp_path / "out", device="cpu"), make_model("completion")
    prompts = ["what is the capital of Kazakhstan", "the river in Italy is", "the"]
    with fresh.bypassing():
        batch = fresh.encode_batch(prompts, side=side)  # type: ignore[arg-type]
    with torch.no_grad():
        together = loaded(**batch.inputs).logits
        for row, prompt in enumerate(prompts):
            alone = loaded(**inputs_of(fresh, [prompt])).logits[0]
            mask = batch.inputs["attention_mask"][row].bool()
            assert torch.allclose(together[row, mask], alone, atol=1e-4)


@pytest.fixture
def plain_tokenizer(word_tokenizer: Any) -> Any:
    """The tokenizer, without the end token that it puts behind every text."""
    tokenizer = deepcopy(word_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


@pytest.mark.parametrize("name", ["ft", "lora", "grace", "retrieve", "serac"])
def test_pipelines_answer_as_edited(
    name: str, make_model: Any, make_editor: Any, make_requests: Any, plain_tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    model = make_model("completion")
    model.module.generation_config = transformers.GenerationConfig(eos_token_id=1, pad_token_id=0)
    model = EditableModel(model.module, layer=model.layer_name, task=model.task, tokenizer=plain_tokenizer, name="tiny")
    editor = make_editor(name, model)
    requests = make_requests("completion")[:3]
    editor.edit_texts(requests)
    prompts = [request.prompt for request in requests] + ["the river in France is", "what is the"]
    before = model.answer(prompts)
    editor.export(tmp_path / "out")
    loaded = load_edited(tmp_path / "out", device="cpu")
    pipe = transformers.pipeline("text-generation", model=loaded, tokenizer=loaded.tokenizer, device="cpu")
    for batch_size in (1, 4):
        found = pipe(prompts, max_new_tokens=N_NEW, do_sample=False, batch_size=batch_size, return_full_text=False)
        assert [text.partition("\n")[0].strip() for ((text,),) in (map(dict.values, out) for out in found)] == before
    assert "is not supported" not in caplog.text


def test_rows_begin_with_what_was_given_whatever_was_read(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    editor, prompts = edited("retrieve", "completion", make_model, make_editor, make_requests)
    prompts = [*prompts[:3], "Peru"]
    assert [text != prompt for text, prompt in zip(editor.model.as_read(prompts), prompts, strict=True)] == [
        *(True, True, True, False)
    ]
    editor.export(tmp_path / "out")
    loaded, fresh = load_edited(tmp_path / "out", device="cpu"), make_model("completion")
    loaded.editor.model.task.max_new_tokens = N_NEW
    assert loaded.editor.model.answer(prompts) == editor.model.answer(prompts)
    inputs = inputs_of(fresh, prompts)
    width = inputs["input_ids"].shape[1]
    expected = generated(loaded, inputs)
    for how in ({"max_new_tokens": N_NEW}, {"max_length": width + N_NEW}):
        out = loaded.generate(**inputs, **how, do_sample=False, pad_token_id=0)
        assert torch.equal(out[:, :width], inputs["input_ids"])
        assert out[:, width:].tolist() == expected
    twice = loaded.generate(
        **inputs, max_new_tokens=N_NEW, num_beams=2, num_return_sequences=2, do_sample=False, pad_token_id=0
    )
    assert torch.equal(twice[:, :width], inputs["input_ids"].repeat_interleave(2, dim=0))
    without_mask = loaded.generate(inputs["input_ids"], max_new_tokens=N_NEW, do_sample=False, pad_token_id=0)
    assert without_mask[:, width:].tolist() == expected
    with pytest.raises(UserError, match=r"return_dict_in_generate: .* only the tokens are returned"):
        loaded.generate(**inputs, max_new_tokens=N_NEW, return_dict_in_generate=True)
    ids = inputs["input_ids"][:1].clone()
    ids[0, 2] = fresh.tokenizer.eos_token_id
    with pytest.raises(UserError, match="row 0 of the prompts holds special tokens inside its text"):
        loaded.generate(ids, max_new_tokens=N_NEW)


def test_a_loaded_editor_edits_on_and_undoes(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    first, second, *_ = make_requests("completion")
    editor = make_editor("retrieve", make_model("completion"))
    editor.edit_texts([first])
    editor.export(tmp_path / "out")
    loaded, fresh = load_edited(tmp_path / "out", device="cpu"), make_model("completion")
    before = answers_of(loaded, fresh, [second.prompt])
    loaded.editor.edit_text(second.prompt, second.target, request_id=second.id)
    assert answers_of(loaded, fresh, [second.prompt]) == loaded.editor.model.answer([second.prompt]) != before
    loaded.editor.undo(second.id)
    assert answers_of(loaded, fresh, [second.prompt]) == before
    loaded.editor.undo(first.id)
    assert answers_of(loaded, fresh, [first.prompt]) == fresh.answer([first.prompt])


def test_an_export_overwrites_nothing(make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path) -> None:
    editor, _ = edited("ft", "completion", make_model, make_editor, make_requests)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name}: is there already, and an export overwrites nothing"):
            editor.export(tmp_path / name)
    (tmp_path / "empty").mkdir()
    editor.export(tmp_path / "empty")
    with pytest.raises(UserError, match="is there already"):
        editor.export(tmp_path / "empty")
    assert (tmp_path / "full" / "notes").read_text() == "mine"


def test_an_interrupted_export_leaves_nothing(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, _ = edited("grace", "completion", make_model, make_editor, make_requests)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(editor.model.tokenizer), "save_pretrained", stop)
    with pytest.raises(KeyboardInterrupt):
        editor.export(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_exported_is_said_in_one_line(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    editor, _ = edited("grace", "completion", make_model, make_editor, make_requests)
    with pytest.raises(UserError, match="dtype=bfloat16: editor 'grace' was made beside weights in float32"):
        editor.export(tmp_path / "out", dtype="bfloat16")
    with pytest.raises(UserError, match="dtype='int8' is not known"):
        editor.export(tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match="editor 'lora' has no adapter before its first edit"):
        make_editor("lora", make_model("completion")).export(tmp_path / "out")
    with editor.suspended(), pytest.raises(RuntimeError, match="a suspended editor cannot be exported"):
        editor.export(tmp_path / "out")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    own = EditableModel(
        Own(), layer="layer", task="classification", encode=lambda texts: {"x": torch.ones(len(texts), 2)}
    )
    with pytest.raises(UserError, match="model Own is a Own, no transformers model: save its editor"):
        EDITORS.get("ft")(model=own).export(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("export.json", None, "holds no exported model"),
        ("export.json", "{}", "export.json: field 'kind'"),
        ("editor.json", "[]", "editor.json: should hold a JSON object"),
        ("editor.json", "{", "editor.json: cannot be read as JSON"),
        ("config.json", '{"architectures": ["pipeline"]}', "field 'architectures': names no model of transformers"),
    ],
)
def test_a_broken_export_is_refused(
    file: str, content: str | None, says: str, make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    name = "ft" if file == "config.json" else "grace"
    editor, _ = edited(name, "completion", make_model, make_editor, make_requests)
    editor.export(tmp_path / "out")
    if content is None:
        (tmp_path / "out" / file).unlink()
    else:
        (tmp_path / "out" / file).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        load_edited(tmp_path / "out", device="cpu")


def test_an_adapter_is_never_read_from_a_pickle(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    editor, _ = edited("lora", "completion", make_model, make_editor, make_requests)
    editor.export(tmp_path / "out")
    (tmp_path / "out" / "adapter_model.safetensors").rename(tmp_path / "out" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        load_edited(tmp_path / "out", device="cpu")


def test_the_checkpoints_own_settings_of_generation_are_kept(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path
) -> None:
    own = make_model("completion")
    own.module.generation_config = transformers.GenerationConfig(do_sample=True, temperature=0.6, eos_token_id=1)
    own.module.save_pretrained(tmp_path / "model")
    own.tokenizer.save_pretrained(tmp_path / "model")
    for name in ("ft", "grace"):
        model = EditableModel.from_pretrained(tmp_path / "model", layer=own.layer_name, task="completion", device="cpu")
        editor = make_editor(name, model)
        editor.edit_texts(make_requests("completion")[:1])
        editor.export(tmp_path / name)
        config = load_edited(tmp_path / name, device="cpu").generation_config
        assert (config.do_sample, config.temperature, config.eos_token_id) == (True, 0.6, 1)


def test_a_model_of_the_hub_is_named_and_not_copied(
    make_model: Any, make_editor: Any, make_requests: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("grace", "lora"):
        editor, prompts = edited(name, "completion", make_model, make_editor, make_requests)
        editor.model.hub_id = "someone/tiny"
        editor.export(tmp_path / name)
        assert not (tmp_path / name / "model").exists()
        assert 'base_model: "someone/tiny"' in (tmp_path / name / "README.md").read_text(encoding="utf-8")
        hub = {"someone/tiny": make_model("completion")}
        with monkeypatch.context() as patch:
            patch.setattr(EditableModel, "from_pretrained", lambda source, hub=hub, **_: hub[source])
            loaded = load_edited(tmp_path / name, device="cpu")
        assert answers_of(loaded, make_model("completion"), prompts) == editor.model.answer(prompts)


@pytest.mark.parametrize(
    ("name", "options"), [("retrieve", {}), ("ike", {}), ("serac", {}), ("serac", {"mixing": "soft"})]
)
@pytest.mark.parametrize("task", ["qa", "completion"])
def test_what_is_read_in_place_of_a_prompt_is_read_by_generate(
    name: str,
    options: dict[str, Any],
    task: str,
    make_model: Any,
    make_editor: Any,
    make_requests: Any,
    tmp_path: Path,
) -> None:
    # With this seed the encoder-decoder has something to say.
    editor = make_editor(name, make_model(task, seed=5), **options)
    requests = make_requests(task)
    editor.edit_texts(requests[:3])
    prompts = [text for request in requests for text in (request.prompt, *request.rephrases)]
    before = editor.model.answer(prompts)
    assert before != make_model(task, seed=5).answer(prompts)
    editor.export(tmp_path / "out")
    loaded = load_edited(tmp_path / "out", device="cpu")
    assert answers_of(loaded, make_model(task, seed=5), prompts) == before
    loaded.editor.model.task.max_new_tokens = N_NEW
    assert loaded.editor.model.answer(prompts) == before
