"""What a run learns of its stream and model before it starts: how long answers are, which of them can be given."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.requests import EditRequest
from grace_bench.data.stream import EditStream, StreamData, StreamMetadata
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.registry import EDITORS
from grace_bench.run.opening import open_benchmark
from grace_bench.run.run_benchmark import run_benchmark
from grace_bench.run.settings import RunSettings
from grace_bench.streams.jsonl import Jsonl

MakeModel = Callable[..., EditableModel]


class Answers(EditStream):
    registered_name = "answers"
    metadata = StreamMetadata(source="this test", revision="1", license="MIT")
    task = "completion"

    def __init__(self, **roles: tuple[EditRequest, ...]) -> None:
        self._roles = roles

    def load(self) -> StreamData:
        return StreamData(**self._roles)


def asked(target: str, **fields: Any) -> EditRequest:
    return EditRequest(id=target, prompt="what is the capital of Peru", target=target, **fields)


def opened_length(model: EditableModel, stream: EditStream, **settings: Any) -> int:
    open_settings = RunSettings(**settings)
    with open_benchmark(
        stream,
        model=model,
        settings=open_settings,
        layer=None,
        dtype="float32",
        device="cpu",
        device_map=None,
        load_in=None,
        progress=None,
    ) as opened:
        assert opened.benchmark.max_new_tokens == opened.model.task.max_new_tokens
        return opened.model.task.max_new_tokens


def test_answers_are_as_long_as_the_longest_target_of_any_role_with_its_end(make_model: MakeModel) -> None:
    model = make_model("completion")
    edits, validation = (asked("Lima"), asked("Lima of Peru")), (asked("Rome"),)
    assert opened_length(model, Answers(edits=edits)) == 4
    assert opened_length(model, Answers(edits=(asked("Lima", answers=("the Lima of Peru",)),))) == 5
    longer = (asked("the capital of Peru in the river"),)
    for role in ("upstream", "holdout", "validation", "train", "accurate"):
        assert opened_length(model, Answers(edits=edits, **{role: longer})) == 8, role
    probe = {"prompt": "what is the river", "target": "the river in Italy is Tiber"}
    assert opened_length(model, Answers(edits=(asked("Lima", locality=(probe,)),))) == 7
    own = {"prompt": "what is the river"}
    assert opened_length(model, Answers(edits=(asked("Lima", locality=(own,)),))) == 2, "the model's own answer"
    both = Answers(edits=edits, validation=validation)
    assert opened_length(model, both, split="validation") == opened_length(model, both) == 4


def test_answers_take_at_most_half_of_what_the_model_reads(make_model: MakeModel) -> None:
    model = make_model("completion")
    assert model.max_length == 48
    assert opened_length(model, Answers(edits=(asked(" ".join(["Lima"] * 40)),))) == 24


def test_a_run_says_and_records_which_targets_no_free_answer_can_equal(make_model: MakeModel, tmp_path: Path) -> None:
    path = tmp_path / "edits.jsonl"
    targets = ["Lima", "the Lima of Peru", "東京"]
    path.write_text(
        "".join(asked(target).model_dump_json(include={"id", "prompt", "target"}) + "\n" for target in targets)
    )
    said: list[str] = []
    result = run_benchmark(
        Jsonl(path=str(path), max_new_tokens=2), model=make_model("completion"), editor="none", say=said.append
    )
    reasons = {"longer than max_new_tokens=2": 1, "characters that the tokenizer cannot give back": 1}
    assert said == [
        "2 of 3 targets cannot be answered freely: characters that the tokenizer cannot give back (1), "
        "longer than max_new_tokens=2 (1)"
    ]
    assert json.loads(result.model_dump_json())["stream"]["unanswerable"] == reasons
    assert (result.protocol.max_new_tokens, result.protocol.chat, result.protocol.target_space) == (2, False, "auto")


def test_a_chat_without_a_template_is_refused_before_the_run(make_model: MakeModel) -> None:
    settings = replace(RunSettings(), chat=True)
    with pytest.raises(UserError, match="chat=true needs a tokenizer with a chat template"):
        run_benchmark(Answers(edits=(asked("Lima"),)), model=make_model("completion"), editor="none", settings=settings)


TEMPLATE = "{% for m in messages %}{{ m.content }} ? {% endfor %}{% if add_generation_prompt %}the is{% endif %}"


@pytest.mark.parametrize("editor", ["ft", "rome"])
def test_editing_scoring_and_generation_read_one_rendered_prompt(
    editor: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make_model("completion")
    monkeypatch.setattr(model.tokenizer, "chat_template", TEMPLATE)
    text = tmp_path / "text.txt"
    text.write_text("the capital of Peru is Lima in the river\n" * 3)
    options = {"ft": {"n_iter": 3}, "rome": {"n_iter": 3, "n_prefixes": 0, "text_path": str(text)}}[editor]
    rows: list[list[int]] = []
    embed = model.module.get_input_embeddings()  # type: ignore[operator]
    handle = embed.register_forward_pre_hook(lambda _, args: rows.extend(args[0].tolist()))
    try:
        run_benchmark(
            Answers(edits=(asked("Lima", subject="Peru"),)),
            model=model,
            editor=lambda **given: EDITORS.get(editor)(**given, **options),
            settings=replace(RunSettings(), chat=True, engine="plain", threads=1),
        )
    finally:
        handle.remove()
    (prompt,) = model.tokenizer(["what is the capital of Peru ? the is"], add_special_tokens=False)["input_ids"]
    asking = [row for row in rows if len(row) >= len(prompt) and row[0] == prompt[0]]
    assert asking
    assert all(row[: len(prompt)] == prompt for row in asking)
