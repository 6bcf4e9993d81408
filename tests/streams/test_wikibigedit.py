"""WikiBigEdit in the authors' format and in LocFT's, on made-up records and on the real file."""

import json
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.derived import is_answered_by_model
from grace_bench.errors import UserError
from grace_bench.streams import Probe
from grace_bench.streams.wikibigedit import WikiBigEdit

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def changed(record: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**record, **changes}.items() if value is not ...}


def authors(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "tag": "new",
        "subject": f"Country{number}",
        "update": f"Who leads Country{number}?",
        "rephrase": f"Who is the head of Country{number}?",
        "ans": f"Person{number}",
        "personas": f"Arr, who be captain of Country{number}?",
        "mhop": f"Where was the leader of Country{number} born?",
        "mhop_ans": f"Town{number}",
        "loc": f"Who leads Neighbour{number}?",
        "loc_ans": f"Other{number}",
    }
    return changed(made, changes)


def locft(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "prompt": f"Who leads Country{number}?",
        "target_new": f"Person{number}",
        "subject": f"Country{number}",
        "rephrase_prompt": f"Who is the head of Country{number}?",
        "locality_prompt": f"Who leads Neighbour{number}?",
        "locality_ground_truth": f"Other{number}",
    }
    return changed(made, changes)


def ultraedit(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "prompt": f"Who leads Country{number}?",
        "ans": f"Person{number}",
        "subject": f"Country{number}",
        "rephrase_prompt": f"Who is the head of Country{number}?",
        "loc": f"Who leads Neighbour{number}?",
        "loc_ans": f"Other{number}",
    }
    return changed(made, changes)


