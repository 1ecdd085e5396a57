"""Indices and opening data by its path: a damaged or outdated index is refused; data opens the same without one."""

from __future__ import annotations

import json
import logging
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semantic_routing.data.sources.discover import Data, discover
from semantic_routing.data.sources.index import DEFAULT, INDEX, Index, default_folder, open_indexed, open_records
from semantic_routing.data.sources.index_writer import build
from semantic_routing.data.sources.records import RecordSource
from semantic_routing.data.sources.storage import (
    Arrays,
    Reader,
    absolute,
    everything_below,
    expand,
    shard_names,
    stat,
)
from tests.helpers.data_files import archive, picture, records


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write three shards of 3, 0 and 4 records in img2dataset's layout."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, count in enumerate((3, 0, 4)):
        (folder / f"{number:05d}.tar").write_bytes(archive(records(count)))
        (folder / f"{number:05d}.parquet").write_bytes(b"what img2dataset knows of the shard")
        (folder / f"{number:05d}_stats.json").write_text("{}")
    return folder


def rows_written(index: Path, paths: list[str], **options: Any) -> list[str]:
    """Build an index; return the names of the files of data whose rows that wrote."""
    for path in index.glob("*.npy"):
        os.utime(path, (0, 0))
    build(paths, index, **options)
    return sorted(path.name.rpartition("-")[0] for path in index.glob("*.npy") if path.stat().st_mtime)


def garble(path: Path) -> None:
    """Replace a file's content, with the same size and times: a scan would find nothing but damage."""
    before = path.stat()
    path.write_bytes(b"x" * before.st_size)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def same(one: RecordSource, other: RecordSource) -> bool:
    everything = [[source.read(i) for i in range(len(source))] for source in (one, other)]
    return everything[0] == everything[1] and list(one.shards) == list(other.shards)


# -- opening ---------------------------------------------------------------------------------------------------


def test_shards_open_with_an_index_as_without(shards: Path, tmp_path: Path):
    plain = open_records(str(shards))
    assert list(plain.shards) == [3, 0, 4]
    assert plain.name == str(shards)
    assert plain.read(3).key == "00002.tar/000000000"
    build([str(shards)], tmp_path / "index")
    indexed = open_records(str(shards), tmp_path / "index")
    assert same(plain, indexed)
    assert same(plain, pickle.loads(pickle.dumps(indexed)))
    assert same(plain, open_records(str(tmp_path / "index")))
    some = open_records(f"{shards}/0000[12].tar", tmp_path / "index")
    assert list(some.shards) == [0, 4]
    assert same(some, open_records(f"{shards}/{{00001..00002}}.tar"))


def test_the_index_in_the_datas_folder_is_used_instead_of_a_scan(shards: Path):
    place = default_folder(str(shards))
    assert place == shards / DEFAULT
    assert place == default_folder(f"{shards}/*.tar") == default_folder(str(shards / "00000.tar"))
    assert default_folder("memory://x/a.tar") is None
    build([str(shards)], place)
    garble(shards / "00002.tar")
    assert len(open_records(str(shards))) == 7
    assert len(open_records(str(shards / "00002.tar"))) == 4


def test_an_index_of_changed_files_is_refused(shards: Path, tmp_path: Path):
    index = tmp_path / "index"
    build([str(shards)], index)
    path = shards / "00002.tar"
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(whole[:-512])
    os.utime(path, ns=times)
    with pytest.raises(ValueError, match=rf"00002\.tar has changed since .*run: semroute data index --out {index}"):
        open_records(str(shards), index)
    path.write_bytes(whole)
    os.utime(path, ns=(times[0], times[1] + 1))
    with pytest.raises(ValueError, match=r"00002\.tar has changed"):
        open_records(str(shards), index)
    os.utime(path, ns=times)
    assert len(open_records(str(shards), index)) == 7
    (shards / "00003.tar").write_bytes(archive(records(1)))
    with pytest.raises(ValueError, match=r"lacks .*00003\.tar \(1 in all\); run: semroute data index"):
        open_records(str(shards), index)


