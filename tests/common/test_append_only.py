"""Files that only grow: a length and a digest are enough to return to what they were."""

from pathlib import Path

import pytest

from grace_bench.common.append_only import AppendOnlyFile, Prefix


def written(path: Path, *contents: bytes) -> Prefix:
    file = AppendOnlyFile(path)
    file.open()
    for content in contents:
        file.append(content)
    prefix = file.sync()
    file.close()
    return prefix


def test_a_file_is_cut_back_to_its_prefix_and_grows_on_from_there_as_if_it_had_never_been_longer(
    tmp_path: Path,
) -> None:
    prefix = written(tmp_path / "a", b"one\n", b"two\n")
    (tmp_path / "a").write_bytes(b"one\ntwo\nthree\nfo")
    assert prefix.begins(tmp_path / "a")
    again = AppendOnlyFile(tmp_path / "a")
    again.start = prefix
    assert again.surplus() == b"three\nfo"
    again.open()
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\n"
    again.append(b"five\n")
    assert again.sync() == written(tmp_path / "b", b"one\ntwo\nfive\n")
    again.close()
    assert (tmp_path / "a").read_bytes() == b"one\ntwo\nfive\n"


def test_content_can_be_read_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    file = AppendOnlyFile(tmp_path / "sub" / "a")
    file.open()
    file.append(b"one\n")
    assert (tmp_path / "sub" / "a").read_bytes() == b"one\n"
    file.close()


def test_without_a_prefix_what_an_earlier_run_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"of an earlier run\n")
    assert written(tmp_path / "a") == Prefix()
    assert (tmp_path / "a").read_bytes() == b""


@pytest.mark.parametrize("content", [b"", b"one\ntw", b"one\nTwo\nthree\n", b"\none\ntwo\n"])
def test_a_file_that_was_cut_or_changed_does_not_begin_with_its_prefix(tmp_path: Path, content: bytes) -> None:
    prefix = written(tmp_path / "a", b"one\ntwo\n")
    (tmp_path / "a").write_bytes(content)
    assert not prefix.begins(tmp_path / "a")


def test_a_file_that_is_missing_begins_with_nothing_only(tmp_path: Path) -> None:
    prefix = written(tmp_path / "a", b"one\n")
    assert not prefix.begins(tmp_path / "b")
    assert Prefix().begins(tmp_path / "b")
