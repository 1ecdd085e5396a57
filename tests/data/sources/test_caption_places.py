"""Captions in the usual places: next to pictures, in others' manifests, under other names."""

from __future__ import annotations

import csv
import json
import os
from io import BytesIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semantic_routing.common.images.decode import decode
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.sources.folder import FolderRecords
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.sources.index_writer import build
from tests.helpers.data_files import archive, captioned, fill, picture, table


def captions(path: Path) -> list[str]:
    """Return each record's first caption, with default settings."""
    source = open_records(str(path))
    choice = DataConfig().choice()
    return [choice.choose(source.read(i).captions, 0.0, 0.0) for i in range(len(source))]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="captions are next to pictures as .TXT, .caption (kohya) or photo.jpg.txt",
    then="they are read like photo.txt, which takes precedence",
)
@pytest.mark.parametrize(
    ("shot", "names", "expected"),
    [
        ("DSC_1.JPG", ["DSC_1.TXT"], "DSC_1.TXT"),
        ("1.jpg", ["1.Txt", "1.txt"], "1.txt"),
        ("1.jpg", ["1.caption"], "1.caption"),
        ("1.jpg", ["1.CAPTION", "1.txt"], "1.txt"),
        ("1.jpeg", ["1.jpeg.txt"], "1.jpeg.txt"),
        ("1.PNG", ["1.PNG.TXT", "1.txt"], "1.txt"),
        ("a.b/x.y.jpg", ["a.b/x.y.txt"], "a.b/x.y.txt"),
    ],
)
def test_captions_next_to_pictures(tmp_path: Path, shot: str, names: list[str], expected: str):
    fill(tmp_path, {shot: picture()} | {name: name.encode() for name in names})
    assert captions(tmp_path) == [expected]
    source = open_records(str(tmp_path))
    assert isinstance(source, FolderRecords)
    assert source.damaged == {}


def test_json_in_capitals_and_kohyas_in_a_tar(tmp_path: Path):
    fill(tmp_path / "json", {"1.JPG": picture(), "1.JSON": b'{"caption": "a cat"}'})
    members = [("1.jpg", b"x"), ("1.caption", b"kohya"), ("2.jpg", b"x"), ("2.caption", b"no"), ("2.txt", b"yes")]
    fill(tmp_path / "tar", {"0.tar": archive(members)})
    assert captions(tmp_path / "json") == ["a cat"]
    assert captions(tmp_path / "tar") == ["kohya", "yes"]


def test_older_formats_and_captions_take_precedence(tmp_path: Path):
    """Formats and captions that older versions read take precedence over later ones."""
    old = picture(7)
    members = [("1.avif", b"x"), ("1.jpg", old), ("1.caption", b"late"), ("1.json", b'{"caption": "early"}')]
    fill(tmp_path / "tar", {"0.tar": archive(members)})
    fill(tmp_path / "folder", dict(members[1:]) | {"1.jpg.txt": b"late"})
    for place in ("tar", "folder"):
        assert captions(tmp_path / place) == ["early"]
        assert open_records(str(tmp_path / place)).read(0).image == old


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a folder is Hugging Face's ImageFolder (metadata.jsonl, .csv or .parquet with file_name, also in train/)",
    then="it is read as a manifest",
)
@pytest.mark.parametrize("inside", ["", "train", "data/train"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_hugging_faces_image_folder(tmp_path: Path, ending: str, inside: str):
    place = fill(tmp_path / inside, {f"{i}.jpg": picture(i) for i in range(3)})
    rows = [{"file_name": f"{i}.jpg", "text": f'caption, "{i}"\nof two lines'} for i in range(3)]
    path = place / f"metadata.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    for given in (tmp_path, path):
        assert captions(given) == [row["text"] for row in rows]
        source = open_records(str(given))
        assert [source.read(i).image for i in range(3)] == [picture(i) for i in range(3)]
    assert build([str(tmp_path)], tmp_path / "index")["records"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name;text\na.jpg;x\n", r'list\.csv, line 2: "image" is missing .* the fields: name, text'),
        (b"file_name;text\na.jpg;\n", r'line 2: "text" is empty text'),
        (b"file_name,text\nb.jpg,x\n", r"line 2: file_name 'b\.jpg' is not a file"),
        ("file_name,text\na.jpg,caf\xe9\n".encode("latin-1"), "byte 25 is not UTF-8"),
        (b"file_name,text\n", "is empty"),
    ],
)
def test_bad_tables_are_named(tmp_path: Path, content: bytes, message: str):
    fill(tmp_path, {"a.jpg": picture(), "list.csv": content})
    with pytest.raises(ValueError, match=message):
        open_records(str(tmp_path / "list.csv"))


def test_tables_may_be_separated_by_semicolons_or_tabs(tmp_path: Path):
    for name, mark in (("a.csv", ";"), ("b.tsv", "\t"), ("c.csv", ",")):
        fill(tmp_path, {"1.jpg": picture(), name: f"file_name{mark}text\n1.jpg{mark}x\n".encode()})
        assert captions(tmp_path / name) == ["x"]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="captions are in a column or field of another name",
    then="an error before training lists the fields and the setting that chooses one (--data.caption-keys)",
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv", "tar", "folder"])
def test_a_caption_of_another_name_is_hinted_at(tmp_path: Path, kind: str):
    row = {"image": "a.jpg", "id": "7", "llava": "a cat on a sofa"}
    pictures = {"a.jpg": picture()}
    path = tmp_path / f"list.{kind}"
    if kind == "parquet":
        table(path, image=[picture()], id=["7"], llava=[row["llava"]])
    elif kind == "jsonl":
        fill(tmp_path, pictures | {path.name: json.dumps(row).encode()})
    elif kind == "json":
        fill(tmp_path, pictures | {path.name: json.dumps([row]).encode()})
    elif kind == "csv":
        fill(tmp_path, pictures | {path.name: b"image,id,llava\na.jpg,7,a cat on a sofa"})
    elif kind == "tar":
        path.write_bytes(archive([("a.jpg", picture()), ("a.json", json.dumps(row).encode())]))
    else:
        path = fill(path, pictures | {"a.json": json.dumps(row).encode()})
    with pytest.raises(ValueError, match=r"but there are llava,.* id.*choose with --data\.caption-keys llava"):
        open_data(DataConfig(paths=(str(path),)), image_size=8, seed=0)
    data = open_data(DataConfig(paths=(str(path),), caption_keys=("llava",)), image_size=8, seed=0)
    assert data.load(0, 1, range(1))[0].caption == row["llava"]


def test_pictures_without_any_captions_are_refused_with_what_to_do(tmp_path: Path):
    fill(tmp_path, {f"{i}.jpg": picture() for i in range(3)})
    with pytest.raises(ValueError, match=r"no captions .*put a \.txt file beside each.*semroute data recaption"):
        open_data(DataConfig(paths=(str(tmp_path),)), image_size=8, seed=0)
    fill(tmp_path, {"1.txt": b"one of three"})  # some may lack theirs
    open_data(DataConfig(paths=(str(tmp_path),)), image_size=8, seed=0)


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a manifest names pictures outside of its folder",
    then="absolute paths are read; relative ones that lead outside are refused with the absolute path to write",
)
def test_a_manifest_may_name_absolute_paths(tmp_path: Path):
    shots = fill(tmp_path / "shots", {"1.jpg": picture(1), "2.jpg": picture(2)})
    rows = [{"image": str(shots / "1.jpg"), "text": "one"}, {"file_name": str(shots / "2.jpg"), "caption": "two"}]
    place = fill(tmp_path / "lists", {"all.jsonl": "\n".join(map(json.dumps, rows)).encode()})
    assert captions(place / "all.jsonl") == ["one", "two"]
    assert open_records(str(place / "all.jsonl")).read(1).image == picture(2)
    (place / "all.jsonl").write_text(json.dumps({"image": "../shots/1.jpg", "text": "x"}))
    with pytest.raises(ValueError, match=rf"is outside .*write its absolute path \({shots}/1\.jpg\)"):
        open_records(str(place / "all.jsonl"))
    (place / "all.jsonl").write_text(json.dumps({"image": "https://x.org/1.jpg", "text": "x"}))
    with pytest.raises(ValueError, match="download it"):
        open_records(str(place / "all.jsonl"))


