"""CounterFact in EasyEdit's format, on made-up records and on the real files."""

import json
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.derived import is_answered_by_model
from grace_bench.errors import UserError
from grace_bench.streams import Probe
from grace_bench.streams.counterfact import CounterFact

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def record(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "case_id": number,
        "prompt": f"The mother tongue of Person{number} is",
        "target_new": "English",
        "subject": f"Person{number}",
        "ground_truth": "French",
        "rephrase_prompt": f"Person{number} grew up speaking",
        "locality_prompt": f"Neighbour{number} is a native speaker of",
        "locality_ground_truth": "Dutch",
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def lines(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "counterfact.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def error_of(path: str) -> str:
    with pytest.raises(UserError) as caught:
        CounterFact(path=path).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_edit_is_the_counterfactual_and_not_the_truth(tmp_path: Path) -> None:
    (request,) = CounterFact(path=lines(tmp_path, record(7))).load().edits
    assert (request.id, request.target, request.subject) == ("7", "English", "Person7")
    assert request.prompt == "The mother tongue of Person7 is"
    assert request.metadata["ground_truth"] == "French"


def test_what_must_be_kept_is_the_unedited_models_answer(tmp_path: Path) -> None:
    data = CounterFact(path=lines(tmp_path, record(7))).load()
    (probe,) = data.edits[0].locality
    assert (probe.prompt, probe.target) == ("Neighbour7 is a native speaker of", None)
    (upstream,) = data.upstream
    assert upstream.prompt == "Neighbour7 is a native speaker of"
    assert is_answered_by_model(upstream)


def test_upstream_asks_each_prompt_once_and_none_that_is_edited(tmp_path: Path) -> None:
    shared = "Somebody is a native speaker of"
    edited = record(3)["prompt"]
    path = lines(
        tmp_path,
        record(1, locality_prompt=shared),
        record(2, locality_prompt=shared),
        record(3, locality_prompt=edited),
    )
    assert [request.prompt for request in CounterFact(path=path).load().upstream] == [shared]


def test_a_rephrase_in_the_prompts_own_words_is_no_holdout(tmp_path: Path) -> None:
    path = lines(tmp_path, record(1), record(2, rephrase_prompt=record(2)["prompt"]))
    assert [(r.prompt, r.fact, r.target) for r in CounterFact(path=path).load().holdout] == [
        ("Person1 grew up speaking", "1", "English")
    ]


def test_rephrases_locality_and_truth_may_be_absent_and_further_fields_are_ignored(tmp_path: Path) -> None:
    names = ("ground_truth", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
    bare = record(1, **dict.fromkeys(names, ...), requested_rewrite={"relation_id": "P103"})
    data = CounterFact(path=lines(tmp_path, bare)).load()
    assert (len(data.edits), data.upstream, data.holdout) == (1, (), ())


def test_portability_is_read_where_given(tmp_path: Path) -> None:
    portability = {
        "Recalled Relation": "(…)",
        "New Question": "Person1's first word was in",
        "New Answer": "English",
    }
    (request,) = CounterFact(path=lines(tmp_path, record(1, portability=portability))).load().edits
    assert request.portability == (Probe(prompt="Person1's first word was in", target="English"),)
    del portability["New Answer"]
    path = lines(tmp_path, record(1, portability=portability))
    assert error_of(path) == f"{path}:1: field 'portability.New Answer': is missing"


def test_a_record_without_a_case_id_has_its_number(tmp_path: Path) -> None:
    path = lines(tmp_path, record(7, case_id=...), record(8, case_id=...))
    assert [request.id for request in CounterFact(path=path).load().edits] == ["1", "2"]


def knowedit(number: int, /, **changes: Any) -> dict[str, Any]:
    made = record(number, case_id=..., rephrase_prompt=..., locality_prompt=..., locality_ground_truth=...)
    nested = {
        "ground_truth": ["French", "Français"],
        "rephrase": [f"Person{number} grew up speaking"],
        "portability": {"Reasoning": [{"prompt": f"Person{number} writes in", "ground_truth": [["English"]]}]},
        "locality": {
            "Relation_Specificity": [{"prompt": f"Person{number} was born in", "ground_truth": [["Lyon", "Lugdunum"]]}],
            "Forgetfulness": [{"prompt": f"Person{number} also spoke", "ground_truth": []}],
        },
    }
    return {name: value for name, value in {**made, **nested, **changes}.items() if value is not ...}


def test_knowedits_records_are_read(tmp_path: Path) -> None:
    data = CounterFact(path=lines(tmp_path, knowedit(1), knowedit(2, portability=..., rephrase=...))).load()
    first, second = data.edits
    assert (first.id, first.target, first.contrast) == ("1", "English", ("English", "French"))
    assert first.rephrases == ("Person1 grew up speaking",)
    (probe,) = first.locality
    assert (probe.prompt, probe.target, probe.gold) == ("Person1 was born in", None, ("Lyon",))
    assert probe.contrast == ("Lyon", "English")
    assert first.portability == (Probe(prompt="Person1 writes in", target="English"),)
    assert (second.rephrases, second.portability) == ((), ())
    assert [request.prompt for request in data.upstream] == ["Person1 was born in", "Person2 was born in"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"locality": {"K": [{"prompt": "p"}]}}, "field 'locality.K[0].ground_truth': is missing"),
        ({"locality": {"K": "p"}}, "field 'locality.K': should be a list, not text"),
        ({"portability": {"K": [{"ground_truth": "p"}]}}, "field 'portability.K[0].prompt': is missing"),
        ({"subject": "Person9"}, "field 'subject': does not occur in the prompt"),
    ],
)
def test_a_damaged_record_of_knowedits_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = lines(tmp_path, knowedit(0), knowedit(1, **change))
    assert error_of(path).startswith(f"{path}:2: {says}")


