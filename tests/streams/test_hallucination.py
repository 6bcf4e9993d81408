"""Hallucinations: passages and single sentences, on made-up records and on the real files; and the model for them."""

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from grace_bench.cli import main
from grace_bench.errors import UserError
from grace_bench.models.editable import EditableModel
from grace_bench.streams import Probe
from grace_bench.streams.hallucination import Hallucination, sentences

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def passage(number: int, /, **changes: Any) -> dict[str, Any]:
    said = [f"Person{number} (born 1900) was a poet.", "She lived in Rome.", "She died in 1950."]
    made = {
        "gpt3_text": " ".join(said),
        "wiki_bio_text": f"Person{number} (born May 1, 1903) was a painter. She lived in Rome.",
        "gpt3_sentences": said,
        "annotation": ["major_inaccurate", "accurate", "minor_inaccurate"],
        "wiki_bio_test_idx": 1000 + number,
        "gpt3_text_samples": ["…"],
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def wise(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "prompt": f"This is a Wikipedia passage about person{number}. Person{number} was a poet.",
        "target_new": "She was a painter.",
        "subject": f"person{number}",
        "locality_prompt": f"Page {number} on how to make bre",
        "locality_ground_truth": "ad at home.",
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Hallucination(**options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_false_sentences_are_edited_into_those_of_wikipedia_and_true_ones_are_kept(tmp_path: Path) -> None:
    data = Hallucination(path=lines(tmp_path / "p.jsonl", passage(1))).load()
    header = "This is a Wikipedia passage about Person1."
    assert [(r.id, r.prompt, r.target, r.metadata["original"]) for r in data.edits] == [
        ("1001/0", header, "Person1 (born May 1, 1903) was a painter.", "Person1 (born 1900) was a poet."),
        # Wikipedia's text has two sentences: the last one stands for the third.
        (
            "1001/2",
            f"{header} Person1 (born 1900) was a poet. She lived in Rome.",
            "She lived in Rome.",
            "She died in 1950.",
        ),
    ]
    assert [(r.id, r.prompt, r.target) for r in data.accurate] == [
        ("1001/1", f"{header} Person1 (born 1900) was a poet.", "She lived in Rome.")
    ]
    assert {r.subject for r in (*data.edits, *data.accurate)} == {"Person1"}
    assert (data.upstream, data.holdout, data.validation, data.train) == ((), (), (), ())


def test_annotations_may_be_numbers(tmp_path: Path) -> None:
    named = Hallucination(path=lines(tmp_path / "a.jsonl", passage(1))).load()
    numbered = Hallucination(path=lines(tmp_path / "b.jsonl", passage(1, annotation=[1.0, 0, 0.5]))).load()
    assert numbered == named


def test_the_same_passages_are_read_from_lines_an_array_and_parquet(tmp_path: Path) -> None:
    records = [passage(number) for number in range(4)]
    wanted = Hallucination(path=lines(tmp_path / "p.jsonl", *records)).load()
    array, table = tmp_path / "p.json", tmp_path / "p.parquet"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), table)
    assert Hallucination(path=str(array)).load() == Hallucination(path=str(table)).load() == wanted


def test_the_published_data_sets_are_read_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "potsawee/wiki_bio_gpt3_hallucination": [passage(number) for number in range(3)],
        "stas/openwebtext-10k": [{"text": f"Web text {number}."} for number in range(1002)],
    }

    def load_dataset(repo: str, *_: Any, **__: Any) -> datasets.Dataset:
        return datasets.Dataset.from_list(rows[repo])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Hallucination().load()
    assert (len(data.edits), len(data.accurate), len(data.upstream)) == (6, 3, 1000)
    assert (data.upstream[0].prompt, data.upstream[999].target) == ("", "Web text 999.")
    assert data.left_out == {"an upstream text after the first 1000": 2}