def test_pictures_that_a_manifest_does_not_name_are_counted(tmp_path: Path):
    row = {"image": "a.jpg", "text": "x"}
    fill(tmp_path, captioned("b.jpg", "deep/c.jpg") | {"a.jpg": picture(), "metadata.jsonl": json.dumps(row).encode()})
    expected = {"picture that the manifest does not name": 2}
    assert open_records(str(tmp_path)).damaged == expected  # type: ignore[attr-defined]
    assert build([str(tmp_path)], tmp_path / ".index")["damaged"] == expected


@pytest.mark.behaviour(
    "Pictures and captions",
    when="pictures are TIFF, BMP, GIF, WebP, PNM, JPEG 2000, JFIF or (with Pillow 11.3) AVIF",
    then="they are read from folders and tars; HEIC too, if pillow-heif is installed",
)
@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        ("TIF", "TIFF"), ("bmp", "BMP"), ("gif", "GIF"), ("webp", "WEBP"), ("pgm", "PPM"), ("jp2", "JPEG2000"),
        ("j2k", "JPEG2000"), ("jfif", "JPEG"), ("avif", "AVIF"), ("HEIC", "HEIF"), ("heif", "HEIF"),
    ],
)  # fmt: skip
def test_every_format_is_read_from_folders_and_tars(tmp_path: Path, ending: str, kind: str):
    if kind == "AVIF":
        pytest.importorskip("PIL.AvifImagePlugin")
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    made = BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(made, kind)
    fill(tmp_path / "folder", {f"a.{ending}": made.getvalue(), "a.txt": b"red"})
    fill(tmp_path / "tar", {"0.tar": archive([(f"a.{ending}", made.getvalue()), ("a.txt", b"red")])})
    for place in ("folder", "tar"):
        assert captions(tmp_path / place) == ["red"]
        pixels = decode(open_records(str(tmp_path / place)).read(0).image, 8, 8)
        assert abs(pixels.astype(int) - (200, 30, 30)).max() < 12
        build([str(tmp_path / place)], tmp_path / f"{place}-index", look_inside=True)
        source = open_records(str(tmp_path / place), tmp_path / f"{place}-index")
        assert source.dimensions().tolist() == [[64, 48]]  # type: ignore[attr-defined]


def test_files_whose_names_are_not_utf8_are_read(tmp_path: Path):
    folder = os.fsencode(tmp_path)
    for ending, content in ((b".jpg", picture()), (b".txt", b"named in Latin-1")):
        with open(os.path.join(folder, b"caf\xe9" + ending), "wb") as file:
            file.write(content)
    assert captions(tmp_path) == ["named in Latin-1"]
    assert build([str(tmp_path)], tmp_path / ".index", look_inside=True)["damaged"] == {}
