"""Parquet files as img2dataset and Hugging Face write them."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.decode import Limits
from semantic_routing.data.captions import CaptionChoice
from semantic_routing.data.sources import row_groups
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.sources.parquet import ParquetRecords, scan_parquet
from semantic_routing.data.sources.records import RecordSource
from semantic_routing.data.streams import Reading, RecordStream


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
        with pytest.raises(BadData) as caught:
            source.read(index)
        assert (caught.value.reason, caught.value.key) == (reason, f"train.parquet/{index}")


CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SHOTS, TEXTS = [b"a", None, b"c"], ["one", None, "three"]
CELLS = [{"bytes": shot, "path": "x.png"} for shot in SHOTS]
IMAGE_ARRAYS = {
    "bytes": pa.array(SHOTS, pa.binary()),
    "large bytes": pa.array(SHOTS, pa.large_binary()),
    "views of bytes": pa.array(SHOTS, pa.binary_view()),
    "bytes of one length": pa.array(SHOTS, pa.binary(1)),
    "categories of bytes": pa.array(SHOTS, pa.binary()).dictionary_encode(),
    "cells of Hugging Face": pa.array(CELLS, CELL),
    "cells of views": pa.array(CELLS, pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])),
    "lists of one cell": pa.array([[cell] for cell in CELLS], pa.list_(CELL)),
    "lists of one picture": pa.array([[shot] for shot in SHOTS], pa.large_list(pa.binary())),
    "fixed lists of one": pa.array([[shot] for shot in SHOTS], pa.list_(pa.binary(), 1)),
    "an extension type": pa.ExtensionArray.from_storage(
        pa.opaque(pa.binary(), "picture", "some vendor"), pa.array(SHOTS, pa.binary())
    ),
}
TEXT_ARRAYS = {
    "large strings": pa.array(TEXTS, pa.large_string()),
    "views of strings": pa.array(TEXTS, pa.string_view()),
    "categories": pa.array(TEXTS).dictionary_encode(),
    "lists": pa.array([[text] for text in TEXTS], pa.list_(pa.string())),
    "lists of views": pa.array([[text] for text in TEXTS], pa.list_(pa.string_view())),
    "fixed lists": pa.array([[text] for text in TEXTS], pa.list_(pa.string(), 1)),
    "views of lists": pa.array([[text] for text in TEXTS], pa.list_view(pa.string())),
}


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a Parquet file's columns are categories, views, lists of one image, extension or fixed-size types",
    then="they are read as images and captions",
)
@pytest.mark.parametrize("kind", [*IMAGE_ARRAYS, *TEXT_ARRAYS])
@pytest.mark.parametrize("kept", [2**29, 0])
def test_arrows_types(kind: str, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_groups, "KEPT_BYTES", kept)
    images = IMAGE_ARRAYS.get(kind, IMAGE_ARRAYS["bytes"])
    path = write(tmp_path / "a.parquet", {"image": images, "text": TEXT_ARRAYS.get(kind, pa.array(TEXTS))}, 3)
    source = open_records(str(path))
    for index, (shot, text) in ((0, (b"a", "one")), (2, (b"c", "three"))):
        record = source.read(index)
        assert (record.image, record.captions) == (shot, {"text": (text,)})
    with pytest.raises(BadData, match="no picture"):
        source.read(1)
    assert scan_parquet(str(path), look_inside=True).damaged == {"no picture": 1, "not an image": 2}


def test_a_row_of_several_pictures_is_damaged(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"images": [[b"a", b"b"], [b"c"], []], "text": ["x"] * 3})
    source = open_records(str(path))
    assert source.read(1).image == b"c"
    for index, reason in ((0, "several pictures"), (2, "no picture")):
        with pytest.raises(BadData, match=reason):
            source.read(index)
    assert scan_parquet(str(path), look_inside=True).damaged["several pictures"] == 1


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a Parquet file's column of pictures or captions has an unsuitable type",
    then="the file is refused in one line that names the column and its type",
)
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [[1, 2]], "text": ["a"]}, r"no column of pictures.*image \(list<element: int64>\), text \(string\)"),
        ({"image": ["a.png"], "text": ["a"]}, r"image .a\.png. is not a file"),  # a manifest
        ({"image": pa.nulls(1), "text": ["a"]}, r"no column of pictures.*image \(null\)"),
        ({"image": [b"a"], "text": [{"en": "a"}]}, r"column 'text' is of the type struct<en: string>"),
        ({"image": [b"a"], "key": ["k"], "caption": [[["a"]]]}, r"column 'caption' is of the type list<"),
    ],
)
def test_types_that_are_refused(columns: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ValueError, match=said):
        open_records(str(write(tmp_path / "a.parquet", columns)))


def test_a_caption_that_is_not_utf8_is_damage_and_a_column_of_nulls_is_ignored(tmp_path: Path):
    texts = pa.Array.from_buffers(pa.string(), 2, [*pa.array(["ok", "??"]).buffers()[:2], pa.py_buffer(b"ok\xff\xfe")])
    columns = {"image": [b"a", b"b"], "text": texts, "prompt": pa.nulls(2)}
    source = open_records(str(write(tmp_path / "a.parquet", columns)))
    assert source.read(0).captions == {"text": ("ok",)}
    with pytest.raises(BadData, match=r"bad captions.*'text' is not UTF-8"):
        source.read(1)


def noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[str]]]:
    """Record the row groups and columns of all further reads."""
    read: list[tuple[list[int], list[str]]] = []
    original = pq.ParquetFile.iter_batches

    def noted(self: Any, rows: int, *, row_groups: list[int], columns: list[str], use_threads: bool) -> Any:
        read.append((row_groups, list(columns)))
        return original(self, rows, row_groups=row_groups, columns=columns, use_threads=use_threads)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    return read


def test_only_needed_columns_are_read_and_the_last_used_row_groups_are_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    columns = {"jpg": [b"x"] * 8, "txt": ["a"] * 8, "embedding": [[0.5] * 8] * 8, "mask": [b"m"] * 8}
    source = ParquetRecords("x", [str(write(tmp_path / "a.parquet", columns))])
    source.keep(2)
    read = noted_reads(monkeypatch)
    for index in (0, 1, 2, 3, 0, 4, 5, 2):
        source.read(index)
    assert read == [([group], ["jpg", "txt"]) for group in (0, 1, 2, 1)]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a Parquet file is read in training order, which draws from many row groups at a time",
    then="each is read once per window; 512 MiB of them are kept in memory, and larger ones in temporary files",
)
@pytest.mark.parametrize("kept", [2**29, 20_000, 0])
@pytest.mark.parametrize("window", [1, 4, 16])
def test_training_order_reads_each_row_group_once(
    window: int, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(row_groups, "KEPT_BYTES", kept)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    shades = [picture(8, 4 + i) for i in range(40)]
    columns = {"image": shades, "text": [str(i) for i in range(40)]}
    sources = [ParquetRecords("x", [str(write(tmp_path / f"{i}.parquet", columns, 4))]) for i in range(2)]
    how = Reading(
        size=4, window=window, choice=CaptionChoice(("text",)), sidecar=None, limits=Limits(), flip=False, multiple=0
    )
    stream = pickle.loads(pickle.dumps(RecordStream(sources, 0, how)))  # as it comes to a worker process
    read = noted_reads(monkeypatch)
    captions = [stream.load(position).caption for position in range(80)]
    assert sorted(map(int, captions)) == sorted([*range(40)] * 2)
    assert len(read) == 20  # two files of ten row groups
    assert sorted(os.listdir(tmp_path)) == ["0.parquet", "1.parquet"]  # no temporary file is left


ALONE = """
import os, sys, threading
import fsspec
from semantic_routing.data.sources.parquet import ParquetRecords
from semantic_routing.data.sources.parquet import scan_parquet

