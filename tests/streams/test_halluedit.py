"""HalluEditBench's CSV, on made-up rows and on the real file."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from grace_bench.data.derived import is_answered_by_model
from grace_bench.errors import UserError
from grace_bench.streams import Probe
from grace_bench.streams.halluedit import HalluEdit

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data sets are not at {SHARED}")


def row(number: int, /, **changes: Any) -> dict[str, str]:
    made = {
        "topic": "geography_volcano",
        "subject": f"Mount, {number}",
        "relation": "country",
        "object": f'the "Land{number}", West',
        "question": f"What is the country of Mount, {number}?",
        "output_some_model": "Elsewhere",
        "multiple_choices": "['Chile', 'Peru', \"Côte d'Ivoire\"]",
        "paraphrased_question": f"Where does Mount, {number} stand?",
        "locality_question": f"How high is Mount, {number}?",
        "reversed_relation_question": f"Which mountain is in Land{number}?",
        "question_2hop": f"What is the capital of the country of Mount, {number}?",
        "answer_2hop": f"Town{number}",
        "question_3hop": "What is the river there?",
        "answer_3hop": "Ishim",
        **changes,
    }
    return {name: value for name, value in made.items() if value is not ...}


def text_of(*rows: dict[str, str]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write(folder: Path, content: str | bytes, name: str = "volcanoes.csv") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def error_of(path: str | None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        HalluEdit(path=path, **options).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_question_of_a_row_has_its_role(tmp_path: Path) -> None:
    data = HalluEdit(path=write(tmp_path, text_of(row(7), row(8)))).load()
    first = data.edits[0]
    assert (first.id, first.prompt, first.target) == (
        "1",
        "What is the country of Mount, 7?",
        'the "Land7", West',
    )
    assert first.subject == "Mount, 7"
    assert [(r.prompt, r.target, r.fact) for r in data.holdout][:1] == [
        ("Where does Mount, 7 stand?", 'the "Land7", West', "1")
    ]
    assert first.portability == (
        Probe(prompt="Which mountain is in Land7?", target="Mount, 7"),
        Probe(prompt="What is the capital of the country of Mount, 7?", target="Town7"),
        Probe(prompt="What is the river there?", target="Ishim"),
    )
    assert first.locality == (Probe(prompt="How high is Mount, 7?"),)
    assert [r.prompt for r in data.upstream] == ["How high is Mount, 7?", "How high is Mount, 8?"]
    assert all(map(is_answered_by_model, data.upstream))
    assert first.metadata == {"topic": "geography_volcano", "relation": "country"}


@pytest.mark.parametrize("nothing", ["", " ", ...])
def test_optional_cells_may_be_empty_and_their_columns_absent(tmp_path: Path, nothing: Any) -> None:
    names = [name for name in row(1) if name not in ("subject", "object", "question")]
    data = HalluEdit(path=write(tmp_path, text_of(row(1, **dict.fromkeys(names, nothing))))).load()
    (request,) = data.edits
    assert (request.rephrases, request.locality, request.portability, request.metadata) == ((), (), (), {})
    assert data.holdout == data.upstream == ()


def test_line_breaks_blank_lines_a_byte_order_mark_and_an_index_column_are_read(tmp_path: Path) -> None:
    wanted = HalluEdit(path=write(tmp_path, text_of(row(1, answer_2hop="two\nlines"), row(2)))).load()
    assert wanted.edits[0].portability[1].target == "two\nlines"
    text = text_of({"": "0", **row(1, answer_2hop="two\nlines")}, {"": "1", **row(2)})
    path = write(tmp_path, b"\xef\xbb\xbf" + text.replace("\n", "\r\n").replace("two\r\n", "two\n").encode() + b"\r\n")
    assert HalluEdit(path=path).load() == wanted


def test_a_folder_of_topics_is_read_and_other_files_in_it_are_not(tmp_path: Path) -> None:
    write(tmp_path, text_of(row(2)), "b.csv")
    write(tmp_path, text_of(row(1)), "a.csv")
    write(tmp_path, "{}", "notes.json")
    assert [r.subject for r in HalluEdit(path=str(tmp_path)).load().edits] == ["Mount, 1", "Mount, 2"]
    (tmp_path / "empty").mkdir()
    assert error_of(str(tmp_path / "empty")) == f"{tmp_path / 'empty'}: the folder holds no .csv file"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": ""}, "field 'question': is empty"),
        ({"object": " "}, "field 'object': is empty"),
        ({"subject": ""}, "field 'subject': is empty"),
        ({"answer_2hop": ""}, "field 'answer_2hop': is missing, while 'question_2hop' is given"),
        ({"question_3hop": ""}, "field 'question_3hop': is missing, while 'answer_3hop' is given"),
    ],
)
def test_a_damaged_row_is_named_by_its_first_line_or_skipped_and_counted(
    tmp_path: Path, change: dict[str, str], says: str
) -> None:
    path = write(tmp_path, text_of(row(0, relation="two\nlines"), row(1, **change)))
    assert error_of(path) == f"{path}:4: {says}"
    data = HalluEdit(path=path, on_error="skip").load()
    assert (len(data.edits), data.left_out) == (1, {"broken": 1})


def test_a_row_with_too_many_or_too_few_cells_is_named(tmp_path: Path) -> None:
    text = text_of(row(0), row(1))
    path = write(tmp_path, text.rstrip("\n") + ",more\n")
    assert error_of(path) == f"{path}:3: has 15 cells for 14 columns"
    path = write(tmp_path, text + "a,b\n")
    assert error_of(path) == f"{path}:4: has 2 cells for 14 columns"
    assert HalluEdit(path=path, on_error="skip").load().left_out == {"broken": 1}


def test_bytes_that_are_not_utf_8_are_named_with_their_field(tmp_path: Path) -> None:
    content = text_of(row(0), row(1)).encode()
    path = write(tmp_path, content.replace(b"Town1", b"T\xffwn1"))
    assert error_of(path) == f"{path}:3: field 'answer_2hop': is not UTF-8 (a byte is 0xff)"
    assert HalluEdit(path=path, on_error="skip").load().left_out == {"broken": 1}
    path = write(tmp_path, content.replace(b"subject", b"s\xffbject", 1))
    assert error_of(path) == f"{path}:1: the name of column 2 is not UTF-8 (a byte is 0xff)"


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", ": holds no records"),
        ("question,object,subject\n", ": holds no records"),
        ("question,object,question\na,b,c\n", ":1: two columns are named 'question'"),
        ('question,object,subject\nq,o,s\nq,"o,s\nq,o,s\n', ":3: is not CSV (unexpected end of data)"),
        ('question,object,subject\nq,"o"o,s\n', ":2: is not CSV (',' expected after '\"')"),
        ("question,object,subject\nq,o\0,s\n", ":2: holds a NUL character, so it is not CSV"),
    ],
)
def test_a_file_that_is_no_table_ends_the_load_whatever_is_skipped(
    tmp_path: Path, content: str, says: str, on_error: str
) -> None:
    path = write(tmp_path, content)
    assert error_of(path, on_error=on_error) == f"{path}{says}"


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, text_of(row(0, object=...)))
    assert error_of(path) == f"{path}:2: field 'object': is missing"


def test_a_missing_file_and_a_missing_path_are_named(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "no.csv")) == f"{tmp_path / 'no.csv'}: no such file"
    assert error_of(None).startswith("stream=halluedit needs stream.path=FILE")
    assert error_of("x", max_new_tokens="32").startswith("stream.max_new_tokens=32")


@needs_shared
def test_the_real_file_is_read_whole() -> None:
    path = SHARED / "halluedit_geography_volcano.csv"
    with path.open(encoding="utf-8", newline="") as file:
        raw = list(csv.DictReader(file))
    data = HalluEdit(path=str(path)).load()
    assert len(data.edits) == len(data.holdout) == len(raw) == 60
    for request, source in zip(data.edits, raw, strict=True):
        assert (request.prompt, request.target) == (source["question"], source["object"])
        assert (request.subject, request.rephrases) == (source["subject"], (source["paraphrased_question"],))
        assert [(probe.prompt, probe.target) for probe in request.portability] == [
            (source["reversed_relation_question"], source["subject"]),
            *((source[f"question_{n}hop"], source[f"answer_{n}hop"]) for n in range(2, 7)),
        ]
        assert [probe.prompt for probe in request.locality] == [source["locality_question"]]
