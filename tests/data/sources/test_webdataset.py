"""Tar shards: members as Python's tarfile finds them, reports of all damage, and complete records."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from semantic_routing.common.errors import BadData
from semantic_routing.data.sources.records import Record
from semantic_routing.data.sources.scan import Damage, ScanResult
from semantic_routing.data.sources.tar import BLOCK, Member, members
from semantic_routing.data.sources.webdataset import GAP, ROW, TarRecords, scan_tar
from tests.helpers.data_files import FORMATS, archive, picture, records


def header(name: bytes, size: int | bytes, kind: bytes = b"0") -> bytes:
    """Make a ustar header with any name, size field and type."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = name.ljust(100, b"\0") + b"0000644\0" * 3 + field + b"00000000000\0" + b" " * 8 + kind
    block = block.ljust(257, b"\0") + b"ustar\x0000"
    block = block.ljust(BLOCK, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)


def found_in(data: bytes, window: int = 4096) -> tuple[list[Member], list[Damage]]:
    found = list(members(lambda at, size: data[at : at + size], len(data), window))
    return [m for m in found if isinstance(m, Member)], [m for m in found if isinstance(m, Damage)]


def scan(tmp_path: Path, data: bytes, *, look_inside: bool = False) -> tuple[TarRecords, ScanResult]:
    path = tmp_path / "00000.tar"
    path.write_bytes(data)
    found = scan_tar(str(path), len(data), look_inside=look_inside)
    return TarRecords(str(path), [str(path)], [len(found.rows)], [found.rows]), found


# -- members ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_any_archive_is_read_as_tarfile_reads_it(kind: str):
    rng = np.random.default_rng(7)
    for turn in range(30):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=FORMATS[kind]) as tar:
            for number in range(int(rng.integers(0, 12))):
                length = int(rng.choice([3, 30, 99, 100, 101, 140] if kind == "ustar" else [3, 99, 100, 101, 600]))
                letters = rng.choice(list("abc/.é" if kind != "ustar" else "abc/."), size=length)
                info = tarfile.TarInfo(f"{number}x" + "".join(letters).strip("/") + "/y" * (length > 100) + "z")
                # Not type "\0" with a long name: tarfile takes a cut-off name that ends in / for a folder's.
                info.type = b"000000025\0"[(at := int(rng.integers(9 + (length < 99)))) : at + 1]
                info.size = int(rng.choice([0, 1, 511, 512, 513, 5000])) if info.isreg() else 0
                info.mtime = float(rng.choice([0.0, 1.5])) if kind == "pax" else 0
                try:
                    tar.addfile(info, io.BytesIO(rng.bytes(info.size)))
                except ValueError:  # a name that ustar cannot split
                    continue
        data = stream.getvalue()
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = [
                (m.name.encode("utf-8", "surrogateescape"), m.offset, m.offset_data, m.size) for m in tar if m.isfile()
            ]
        ours, damage = found_in(data, window=int(rng.choice([BLOCK, 1024, 4096])))
        assert [tuple(member) for member in ours] == files, turn
        assert {d.reason for d in damage} <= {"not a file"}


def test_numbers_of_every_notation():
    for field, size in [
        (b"%011o\0" % 700, 700),
        (b"%012o" % 700, 700),
        (b"%10o \0" % 700, 700),
        (b"1274\0" + b"junk!!!", 700),
        (b"\x80" + (700).to_bytes(11, "big"), 700),
        (bytes(12), 0),
        (b" " * 12, 0),
    ]:
        data = header(b"a.jpg", field) + padded(b"x" * size) + header(b"b.jpg", 1) + padded(b"y") + END
        found, damage = found_in(data)
        assert [(m.name, m.size) for m in found] == [(b"a.jpg", size), (b"b.jpg", 1)]
        assert not damage


@pytest.mark.parametrize(
    "field", [b"-0000000001\0", b"\xff" * 12, b"99999999999\0", b"0x000000000\0", b"12 34567890\0"]
)
def test_a_bad_size_ends_the_archive(field: bytes):
    first = header(b"a.jpg", 1) + padded(b"x")
    found, damage = found_in(first + header(b"b.jpg", field) + END)
    assert [m.name for m in found] == [b"a.jpg"]
    assert [(d.reason, d.place) for d in damage] == [("bad header", len(first))]


def test_a_checksum_over_signed_bytes_is_accepted():
    block = bytearray(header("é.jpg".encode("latin-1"), 1))
    block[148:156] = b"%06o\0 " % (int(block[148:154], 8) - 256)
    found, damage = found_in(bytes(block) + padded(b"x") + END)
    assert [m.name for m in found] == [b"\xe9.jpg"]
    assert not damage


