"""QAEdit in its three contexts, on made-up records and on the real file."""

import json
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.derived import is_answered_by_model
from grace_bench.errors import UserError
from grace_bench.streams.qaedit import QaEdit

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def record(number: int, /, **changes: Any) -> dict[str, Any]:
    made = {
        "id": number,
        "source": "NQ",
        "prompt": f"who wrote Book{number}",
        "target": f"Author{number}",
        "subject": f"Book{number}",
        "rephrase": f"Who is the author of Book{number}?",
        "locality": [
            {"loc": f"who painted Picture{number}", "loc_ans": f"Painter{number}"},
            {"loc": "when did it end", "loc_ans": "1994"},
        ],
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def array(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "qaedit.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return str(path)


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        QaEdit(**options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_question_its_rephrase_and_its_locality_questions_have_their_roles(tmp_path: Path) -> None:
    data = QaEdit(path=array(tmp_path, record(7), record(8))).load()
    first = data.edits[0]
    assert (first.id, first.prompt, first.target, first.subject) == ("NQ/7", "who wrote Book7", "Author7", "Book7")
    assert [(r.prompt, r.target, r.fact) for r in data.holdout][:1] == [
        ("Who is the author of Book7?", "Author7", "NQ/7")
    ]
    assert [(probe.prompt, probe.target) for probe in first.locality] == [
        ("who painted Picture7", None),
        ("when did it end", None),
    ]
    assert [r.prompt for r in data.upstream] == ["who painted Picture7", "when did it end", "who painted Picture8"]
    assert all(map(is_answered_by_model, data.upstream))


def test_the_gold_answers_may_be_the_targets_of_locality(tmp_path: Path) -> None:
    data = QaEdit(path=array(tmp_path, record(7)), locality_target="gold").load()
    assert [probe.target for probe in data.edits[0].locality] == ["Painter7", "1994"]
    assert all(map(is_answered_by_model, data.upstream))


def test_every_question_is_asked_in_the_same_context(tmp_path: Path) -> None:
    path = array(tmp_path, record(7), record(8))

    def asked(context: str) -> list[str]:
        stream = QaEdit(path=path, context=context)
        assert stream.chat == (context == "chat")
        data = stream.load()
        probes = [probe.prompt for request in data.edits for probe in request.locality]
        assert all(request.subject in request.prompt for request in data.edits if request.subject)
        return [*(request.prompt for request in (*data.edits, *data.holdout, *data.upstream)), *probes]

    bare = asked("bare")
    assert asked("chat") == bare
    instructed = asked("instruction")
    shared = {text.replace(question, "{}") for text, question in zip(instructed, bare, strict=True)}
    (context,) = shared
    assert context.count("{}") == 1
    assert context != "{}"


def test_each_source_has_ids_of_its_own(tmp_path: Path) -> None:
    data = QaEdit(path=array(tmp_path, record(1), record(1, source="TQA"), record(2, source=...))).load()
    assert [request.id for request in data.edits] == ["NQ/1", "TQA/1", "2"]
    path = array(tmp_path, record(1), record(1, source="TQA"), record(1))
    assert error_of(path=path) == f"{path}:1: record 3: field 'id': 'NQ/1' was used before, at {path}:1: record 1"


@pytest.mark.parametrize("nothing", [None, "", ...])
def test_subject_rephrase_and_source_may_be_null_blank_or_absent(tmp_path: Path, nothing: Any) -> None:
    path = array(tmp_path, record(1, **dict.fromkeys(("subject", "rephrase", "source"), nothing), locality=...))
    data = QaEdit(path=path).load()
    assert (data.edits[0].subject, data.edits[0].id, data.edits[0].locality) == (None, "1", ())
    assert data.holdout == data.upstream == ()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": ...}, "field 'prompt': is missing"),
        ({"target": ""}, "field 'target': is empty"),
        ({"target": 1994}, "field 'target': should be text, not the number 1994"),
        ({"id": None}, "field 'id': should be a whole number, not null or should be text, not null"),
        ({"locality": {"loc": "q"}}, "field 'locality': should be a list, not an object"),
        ({"locality": [{"loc": "q"}]}, "field 'locality[0].loc_ans': is missing"),
        ({"locality": [{"loc": "q", "loc_ans": " "}]}, "field 'locality[0].loc_ans': is empty"),
        ({"rephrase": ["q"]}, "field 'rephrase': should be text, not a list"),
    ],
)
def test_a_damaged_record_is_named_or_skipped_and_counted(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = array(tmp_path, record(0), record(1, **change))
    assert error_of(path=path) == f"{path}:1: record 2: {says}"
    data = QaEdit(path=path, on_error="skip").load()
    assert (len(data.edits), data.left_out) == (1, {"broken": 1})


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "stream=qaedit needs stream.path="),
        (
            {"path": "x", "context": "instructions"},
            "stream.context=instructions is not known; did you mean 'instruction'?",
        ),
        ({"path": "x", "locality_target": "old"}, "stream.locality_target=old is not known"),
        ({"path": "x", "max_new_tokens": True}, "stream.max_new_tokens=True"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], names: str) -> None:
    assert error_of(**options).startswith(names)


@needs_shared
def test_the_real_file_is_read_whole() -> None:
    raw = json.loads((SHARED / "qaedit.json").read_text(encoding="utf-8"))
    data = QaEdit(path=str(SHARED / "qaedit.json")).load()
    assert len(data.edits) == len(data.holdout) == len(raw) == 400
    for request, source in zip(data.edits, raw, strict=True):
        assert (request.prompt, request.target, request.subject) == (
            source["prompt"],
            source["target"],
            source["subject"],
        )
        assert [probe.prompt for probe in request.locality] == [question["loc"] for question in source["locality"]]
    edited = {source["prompt"] for source in raw}
    asked = {question["loc"] for source in raw for question in source["locality"]}
    assert {request.prompt for request in data.upstream} == asked - edited
