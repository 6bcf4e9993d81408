"""What `export` writes is loaded without the harness where it can be, and answers as the edited model did."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftModel

from grace_bench import load_edited
from grace_bench.editing.strategy import EditorStrategy
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS

MakeModel = Callable[..., EditableModel]
MakeEditor = Callable[..., EditorStrategy]

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