def test_a_wrong_checksum_ends_the_archive():
    blocks = [header(b"%d.jpg" % i, 1) + padded(b"x") for i in range(5)]
    bad = bytearray(blocks[2])
    bad[3] ^= 1
    found, damage = found_in(b"".join([*blocks[:2], bytes(bad), *blocks[3:]]) + END)
    assert [m.name for m in found] == [b"0.jpg", b"1.jpg"]
    assert [(d.reason, d.place) for d in damage] == [("bad header", 2 * 1024)]


@pytest.mark.parametrize("lead", [0, 3])
def test_garbage_is_reported_where_it_begins(lead: int):
    begin = b"".join(header(b"%d.jpg" % i, 1) + padded(b"x") for i in range(lead))
    found, damage = found_in(begin + np.random.default_rng(0).bytes(5000))
    assert len(found) == lead
    assert [(d.reason, d.place) for d in damage] == [("bad header", len(begin))]


def test_pax_names_and_sizes_of_every_sort():
    def pax(*fields: tuple[bytes, bytes]) -> bytes:
        text = b""
        for key, value in fields:
            length = len(key) + len(value) + 3
            length += len(b"%d" % (length + len(b"%d" % length)))
            text += b"%d %s=%s\n" % (length, key, value)
        return header(b"pax", len(text), b"x") + padded(text)

    plain = header(b"a.jpg", 1) + padded(b"x")
    found, damage = found_in(
        pax((b"path", b"../../etc/b.jpg"), (b"size", b"3")) + header(b"?", 0) + padded(b"xyz") + END
    )
    assert [(m.name, m.size, m.start) for m in found] == [(b"../../etc/b.jpg", 3, 0)]
    assert not damage
    # a name with line breaks and equals signs, after a header for all members that follow
    found, _ = found_in(header(b"g", 0, b"g") + pax((b"path", b"a=\n9 size=9.jpg")) + plain + END)
    assert [(m.name, m.size) for m in found] == [(b"a=\n9 size=9.jpg", 1)]
    huge = pax((b"size", b"9" * 15)) + plain
    found, damage = found_in(plain + huge + END)
    assert [m.name for m in found] == [b"a.jpg"]
    assert [(d.reason, d.name) for d in damage] == [("truncated", b"a.jpg")]
    for text in (
        b"99 size=3\n",
        b"x size=3\n",
        b"10 size=3 ",
        b"9 size=-3\n",
        b"30 size=" + b"9" * 21 + b"\n",
        b"0 size=1\n",
    ):
        found, damage = found_in(plain + header(b"pax", len(text), b"x") + padded(text) + plain + END)
        assert len(found) == 1, text
        assert [(d.reason, d.place) for d in damage] == [("bad header", 1024)], text


def test_a_huge_extended_header_is_skipped_or_ends_the_archive():
    plain = header(b"a.jpg", 1) + padded(b"x")
    found, damage = found_in(header(b"L", 8**11 - 1, b"L") + plain + END)
    assert not found
    assert [(d.reason, d.place) for d in damage] == [("truncated", 0)]
    size = 3 * 2**20
    found, damage = found_in(header(b"L", size, b"L") + bytes(size) + plain + header(b"b.jpg", 0) + END)
    assert [m.name for m in found] == [b"b.jpg"]
    assert [(d.reason, d.place) for d in damage] == [("too large", 0)]


def test_a_name_of_a_million_letters():
    name = "n" * 10**6 + ".jpg"
    found, damage = found_in(archive([(name, b"x"), ("b.jpg", b"y")], "gnu"))
    assert [(len(m.name), m.size) for m in found] == [(len(name), 1), (5, 1)]
    assert not damage


def test_links_devices_and_sparse_files_are_skipped():
    blocks = b""
    for kind in (b"1", b"2", b"3", b"4", b"6", b"Z"):
        blocks += header(b"other.jpg", 0, kind)
    blocks += header(b"folder/", 0, b"5")
    sparse = bytearray(header(b"s.jpg", 3, b"S"))
    sparse[482] = 1  # one more block of holes follows
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse)
    blocks += bytes(sparse) + bytes(BLOCK) + padded(b"abc")
    found, damage = found_in(blocks + header(b"a.jpg", 1) + padded(b"x") + END)
    assert [m.name for m in found] == [b"a.jpg"]
    assert [d.reason for d in damage] == ["not a file"] * 7


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 700, 1024, 1535, 1536, 1600])
def test_an_archive_cut_anywhere_is_reported(cut: int):
    data = archive([("a.jpg", b"x" * 600), ("b.jpg", b"y" * 600)], "ustar")[:cut]
    found, damage = found_in(data)
    assert [m.name for m in found] == [b"a.jpg"] * (cut >= 512 + 600)
    assert [d.reason for d in damage] == ["zero bytes" if not cut else "truncated"]


