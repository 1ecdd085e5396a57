"""Parquet files as img2dataset and Hugging Face write them."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semantic_routing.data.index import open_records
from semantic_routing.data.parquet import ParquetRecords, scan_parquet
from semantic_routing.data.records import DamagedRecord, RecordSource


def picture(width: int, height: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, columns: dict[str, Any], row_group: int = 2) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def test_img2datasets_layout(tmp_path: Path):
    for shard in range(2):
        columns = {
            "key": [f"{shard}{i:04d}" for i in range(5)],
            "jpg": [b"%d-%d" % (shard, i) for i in range(5)],
            "txt": [f"caption {i}" if i else None for i in range(5)],
            "url": ["http://x"] * 5,
            "width": [3] * 5,
        }
        write(tmp_path / f"{shard:05d}.parquet", columns)
    source = open_records(str(tmp_path))
    assert isinstance(source, RecordSource)
    assert list(source.shards) == [2, 2, 1, 2, 2, 1]
    assert source.shard_name(3) == "00001.parquet"
    records = [source.read(i) for i in range(10)]
    assert [r.image for r in records] == [b"%d-%d" % (shard, i) for shard in range(2) for i in range(5)]
    assert records[7].key == "00001.parquet/10002"
    assert records[7].captions == {"txt": ("caption 2",), "url": ("http://x",)}
    assert records[5].captions == {"url": ("http://x",)}
    with pytest.raises(IndexError):
        source.read(10)


def test_hugging_faces_layout(tmp_path: Path):
    columns = {
        "image": [
            {"bytes": b"a", "path": "a.png"},
            {"bytes": None, "path": "b.png"},
            None,
            {"bytes": b"", "path": None},
        ],
        "captions": [["one", "two"], [], None, ["three"]],
        "mask": [b"m"] * 4,
    }
    source = open_records(str(write(tmp_path / "train.parquet", columns)))
    record = source.read(0)
    assert (record.key, record.image, record.captions) == ("train.parquet/0", b"a", {"captions": ("one", "two")})
    for index, reason in ((1, "no picture"), (2, "no picture"), (3, "zero bytes")):
        with pytest.raises(DamagedRecord) as caught:
            source.read(index)
        assert (caught.value.reason, caught.value.key) == (reason, f"train.parquet/{index}")


def test_only_columns_in_need_are_read_and_few_row_groups_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    columns = {"jpg": [b"x"] * 8, "txt": ["a"] * 8, "embedding": [[0.5] * 8] * 8, "mask": [b"m"] * 8}
    path = write(tmp_path / "a.parquet", columns)
    read: list[tuple[int, list[str]]] = []
    original = pq.ParquetFile.read_row_group

    def noted(self: Any, i: int, columns: list[str], **options: Any) -> Any:
        read.append((i, columns))
        return original(self, i, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    source = open_records(str(path))
    for index in (0, 1, 2, 3, 0, 4, 5, 2):
        source.read(index)
    assert read == [(0, ["jpg", "txt"]), (1, ["jpg", "txt"]), (2, ["jpg", "txt"]), (1, ["jpg", "txt"])]


def test_threads_and_other_processes_read_the_same(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"jpg": [b"%d" % i for i in range(20)]})
    source = open_records(str(path))
    source.read(3)
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(again.read, [*range(20)] * 3))
    assert [int(record.image) for record in found] == [*range(20)] * 3


def test_a_damaged_row_group_costs_its_own_records_only(tmp_path: Path):
    rng = np.random.default_rng(0)
    path = write(tmp_path / "a.parquet", {"jpg": [rng.bytes(500) for _ in range(6)]})
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = open_records(str(path))
    reasons = []
    for index in range(6):
        try:
            source.read(index)
        except DamagedRecord as error:
            reasons.append((index, error.reason, error.key))
    assert reasons == [(2, "unreadable", "a.parquet/2"), (3, "unreadable", "a.parquet/3")]


def test_what_is_no_such_file_is_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is no whole Parquet file"):
        open_records(str(tmp_path))
    write(tmp_path / "a.parquet", {"url": ["http://x"], "width": [3]})
    with pytest.raises(ValueError, match=r"no column of pictures.*its columns: url, width"):
        open_records(str(tmp_path / "a.parquet"))


def test_a_scan_looks_inside_if_asked(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"image": [picture(3), None, b"", b"text", picture(7)]})
    found = scan_parquet(str(path))
    assert (len(found.rows), found.damaged) == (5, {})
    found = scan_parquet(str(path), look_inside=True)
    assert found.rows["width"].tolist() == [3, 0, 0, 0, 7]
    assert found.damaged == {"no picture": 1, "zero bytes": 1, "not an image": 1}
    assert [example["place"] for example in found.examples] == [1, 2, 3]
    assert scan_parquet(str(tmp_path / "none.parquet")).damaged == {"unreadable": 1}


def test_urls(tmp_path: Path):
    storage = fsspec.filesystem("memory")
    columns = {"jpg": [b"%d" % i for i in range(3)], "txt": ["a", "b", "c"]}
    storage.pipe("/parquet-test/a.parquet", write(tmp_path / "a.parquet", columns).read_bytes())
    source = ParquetRecords("x", ["memory://parquet-test/a.parquet"])
    assert source.read(2).captions == {"txt": ("c",)}
    storage.rm("/parquet-test", recursive=True)
