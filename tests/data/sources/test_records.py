"""Records, the exception for bad ones, and captions from files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from semantic_routing.common.errors import BadData
from semantic_routing.data.sources.records import (
    ConcatRecords,
    Record,
    RecordSource,
    Sharded,
    captions_of,
    parse_json,
    texts,
)
from semantic_routing.data.sources.scan import SIZE


def test_the_exception_for_bad_data_can_be_pickled():
    error = BadData("truncated", "5 of 9 bytes", "0.tar", "0.tar/a")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, again.shard, again.key, again.detail) == ("truncated", "0.tar", "0.tar/a", "5 of 9 bytes")
    assert str(again) == "record '0.tar/a' of 0.tar: truncated: 5 of 9 bytes"
    assert str(BadData("truncated", "", "0.tar", "a")) == "record 'a' of 0.tar: truncated"
    assert str(BadData("too small", "1 x 1 pixels")) == "too small: 1 x 1 pixels"
    assert isinstance(again, ValueError)


def test_shards_are_consecutive():
    sharded = Sharded("x", ["a", "b", "c", "d"], [2, 0, 3, 1])
    assert len(sharded) == 6
    assert [sharded.locate(i) for i in range(6)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert sharded.shard_name(2) == "c"
    assert len(Sharded("x", [], [])) == 0
    for index in (-1, 6):
        with pytest.raises(IndexError, match="of 6 in x"):
            sharded.locate(index)


class Numbered(Sharded):
    """A source whose records' keys are their indices."""

    def read(self, index: int) -> Record:
        self.locate(index)
        return Record(f"{self.name}{index}", b"x", {})


def test_a_source_needs_only_shards_and_read():
    assert isinstance(Numbered("x", ["a"], [1]), RecordSource)
    assert not isinstance(Sharded("x", ["a"], [1]), RecordSource)


def test_several_sources_read_as_one():
    together = ConcatRecords([Numbered("x", ["a"], [2]), Numbered("y", [], []), Numbered("z", ["a", "b"], [1, 2])])
    assert [together.read(i).key for i in range(len(together))] == ["x0", "x1", "z0", "z1", "z2"]
    assert len(ConcatRecords([])) == 0


def test_dimensions_come_from_all_arrays_in_order():
    sizes = [np.array([(3, 4), (0, 0)], SIZE), np.zeros(0, SIZE), np.array([(7, 8)], SIZE)]
    found = Sharded("x", ["a", "b"], [1, 2], sizes).dimensions()
    np.testing.assert_array_equal(found, [[3, 4], [0, 0], [7, 8]])
    assert Sharded("x", ["a"], [3]).dimensions() is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", ("a cat",)),
        (["a", " ", "b", 3, None], ("a", "b")),
        ([], ()),
        (" \n", ()),
        (None, ()),
        (7, ()),
        ({"en": "a"}, ()),
        ("\ud800 half", ()),
    ],
)
def test_texts(value: object, expected: tuple[str, ...]):
    assert texts(value) == expected


def test_captions_of_files_by_their_keys():
    extra = '\ufeff{"caption": "a", "tags": ["b", "c"], "width": 3, "empty": "", "error": null, "txt": "other"}'
    found = captions_of(b"\xef\xbb\xbf two words \n", extra.encode())
    assert found == {"caption": ("a",), "tags": ("b", "c"), "txt": ("two words",)}
    assert captions_of(b"", b"") == {}
    assert captions_of(b" \n", b'["a", "b"]') == {}
    assert captions_of(b"", b'{"txt": "other"}') == {"txt": ("other",)}


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        (b"caf\xe9", b"", r"^\.txt: byte 4 is not UTF-8"),
        (b"a", b'{"a": ', r"^\.json: not JSON at column 7"),
        (b"a", b"\xff", r"^\.json: byte 1 is not UTF-8"),
        (b"a", b"[" * 100_000, r"^\.json: nested too deeply"),
    ],
)
def test_captions_that_cannot_be_read(text: bytes, extra: bytes, message: str):
    with pytest.raises(ValueError, match=message):
        captions_of(text, extra)


def test_json_errors_name_the_place():
    with pytest.raises(ValueError, match="line 2, column 1"):
        parse_json(b"[1,\n}")