def test_what_follows_the_end_mark_is_reported():
    one = archive([("a.jpg", b"x")], "ustar")
    found, damage = found_in(one + one, window=2**15)
    assert len(found) == 1
    assert [(d.reason, "several archives" in d.detail) for d in damage] == [("bad header", True)]


def test_random_damage_is_noticed_and_members_before_it_are_kept():
    rng = np.random.default_rng(3)
    whole = archive([(f"{i}.jpg", b"x" * 700) for i in range(6)], "pax", 1.5)
    expected, _ = found_in(whole)
    for _ in range(300):
        data = bytearray(whole[: int(rng.integers(len(whole)))] if rng.random() < 0.3 else whole)
        hurt = len(data)
        for _ in range(int(rng.integers(1, 4))):
            at = int(rng.integers(len(data) or 1))
            data[at : at + 1] = rng.bytes(1)
            hurt = min(hurt, at)
        found, damage = found_in(bytes(data))
        before = [member for member in expected if member.offset + member.size <= hurt]
        assert found[: len(before)] == before
        assert all(member.offset + member.size <= len(data) for member in found)
        known = {member.name for member in expected}
        assert damage or {member.name for member in found} == known  # else the damage is in a content or in padding


# -- records ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_records_are_read_back(tmp_path: Path, kind: str):
    mtime = 1.25 if kind == "pax" else 0  # WebDataset's writer makes a pax header for every member this way
    source, found = scan(tmp_path, archive(records(25), kind, mtime))
    assert len(source) == 25
    assert source.shards == (25,)
    assert not found.damaged
    for i in (24, 0, 7):
        record = source.read(i)
        assert record.key == f"00000.tar/{i:09d}"
        assert record.image == b"%d" % i * (i + 1)
        assert record.captions == {"caption": (f"json {i}",), "txt": (f"text {i}",)}
    assert source.dimensions() is None
    with pytest.raises(IndexError):
        source.read(25)


def test_grouping_is_webdatasets(tmp_path: Path):
    files = [
        ("readme", b"no suffix"),
        ("._a.jpg", b"hidden"),
        ("./x/a.seg.png", b"mask"),  # not this record's picture
        ("./x/a.JPG", b"first"),
        ("./x/a.png", b"second picture"),
        ("./x/a.cls", b"3"),
        ("b.dir/c.v2.txt", b"no picture"),
        ("b.dir/d.webp", b"w"),
        ("e.txt", b"caption first"),
        ("e.jpeg", b"e"),
    ]
    source, found = scan(tmp_path, archive(files))
    read = [source.read(i) for i in range(len(source))]
    assert [(r.key, r.image) for r in read] == [
        ("00000.tar/./x/a", b"first"),
        ("00000.tar/b.dir/d", b"w"),
        ("00000.tar/e", b"e"),
    ]
    assert read[2].captions == {"txt": ("caption first",)}
    assert found.damaged == {"hidden file": 1, "no picture": 1, "no caption": 2}
    assert [row["key"] for row in found.examples if row["reason"] == "no picture"] == ["b.dir/c"]


def test_damage_is_reported_and_the_rest_kept(tmp_path: Path):
    files = [
        *records(1),
        ("dup.jpg", b"1"),
        ("dup.jpg", b"2"),
        ("dup.txt", b"one"),
        ("dup.txt", b"two"),
        ("000000000.jpg", b"again"),
        ("only.txt", b"text"),
        ("zero.jpg", b""),
        ("zero.txt", b"zero"),
        ("latin.jpg", b"x"),
        ("latin.txt", b"caf\xe9"),
        ("broken.jpg", b"x"),
        ("broken.json", b"{"),
        ("huge.jpg", b"x"),
        ("huge.txt", b"x" * (2**24 + 1)),
    ]
    source, found = scan(tmp_path, archive(files))
    assert found.damaged == {
        "duplicate member": 2,
        "repeated key": 1,
        "no picture": 1,
        "zero bytes": 1,
        "too large": 1,
    }
    assert len(source) == 5
    assert source.read(1).image == b"1"
    assert source.read(1).captions == {"txt": ("one",)}
    for index, reason, key in ((2, "zero bytes", "zero"), (3, "bad captions", "latin"), (4, "bad captions", "broken")):
        with pytest.raises(BadData) as caught:
            source.read(index)
        assert (caught.value.reason, caught.value.shard) == (reason, "00000.tar")
        assert caught.value.key == f"00000.tar/{key}"