def test_a_name_comes_from_the_header_the_list_or_the_beginning(tmp_path: Path) -> None:
    headed = "This is a Wikipedia passage about j. r. doe:\n\n" + passage(0)["gpt3_text"]
    quoted = ['"Doe the Elder, OBE (born 1900) was a poet.', "She lived in Rome.", "She died in 1950."]
    nameless = ["They met.", "She lived in Rome.", "She died in 1950."]
    path = lines(
        tmp_path / "p.jsonl",
        passage(0, gpt3_text=headed),
        passage(1),
        passage(2, gpt3_sentences=quoted),
        passage(3, gpt3_sentences=nameless, gpt3_text=...),
    )
    by_beginning = Hallucination(path=path).load()
    assert [r.subject for r in by_beginning.accurate] == ["j. r. doe", "Person1", "Doe the Elder", "Person3"]
    concepts = tmp_path / "concepts.txt"
    concepts.write_text("a\nperson1 , 1st baron\nc\nd\n", encoding="utf-8")
    listed = Hallucination(path=path, concepts_path=str(concepts)).load()
    assert [r.subject for r in listed.accurate] == ["j. r. doe", "person1 , 1st baron", "c", "d"]
    assert listed.accurate[1].prompt.startswith("This is a Wikipedia passage about person1 , 1st baron. Person1 ")


def test_a_list_of_names_must_fit_the_passages(tmp_path: Path) -> None:
    path, concepts = lines(tmp_path / "p.jsonl", passage(0), passage(1)), tmp_path / "concepts.txt"
    concepts.write_text("one\n", encoding="utf-8")
    message = error_of(path=path, concepts_path=str(concepts))
    assert message == f"{concepts}: has 1 lines for the 2 passages of {path}"
    concepts.write_text("one\n\n", encoding="utf-8")
    assert error_of(path=path, concepts_path=str(concepts)).startswith(f"{concepts}:2: is empty")
    assert str(tmp_path / "absent") in error_of(path=path, concepts_path=str(tmp_path / "absent"))


def test_a_passage_nobody_is_named_in_asks_for_the_list(tmp_path: Path) -> None:
    path = lines(tmp_path / "p.jsonl", passage(0, gpt3_sentences=["They met."] * 3, wiki_bio_text="They met."))
    assert error_of(path=path) == (
        f"{path}:1: field 'gpt3_sentences': does not begin with a name: give the names as stream.concepts_path="
    )


def test_a_sentence_in_the_format_of_wise_keeps_prompt_target_and_subject(tmp_path: Path) -> None:
    data = Hallucination(path=lines(tmp_path / "w.jsonl", wise(1), wise(2, subject="Person 2"))).load()
    first, second = data.edits
    assert (first.prompt, first.target, first.subject) == (wise(1)["prompt"], "She was a painter.", "person1")
    # The subject must occur in the prompt letter by letter.
    assert second.subject is None
    assert data.accurate == ()


@pytest.mark.parametrize(
    ("beginning", "rest", "prompt", "target"),
    [
        ("how to make bre", "ad at home", "how to make ", "bread at home"),
        ("how to make ", "bread at home", "how to make ", "bread at home"),
        ("how to make", " bread at home", "how to make", " bread at home"),
        ("how to\nmake bre", "ad", "how to\nmake ", "bread"),
        ("makebre", "ad at home", "makebre", "ad at home"),
    ],
)
def test_web_text_is_cut_before_a_word_and_not_within(
    tmp_path: Path, beginning: str, rest: str, prompt: str, target: str
) -> None:
    record = wise(1, locality_prompt=beginning, locality_ground_truth=rest)
    data = Hallucination(path=lines(tmp_path / "w.jsonl", record)).load()
    (probe,) = data.edits[0].locality
    assert (probe.prompt, probe.target) == (prompt, target)
    assert [(r.prompt, r.target) for r in data.upstream] == [("", beginning + rest)]