def array(folder: Path, *records: dict[str, Any], name: str = "wiki_big_edit_20240201_20240220.json") -> str:
    path = folder / name
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def error_of(path: str, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        WikiBigEdit(path=path, **options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_question_of_the_authors_has_its_role(tmp_path: Path) -> None:
    data = WikiBigEdit(path=array(tmp_path, authors(7))).load()
    (request,) = data.edits
    assert (request.id, request.prompt, request.target) == ("1", "Who leads Country7?", "Person7")
    assert (request.subject, request.step) == ("Country7", "20240201_20240220")
    assert [(r.prompt, r.target, r.fact) for r in data.holdout] == [
        ("Who is the head of Country7?", "Person7", "1"),
        ("Arr, who be captain of Country7?", "Person7", "1"),
    ]
    assert request.portability == (Probe(prompt="Where was the leader of Country7 born?", target="Town7"),)
    (probe,) = request.locality
    assert (probe.prompt, probe.target) == ("Who leads Neighbour7?", None)
    (upstream,) = data.upstream
    assert upstream.prompt == "Who leads Neighbour7?"
    assert is_answered_by_model(upstream)


def test_locfts_records_have_no_time_steps(tmp_path: Path) -> None:
    (request,) = WikiBigEdit(path=array(tmp_path, locft(7))).load().edits
    assert (request.prompt, request.target, request.step) == ("Who leads Country7?", "Person7", None)
    assert request.rephrases == ("Who is the head of Country7?",)


def test_the_files_of_a_folder_are_time_steps_in_order(tmp_path: Path) -> None:
    array(tmp_path, authors(3), name="wiki_big_edit_20240220_20240301.json")
    array(tmp_path, authors(1), authors(2), name="wiki_big_edit_20240201_20240220.json")
    data = WikiBigEdit(path=str(tmp_path)).load()
    assert WikiBigEdit.order == "stream"
    assert [(r.id, r.target, r.step) for r in data.edits] == [
        ("1", "Person1", "20240201_20240220"),
        ("2", "Person2", "20240201_20240220"),
        ("3", "Person3", "20240220_20240301"),
    ]


def test_the_same_content_under_another_name_is_another_time_step(tmp_path: Path) -> None:
    steps = []
    for name in ("wiki_big_edit_20240201_20240220.json", "wiki_big_edit_20240220_20240301.json", "february.json"):
        steps.append(WikiBigEdit(path=array(tmp_path, authors(1), name=name)).load().edits[0].step)
    assert steps == ["20240201_20240220", "20240220_20240301", "february"]


@pytest.mark.parametrize("nothing", [None, "", " ", ...])
def test_optional_questions_may_be_null_blank_or_absent(tmp_path: Path, nothing: Any) -> None:
    names = ("rephrase", "personas", "mhop", "mhop_ans", "loc", "loc_ans", "subject", "tag")
    data = WikiBigEdit(path=array(tmp_path, authors(1, **dict.fromkeys(names, nothing)))).load()
    (request,) = data.edits
    assert (request.rephrases, request.portability, request.locality, request.subject) == ((), (), (), None)
    assert data.holdout == data.upstream == ()


def test_ultraeditbench_is_read_from_lines_as_its_script_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "UltraEditBench_2M.json"
    path.write_text("".join(json.dumps(ultraedit(number)) + "\n" for number in (1, 2)), encoding="utf-8")
    assert WikiBigEdit(path=str(path)).load() == WikiBigEdit(path=array(tmp_path, locft(1), locft(2))).load()
    path.write_text(json.dumps(ultraedit(1)) + "\n" + json.dumps(ultraedit(2, loc_ans=...)), encoding="utf-8")
    assert error_of(str(path)) == f"{path}:2: field 'loc_ans': is missing, while 'loc' is given"


@pytest.mark.parametrize("make", [authors, locft, ultraedit])
def test_the_target_of_locality_may_be_the_gold_answer(tmp_path: Path, make: Any) -> None:
    (request,) = WikiBigEdit(path=array(tmp_path, make(7)), locality_target="gold").load().edits
    assert [(probe.prompt, probe.target) for probe in request.locality] == [("Who leads Neighbour7?", "Other7")]


def test_a_question_that_is_edited_is_no_upstream(tmp_path: Path) -> None:
    path = array(tmp_path, locft(1, locality_prompt=locft(2)["prompt"]), locft(2), locft(3, locality_prompt="q"))
    assert [request.prompt for request in WikiBigEdit(path=path).load().upstream] == ["Who leads Neighbour2?", "q"]


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (authors, {"update": ...}, "field 'update': is missing"),
        (authors, {"ans": " "}, "field 'ans': is empty"),
        (authors, {"ans": ["a"]}, "field 'ans': should be text, not a list"),
        (authors, {"personas": 3}, "field 'personas': should be text, not the number 3"),
        (authors, {"mhop_ans": None}, "field 'mhop_ans': is missing, while 'mhop' is given"),
        (authors, {"mhop": ""}, "field 'mhop': is missing, while 'mhop_ans' is given"),
        (authors, {"loc_ans": ...}, "field 'loc_ans': is missing, while 'loc' is given"),
        (locft, {"prompt": ...}, "field 'prompt': is missing"),
        (locft, {"target_new": None}, "field 'target_new': should be text, not null"),
        (locft, {"subject": {}}, "field 'subject': should be text, not an object"),
        (
            locft,
            {"locality_ground_truth": ...},
            "field 'locality_ground_truth': is missing, while 'locality_prompt' is given",
        ),
    ],
)
def test_a_damaged_record_is_named_or_skipped_and_counted(
    tmp_path: Path, make: Any, change: dict[str, Any], says: str
) -> None:
    path = array(tmp_path, make(0), make(1, **change))
    assert error_of(path) == f"{path}:1: record 2: {says}"
    data = WikiBigEdit(path=path, on_error="skip").load()
    assert (len(data.edits), data.left_out) == (1, {"broken": 1})


def test_a_record_of_no_format_is_refused_with_all(tmp_path: Path) -> None:
    path = array(tmp_path, {"question": "q", "answer": "a"})
    assert error_of(path) == (
        f"{path}:1: record 1: is a record of none of the formats read here (the authors': ans, update; "
        f"LocFT: prompt, target_new; UltraEditBench: ans, prompt)"
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "stream=wikibigedit needs stream.path="),
        (
            {"path": "x", "locality_target": "golden"},
            "stream.locality_target=golden is not known",
        ),
        ({"path": "x", "max_new_tokens": 0}, "stream.max_new_tokens=0"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], names: str) -> None:
    with pytest.raises(UserError) as caught:
        WikiBigEdit(**options)
    assert str(caught.value).startswith(names)


@needs_shared
def test_the_real_file_is_read_whole() -> None:
    raw = json.loads((SHARED / "wikibigedit_locft.json").read_text(encoding="utf-8"))
    data = WikiBigEdit(path=str(SHARED / "wikibigedit_locft.json")).load()
    assert len(data.edits) == len(data.holdout) == len(raw) == 600
    for request, source in zip(data.edits, raw, strict=True):
        assert (request.prompt, request.target) == (source["prompt"], source["target_new"])
        assert (request.subject, request.rephrases) == (source["subject"], (source["rephrase_prompt"],))
    edited = {source["prompt"] for source in raw}
    assert {request.prompt for request in data.upstream} == {r["locality_prompt"] for r in raw} - edited