def test_an_array_gives_the_same_data_as_lines(tmp_path: Path) -> None:
    records = [record(number) for number in range(5)]
    array = tmp_path / "counterfact.json"
    array.write_text(json.dumps(records, indent=1), encoding="utf-8")
    assert CounterFact(path=str(array)).load() == CounterFact(path=lines(tmp_path, *records)).load()
    records[3]["prompt"] = ""
    array.write_text(json.dumps(records), encoding="utf-8")
    assert error_of(str(array)) == f"{array}:1: record 4: field 'prompt': is empty"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ...}, "field 'prompt': is missing"),
        ({"target_new": "  "}, "field 'target_new': is empty"),
        ({"target_new": {"str": "English"}}, "field 'target_new': should be text, not an object"),
        ({"subject": "Person9"}, "field 'subject': does not occur in the prompt, letter by letter"),
        ({"case_id": 1.5}, "field 'case_id': should be a whole number, not the number 1.5 or should be text"),
        ({"case_id": 0}, "field 'case_id': '0' was used before, at "),
        (
            {"locality_ground_truth": ...},
            "field 'locality_ground_truth': is missing, while 'locality_prompt' is",
        ),
        ({"locality_prompt": ...}, "field 'locality_prompt': is missing, while 'locality_ground_truth' is"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = lines(tmp_path, record(0), record(1, **change))
    assert error_of(path).startswith(f"{path}:2: {says}")


def rome(number: int, /, **changes: Any) -> dict[str, Any]:
    return {
        "case_id": number,
        "pararel_idx": 2796,
        "requested_rewrite": {
            "prompt": "The mother tongue of {} is",
            "relation_id": "P103",
            "target_new": {"str": "English", "id": "Q1860"},
            "target_true": {"str": "French", "id": "Q150"},
            "subject": f"Person{number}",
        },
        "paraphrase_prompts": [f"Shayna does this. Person{number} spoke the language", f"Person{number} spoke"],
        "neighborhood_prompts": [f"Neighbour{number} is a native speaker of", "Somebody was born in"],
        "attribute_prompts": ["J.R.R. Tolkien is a native speaker of"],
        "generation_prompts": [f"Person{number}'s mother tongue is"],
        **changes,
    }


def test_romes_records_are_read(tmp_path: Path) -> None:
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([rome(7), rome(8)], indent=1), encoding="utf-8")
    data = CounterFact(path=str(path)).load()
    first = data.edits[0]
    assert (first.id, first.prompt, first.target) == ("7", "The mother tongue of Person7 is", "English")
    assert (first.subject, first.metadata["ground_truth"]) == ("Person7", "French")
    assert [(r.prompt, r.target, r.fact) for r in data.holdout[:2]] == [
        ("Shayna does this. Person7 spoke the language", "English", "7"),
        ("Person7 spoke", "English", "7"),
    ]
    neighbours = ["Neighbour7 is a native speaker of", "Somebody was born in"]
    assert [probe.prompt for probe in first.locality] == neighbours
    assert [request.prompt for request in data.upstream] == [*neighbours, "Neighbour8 is a native speaker of"]


