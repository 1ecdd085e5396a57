"""Folders and manifests of a user's own pictures, and pixels from files of every kind."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.decode import centre_crop, decode
from semantic_routing.data.sources.folder import FolderRecords
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.sources.manifest import ManifestRecords
from semantic_routing.data.sources.manifest_rows import MANIFESTS
from semantic_routing.data.sources.records import RecordSource

RNG = np.random.default_rng(0)
RED, GREEN, BLUE, WHITE = (200, 30, 30), (30, 200, 30), (30, 30, 200), (255, 255, 255)


def square(path: Path, side: int) -> np.ndarray:
    """Decode a picture as training does."""
    return decode(path.read_bytes(), side, side)


def picture(path: Path, size: tuple[int, int] = (8, 8), color: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "a.png", color=RED)
    picture(tmp_path / "deep" / "b.png", color=BLUE)
    return tmp_path


GOOD = [{"image": "a.png", "text": "red"}, {"image": "deep/b.png", "text": ["blue", "not red"], "id": 7}]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_of_each_name_are_found(folder: Path, name: str):
    write(folder / name, GOOD)
    source = ManifestRecords(folder)
    assert len(source) == 2
    first, second = (source.read(index) for index in range(2))
    assert first.captions == {"text": ("red",)}
    assert (decode(first.image, 4, 4) == RED).all()
    assert second.captions == {"text": ("blue", "not red")}
    assert (decode(second.image, 4, 4) == BLUE).all()


def test_a_manifest_may_be_in_another_folder_than_its_images(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "list.jsonl"
    rows = [
        *GOOD,
        {"image": str(folder / "a.png"), "text": "absolute"},
        {"image": "deep/../a.png", "text": "up"},
    ]
    source = ManifestRecords(write(elsewhere, rows), root=folder)
    assert [source.read(index).captions["text"][0] for index in range(4)] == ["red", "blue", "absolute", "up"]
    with pytest.raises(ValueError, match=r"'a\.png' is not a file in"):
        ManifestRecords(elsewhere)


def test_relative_paths_and_byte_order_marks_and_blank_lines(folder: Path, monkeypatch: pytest.MonkeyPatch):
    lines = "\n\n".join(json.dumps(row) for row in GOOD)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8-sig")
    monkeypatch.chdir(folder)
    source = ManifestRecords("metadata.jsonl")
    monkeypatch.chdir("/")
    assert (decode(source.read(0).image, 4, 4) == RED).all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, '"image" is missing'),
        ({"image": 3, "text": "x"}, '"image" is a number'),
        ({"image": "", "text": "x"}, '"image" is empty text'),
        ({"image": "a.png"}, '"text" is missing'),
        ({"image": "a.png", "text": []}, '"text" is an empty list'),
        ({"image": "a.png", "text": ["x", None]}, '"text" is missing or null'),
        ({"image": "a.png", "text": " "}, '"text" is empty text'),
        ({"image": "a.png", "text": {"en": "x"}}, '"text" is an object'),
        ({"image": "a.png", "text": "\ud800"}, "surrogate"),
        ({"image": "no.png", "text": "x"}, "'no.png' is not a file"),
        ({"image": "deep", "text": "x"}, "'deep' is not a file"),
        ({"image": "a\0.png", "text": "x"}, "is not a file"),
        ({"image": "../secret.png", "text": "x"}, "is outside"),
        ({"image": "deep/../../secret.png", "text": "x"}, "is outside"),
        ({"image": "/nowhere/a.png", "text": "x"}, "'/nowhere/a.png' is not a file"),
        ({"image": ".", "text": "x"}, "is outside"),
        (["a.png", "x"], "found a list"),
        (None, "found missing or null"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_bad_rows_are_named(folder: Path, row: Any, message: str, suffix: str):
    picture(folder.parent / "secret.png")
    manifest = write(folder / f"list.{suffix}", [*GOOD, row])
    with pytest.raises(ValueError, match=message) as caught:
        ManifestRecords(manifest)
    assert str(caught.value).startswith(f"{manifest}, {'line' if suffix == 'jsonl' else 'row'} 3: ")
    assert "\n" not in str(caught.value)


def test_a_sibling_folder_whose_name_begins_with_the_roots_is_outside(folder: Path):
    picture(folder.parent / f"{folder.name}2" / "a.png")
    manifest = write(folder / "list.jsonl", [{"image": f"../{folder.name}2/a.png", "text": "x"}])
    with pytest.raises(ValueError, match="is outside"):
        ManifestRecords(manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"image": "a.png", "text": "x"}\n{"image": "a.png", "te', "line 2: not JSON at column"),
        (
            b'{"image": "a.png", "text": "x"}\n{"image": "a.png", "text": "\xe9"}',
            "line 2: byte 29 is not UTF-8",
        ),
        (b"[" * 100_000, "line 1: nested too deeply"),
        (b"\n \n", "is empty"),
    ],
)
def test_bad_jsonl_is_named(folder: Path, content: bytes, message: str):
    (folder / "list.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"list.jsonl.*{message}"):
        ManifestRecords(folder / "list.jsonl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[\n{]", "not JSON at line 2, column 2"),
        (b'{"image": "a.png", "text": "x"}', "holds an object; expected a list"),
        (b"\xff\xfe[", "byte 1 is not UTF-8"),
        (b"[]", "is empty"),
    ],
)
def test_bad_json_is_named(folder: Path, content: bytes, message: str):
    (folder / "list.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"list.json.*{message}"):
        ManifestRecords(folder / "list.json")


def test_there_must_be_exactly_one_manifest(folder: Path):
    with pytest.raises(ValueError, match="holds no manifest; write one of metadata"):
        ManifestRecords(folder)
    write(folder / "metadata.jsonl", GOOD)
    write(folder / "captions.json", GOOD)
    with pytest.raises(ValueError, match=r"several manifests \(metadata.jsonl, captions.json\)"):
        ManifestRecords(folder)
    with pytest.raises(ValueError, match="does not exist"):
        ManifestRecords(folder / "nowhere")
    with pytest.raises(ValueError, match="not a folder"):
        ManifestRecords(folder / "metadata.jsonl", root=folder / "a.png")


@pytest.mark.parametrize("name", MANIFESTS)
def test_rows_are_records(folder: Path, name: str):
    rows = [
        *GOOD,
        {"image": "a.png", "text": "again", "title": "t", "n": 3},
        {"image": "deep/b.png", "text": ["x", "y"]},
    ]
    source = ManifestRecords(write(folder / name, rows))
    assert isinstance(source, RecordSource)
    assert (len(source), list(source.shards), source.shard_name(0)) == (4, [4], name)
    for found in (source, pickle.loads(pickle.dumps(source)), open_records(str(folder))):
        records = [found.read(i) for i in range(4)]
        assert [r.key for r in records] == ["a.png", "deep/b.png", "a.png#2", "deep/b.png#2"]
        assert [r.image for r in records] == [(folder / row["image"]).read_bytes() for row in rows]
        assert records[1].captions == {"text": ("blue", "not red")}
        assert records[2].captions == {"text": ("again",), "title": ("t",)}
    assert source.dimensions() is None
    with pytest.raises(IndexError):
        source.read(4)


def test_rows_of_jsonl_stay_in_the_file(folder: Path):
    rows = [{"image": "a.png", "text": "é" * 500} for _ in range(2000)]
    source = ManifestRecords(write(folder / "list.jsonl", rows))
    assert len(pickle.dumps(source)) < 100_000
    assert source.read(1999).captions == {"text": ("é" * 500,)}
    (folder / "list.jsonl").write_text("")
    with pytest.raises(BadData, match=r"bad captions.*manifest has changed"):
        source.read(3)


def test_pictures_with_captions_next_to_them(folder: Path):
    (folder / "a.txt").write_text("red\n")
    (folder / "deep" / "b.json").write_text('{"caption": "blue", "tags": ["x", "y"]}')
    picture(folder / "deep" / "c.JPG")
    picture(folder / ".hidden" / "d.png")
    (folder / "deep" / "other.md").write_text("not looked at")
    source = open_records(str(folder))
    assert isinstance(source, FolderRecords)
    assert list(source.shards) == [3]
    records = [pickle.loads(pickle.dumps(source)).read(i) for i in range(3)]
    assert [r.key for r in records] == ["a.png", "deep/b.png", "deep/c.JPG"]
    assert [r.captions for r in records] == [{"txt": ("red",)}, {"caption": ("blue",), "tags": ("x", "y")}, {}]
    assert records[2].image == (folder / "deep" / "c.JPG").read_bytes()


def test_damaged_files_of_a_folder(folder: Path):
    for name, content in (("c.txt", b"caf\xe9"), ("d.json", b"{"), ("e.txt", b"gone soon")):
        picture(folder / f"{name[0]}.png")
        (folder / name).write_bytes(content)
    (folder / "z.png").write_bytes(b"")
    source = FolderRecords(folder)
    (folder / "a.png").unlink()
    (folder / "e.txt").unlink()
    reasons = {}
    for index in range(len(source)):
        try:
            source.read(index)
        except BadData as error:
            reasons[error.key] = error.reason
    assert reasons == {
        "a.png": "missing file",
        "c.png": "bad captions",
        "d.png": "bad captions",
        "e.png": "bad captions",
        "z.png": "zero bytes",
    }


def test_manifests_and_folders_at_urls(folder: Path):
    storage = fsspec.filesystem("memory")
    write(folder / "metadata.jsonl", GOOD)
    for path in (*folder.rglob("*.png"), folder / "metadata.jsonl"):
        storage.pipe(f"/folder-test/{path.relative_to(folder)}", path.read_bytes())
    local = open_records(str(folder))
    found = open_records("memory://folder-test")
    assert [found.read(i) for i in range(2)] == [local.read(i) for i in range(2)]
    row = {"image": "no.png", "text": "x"}  # at a URL, a missing picture shows only when it is read
    storage.pipe("/folder-test/metadata.jsonl", json.dumps(row).encode())
    with pytest.raises(BadData, match="missing file"):
        open_records("memory://folder-test").read(0)
    for name in ("../x.png", "/etc/x.png", "memory://other/x.png", "."):
        storage.pipe("/folder-test/metadata.jsonl", json.dumps(row | {"image": name}).encode())
        with pytest.raises(ValueError, match="is outside"):
            open_records("memory://folder-test")
    storage.rm("/folder-test/metadata.jsonl")
    assert [open_records("memory://folder-test").read(i).key for i in range(2)] == ["a.png", "deep/b.png"]
    storage.rm("/folder-test", recursive=True)


def gray_png16(path: Path, values: np.ndarray) -> Path:
    Image.fromarray(values.astype(np.uint16)).save(path)
    return path


def test_sixteen_bits_are_scaled(tmp_path: Path):
    values = np.array([[0, 257, 32896], [65535, 256, 514], [128, 129, 65406]])
    path = gray_png16(tmp_path / "a.png", values)
    expected = np.array([[0, 1, 128], [255, 1, 2], [0, 1, 254]])
    np.testing.assert_array_equal(square(path, 3), np.repeat(expected[..., None], 3, axis=-1))
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "i.tiff")
    np.testing.assert_array_equal(square(tmp_path / "i.tiff", 3)[..., 0], expected)


def test_a_picture_of_the_right_size_is_not_touched(tmp_path: Path):
    pixels = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(square(tmp_path / "a.png", 16), pixels)


def test_palette_and_gray_become_rgb(tmp_path: Path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *GREEN])
    image.save(tmp_path / "p.png")
    assert (square(tmp_path / "p.png", 4) == GREEN).all()
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    assert (square(tmp_path / "l.png", 4) == 77).all()
    Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
    assert (square(tmp_path / "1.png", 4) == 255).all()


def test_transparency_is_laid_over_white(tmp_path: Path):
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 1] = (*RED, 255)
    pixels[1, 0] = (0, 0, 0, 127)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = np.array([[WHITE, RED], [(128, 128, 128), WHITE]])
    np.testing.assert_array_equal(square(tmp_path / "a.png", 2), expected)
    image = Image.new("P", (2, 2), 0)
    image.putpixel((0, 0), 1)
    image.putpalette([0, 0, 0, *GREEN])
    image.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(square(tmp_path / "p.png", 2), [[GREEN, WHITE], [WHITE, WHITE]])
    Image.new("LA", (2, 2), (9, 0)).save(tmp_path / "la.png")
    assert (square(tmp_path / "la.png", 2) == 255).all()
    Image.new("RGB", (2, 2), RED).save(tmp_path / "keyed.png", transparency=RED)
    assert (square(tmp_path / "keyed.png", 2) == 255).all()


def test_cmyk_becomes_rgb(tmp_path: Path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(square(tmp_path / "a.jpg", 16).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, turn):
    pixels = RNG.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(square(tmp_path / "a.png", 4), turn(pixels))


@pytest.mark.parametrize("size", [(24, 8), (8, 24), (26, 8), (8, 8)])
def test_the_middle_is_kept(size: tuple[int, int]):
    width, height = size
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    left, top = (width - 8) // 2, (height - 8) // 2
    middle = pixels[top : top + 8, left : left + 8]
    np.testing.assert_array_equal(np.asarray(centre_crop(Image.fromarray(pixels), 8, 8)), middle)


def test_crop_equals_resizing_first():
    image = Image.fromarray(RNG.integers(0, 256, (20, 40, 3), dtype=np.uint8))
    resized = image.resize((20, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(centre_crop(image, 10, 10)), np.asarray(resized)[:, 5:15])


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_shrinking_averages(tmp_path: Path, suffix: str):
    # Stripes finer than a new pixel must become gray, without moire.
    stripes = np.zeros((512, 512, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(stripes).save(path, **({"quality": 100} if suffix == "jpg" else {}))
    assert np.abs(square(path, 32).astype(int)[4:-4, 4:-4] - 127.5).max() < 3


def test_growing_keeps_a_gradient():
    ramp = np.repeat(np.linspace(20, 220, 8).astype(np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    grown = np.asarray(centre_crop(Image.fromarray(ramp), 32, 32)).astype(int)
    assert grown.shape == (32, 32, 3)
    assert (np.diff(grown[16, 4:-4, 0]) >= 0).all()


def test_a_picture_that_was_deleted_since_the_start_is_named(folder: Path):
    source = ManifestRecords(write(folder / "list.jsonl", GOOD))
    os.remove(folder / "a.png")
    with pytest.raises(BadData, match="missing file") as caught:
        source.read(0)
    assert caught.value.key == "a.png"
