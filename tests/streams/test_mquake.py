"""MQuAKE's cases: what is edited together, and what follows from it; on made-up records and on the real file."""

import json
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.benchmark import EditBenchmark
from grace_bench.errors import UserError
from grace_bench.streams.mquake import Mquake

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def rewrite(subject: str, **changes: Any) -> dict[str, Any]:
    made = {
        "prompt": "{} is a citizen of",
        "relation_id": "P27",
        "target_new": {"str": "Croatia", "id": "Q224"},
        "target_true": {"str": "Peru", "id": "Q419"},
        "subject": subject,
        "question": f"What is the country of citizenship of {subject}?",
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def case(number: int, /, n_edits: int = 1, **changes: Any) -> dict[str, Any]:
    subjects = [f"Person{number}-{index}" for index in range(n_edits)]
    made = {
        "case_id": number,
        "requested_rewrite": [rewrite(subject) for subject in subjects],
        "questions": [f"{asked} rules the country of Person{number}-0?" for asked in ("Who", "Which one", "What")],
        "answer": "Old",
        "answer_alias": ["Older"],
        "new_answer": f"New{number}",
        "new_answer_alias": [f"Newer{number}", "Newest"],
        "single_hops": [],
        "new_single_hops": [
            {"question": rewrite(subjects[0])["question"], "answer": "Croatia", "answer_alias": ["CRO", " "]},
            {"question": "Who rules Croatia?", "answer": f"New{number}", "answer_alias": []},
        ],
        "orig": {"triples": []},
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def array(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "mquake.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        Mquake(**options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_rewrite_of_a_case_is_an_edit_of_one_group(tmp_path: Path) -> None:
    data = Mquake(path=array(tmp_path, case(1, 2), case(2))).load()
    assert [(r.id, r.group, r.prompt, r.target, r.subject) for r in data.edits] == [
        ("1/0", "1", "Person1-0 is a citizen of", "Croatia", "Person1-0"),
        ("1/1", "1", "Person1-1 is a citizen of", "Croatia", "Person1-1"),
        ("2/0", "2", "Person2-0 is a citizen of", "Croatia", "Person2-0"),
    ]
    assert [request.answers for request in data.edits] == [("CRO",), (), ("CRO",)]
    assert all(request.contrast == ("Croatia", "Peru") for request in data.edits)
    assert [(r.prompt, r.target) for r in data.holdout][:1] == [
        ("What is the country of citizenship of Person1-0?", "Croatia")
    ]


def test_the_questions_of_a_case_belong_to_its_last_edit_and_to_one_group(tmp_path: Path) -> None:
    first, second = Mquake(path=array(tmp_path, case(1, 2))).load().edits
    assert first.portability == ()
    assert [probe.prompt for probe in second.portability] == case(1)["questions"]
    assert {(probe.target, probe.answers, probe.group) for probe in second.portability} == {
        ("New1", ("Newer1", "Newest"), "1")
    }


@pytest.mark.parametrize("seed", range(3))
def test_no_order_separates_the_edits_of_a_case(tmp_path: Path, seed: int) -> None:
    path = array(tmp_path, *(case(number, 1 + number % 3) for number in range(9)))
    ids = [request.id for request in EditBenchmark.from_stream(Mquake(path=path), seed=seed).data.edits]
    for number in range(9):
        first = ids.index(f"{number}/0")
        wanted = [f"{number}/{index}" for index in range(1 + number % 3)]
        assert ids[first : first + len(wanted)] == wanted


def test_aliases_hops_old_answers_and_single_questions_may_be_absent(tmp_path: Path) -> None:
    bare = case(
        1,
        new_answer_alias=...,
        new_single_hops=...,
        requested_rewrite=[rewrite("Person1-0", target_true=..., question=...)],
    )
    data = Mquake(path=array(tmp_path, bare)).load()
    (request,) = data.edits
    assert (request.answers, request.contrast, request.rephrases, data.holdout) == ((), None, (), ())
    assert request.portability[0].answers == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"requested_rewrite": ...}, "field 'requested_rewrite': is missing"),
        ({"requested_rewrite": []}, "field 'requested_rewrite': is empty"),
        ({"requested_rewrite": rewrite("P")}, "field 'requested_rewrite': should be a list, not an object"),
        ({"questions": []}, "field 'questions': is empty"),
        ({"questions": ["q", ""]}, "field 'questions[1]': is empty"),
        ({"questions": "q"}, "field 'questions': should be a list, not text"),
        ({"new_answer": None}, "field 'new_answer': should be text, not null"),
        ({"new_answer_alias": [1]}, "field 'new_answer_alias[0]': should be text, not the number 1"),
        ({"new_single_hops": [{"question": "q"}]}, "field 'new_single_hops[0].answer': is missing"),
        ({"case_id": 0}, "field 'case_id': '0' was used before, at "),
        (
            {"requested_rewrite": [rewrite("P"), rewrite("Q", prompt="is a citizen of")]},
            "field 'requested_rewrite[1].prompt': should hold {} once, where the subject goes",
        ),
        (
            {"requested_rewrite": [rewrite("P", target_new={"id": "Q224"})]},
            "field 'requested_rewrite[0].target_new.str': is missing",
        ),
        (
            {"requested_rewrite": [rewrite("P", target_new="Croatia")]},
            "field 'requested_rewrite[0].target_new': should be an object, not text",
        ),
    ],
)
def test_a_damaged_case_is_named_or_skipped_and_counted(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = array(tmp_path, case(0), case(1, **change))
    assert error_of(path=path).startswith(f"{path}:1: record 2: {says}")
    data = Mquake(path=path, on_error="skip").load()
    assert (len(data.edits), data.left_out) == (1, {"broken": 1})


@pytest.mark.parametrize(
    ("options", "names"),
    [({}, "stream=mquake needs stream.path="), ({"path": "x", "max_new_tokens": 0}, "stream.max_new_tokens=0")],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], names: str) -> None:
    assert error_of(**options).startswith(names)


@needs_shared
def test_the_real_file_is_read_whole() -> None:
    raw = json.loads((SHARED / "mquake_cf.json").read_text(encoding="utf-8"))
    data = Mquake(path=str(SHARED / "mquake_cf.json")).load()
    assert len({request.group for request in data.edits}) == len(raw) == 120
    assert len(data.edits) == sum(len(source["requested_rewrite"]) for source in raw) == 150
    asked = [request for request in data.edits if request.portability]
    assert len(asked) == len(raw)
    for request, source in zip(asked, raw, strict=True):
        assert request.group == str(source["case_id"])
        assert [probe.prompt for probe in request.portability] == source["questions"]
        assert {(probe.target, probe.answers) for probe in request.portability} == {
            (source["new_answer"], tuple(source["new_answer_alias"]))
        }
    # Every edited answer of the real cases has a hop that names its aliases, if only an empty list.
    assert sum(bool(request.answers) for request in data.edits) > 100