@pytest.mark.parametrize("make", [record, rome])
def test_portability_is_read_in_both_formats(tmp_path: Path, make: Any) -> None:
    one_hop = {"Recalled Relation": "(…)", "New Question": "Person1 can talk to people from", "New Answer": "London"}
    first, second = CounterFact(path=lines(tmp_path, make(1, portability=one_hop), make(2))).load().edits
    assert first.portability == (Probe(prompt="Person1 can talk to people from", target="London"),)
    assert second.portability == ()


def test_a_folder_may_hold_files_of_both_formats(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([rome(7), rome(8)]), encoding="utf-8")
    again = tmp_path / "b.jsonl"
    again.write_text(json.dumps(record(9)) + "\n", encoding="utf-8")
    data = CounterFact(path=str(tmp_path)).load()
    assert [request.id for request in data.edits] == ["7", "8", "9"]
    again.write_text(json.dumps(record(8)) + "\n", encoding="utf-8")
    first = f"{tmp_path / 'a.json'}:1: record 2"
    assert error_of(str(tmp_path)) == f"{again}:1: field 'case_id': '8' was used before, at {first}"


@pytest.mark.parametrize("make", [record, rome])
def test_the_new_answer_is_to_be_likelier_where_it_belongs_and_the_true_one_in_the_neighbourhood(
    tmp_path: Path, make: Any
) -> None:
    data = CounterFact(path=lines(tmp_path, make(7))).load()
    (probe,) = data.edits[0].locality[:1]
    true = probe.contrast[0] if probe.contrast else None
    assert true == ("Dutch" if make is record else "French")
    assert data.edits[0].contrast == ("English", "French")
    assert all(request.contrast == ("English", "French") for request in data.holdout)
    assert all(probe.contrast == (true, "English") for probe in data.edits[0].locality)


@pytest.mark.parametrize("make", [record, rome])
def test_the_true_answers_may_be_the_targets_of_locality(tmp_path: Path, make: Any) -> None:
    path = lines(tmp_path, make(7))
    gold = CounterFact(path=path, locality_target="gold").load()
    assert {probe.target for probe in gold.edits[0].locality} == {"Dutch" if make is record else "French"}
    bare = CounterFact(path=path).load()
    assert {probe.target for probe in bare.edits[0].locality} == {None}
    assert gold.upstream == bare.upstream
    with pytest.raises(UserError, match=r"stream\.locality_target=golden is not known"):
        CounterFact(path=path, locality_target="golden")


def test_validation_shares_no_prompt_with_the_edits_and_says_what_it_left_out(tmp_path: Path) -> None:
    other = tmp_path / "validation"
    other.mkdir()
    data = CounterFact(
        path=lines(tmp_path, record(1), record(2)), validation_path=lines(other, record(3), record(2))
    ).load()
    assert [request.id for request in data.validation] == ["3"]
    assert data.left_out == {"a validation record about an edited prompt": 1}


def test_a_damaged_record_of_romes_is_named(tmp_path: Path) -> None:
    rewrite = rome(1)["requested_rewrite"]
    path = lines(tmp_path, rome(0), rome(1, requested_rewrite={**rewrite, "prompt": "no place for a subject"}))
    assert error_of(path) == (
        f"{path}:2: field 'requested_rewrite.prompt': should hold {{}} once, where the subject goes"
    )
    del rewrite["target_true"]
    path = lines(tmp_path, rome(1, requested_rewrite=rewrite))
    assert error_of(path) == f"{path}:1: field 'requested_rewrite.target_true': is missing"


@needs_shared
@pytest.mark.parametrize(("name", "count"), [("counterfact_edit.jsonl", 1000), ("counterfact_val.jsonl", 400)])
def test_the_real_files_are_read_whole(name: str, count: int) -> None:
    raw = [json.loads(line) for line in (SHARED / name).read_bytes().split(b"\n") if line]
    data = CounterFact(path=str(SHARED / name)).load()
    assert len(data.edits) == count == len(raw)
    for request, source in zip(data.edits, raw, strict=True):
        assert (request.prompt, request.target) == (source["prompt"], source["target_new"])
        assert request.subject == source["subject"]
    prompts = {source["prompt"] for source in raw}
    assert {request.prompt for request in data.upstream} == {r["locality_prompt"] for r in raw} - prompts
    assert len({request.prompt for request in data.upstream}) == len(data.upstream)
    assert len(data.holdout) == sum(r["rephrase_prompt"] != r["prompt"] for r in raw)
    facts = {request.fact_id: request.target for request in data.edits}
    assert all(facts[request.fact] == request.target for request in data.holdout)
