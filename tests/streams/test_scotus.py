"""SCOTUS: eras, labels and what is refused, on made-up records and on the real files; and the model for it."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.streams.scotus import Scotus

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def scdb(number: int, term: int | None = 1995, /, **changes: Any) -> dict[str, Any]:
    made = {
        "case_id": f"{term}-{number:03}",
        "us_cite": "500 U.S. 1",
        "name": f"Person{number} v. State",
        "term": term if term is not None else ...,
        "text": f"Person {number} was arrested.",
        "question": "Did the arrest violate the First Amendment?",
        "issue_area": 1 + number % 11,
        "issue": "10010",
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def labelled(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {"text": f"Person {number} was arrested.", "label": number % 11, **changes}
    return {name: value for name, value in made.items() if value is not ...}


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Scotus(**options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_term_decides_the_era_and_what_lies_outside_is_counted(tmp_path: Path) -> None:
    terms = [1945, 1946, 1982, 1983, 1990, 1991, 2009, 2010]
    data = Scotus(path=lines(tmp_path / "s.jsonl", *(scdb(n, term) for n, term in enumerate(terms)))).load()
    found = {
        era: [request.metadata["term"] for request in getattr(data, era)] for era in ("upstream", "validation", "edits")
    }
    assert found == {"upstream": [1946, 1982], "validation": [1983, 1990], "edits": [1991, 2009]}
    assert data.left_out == {"a term outside 1946 to 2009": 2}
    assert data.holdout == ()


def test_issue_areas_count_from_one_and_labels_from_zero(tmp_path: Path) -> None:
    areas = Scotus(path=lines(tmp_path / "s.jsonl", *(scdb(n) for n in range(11)))).load()
    labels = Scotus(path=lines(tmp_path / "l.jsonl", *(labelled(n, term=1995) for n in range(11)))).load()
    assert [r.target for r in areas.edits] == [r.target for r in labels.edits] == list(range(11))
    assert areas.label_names[0] == labels.label_names[0] == "Criminal Procedure"
    assert areas.label_names[:10] == labels.label_names[:10]
    # The Supreme Court Database has Interstate Relations in eleventh place; FairLex goes on with Federal Taxation.
    assert (areas.label_names[10], labels.label_names[10]) == ("Interstate Relations", "Federal Taxation")


def test_the_prompt_is_the_text_without_the_question(tmp_path: Path) -> None:
    (request,) = Scotus(path=lines(tmp_path / "s.jsonl", scdb(3))).load().edits
    assert (request.id, request.prompt, request.target) == ("1995-003", "Person 3 was arrested.", 3)


def test_records_without_a_term_are_of_the_era_of_their_file(tmp_path: Path) -> None:
    edits = lines(tmp_path / "e.jsonl", *(labelled(n) for n in range(3)))
    upstream = lines(tmp_path / "u.jsonl", *(labelled(n) for n in range(4)), labelled(4, term=1999))
    data = Scotus(path=edits, upstream_path=upstream).load()
    assert (len(data.upstream), len(data.edits)) == (4, 4)
    assert len({request.id for request in (*data.upstream, *data.edits)}) == 8


def test_a_folder_and_an_array_give_the_same_requests_as_lines(tmp_path: Path) -> None:
    records = [scdb(number, 1940 + 7 * number) for number in range(9)]
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(folder / "a.jsonl", *records[:4])
    (folder / "b.json").write_text(json.dumps(records[4:]), encoding="utf-8")
    assert Scotus(path=str(folder)).load() == Scotus(path=lines(tmp_path / "s.jsonl", *records)).load()


def test_the_published_data_set_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {
        "train": [labelled(n, text=f"Old case {n}.") for n in range(3)],
        "test": [labelled(n, text=f"New case {n}.") for n in range(2)],
    }
    asked = []

    def load_dataset(repo: str, *_: Any, split: str, **__: Any) -> datasets.Dataset:
        asked.append(repo)
        return datasets.Dataset.from_list(splits[split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Scotus().load()
    assert set(asked) == {"tomh/grace-scotus"}
    assert [request.prompt for request in data.upstream] == ["Old case 0.", "Old case 1.", "Old case 2."]
    assert [(request.prompt, request.target) for request in data.edits] == [("New case 0.", 0), ("New case 1.", 1)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": ...}, "field 'text': is missing"),
        ({"text": " \n"}, "field 'text': is empty"),
        ({"text": 3}, "field 'text': should be text, not the number 3"),
        ({"issue_area": 0}, "field 'issue_area': is 0, but issue areas are numbered 1 to 11"),
        ({"issue_area": 12}, "field 'issue_area': is 12, but issue areas are numbered 1 to 11"),
        ({"issue_area": "1"}, "field 'issue_area': should be a whole number, not text"),
        ({"issue_area": True}, "field 'issue_area': should be a whole number, not true or false"),
        ({"term": ...}, "field 'term': is missing"),
        ({"term": "1995"}, "field 'term': should be a whole number, not text"),
        ({"case_id": "1995-000"}, "field 'case_id': '1995-000' was used before, at "),
        ({"case_id": ""}, "field 'case_id': "),
    ],
)
def test_a_damaged_record_is_named_or_left_out(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = lines(tmp_path / "s.jsonl", scdb(0), scdb(1, **change), scdb(2))
    assert error_of(path=path).startswith(f"{path}:2: {says}")
    data = Scotus(path=path, on_error="skip").load()
    assert [request.id for request in data.edits] == ["1995-000", "1995-002"]
    assert data.left_out == {"broken": 1}


def test_a_first_record_without_a_label_is_told_both_fields_and_costs_no_other(tmp_path: Path) -> None:
    path = lines(tmp_path / "s.jsonl", scdb(0, issue_area=...), scdb(1), scdb(2))
    assert error_of(path=path) == f"{path}:1: field 'label' or 'issue_area': is missing"
    data = Scotus(path=path, on_error="skip").load()
    assert ([request.id for request in data.edits], data.left_out) == (["1995-001", "1995-002"], {"broken": 1})


def test_an_id_that_comes_back_is_refused_and_one_of_each_file_is_not(tmp_path: Path) -> None:
    path = lines(tmp_path / "l.jsonl", labelled(0, id=4), labelled(1, id=5), labelled(2, id=4))
    upstream = lines(tmp_path / "u.jsonl", labelled(3, id=4))
    assert error_of(path=path, upstream_path=upstream) == f"{path}:3: field 'id': '4' was used before, at {path}:1"
    data = Scotus(path=path, upstream_path=upstream, on_error="skip").load()
    assert (len(data.edits), len(data.upstream), data.left_out) == (2, 1, {"broken": 1})


@pytest.mark.parametrize(("make", "field", "first"), [(scdb, "issue_area", 1), (labelled, "label", 0)])
def test_an_area_that_the_model_lacks_is_named_or_left_out(tmp_path: Path, make: Any, field: str, first: int) -> None:
    path = lines(tmp_path / "s.jsonl", *(make(n, term=1995) for n in range(5)))

    def stream(on_error: str) -> Scotus:
        made = Scotus(path=path, on_error=on_error)
        made.n_model_labels = 4
        return made

    with pytest.raises(UserError) as caught:
        stream("raise").load()
    says = f"is {4 + first}, but the model has labels for {first} to {3 + first} alone"
    assert str(caught.value) == f"{path}:5: field '{field}': {says}"
    data = stream("skip").load()
    assert (len(data.edits), data.left_out) == (4, {"broken": 1})


def test_out_of_reach_of_the_hub_both_splits_are_named_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    message = error_of()
    assert "split test from https://huggingface.co/datasets/tomh/grace-scotus/" in message
    assert message.endswith("give their place as stream.path=, those of split train as stream.upstream_path=")


@pytest.mark.parametrize("label", [-1, 11])
def test_a_label_that_does_not_exist_is_refused(tmp_path: Path, label: int) -> None:
    path = lines(tmp_path / "l.jsonl", labelled(0, term=1995), labelled(1, term=1995, label=label))
    assert error_of(path=path) == f"{path}:2: field 'label': is {label}, but issue areas are numbered 0 to 10"


def test_a_case_of_both_files_is_refused(tmp_path: Path) -> None:
    edits = lines(tmp_path / "e.jsonl", scdb(0))
    upstream = lines(tmp_path / "u.jsonl", scdb(1, 1950), scdb(0))
    message = error_of(path=edits, upstream_path=upstream)
    assert message == f"{upstream}:2: field 'case_id': '1995-000' was used before, at {edits}:1"


def test_two_ways_of_numbering_are_not_mixed(tmp_path: Path) -> None:
    edits, upstream = lines(tmp_path / "e.jsonl", scdb(0)), lines(tmp_path / "u.jsonl", labelled(1))
    message = error_of(path=edits, upstream_path=upstream)
    assert edits in message
    assert upstream in message


def test_invalid_utf8_ends_a_run_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(json.dumps(scdb(0)).encode() + b"\n" + json.dumps(scdb(1)).encode().replace(b"Person", b"P\xe9r"))
    command = ["run", "stream=scotus", f"stream.path={path}", "model=atlas-drift", "editor=none"]
    assert main([*command, f"out={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{path}:2: field 'name': is not UTF-8" in error
    assert "\n" not in error


def test_upstream_alone_is_refused(tmp_path: Path) -> None:
    assert "stream.path=" in error_of(upstream_path=lines(tmp_path / "u.jsonl", scdb(0, 1950)))


@pytest.fixture
def tiny_encoder(tmp_path: Path, word_tokenizer: Any) -> Path:
    """A BERT of three blocks without a head, as a folder."""
    folder = tmp_path / "encoder"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(word_tokenizer), max_position_embeddings=16, **sizes)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def test_the_pretrained_model_knows_its_labels_its_layer_and_its_figures(tmp_path: Path, tiny_encoder: Path) -> None:
    texts = ["the capital of France", "the river of Italy", "what currency in Peru", "is Kazakhstan the Tenge"] * 2
    old = [scdb(n, 1950 + n, text=text, issue_area=1 + n % 4) for n, text in enumerate(texts)]
    # Longer than the encoder's positions.
    old[0]["text"] = "the capital of France " * 20
    new = [scdb(n, 1995, text=text, issue_area=5) for n, text in enumerate(texts[:4])]
    stream = Scotus(path=lines(tmp_path / "s.jsonl", *old, *new))
    out = tmp_path / "out"
    figures = stream.pretrain(out, base=str(tiny_encoder), seed=0)

    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"]["2"] == "First Amendment"
    assert len(config["id2label"]) == 11
    assert json.loads((out / "figures.json").read_text(encoding="utf-8")) == figures
    model = EditableModel.from_pretrained(out, task="classification", device="cpu")
    assert model.layer_name == "bert.encoder.layer.1.output.dense"
    data = stream.load()
    for era in ("upstream", "edits"):
        answers = model.answer([request.prompt for request in getattr(data, era)])
        right = [answer == request.target for answer, request in zip(answers, getattr(data, era), strict=True)]
        assert figures[f"{era}_accuracy"] == sum(right) / len(right)
    # Only what it was trained on can be known.
    assert figures["edits_accuracy"] == 0.0


def test_the_lower_half_of_the_encoder_stays_as_it_is(tmp_path: Path, tiny_encoder: Path) -> None:
    stream = Scotus(path=lines(tmp_path / "s.jsonl", *(scdb(n, 1950) for n in range(4)), scdb(4)))
    stream.pretrain(tmp_path / "out", base=str(tiny_encoder), seed=0)
    before = BertModel.from_pretrained(tiny_encoder).state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").base_model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not {name for name in changed if name.startswith(("embeddings.", "encoder.layer.0."))}
    assert {name for name in before if name.startswith("encoder.layer.2.") and "key.bias" not in name} <= changed


def test_the_pretrained_model_repeats_itself_by_seed(tmp_path: Path, tiny_encoder: Path) -> None:
    stream = Scotus(path=lines(tmp_path / "s.jsonl", *(scdb(n, 1950) for n in range(4)), scdb(4)))
    heads = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        stream.pretrain(tmp_path / name, base=str(tiny_encoder), seed=seed)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert model.dtype == torch.float32
        heads.append(model.classifier.weight.detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_pretraining_says_what_it_lacks(tmp_path: Path, tiny_encoder: Path) -> None:
    stream = Scotus(path=lines(tmp_path / "s.jsonl", scdb(0)))
    with pytest.raises(UserError, match=r"model="):
        stream.pretrain(tmp_path / "out")
    with pytest.raises(UserError, match=r"stream\.upstream_path="):
        stream.pretrain(tmp_path / "out", base=str(tiny_encoder))
    old = Scotus(path=lines(tmp_path / "t.jsonl", scdb(0), scdb(1, 1950)))
    with pytest.raises(UserError, match="cannot be loaded"):
        old.pretrain(tmp_path / "out", base=str(tmp_path))


@needs_shared
def test_the_real_files_are_read_whole() -> None:
    names = {"path": "scotus_1991_2009.jsonl", "upstream_path": "scotus_1946_1982.jsonl"}
    raw = {
        option: [json.loads(line) for line in (SHARED / name).read_bytes().split(b"\n") if line]
        for option, name in names.items()
    }
    data = Scotus(**{option: str(SHARED / name) for option, name in names.items()}).load()
    for requests, records in ((data.edits, raw["path"]), (data.upstream, raw["upstream_path"])):
        assert [(r.id, r.prompt, r.target) for r in requests] == [
            (record["case_id"], record["text"], record["issue_area"] - 1) for record in records
        ]
    assert (len(data.edits), len(data.upstream), len(data.validation)) == (200, 250, 0)
    assert data.left_out == {}