def test_a_truncated_record_is_left_out(tmp_path: Path):
    data = archive([("a.jpg", b"a"), ("a.txt", b"a"), ("b.jpg", b"b"), ("b.txt", b"x" * 2000)], "ustar")
    source, found = scan(tmp_path, data[: 7 * BLOCK + 100])
    assert len(source) == 1
    assert found.damaged == {"truncated": 1}
    assert found.examples[0]["key"] == "b.txt"
    assert found.examples[0]["place"] == 6 * BLOCK


def test_names_are_never_used_as_paths(tmp_path: Path):
    stream = io.BytesIO()
    outside = ["../../escape.jpg", "/etc/passwd.jpg", "C:\\a.jpg", "n" * 5000 + ".jpg"]
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in outside:
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    raw = header(b"caf\xe9.jpg", 1) + padded(b"y")
    before = sorted(tmp_path.iterdir())
    source, found = scan(tmp_path, raw + stream.getvalue())
    keys = [source.read(i).key for i in range(len(source))]
    assert keys == ["00000.tar/caf\\xe9", *(f"00000.tar/{name[:-4]}" for name in outside)]
    assert found.damaged == {"no caption": 5}
    assert sorted(tmp_path.iterdir()) == [*before, tmp_path / "00000.tar"]


def test_large_unused_members_between_parts_are_skipped(tmp_path: Path):
    files = [("a.jpg", b"picture"), ("a.npy", bytes(GAP + 5)), ("a.txt", b"far away")]
    source, _ = scan(tmp_path, archive(files))
    record = source.read(0)
    assert (record.image, record.captions) == (b"picture", {"txt": ("far away",)})


def test_dimensions_are_those_of_decoded_pictures(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.new("RGB", (20, 10)).save(turned, "JPEG", exif=exif)
    thick = io.BytesIO()
    Image.new("RGB", (5, 7)).save(thick, "JPEG", comment=b"c" * 60_000, icc_profile=bytes(70_000))
    files = [
        ("a.png", picture(size=(8, 6))),
        ("b.jpg", turned.getvalue()),
        ("c.jpg", b"no picture"),
        ("d.jpg", b""),
        ("e.jpg", thick.getvalue()),
    ]
    source, found = scan(tmp_path, archive(files), look_inside=True)
    sizes = source.dimensions()
    assert sizes is not None
    np.testing.assert_array_equal(sizes, [[8, 6], [10, 20], [0, 0], [0, 0], [5, 7]])
    assert found.damaged == {"not an image": 1, "zero bytes": 1, "no caption": 5}


def test_the_layout_of_indexed_rows_stays():
    """Old indices hold rows of this layout."""
    names = ("image", "image_size", "text", "text_size", "json", "json_size", "width", "height")
    assert ROW.descr == [("start", "<u8"), *((name, "<u4") for name in names)]


def test_a_shard_that_was_cut_changed_or_deleted_is_reported(tmp_path: Path):
    source, _ = scan(tmp_path, archive(records(3), "ustar"))
    path = tmp_path / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: 14 * BLOCK])
    source = pickle.loads(pickle.dumps(source))
    assert source.read(0).captions["txt"] == ("text 0",)
    with pytest.raises(BadData, match="truncated"):
        source.read(2)
    path.write_bytes(b"\1" * len(whole))
    with pytest.raises(BadData, match="bad header"):
        source.read(0)
    path.unlink()
    with pytest.raises(BadData, match="unreadable"):
        pickle.loads(pickle.dumps(source)).read(0)


def test_many_shards_in_many_threads_and_after_a_fork(tmp_path: Path):
    paths = []
    for shard in range(40):  # more than are kept open
        path = tmp_path / f"{shard % 2}" / f"{shard:05d}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(archive([(f"{i}.jpg", b"%d %d" % (shard, i)) for i in range(shard % 3)]))
        paths.append(str(path))
    rows = [scan_tar(path, os.path.getsize(path)).rows for path in paths]
    source = TarRecords("many", paths, [len(part) for part in rows], rows)
    assert source.shard_name(3) == "1/00003.tar"
    expected = [b"%d %d" % (shard, i) for shard in range(40) for i in range(shard % 3)]

    def read(index: int) -> Record:
        return source.read(index)

    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(source)), 20)).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, order))
    assert [record.image for record in found] == [expected[i] for i in order]
    assert len({record.key for record in found}) == len(source)
    again = pickle.loads(pickle.dumps(source))
    assert [again.read(i).image for i in range(len(again))] == expected