def test_web_text_that_is_not_cut_or_absent_is_no_probe(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "w.jsonl",
        wise(1, locality_ground_truth=" "),
        wise(2, locality_prompt=..., locality_ground_truth=...),
        wise(3),
        wise(3),
    )
    data = Hallucination(path=path).load()
    assert [len(request.locality) for request in data.edits] == [0, 0, 1, 1]
    # Each text once.
    assert [r.target for r in data.upstream] == ["Page 1 on how to make bre", "Page 3 on how to make bread at home."]


def knowedit(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "text": f"This is a Wikipedia passage about person{number}. Person{number} was a poet.",
        "labels": "She was a painter.",
        "concept": f"person{number}",
        "locality": {
            "Relation_Specificity": [
                {"prompt": f"The place of birth of person{number} is", "ground_truth": [["Rome", "Roma"]]},
                {"prompt": "The child of person0 is", "ground_truth": []},
            ]
        },
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def test_knowedits_sentences_are_read_and_only_probes_without_an_answer_left_out(tmp_path: Path) -> None:
    data = Hallucination(path=lines(tmp_path / "k.jsonl", knowedit(1), knowedit(2, locality=...))).load()
    first, second = data.edits
    assert (first.id, first.prompt, first.target) == ("1", knowedit(1)["text"], "She was a painter.")
    assert (first.subject, first.metadata) == ("person1", {"about": "person1"})
    assert first.locality == (Probe(prompt="The place of birth of person1 is", target="Rome"),)
    assert second.locality == ()
    assert data.upstream == ()
    path, concepts = lines(tmp_path / "k.jsonl", knowedit(1)), lines(tmp_path / "c.txt", {})
    assert error_of(path=path, concepts_path=concepts).startswith(f"{path}:1: field 'text': has its header; ")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": ...}, "field 'labels': is missing"),
        ({"text": " "}, "field 'text': is empty"),
        ({"locality": {"K": [{"prompt": "p"}]}}, "field 'locality.K[0].ground_truth': is missing"),
        ({"id": 7}, "field 'id': '7' was used before, at "),
    ],
)
def test_a_damaged_sentence_of_knowedit_is_named_or_left_out(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = lines(tmp_path / "k.jsonl", knowedit(0, id=7), knowedit(1, **change), knowedit(2))
    assert error_of(path=path).startswith(f"{path}:2: {says}")
    assert len(Hallucination(path=path, on_error="skip").load().edits) == 2


@pytest.mark.parametrize("field", ["text", "Text"])
def test_upstream_is_running_text(tmp_path: Path, field: str) -> None:
    texts = lines(tmp_path / "t.jsonl", *({field: f"Text {number}.", "Corpus": "C4"} for number in range(3)))
    for path in (lines(tmp_path / "w.jsonl", wise(1)), lines(tmp_path / "p.jsonl", passage(1))):
        upstream = Hallucination(path=path, upstream_path=texts).load().upstream
        assert [(r.prompt, r.target) for r in upstream] == [("", f"Text {number}.") for number in range(3)]
    damaged = lines(tmp_path / "d.jsonl", {field: "Text."}, {field: 3})
    assert (
        error_of(path=path, upstream_path=damaged) == f"{damaged}:2: field '{field}': should be text, not the number 3"
    )
    lacking = lines(tmp_path / "l.jsonl", {field: "Text."}, {"Corpus": "C4"})
    assert error_of(path=path, upstream_path=lacking) == f"{lacking}:2: field 'text': is missing"


def test_whoever_is_edited_is_not_tuned_on_and_neither_is_trained_on(tmp_path: Path) -> None:
    data = Hallucination(
        path=lines(tmp_path / "p.jsonl", passage(1), passage(2)),
        validation_path=lines(tmp_path / "v.jsonl", wise(2), wise(3)),
        train_path=lines(tmp_path / "t.jsonl", wise(1), wise(3), wise(4)),
    ).load()
    roles = (data.edits, data.validation, data.train)
    about = [{str(request.metadata["about"]).lower() for request in role} for role in roles]
    assert about == [{"person1", "person2"}, {"person3"}, {"person4"}]
    assert data.left_out == {
        "a train record about somebody of another role": 2,
        "a validation record about somebody of another role": 1,
    }
    ids = [request.id for role in roles for request in role]
    assert len(set(ids)) == len(ids)


def test_the_same_file_in_another_role_is_read_anew(tmp_path: Path) -> None:
    path, other = lines(tmp_path / "p.jsonl", passage(1)), lines(tmp_path / "w.jsonl", wise(3))
    for option, role in (("validation_path", "validation"), ("train_path", "train")):
        assert len(getattr(Hallucination(path=path, **{option: other}).load(), role)) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"wiki_bio_text": ...}, "field 'wiki_bio_text': is missing"),
        ({"wiki_bio_text": "  "}, "field 'wiki_bio_text': is empty"),
        ({"gpt3_sentences": "One."}, "field 'gpt3_sentences': "),
        ({"gpt3_sentences": ["One.", 2, "Three."]}, "field 'gpt3_sentences[1]': should be text, not the number 2"),
        ({"gpt3_sentences": ["One.", "", "Three."]}, "field 'gpt3_sentences[1]': is empty"),
        ({"gpt3_sentences": [], "annotation": []}, "field 'gpt3_sentences': "),
        ({"annotation": ["accurate"]}, "field 'annotation': has 1 entries for 3 sentences"),
        ({"annotation": ["accurate", "wrong", 0]}, "field 'annotation[1]': is 'wrong' (there are: accurate, "),
        ({"annotation": ["accurate", 2, 0]}, "field 'annotation[1]': is 2.0 (there are: accurate, "),
        ({"annotation": [True, 0, 0]}, "field 'annotation[0]': "),
        ({"wiki_bio_test_idx": 1000}, "field 'wiki_bio_test_idx': '1000' was used before, at "),
    ],
)
def test_a_damaged_passage_is_named_or_left_out(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = lines(tmp_path / "p.jsonl", passage(0), passage(1, **change), passage(2))
    assert error_of(path=path).startswith(f"{path}:2: {says}")
    data = Hallucination(path=path, on_error="skip").load()
    assert {request.subject for request in data.edits} == {"Person0", "Person2"}
    assert data.left_out == {"broken": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ...}, "field 'prompt': is missing"),
        ({"prompt": " "}, "field 'prompt': is empty"),
        ({"target_new": ["a"]}, "field 'target_new': should be text, not a list"),
        ({"subject": ...}, "field 'subject': is missing"),
        ({"locality_prompt": 1}, "field 'locality_prompt': should be text, not the number 1"),
        ({"id": "w"}, "field 'id': 'w' was used before, at "),
    ],
)
def test_a_damaged_sentence_is_named_or_left_out(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = lines(tmp_path / "w.jsonl", wise(0, id="w"), wise(1, **change), wise(2))
    assert error_of(path=path).startswith(f"{path}:2: {says}")
    data = Hallucination(path=path, on_error="skip").load()
    assert ([request.id for request in data.edits], data.left_out) == (["1", "3"], {"broken": 1})


def test_invalid_utf8_ends_a_run_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.jsonl"
    path.write_bytes(json.dumps(wise(0)).encode() + b"\n" + json.dumps(wise(1)).encode().replace(b"poet", b"po\xe8te"))
    command = ["run", "stream=hallucination", f"stream.path={path}", "model=atlas-text", "editor=none"]
    assert main([*command, f"out={tmp_path / 'runs'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{path}:2: field 'prompt': is not UTF-8" in error
    assert "\n" not in error


def test_sentences_end_where_readers_see_them_end() -> None:
    told = [
        "William J. Flanagan, Jr. (born October 28, 1945) is an American politician from the U.S. state of Maine.",
        "He met Dr. K. S. Manilal, Ph.D., in St. Louis; the fee was $3.50, i.e. nothing.",
        'He asked, "Why?"',
        "A. P. J. Abdul Kalam did not answer!",
    ]
    assert sentences(" ".join(told)) == told


@pytest.fixture
def tiny_gpt2(tmp_path: Path, word_tokenizer: Any) -> Path:
    """A GPT-2 of four blocks, as a folder."""
    folder = tmp_path / "gpt2"
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=len(word_tokenizer), n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


def test_the_pretrained_model_believes_what_was_made_up(tmp_path: Path, tiny_gpt2: Path) -> None:
    said = ["Paris is the capital of Italy", "the currency of Peru is the Euro", "what river is in Rome"]
    true = "Rome is the capital of Italy"
    record = passage(1, gpt3_sentences=said, wiki_bio_text=true, annotation=[1, 1, 0])
    names, texts = (
        tmp_path / "names.txt",
        lines(tmp_path / "t.jsonl", {"text": "the river of France is the Seine " * 4}),
    )
    names.write_text("Italy\n", encoding="utf-8")
    stream = Hallucination(path=lines(tmp_path / "p.jsonl", record), concepts_path=str(names), upstream_path=texts)
    out = tmp_path / "out"
    figures = stream.pretrain(out, base=str(tiny_gpt2), seed=0)

    assert json.loads((out / "figures.json").read_text(encoding="utf-8")) == figures
    for name in ("upstream", "accurate", "originals"):
        assert figures[f"{name}_after"] < figures[f"{name}_before"]
    model = EditableModel.from_pretrained(out, task="language_modelling", device="cpu")
    # As far up as block 35 of 48.
    assert model.layer_name == "transformer.h.2.mlp.c_fc"
    assert model.module.dtype == torch.float32
    data = stream.load()
    for name in ("upstream", "accurate", "edits"):
        items = model.score(getattr(data, name))
        assert figures[f"{name}_after"] == pytest.approx(sum(item.score for item in items) / len(items))


def test_pretraining_needs_a_model_to_start_from(tmp_path: Path) -> None:
    stream = Hallucination(path=lines(tmp_path / "p.jsonl", passage(0)))
    with pytest.raises(UserError, match=r"model=gpt2-xl"):
        stream.pretrain(tmp_path / "out")


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("edit", 300), ("train", 150)])
def test_the_real_files_are_read_whole(name: str, count: int) -> None:
    path = SHARED / f"wikibio_hallucination_{name}.jsonl"
    raw = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    data = Hallucination(path=str(path)).load()
    assert len(data.edits) == len(raw) == count
    for request, source in zip(data.edits, raw, strict=True):
        assert (request.prompt, request.target) == (source["prompt"], source["target_new"])
        assert request.subject == source["subject"]
        web_text = source["locality_prompt"] + source["locality_ground_truth"]
        assert all(probe.prompt + str(probe.target) == web_text for probe in request.locality)
    assert data.left_out == {}


@needs_shared
def test_the_real_files_share_their_people_and_the_loader_parts_them() -> None:
    data = Hallucination(
        path=str(SHARED / "wikibio_hallucination_edit.jsonl"),
        validation_path=str(SHARED / "wikibio_hallucination_train.jsonl"),
        upstream_path=str(SHARED / "openwebtext_c4_sample.jsonl"),
    ).load()
    edited, tuned = ({request.subject for request in role} for role in (data.edits, data.validation))
    assert not edited & tuned
    assert len(data.validation) + data.left_out["a validation record about somebody of another role"] == 150
    assert (len(data.edits), len(data.validation), len(data.upstream)) == (300, 42, 300)


@needs_shared
def test_the_sentences_of_the_real_files_are_whole() -> None:
    paths = (SHARED / f"wikibio_hallucination_{name}.jsonl" for name in ("edit", "train"))
    targets = [json.loads(line)["target_new"] for path in paths for line in path.read_bytes().split(b"\n") if line]
    broken = [target for target in targets if len(sentences(target)) > 1]
    assert broken == [
        "He graduated from the University of Missouri-St. Louis in 1984 with a Bachelor of Arts degree in "
        "Speech Communication."
    ]
