"""Streams made from records: formats, folders, the hub, what is left out and what is kept."""

import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

from grace_bench.data.artifacts import cache_folder
from grace_bench.data.benchmark import fingerprint_requests
from grace_bench.errors import UserError
from grace_bench.streams._records import Files, Format, Hub, Reader
from grace_bench.streams.jsonl import Jsonl


class Question(BaseModel):
    question: str
    answer: str


class Pair(BaseModel):
    src: str
    trg: str


FORMATS: list[Format[Any]] = [
    Format("questions", Question, frozenset({"question", "answer"})),
    Format("pairs", Pair, frozenset({"src", "trg"})),
]


def texts(source: Files | Hub, *, on_error: str = "raise") -> list[tuple[str, str]]:
    def convert(record: Any) -> tuple[str, str]:
        return record.place, getattr(record.value, "question", None) or record.value.src

    return Reader(on_error=on_error).read(source, FORMATS, convert)


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def requests(path: Path, n: int = 3) -> str:
    return write(path, *({"id": str(i), "prompt": f"prompt {i}", "target": f"target {i}"} for i in range(n)))


def test_the_first_whole_record_decides_the_format_and_a_later_one_of_another_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"src": "x", "trg": "y", "question": "extra"})
    assert texts(Files(path)) == [(f"{path}:1", "x")]
    path = write(tmp_path / "b.jsonl", {"question": "q", "answer": "a"}, {"src": "x", "trg": "y"})
    with pytest.raises(UserError, match=r"b\.jsonl:2: field 'question': is missing"):
        texts(Files(path))


def test_a_file_of_no_known_format_is_told_the_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"other": 1})
    with pytest.raises(UserError) as caught:
        texts(Files(path))
    assert str(caught.value) == (
        f"{path}:1: is a record of none of the formats read here (questions: answer, question; pairs: src, trg)"
    )


def test_a_record_that_may_be_of_two_formats_is_told_what_both_lack_and_leaves_the_choice_to_the_next(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q", "src": "x"}, {"src": "y", "trg": ""}, {"src": "z", "trg": ""})
    with pytest.raises(UserError) as caught:
        texts(Files(path))
    assert str(caught.value) == f"{path}:1: field 'answer' or 'trg': is missing"
    assert texts(Files(path), on_error="skip") == [(f"{path}:2", "y"), (f"{path}:3", "z")]


def test_a_broken_record_decides_no_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "q"}, {"src": "y", "trg": ""})
    with pytest.raises(UserError, match=r"a\.jsonl:1: field 'answer': is missing"):
        texts(Files(path))
    assert texts(Files(path), on_error="skip") == [(f"{path}:2", "y")]


