"""Files and folders are written completely or not at all, and reading errors are one line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from semantic_routing.common.files import (
    check_writable,
    hash_files,
    read_json,
    read_json_lines,
    read_text,
    write_text,
    written_whole,
)


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    with written_whole(path) as scratch:
        scratch.write_text("complete")
        assert not path.exists()
        assert scratch.parent == path.parent  # on the same disk, so that renaming is atomic
    assert path.read_text() == "complete"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write_half() -> None:
        with written_whole(path) as scratch:
            scratch.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_written_at_once_and_replaces_no_folder_with_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        place = tmp_path / "folder"
        try:
            with written_whole(place) as scratch:
                scratch.mkdir()
                (scratch / name).touch()
        except ValueError as error:
            assert str(error) == f"cannot write {place}: Directory not empty"  # noqa: PT017
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["folder", "folder/first"]


def test_places_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"^cannot write {tmp_path}/file/run: {tmp_path}/file is a file$"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"^cannot read the prompts .*/f: No such file or directory$"),
        (b"caf\xe9", r"/f is not UTF-8 text \(byte 3\); save it as UTF-8$"),
        (b"{", r"/f is not the prompts: it is not JSON \(Expecting"),
    ],
)
def test_reading_errors_name_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "f", "the prompts")


def test_lines_of_json_are_counted_from_one(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text('{"a": 1}\n\n[2]\n')
    assert read_json_lines(path, "the rows") == [{"a": 1}, [2]]
    path.write_text('1\n\n{"a": \n')
    with pytest.raises(ValueError, match=r"is not the rows: line 3 is not JSON"):
        read_json_lines(path, "the rows")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfa star")
    assert read_text(tmp_path / "f", "it") == "a star"


def test_files_are_hashed_in_order_of_their_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "ba"]
    for path in paths:
        path.write_text(path.name * 2**20)
    expected = hashlib.sha256(b"a" * 2**20 + b"b" * 2**20).hexdigest()
    assert hash_files(paths) == hash_files(reversed(paths)) == expected
