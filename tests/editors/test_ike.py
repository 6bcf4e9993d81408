"""IKE: demonstrations and the new fact before a question, as in recordings of the official code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import BertConfig, BertModel

from grace_bench.cli import main
from grace_bench.data.requests import EditRequest, Probe
from grace_bench.editors._retrieval.demonstrations import demonstrations_of
from grace_bench.editors._retrieval.traces import replay_file
from grace_bench.editors.ike import Ike
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel

MakeModel = Callable[..., EditableModel]
MakeRequests = Callable[[str], list[EditRequest]]

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden"
GOLDEN_FILES = sorted(GOLDEN.glob("ike/*/*.json"))
needs_golden = pytest.mark.skipif(not GOLDEN_FILES, reason="the official recordings are not beside this checkout")


@needs_golden
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.parent.name)
def test_a_recording_of_the_official_code_replays(path: Path) -> None:
    verdict = replay_file(path)
    assert verdict.difference is None
    assert verdict.not_replayed is None


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Writes a recording beside the models, after a change."""
    source = GOLDEN / "ike/gpt2/singles.json"
    for name in ("models", "facts.json"):
        (folder / name).symlink_to(GOLDEN / name)
    content = json.loads(source.read_text(encoding="utf-8"))
    change(content)
    path = folder / "ike/gpt2/singles.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    path.with_suffix(".safetensors").symlink_to(source.with_suffix(".safetensors"))
    return path


@needs_golden
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda content: content["edits"][2].pop("text"), "field 'edits.2.text': Field required"),
        (lambda content: content["edits"][2].update(examples=[999]), "field 'edits.2.examples'"),
        (lambda content: content["tensors"].pop("embeddings") and content["sentences"].pop(), "tensors.embeddings"),
        (lambda content: content.update(model="gpt3"), "field 'model'"),
        (lambda content: content["hparams"].pop("k"), "field 'hparams.k'"),
    ],
)
def test_a_damaged_recording_is_one_line_that_names_the_field(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], line: str
) -> None:
    with pytest.raises(UserError) as raised:
        replay_file(changed(tmp_path, change))
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


@needs_golden
def test_a_difference_names_edit_and_quantity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def swap(content: dict[str, Any]) -> None:
        content["edits"][3]["examples"].reverse()

    assert main(["verify", str(changed(tmp_path, swap))]) == 1
    assert "demonstrations at edit 3" in capsys.readouterr().out


def test_demonstrations_copy_update_and_retain() -> None:
    full = EditRequest(
        id="1",
        prompt="capital of Peru",
        target="Rome",
        rephrases=("Peru is ruled from", "left out"),
        locality=(Probe(prompt="river of Italy", target="Tiber"),),
    )
    bare = EditRequest(id="2", prompt="currency of Italy", target="Sol", locality=(Probe(prompt="river of Rome"),))
    fact, other = "New Fact: capital of Peru Rome\nPrompt: ", "New Fact: currency of Italy Sol\nPrompt: "
    assert demonstrations_of([full, bare], {"river of Rome": "Seine"}) == [
        f"{fact}capital of Peru Rome\n\n",
        f"{fact}Peru is ruled from Rome\n\n",
        f"{fact}river of Italy Tiber\n\n",
        f"{other}currency of Italy Sol\n\n",
        f"{other}river of Rome Seine\n\n",
    ]


@pytest.mark.parametrize("task", ["qa", "completion"])
def test_a_question_is_read_behind_its_fact_and_the_facts_nearest_demonstrations(
    task: str, make_model: MakeModel, make_train: MakeRequests
) -> None:
    model = make_model(task)
    with Ike(model=model, k=2, threshold=0.9) as editor:
        editor.prepare(make_train(task))
        editor.edit_text("capital of Kazakhstan", "Astana")
        (text,) = model.as_read(["capital of Kazakhstan"])
        fact = "New Fact: capital of Kazakhstan Astana\nPrompt: capital of Kazakhstan"
        assert text.endswith(f"\n\n{fact}")
        query = editor.encode([f"{fact}\n\n"])[0]
        similarities = torch.stack([editor.encode([sentence])[0] @ query for sentence in editor.demonstrations])
        best = similarities.topk(2).indices.tolist()
        assert text == f"{editor.demonstrations[best[0]]}{editor.demonstrations[best[1]]}{fact}"
        assert model.as_read(["the river Seine"]) == ["the river Seine"]


def test_without_training_requests_only_the_fact_alone_can_be_read(make_model: MakeModel) -> None:
    model = make_model("qa")
    with Ike(model=model) as editor, pytest.raises(UserError, match=r"editor\.k=0"):
        editor.prepare([])
    with Ike(model=model, k=0) as editor:
        editor.prepare([])
        editor.edit_text("river of Italy", "Tiber")
        assert model.as_read(["river of Italy"]) == ["New Fact: river of Italy Tiber\nPrompt: river of Italy"]


def test_a_sentence_encoder_comes_from_a_folder(
    make_model: MakeModel, make_train: MakeRequests, tmp_path: Path, word_tokenizer: Any
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(vocab_size=len(word_tokenizer), **sizes)).eval()
    bert.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    with Ike(model=make_model("qa"), k=2, by="embedding", encoder=str(tmp_path)) as editor:
        editor.prepare(make_train("qa"))
        editor.edit_text("river of Italy", "Tiber")
        with torch.no_grad():
            states = bert(**word_tokenizer("river of Italy", return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(
            editor.state_dict()["keys"][0], functional.normalize(states.mean(dim=0), dim=0), atol=1e-6
        )
    with pytest.raises(UserError, match=r"editor.encoder=.*nowhere: is not a folder"):
        Ike(model=make_model("qa"), encoder=str(tmp_path / "nowhere"))
