"""Files are complete or absent, whatever interrupts their writing."""

from pathlib import Path

import pytest

from grace_bench.common.files import atomic_path, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("content", "expected"), [("naïve\r\n", "naïve\r\n".encode()), (b"\x00\xff", b"\x00\xff")])
def test_text_and_bytes_replace_a_file_and_leave_nothing_beside_it(
    tmp_path: Path, content: str | bytes, expected: bytes
) -> None:
    (tmp_path / "a").write_bytes(b"before")
    write_atomically(tmp_path / "a", content)
    write_atomically(tmp_path / "sub" / "deeper" / "a", content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "sub" / "deeper" / "a").read_bytes() == expected
    assert names(tmp_path) == ["a", "sub"]
    assert names(tmp_path / "sub" / "deeper") == ["a"]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_stays_as_it_was_until_all_of_the_new_one_is_written(
    tmp_path: Path, shared: bool, error: type[BaseException]
) -> None:
    (tmp_path / "a").write_bytes(b"before")

    def write() -> None:
        with atomic_path(tmp_path / "a", shared=shared) as partial:
            partial.write_bytes(b"half of it")
            assert (tmp_path / "a").read_bytes() == b"before"
            raise error

    with pytest.raises(error):
        write()
    assert (tmp_path / "a").read_bytes() == b"before"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_with_everything_in_it_and_without_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "stale").write_bytes(b"")
    with atomic_path(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "one").write_bytes(b"1")
        (partial / "sub").mkdir()
        (partial / "sub" / "two").write_bytes(b"2")
        assert not (tmp_path / "a").exists()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["one", "sub"]
    assert (tmp_path / "a" / "sub" / "two").read_bytes() == b"2"


def test_processes_that_share_a_file_do_not_write_into_the_same_partial_one(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as alone, atomic_path(tmp_path / "a", shared=True) as shared:
        assert alone != shared
        alone.write_bytes(b"1")
        shared.write_bytes(b"2")
    assert names(tmp_path) == ["a"]
