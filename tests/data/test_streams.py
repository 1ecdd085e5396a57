"""Rows of records: damaged ones are replaced by whole ones, the same everywhere, and told with their reason."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semantic_routing.common.errors import BadData, TrainingFailed
from semantic_routing.common.images.decode import Limits
from semantic_routing.data.captions import CaptionChoice
from semantic_routing.data.damage import Skipped
from semantic_routing.data.sources.records import Record, Sharded
from semantic_routing.data.streams import ATTEMPTS, Reading, RecordStream, Row


class Numbered(Sharded):
    """Records whose picture is of one colour, their number; those of ``bad`` are damaged."""

    def __init__(self, shards: Sequence[int], bad: Sequence[int] = (), sizes: np.ndarray | None = None) -> None:
        super().__init__("numbered", [f"{i}.tar" for i in range(len(shards))], shards)
        self.bad, self.sizes = set(bad), sizes

    def read(self, index: int) -> Record:
        shard, number = self.locate(index)
        key = f"{self.shard_name(shard)}/{number}"
        if index in self.bad:
            raise BadData("truncated", "by the test", self.shard_name(shard), key)
        width, height = (8, 8) if self.sizes is None else self.sizes[index].tolist()
        pixels = np.full((height, width, 3), index % 251, np.uint8)
        pixels[:, : width // 2] = 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return Record(key, file.getvalue(), {"txt": (f"number {index}", f"{index} it is")})

    def dimensions(self) -> np.ndarray | None:
        return self.sizes


def stream(source: Numbered, seed: int = 0, **changes: Any) -> RecordStream:
    how = {
        "size": 8, "window": 2, "choice": CaptionChoice(), "sidecar": None, "limits": Limits(), "flip": False,
        "multiple": 0,
    }  # fmt: skip
    return RecordStream([source], seed, Reading(**(how | changes)))


def epoch(rows: RecordStream, number: int = 0) -> list[Row]:
    return [rows.load(position) for position in range(number * len(rows), (number + 1) * len(rows))]


def same(one: Row, other: Row) -> bool:
    return np.array_equal(one.image, other.image) and one.__dict__ | {"image": 0} == other.__dict__ | {"image": 0}


def test_rows_are_their_records():
    rows = epoch(stream(Numbered([5, 9, 3])))
    assert sorted(row.sample for row in rows) == list(range(17))
    for row in rows:
        assert (row.image[:, 4:] == row.sample).all()
        assert row.caption in (f"number {row.sample}", f"{row.sample} it is")
        assert row.skipped == ()
    assert {row.caption.startswith("number") for row in rows} == {True, False}


def test_captions_change_between_epochs_and_pictures_are_mirrored_by_half():
    rows = stream(Numbered([40]), flip=True)
    first, second = ({row.sample: row for row in epoch(rows, number)} for number in (0, 1))
    assert 5 < sum(first[sample].caption != second[sample].caption for sample in first) < 35
    assert 5 < sum((first[sample].image[:, 0] == 255).all() for sample in first) < 35


def test_damaged_records_are_replaced_by_whole_ones_of_their_shard():
    source = Numbered([20, 20, 20], bad=[3, 4, 25, 59])
    rows = epoch(stream(source))
    own = {row.sample: row for row in rows}
    for row in rows:
        shown = int(row.image[0, -1, 0])
        if row.sample in source.bad:
            assert shown not in source.bad
            assert shown // 20 == row.sample // 20
            first = row.skipped[0]
            assert first.key == f"{row.sample // 20}.tar/{row.sample % 20}"
            assert (first.source, first.reason, first.stand_in) == ("numbered", "truncated", False)
            assert all(other.stand_in for other in row.skipped[1:])
            assert row.key.startswith(first.shard)
        else:
            assert (shown, row.skipped) == (row.sample, ())
    assert len(own) == 60
    assert all(same(row, again) for row, again in zip(rows, epoch(stream(source)), strict=True))


def test_a_damaged_record_moves_no_other_row():
    whole, broken = epoch(stream(Numbered([20, 20]))), epoch(stream(Numbered([20, 20], bad=[7])))
    assert [row.sample for row in whole if row.sample != 7] == [row.sample for row in broken if row.sample != 7]
    assert all(same(a, b) for a, b in zip(whole, broken, strict=True) if a.sample != 7)


def test_a_shard_of_nothing_but_damage_is_replaced_from_others():
    rows = epoch(stream(Numbered([4, 20, 20], bad=range(4))))
    assert all(4 <= int(row.image[0, -1, 0]) < 44 for row in rows)
    assert sum(not skipped.stand_in for row in rows for skipped in row.skipped) == 4


def test_nothing_but_damage_is_an_error_that_names_the_shard():
    with pytest.raises(
        TrainingFailed, match=rf"{ATTEMPTS} records of numbered .* shard [01]\.tar .*truncated \(by the"
    ):
        stream(Numbered([4, 4], bad=range(8))).load(0)


def test_streams_are_the_same_in_another_process():
    rows = stream(Numbered([5, 9, 3], bad=[2]))
    copy = pickle.loads(pickle.dumps(rows))
    assert all(same(a, b) for a, b in zip(epoch(rows), epoch(copy), strict=True))


def test_captions_to_watch_by_are_of_whole_records():
    captions = stream(Numbered([5, 5], bad=[1, 8])).captions(100)
    assert sorted(captions) == sorted(f"number {i}" for i in range(10) if i not in (1, 8))
    assert stream(Numbered([5, 5])).captions(3) == stream(Numbered([5, 5])).captions(10)[:3]


def test_a_bucket_has_each_of_its_records_once_an_epoch():
    sizes = np.array([(8, 8), (16, 9), (9, 16), (16, 9), (8, 8), (0, 0), (12, 12)] * 3, np.uint32)
    sizes[5::7] = (8, 8)
    rows = stream(Numbered([4, 10, 7], bad=[1], sizes=sizes), size=16, multiple=4)
    assert [rows.shapes[bucket][0] / rows.shapes[bucket][1] for bucket in range(3)] == [20 / 12, 1, 12 / 20]
    counts = Counter(rows.turns.locate(step)[0] for step in range(21))
    assert counts == {0: 3, 1: 12, 2: 6}
    seen = []
    for bucket, count in counts.items():
        loaded = [rows.load(position, bucket) for position in range(count)]
        assert {row.image.shape[:2] for row in loaded} == {rows.shapes[bucket]}
        seen += [row.sample for row in loaded]
        assert all(sizes[row.image[0, -1, 0]].tolist() == sizes[row.sample].tolist() or bucket == 1 for row in loaded)
    assert sorted(seen) == list(range(21))


def test_buckets_need_dimensions():
    with pytest.raises(ValueError, match="semroute data index --dimensions numbered"):
        stream(Numbered([4]), size=16, multiple=4)


def test_stand_ins_keep_their_own_reasons():
    skipped = stream(Numbered([2, 30], bad=[0, 1])).load
    reasons = [one for position in range(32) for one in skipped(position).skipped]
    assert all(isinstance(one, Skipped) and one.detail == "by the test" for one in reasons)
    assert {one.key for one in reasons} == {"0.tar/0", "0.tar/1"}