def test_every_file_of_a_folder_has_its_own_format(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", {"question": "q", "answer": ""})
    second = write(tmp_path / "b.jsonl", {"src": "x", "trg": ""}, {"question": "q", "answer": ""})
    with pytest.raises(UserError, match=r"b\.jsonl:2: field 'src': is missing"):
        texts(Files(str(tmp_path)))
    assert texts(Files(str(tmp_path)), on_error="skip") == [(f"{first}:1", "q"), (f"{second}:1", "x")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    second = write(tmp_path / "b.jsonl", {"question": "second", "answer": ""})
    (tmp_path / "a.json").write_text('[{"question": "first", "answer": ""}]', encoding="utf-8")
    (tmp_path / "README.md").write_text("not a record", encoding="utf-8")
    assert texts(Files(str(tmp_path))) == [(f"{tmp_path / 'a.json'}:1: record 1", "first"), (f"{second}:1", "second")]


def test_parquet_is_read_and_a_broken_one_named(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    pq.write_table(pa.table({"question": ["q", None], "answer": ["a", "b"]}), path)
    with pytest.raises(UserError, match=r"part\.parquet: record 2: field 'question': is missing"):
        texts(Files(str(path)))
    assert texts(Files(str(path)), on_error="skip") == [(f"{path}: record 1", "q")]
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match=r"part\.parquet: cannot be read as Parquet"):
        texts(Files(str(path)))


def test_the_hubs_rows_go_the_way_of_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "repo"
    folder.mkdir()
    write(folder / "train.jsonl", {"question": "q", "answer": "a"}, {"question": "p", "answer": None})
    # A folder stands where the hub's id would.
    hub = Hub(str(folder), "train", option="stream.path")
    with pytest.raises(UserError, match=r"train: record 2: field 'answer': is missing"):
        texts(hub)
    assert texts(hub, on_error="skip") == [(f"{folder}/train: record 1", "q")]
    assert hub.digest == Hub(str(folder), "train", option="stream.path").digest


def test_a_hub_out_of_reach_is_told_at_once_with_the_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    started = time.perf_counter()
    with pytest.raises(UserError) as caught:
        texts(Hub("nobody/nothing-here", "test", option="stream.path"))
    assert time.perf_counter() - started < 10
    message = str(caught.value)
    assert message.startswith("data set nobody/nothing-here cannot be loaded (")
    assert "split test from https://huggingface.co/datasets/nobody/nothing-here/tree/" in message
    assert message.endswith("give their place as stream.path=")
    assert "\n" not in message


BROKEN = [
    b'{"id": "x", "prompt": "p"}',
    b'{"id": "x", "prompt": 3, "target": "t"}',
    b'{"id": "x", "prompt": " ", "target": "t"}',
    b'{"id": "0", "prompt": "p", "target": "again"}',
    b'{"id": "x", "prompt": "caf\xe9", "target": "t"}',
    b'{"id": "x", "prompt": ',
    b"[]",
]


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_record_ends_the_load_or_is_left_out_and_counted(tmp_path: Path, line: bytes) -> None:
    path = Path(requests(tmp_path / "r.jsonl"))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, lines[2]]))
    with pytest.raises(UserError) as caught:
        Jsonl(path=str(path)).load()
    assert str(caught.value).startswith(f"{path}:3: ")
    data = Jsonl(path=str(path), on_error="skip").load()
    assert [request.id for request in data.edits] == ["0", "1", "2"]
    assert data.left_out == {"broken": 1}


def test_labels_that_the_model_lacks_are_kept_apart_from_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *({"id": str(n), "prompt": "p", "target": n} for n in range(4)))
    stream = Jsonl(path=path, task="classification", on_error="skip")
    assert len(stream.load().edits) == 4
    stream.n_model_labels = 2
    assert (len(stream.load().edits), stream.load().left_out) == (2, {"broken": 2})
    stream.n_model_labels = None
    assert len(stream.load().edits) == 4


def test_where_every_record_is_broken_there_is_nothing_to_edit(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"id": "x"}, {"id": "y"})
    with pytest.raises(UserError, match=r"stream 'jsonl' has no requests left to edit in .*/r.jsonl \(broken: 2\)"):
        Jsonl(path=path, on_error="skip").load()


def test_what_was_read_is_found_again_by_content_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))
    path = requests(tmp_path / "r.jsonl")
    read = Jsonl(path=path).load()
    (kept,) = (cache_folder() / "streams" / "jsonl").iterdir()
    again = Jsonl(path=path).load()
    assert (again, fingerprint_requests(again)) == (read, fingerprint_requests(read))
    # A copy elsewhere has the same content; another task is another setting; a changed file is read anew.
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(path).read_bytes())
    assert Jsonl(path=str(copy)).load() == read
    assert list(kept.parent.iterdir()) == [kept]
    Jsonl(path=path, task="qa").load()
    requests(Path(path), 5)
    assert len(Jsonl(path=path).load().edits) == 5
    assert len(list(kept.parent.iterdir())) == 3


def test_a_cache_that_is_broken_or_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "cache"))
    path = requests(tmp_path / "r.jsonl")
    read = Jsonl(path=path).load()
    (kept,) = (cache_folder() / "streams" / "jsonl").iterdir()
    for damaged in (kept.read_bytes()[:-20], b"{}", b"[1]"):
        kept.write_bytes(damaged)
        assert Jsonl(path=path).load() == read
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("GRACE_BENCH_CACHE", str(tmp_path / "file"))
    assert Jsonl(path=path).load() == read


def test_a_long_read_reports_how_far_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *({"question": "q" * 400_000, "answer": "a"} for _ in range(8)))
    told: list[tuple[str, int, int]] = []
    Reader(progress=lambda *step: told.append(step)).read(Files(path), FORMATS, lambda record: record.number)
    total = Path(path).stat().st_size
    assert len(told) >= 2
    assert {what for what, _, _ in told} == {f"reading {path}"}
    assert told[-1][1:] == (total, total)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