def threads():
    named = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return named.count(open("/proc/self/comm").read())  # Arrow's inherit the name, that of its allocator does not

path, before = sys.argv[1], threads()
fsspec.filesystem("memory").pipe("/x/a.parquet", open(path, "rb").read())
for place in (path, "memory://x/a.parquet"):
    source = ParquetRecords("x", [place])
    worker = threading.Thread(target=source.read, args=(0,))
    worker.start()
    worker.join()
    source.read(1)
    scan_parquet(place, look_inside=True)
print(threads() - before)
sys.exit(5)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted as Linux lists them")
@pytest.mark.behaviour(
    "Surroundings",
    when="a command ends, with an error or without, soon after it read Parquet from disk or a URL",
    then="it ends with its own exit code, because no thread of Arrow is left that could abort it",
)
def test_no_thread_of_arrow_outlives_a_read(tmp_path: Path):
    path = write(tmp_path / "a.parquet", {"image": [os.urandom(2**20) for _ in range(4)], "text": ["a"] * 4})
    ended = subprocess.run([sys.executable, "-c", ALONE, str(path)], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (5, "0\n"), ended.stderr


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
        except BadData as error:
            reasons.append((index, error.reason, error.key))
    assert reasons == [(2, "unreadable", "a.parquet/2"), (3, "unreadable", "a.parquet/3")]


def test_a_file_that_is_not_parquet_or_has_no_pictures_is_named(tmp_path: Path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"a\.parquet is not a complete Parquet file"):
        open_records(str(tmp_path))
    write(tmp_path / "a.parquet", {"url": ["http://x"], "width": [3]})
    with pytest.raises(ValueError, match=r"no column of pictures.*its columns: url \(string\), width"):
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
