"""The reader of records: what it forgives, and the one line it gives for anything else."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from grace_bench.errors import UserError
from grace_bench.streams._lines import Record
from grace_bench.streams._records import Files, Format, Reader


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: str


class Schema(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str
    number: int = 0
    either: str | int = ""
    inner: tuple[Inner, ...] = ()


def write(folder: Path, content: str | bytes) -> str:
    path = folder / "records.jsonl"
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return str(path)


def read(path: str, *, on_error: str = "raise") -> list[Record[Schema]]:
    schema = Format("test", Schema, frozenset({"id"}))
    return Reader(on_error=on_error).read(Files(path), [schema], lambda record: record, id_fields=("id",))


def error_of(path: str) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def ids(path: str) -> list[tuple[str, str]]:
    return [(r.place.removeprefix(path), r.value.id) for r in read(path)]


def test_bom_windows_line_ends_blank_lines_and_a_missing_last_newline_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path, b'\xef\xbb\xbf{"id": "a"}\r\n\r\n   \n{"id": "b"}')
    assert ids(path) == [(":1", "a"), (":4", "b")]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\x0c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    record = json.dumps({"id": f"a{separator}b"}, ensure_ascii=separator < "\x20")
    path = write(tmp_path, f"{record}\n{{}}\n")
    assert error_of(path).startswith(f"{path}:2: field 'id'")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "x"', "is not JSON"),
        ("{'id': 'x'}", "is not JSON"),
        ('{"id": "x"} {"id": "y"}', "is not JSON"),
        ('{"id": "x", "number": NaN}', "NaN is no JSON number"),
        ('["x"]', "should be a JSON object, not a list"),
        ("null", "should be a JSON object, not null"),
        ("{}", "field 'id': is missing"),
        ('{"id": 3}', "field 'id': should be text, not the number 3"),
        ('{"id": null}', "field 'id': should be text, not null"),
        ('{"id": "x", "number": "3"}', "field 'number': should be a whole number, not text"),
        ('{"id": "x", "number": true}', "field 'number': should be a whole number, not true or false"),
        ('{"id": "x", "number": 3.0}', "field 'number': should be a whole number"),
        (
            '{"id": "x", "either": []}',
            "field 'either': should be text, not a list or should be a whole number, not a list",
        ),
        ('{"id": "x", "numbr": 3}', "field 'numbr': is not a known field; did you mean 'number'?"),
        ('{"id": "x", "inner": [{"prompt": "p"}, {}]}', "field 'inner[1].prompt': is missing"),
        ('{"id": "x", "inner": [{"prompt": "p", "a": 1}]}', "field 'inner[0].a': is not a known field"),
        ('{"id": "x", "number": 1, "number": 2}', "field 'number': is given twice"),
        ('{"id": "x\\u0000y"}', "field 'id': holds a NUL character"),
        ('{"id": "x\0y"}', "NUL"),
        ('{"id": "x\\ud800"}', "field 'id': holds half of a surrogate pair"),
        ('{"id": "x", "inner": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"id": "x", "number": ' + "9" * 5000 + "}", "is not JSON"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_file_line_and_field(tmp_path: Path, line: str, says: str) -> None:
    path = write(tmp_path, f'{{"id": "fine"}}\n\n{line}\n{{"id": "later"}}\n')
    message = error_of(path)
    assert message.startswith(f"{path}:3: ")
    assert says in message


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"id": "a"}\n{"id": "caf\xe9"}\n')
    assert error_of(path) == f"{path}:2: field 'id': is not UTF-8 (byte 12 is 0xe9)"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (
            b'{"id": "a", "inner": [{"prompt": "\xc3\xa9"}, {"prompt": "\xff"}]}',
            "field 'inner[1].prompt': is not UTF-8 (byte 53",
        ),
        (b'{"id": "a", "caf\xe9": 1}', "field 'caf': is not UTF-8 (byte 17 is 0xe9)"),
        (b'{"id": "caf\xe9"', "is not UTF-8 (byte 12 is 0xe9)"),
        (b'{"id": "a"}, \xe9', "is not UTF-8 (byte 14 is 0xe9)"),
        (b"\x1f\x8b\x08", "is not UTF-8 (byte 2 is 0x8b)"),
        (b'{"id": "\\udce9", "number": 1, "number": 2}', "field 'number': is given twice"),
    ],
)
def test_the_field_of_bytes_that_are_not_utf8_is_named_where_the_line_is_json_otherwise(
    tmp_path: Path, line: bytes, says: str
) -> None:
    path = write(tmp_path, b'{"id": "fine"}\n' + line + b"\n")
    assert error_of(path).startswith(f"{path}:2: {says}")


def test_an_id_that_comes_back_is_named_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a"}\n{"id": "b"}\n\n{"id": "a"}\n')
    assert error_of(path) == f"{path}:4: field 'id': 'a' was used before, at {path}:1"


@pytest.mark.parametrize("content", ["", "\n \r\n", "\ufeff"])
def test_a_file_without_records_is_an_error(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert error_of(path) == f"{path}: holds no records"


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path: Path) -> None:
    assert error_of(str(tmp_path / "none.jsonl")) == f"{tmp_path / 'none.jsonl'}: no such file"
    assert error_of(str(tmp_path)) == f"{tmp_path}: the folder holds no .json, .jsonl or .parquet file"


def test_an_array_is_read_too_and_its_records_are_counted_from_one(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff\r\n [\n {"id": "a"},\n {"id": "b"}]\n')
    assert ids(path) == [(":3: record 1", "a"), (":4: record 2", "b")]
    damaged = write(tmp_path, '[{"id": "a"},\n{\n"id": 5}]')
    assert error_of(damaged) == f"{damaged}:2: record 2: field 'id': should be text, not the number 5"
    assert error_of(write(tmp_path, " [\n ] ")) == f"{path}: holds no records"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('\n[\n{"id": "a"},\n{"id": b}\n]\n', ":4: is not JSON (Expecting value, column 8)"),
        ('[\n{"id": "a"}\n{"id": "b"}]', ":3: is not JSON (Expecting ',' delimiter, column 1)"),
        ('[{"id": "a"},\n]', ":2: is not JSON (Expecting value, column 1)"),
        ('[{"id": "a"},\n{"id": ', ":2: is not JSON (Expecting value, column 7)"),
        ('[{"id": "a"},', ":1: is not JSON (Expecting value, column 14)"),
        ('[{"id": "a"}', ":1: is not JSON (Expecting ',' delimiter, column 13)"),
        ('[{"id": "a"}\n]\n\n{"id": "b"}', ":4: is not JSON (Extra data, column 1)"),
        ('[{"id": "a"},\n{"id": "\0"}]', ":2: holds a NUL character"),
        ('\f[{"id": "a"}]', ":1: is not JSON (Expecting value, column 1)"),
        ('[{"id": "a"},\n' + "[" * 100_000, ":2: record 2: is nested too deeply"),
    ],
)
def test_broken_syntax_in_an_array_ends_the_load_with_the_line_in_the_file(
    tmp_path: Path, content: str, says: str
) -> None:
    path = write(tmp_path, content)
    assert error_of(path).startswith(f"{path}{says}")
    with pytest.raises(UserError) as caught:
        read(path, on_error="skip")
    assert str(caught.value) == error_of(path)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (b'{"id":\n "caf\xe9"}', ":4: record 2: field 'id': is not UTF-8 (byte 6 is 0xe9)"),
        (b'{"id": "a", "number": 1, "number": 2}', ":3: record 2: field 'number': is given twice in one object"),
        (b'{"id": "x", "number": NaN}', ":3: record 2: is not JSON (NaN is no JSON number)"),
        (b'{"id": "x", "number": ' + b"9" * 5000 + b"}", ":3: record 2: is not JSON (Exceeds the limit"),
        (b'{"id": "x\\ud800"}', ":3: record 2: field 'id': holds half of a surrogate pair"),
        (b'"x"', ":3: record 2: should be a JSON object, not text"),
        (b'{"id": "a"}', ":3: record 2: field 'id': 'a' was used before, at PATH:2: record 1"),
    ],
)
def test_a_broken_record_of_an_array_is_named_or_left_out(tmp_path: Path, item: bytes, says: str) -> None:
    path = write(tmp_path, b'[\n{"id": "a"},\n' + item + b',\n{"id": "b"}]')
    assert error_of(path).startswith(f"{path}{says.replace('PATH', path)}")
    assert [record.value.id for record in read(path, on_error="skip")] == ["a", "b"]


def test_a_long_array_on_one_line_with_many_broken_bytes_is_read_in_one_pass(tmp_path: Path) -> None:
    items = (b'{"id": "%d", "either": "%s\xff"}' % (number, b"x" * 500) for number in range(20_000))
    path = write(tmp_path, b'[{"id": "a"}, ' + b", ".join(items) + b"]")
    started = time.perf_counter()
    assert [record.value.id for record in read(path, on_error="skip")] == ["a"]
    # A position that is counted from the beginning each time takes minutes.
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize("content", ['{\n"id": "a"}', '\n{"id":\n"a"\n}\n', '{"id": "a",\r\n"inner": [\n]}'])
def test_one_object_over_several_lines_is_a_record_wherever_its_first_line_ends(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, content)
    assert ids(path) == [(":2" if content.startswith("\n") else ":1", "a")]


def test_a_first_line_that_is_cut_costs_no_other(tmp_path: Path) -> None:
    path = write(tmp_path, '{"id": "a", "inner":\n{"id": "b"}\n{"id": "c"}\n')
    assert error_of(path).startswith(f"{path}:1: is not JSON")
    assert [record.value.id for record in read(path, on_error="skip")] == ["b", "c"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["id", "number", "either", "inner", "prompt"]) | st.text(max_size=4)
any_line = st.dictionaries(keys, json_values, max_size=4).map(json.dumps) | json_values.map(json.dumps) | st.text()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(any_line.map(lambda line: line.encode("utf-8", "replace")) | st.binary(), max_size=4))
def test_whatever_a_file_holds_it_is_read_or_refused_in_one_line(tmp_path: Path, lines: list[bytes]) -> None:
    path = write(tmp_path, b"\n".join(lines))
    try:
        records = read(path)
    except UserError as error:
        message = str(error)
    else:
        assert len({record.value.id for record in records}) == len(records) > 0
        return
    assert message.startswith(path)
    assert len(message.splitlines()) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_line_is_named(tmp_path: Path, data: st.DataObject) -> None:
    lines = [json.dumps({"id": str(index), "number": index}).encode() for index in range(6)]
    number = data.draw(st.integers(0, 5))
    cut = data.draw(st.integers(1, len(lines[number]) - 1))
    lines[number] = lines[number][:cut]
    path = write(tmp_path, b"\n".join(lines))
    assert error_of(path).startswith(f"{path}:{number + 1}: ")