def test_a_damaged_index_is_refused(shards: Path, tmp_path: Path):
    index = tmp_path / "index"
    build([str(shards)], index)
    part = next(index.glob("00002.tar-*.npy"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00002\.tar-\w+\.npy is missing or damaged; run: semroute data index"):
        open_records(str(shards), index)
    for content, message in (
        ('{"format": "other"}', "format is not"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": "semantic-routing index 1"}', "damaged"),
        ('{"format": "semantic-routing index 1", "entries": [{"path": "x"}]}', "is missing and has no default"),
    ):
        (index / INDEX).write_text(content)
        with pytest.raises(ValueError, match=message):
            Index(index)
    with pytest.raises(ValueError, match="holds no index; write one"):
        Index(tmp_path)


def test_rows_are_never_unpickled(shards: Path, tmp_path: Path):
    index = tmp_path / "index"
    build([str(shards)], index)
    part = next(index.glob("00002.tar-*.npy"))
    np.save(part, np.array([{"a": 1}] * 4, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        open_records(str(shards), index)


def test_what_a_path_means(shards: Path, tmp_path: Path):
    tars = [str(shards / f"{i:05d}.tar") for i in range(3)]
    assert discover(str(shards)) == Data("tar", tars, {})
    assert discover(str(shards.parent)) == Data("tar", tars, {})
    for wrong, message in (
        (str(shards / "*.webp"), "does not exist"),
        (str(shards / "{00003..00004}.tar"), "does not exist"),
        (str(shards / "0*[0-9].*"), r"several kinds \(parquet, tar\)"),
        (str(shards / "*.json"), "several manifests"),
    ):
        with pytest.raises(ValueError, match=message):
            discover(wrong)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is not .*no random access"):
        discover(str(tmp_path / "a.tar.gz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_records(str(tmp_path / "empty"))


def test_everything_indexed_together_opens_together(shards: Path, tmp_path: Path):
    pictures, parquet, listed = tmp_path / "pictures", tmp_path / "a.parquet", tmp_path / "listed"
    for folder in (pictures, listed):
        folder.mkdir()
        Image.new("RGB", (5, 3)).save(folder / "a.png")
    pq.write_table(pa.table({"jpg": [picture(), picture(1)]}), parquet)
    (listed / "metadata.jsonl").write_text('{"image": "a.png", "text": "black"}')
    index = tmp_path / "index"
    paths = [str(path) for path in (pictures, shards, parquet, listed)]
    report = build(paths, index, look_inside=True)
    assert (report["files"], report["records"]) == (6, 11)
    sources = open_indexed(index)
    assert [len(source) for source in sources] == [7, 2, 1, 1]
    sizes = [source.dimensions() for source in sources if hasattr(source, "dimensions")]
    assert sizes[0] is None  # nothing in the tars is a picture
    assert [size.tolist() for size in sizes[1:]] == [[[8, 6], [8, 6]], [[5, 3]], [[5, 3]]]
    assert report["damaged"] == {"not an image": 7, "no caption": 1}
    assert sources[0].damaged == {"not an image": 7}
    with pytest.raises(ValueError, match="several kinds of data"):
        open_records(str(index))
    for path in (pictures, parquet, listed):
        assert same(open_records(str(path)), open_records(str(path), index))
    Image.new("RGB", (5, 3)).save(pictures / "b.png")
    with pytest.raises(ValueError, match="pictures has changed"):
        open_records(str(pictures), index)


def test_a_scan_without_an_index_reports_what_it_leaves_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for number in range(17):
        (tmp_path / f"{number:05d}.tar").write_bytes(archive([("a.txt", b"alone"), ("b.jpg", b"x")]))
    with caplog.at_level(logging.WARNING):
        source = open_records(str(tmp_path))
    assert len(source) == 17
    assert f"semroute data index {tmp_path}" in caplog.text
    assert "17 no picture" in caplog.text


# -- building --------------------------------------------------------------------------------------------------


def test_unchanged_files_are_not_scanned_again(shards: Path, tmp_path: Path):
    index, tars = tmp_path / "index", ["00000.tar", "00001.tar", "00002.tar"]
    assert rows_written(index, [str(shards)]) == tars
    assert rows_written(index, [str(shards)]) == []
    (shards / "00001.tar").write_bytes(archive(records(2)))
    assert rows_written(index, [str(shards), str(shards / "*.tar")]) == ["00001.tar"]
    assert rows_written(index, [str(shards)], look_inside=True) == tars
    assert rows_written(index, [str(shards)]) == []  # an index with dimensions serves without them
    garble(shards / "00002.tar")
    assert build([str(shards)], index)["records"] == 9


@pytest.mark.parametrize("hurt", ["cut rows", "no rows", "no entry", "cut entry", "other rows", "half-written"])
def test_a_stopped_or_damaged_build_is_resumed(shards: Path, tmp_path: Path, hurt: str):
    index = tmp_path / "index"
    report = build([str(shards)], index)
    before = {path.name: path.read_bytes() for path in index.iterdir() if path.suffix == ".npy"}
    rows = next(index.glob("00002.tar-*.npy"))
    entry = rows.with_suffix(".json")
    if hurt == "cut rows":
        rows.write_bytes(rows.read_bytes()[:-7])
    elif hurt == "no rows":
        rows.unlink()
    elif hurt == "no entry":
        entry.unlink()
    elif hurt == "cut entry":
        entry.write_text(entry.read_text()[:30])
    elif hurt == "other rows":
        np.save(rows, np.zeros(4))
    else:  # as after a kill: rows under a temporary name, no entry, no list
        rows.rename(index / f".{rows.name}.partial-1")
        entry.unlink()
        (index / INDEX).unlink()
    garble(shards / "00000.tar")
    assert rows_written(index, [str(shards)]) == ["00002.tar"]
    assert build([str(shards)], index) == report
    after = {path.name: path.read_bytes() for path in index.iterdir() if path.suffix == ".npy"}
    assert {name: data for name, data in after.items() if ".partial" not in name} == before
    assert len(open_records(str(shards), index)) == 7


def test_several_processes_write_the_same_index(shards: Path, tmp_path: Path):
    reports = [build([str(shards)], tmp_path / f"index{workers}", workers=workers) for workers in (1, 2)]
    assert reports[0] == reports[1]
    assert same(open_records(str(shards), tmp_path / "index1"), open_records(str(shards), tmp_path / "index2"))


def test_the_report_names_what_is_broken(shards: Path, tmp_path: Path):
    whole = (shards / "00002.tar").read_bytes()
    (shards / "00002.tar").write_bytes(whole[:2000])
    (shards / "00003.tar").write_bytes(b"")
    (shards / "00004.tar").write_bytes(b"no tar at all" * 100)
    (shards / "00005.tar").write_bytes(archive([(f"{i}.txt", b"alone") for i in range(50)]))
    index = tmp_path / "index"
    report = build([str(shards)], index)
    assert report["damaged"] == {"no picture": 50, "truncated": 1, "zero bytes": 1, "bad header": 1}
    assert report["damaged_total"] == 53
    examples = report["examples"]
    assert [Path(example["file"]).name for example in examples if example["reason"] != "no picture"] == [
        "00002.tar",
        "00003.tar",
        "00004.tar",
    ]
    assert sum(example["reason"] == "no picture" for example in examples) == 20
    written = json.loads((index / "report.json").read_text())
    assert written["damaged"] == report["damaged"]
    assert "semantic-routing" in written["manifest"]["versions"]
    source = open_records(str(shards), index)
    assert source.damaged == report["damaged"]


def test_a_manifest_with_bad_rows_is_reported_row_by_row(tmp_path: Path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    lines = ['{"image": "a.png", "text": "x"}', "{", '{"image": "b.png", "text": "x"}', '{"image": "a.png"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    report = build([str(tmp_path)], tmp_path / "index", look_inside=True)
    assert report["records"] == 1
    assert report["damaged"] == {"bad captions": 2, "missing file": 1}
    assert [example["place"] for example in report["examples"]] == [2, 3, 4]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.json").write_text("{")
    assert build([str(tmp_path)], tmp_path / "index")["damaged"] == {"unreadable": 1}


def test_a_build_that_cannot_start_says_why(shards: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="workers is 0"):
        build([str(shards)], tmp_path / "index", workers=0)
    with pytest.raises(ValueError, match="does not exist"):
        build([str(shards / "nothing")], tmp_path / "index")
    with pytest.raises(ValueError, match="is a file"):
        build([str(shards)], shards / "00000.tar" / "index")


# -- files -----------------------------------------------------------------------------------------------------


@contextmanager
def http_server(files: dict[str, bytes]) -> Iterator[str]:
    """Serve files, with range requests as every storage has them."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            data = files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            wanted = self.headers.get("Range")
            part = data
            if wanted:
                first, last = wanted.removeprefix("bytes=").split("-")
                part = data[int(first) : int(last) + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{hash(data)}"')
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_shards_behind_urls(shards: Path, tmp_path: Path):
    plain = open_records(str(shards))
    storage = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        storage.pipe(f"/index-test/{path.name}", path.read_bytes())
    urls = [f"memory://index-test/{part}" for part in ("", "*.tar", "{00000..00002}.tar")]
    for url in urls:
        assert same(plain, open_records(url))
    build([urls[0]], tmp_path / "memory")
    assert same(plain, open_records(urls[0], tmp_path / "memory"))
    assert len(open_records(f"file://{shards}")) == 7
    storage.pipe("/index-test/00000.tar", archive(records(1)))
    with pytest.raises(ValueError, match=r"memory://.*00000\.tar has changed"):
        open_records(urls[1], tmp_path / "memory")
    storage.rm("/index-test", recursive=True)
    with pytest.raises(ValueError, match="does not exist"):
        open_records(urls[2])


def test_shards_behind_a_web_server(shards: Path, tmp_path: Path):
    plain = open_records(str(shards))
    files = {f"/{path.name}": path.read_bytes() for path in shards.glob("*.tar")}
    with http_server(files) as address:
        url = f"{address}/{{00000..00002}}.tar"
        assert same(plain, open_records(url))
        build([url], tmp_path / "index")
        indexed = open_records(url, tmp_path / "index")
        assert same(plain, indexed)
        del files["/00002.tar"]
        with pytest.raises(ValueError, match="unreadable"):
            indexed.read(6)


def test_the_ways_to_write_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.tar", "a.TAR", ".c.tar", "x/d.tar", ".y/e.tar", "odd[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert absolute("b.tar") == absolute(f"file://{tmp_path}/b.tar") == str(tmp_path / "b.tar")
    assert absolute("s3://a/b") == "s3://a/b"
    sizes = {os.path.relpath(path, tmp_path): size for path, size in everything_below(".")}
    assert sizes == {".c.tar": 1, "a.TAR": 1, "b.tar": 1, "odd[1].tar": 1, "x/d.tar": 1}
    assert expand("odd[1].tar") == [str(tmp_path / "odd[1].tar")]
    assert expand("**/d.*") == [str(tmp_path / "x/d.tar")]
    assert expand("s3://b/{8..10}-{0..1}.tar") == [f"s3://b/{i}-{j}.tar" for i in (8, 9, 10) for j in (0, 1)]
    assert expand("{08..09}.tar") == [str(tmp_path / f"0{i}.tar") for i in (8, 9)]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/a.tar"], ["a.tar"]),
        (["/d/a.tar", "/d/b.tar"], ["a.tar", "b.tar"]),
        (["/d/x1/a.tar", "/d/x2/a.tar"], ["x1/a.tar", "x2/a.tar"]),
        (["/d/a.tar", "/d/x/a.tar"], ["a.tar", "x/a.tar"]),
        (["s3://b/a.tar", "s3://c/a.tar"], ["b/a.tar", "c/a.tar"]),
        ([], []),
    ],
)
def test_shard_names_are_unique_and_short(paths: list[str], names: list[str]):
    assert shard_names(paths) == names


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="Protocol not known"):
        stat("nonsense://x")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child waits for no thread
def test_ranges_of_files(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    reader = Reader()
    assert [reader.read(str(path), *span) for span in ((0, 3), (8, 9), (20, 1), (3, 0))] == [b"012", b"89", b"", b""]
    child = os.fork()
    if child == 0:
        os._exit(0 if reader.read(str(path), 2, 2) == b"23" else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_arrays_come_from_memory_and_from_files(tmp_path: Path):
    paths = [tmp_path / f"{i}.npy" for i in range(40)]
    for i, path in enumerate(paths):
        np.save(path, np.full(3, i))
    arrays = pickle.loads(pickle.dumps(Arrays([*paths, np.full(3, 40)])))
    for i in [*range(41), 0, 17]:
        np.testing.assert_array_equal(arrays[i], np.full(3, i))
