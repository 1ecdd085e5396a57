"""The kind of a folder of data, and reports of what is left out of it."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from semantic_routing.cli.data import IndexArguments, StatsArguments, index, stats
from semantic_routing.common.images import formats
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.sources.discover import discover
from semantic_routing.data.sources.index import DEFAULT, INDEX, open_indexed, open_records
from semantic_routing.data.sources.index_writer import build
from semantic_routing.data.tools.recaption import RecaptionArguments, recaption
from tests.helpers.data_files import archive, captioned, fill, picture, table


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make pillow-heif look as if it were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for found in (formats.formats, formats.picture_endings):
        found.cache_clear()
    yield
    for found in (formats.formats, formats.picture_endings):
        found.cache_clear()


HEIC = b"\0\0\0\x18ftypheic" + bytes(400)
PHONE = captioned("0.jpg") | {f"IMG_{i}.HEIC": HEIC for i in range(9)} | {f"IMG_{i}.txt": b"photo" for i in range(9)}
INSTALL = 'unknown format .heic (pip install "semantic-routing[heif]")'


# -- what is left out --------------------------------------------------------------------------------------------


MEMBERS = [("a.jpg", b"x"), ("a.txt", b"x")]
LEFT_OUT: dict[str, tuple[dict[str, bytes], dict[str, int]]] = {
    "telephone": (PHONE, {INSTALL: 9}),
    "other formats": (
        captioned("a.jpg") | {"b.CR2": b"x", "c.mp4": b"x", "d.psd": b"x"},
        {"unknown format .cr2": 1, "unknown format .mp4": 1, "unknown format .psd": 1},
    ),
    "hidden": (captioned("a.jpg") | {"._a.jpg": b"x", ".b.png": b"x", ".DS_Store": b"x"}, {"hidden file": 2}),
    "empty": (
        captioned("a.jpg", "b.jpg") | {"b.jpg": b"", "c.png": picture(), "d.png": picture(), "d.txt": b""},
        {"zero bytes": 1, "no caption": 2},
    ),
    "text alone": (captioned("a.jpg") | {"b.txt": b"of what?", "README.txt": b"x"}, {"no picture": 1}),
    "in a tar": ({"0.tar": archive([*MEMBERS, ("b.heic", b"x"), ("b.txt", b"x")])}, {INSTALL: 1}),
    "two kinds": ({"0.tar": archive(MEMBERS), **captioned("b.jpg")}, {"picture beside tar shards": 1}),
}


@pytest.mark.usefixtures("without_heif")
@pytest.mark.parametrize(("files", "left_out"), LEFT_OUT.values(), ids=LEFT_OUT)
@pytest.mark.behaviour(
    "Pictures and captions",
    when="a folder holds files that cannot be used (HEIC without pillow-heif, raw, hidden or empty files, lone texts)",
    then="every command counts them by reason, and says what to install if that helps",
)
def test_every_command_reports_what_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, bytes], left_out: dict[str, int]
):
    data = fill(tmp_path / "data", files)
    assert open_records(str(data)).damaged == left_out  # so does everything that opens data
    for reason, count in left_out.items():
        assert f"{count} {reason}" in caplog.text
    assert json.loads(stats(StatsArguments(paths=(str(data),), json=True)))["damaged"]["scan"] == left_out
    said = index(IndexArguments(paths=(str(data),), out=tmp_path / "index", workers=1))
    assert all(reason in said for reason in left_out)
    assert f"{sum(left_out.values())} left out or damaged" in said
    for source in (*open_indexed(tmp_path / "index"), open_records(str(data), tmp_path / "index")):
        assert source.damaged == left_out  # type: ignore[attr-defined]


@pytest.mark.usefixtures("without_heif")
def test_a_folder_without_usable_pictures_is_refused(tmp_path: Path):
    fill(tmp_path, {"IMG_1.HEIC": HEIC, "IMG_2.heif": HEIC})
    with pytest.raises(ValueError, match=r"holds no pictures .*1 unknown format \.heic \(pip install .*heif"):
        open_records(str(tmp_path))


@pytest.mark.behaviour(
    "Pictures and captions",
    when="names in a tar have dots before their ending (photo.v1.jpg)",
    then="by WebDataset's rule they do not form records; each is counted, with advice to rename it",
)
@pytest.mark.parametrize(
    ("names", "records", "lost"),
    [
        ([f"photo.v{i}" for i in range(6)], 0, 6),
        (["a.1", "b.2", "c"], 1, 2),
        (["photo", "photo.v1", "photo.v2"], 1, 2),
        (["x/2024.01.02", "x/2024.01.03"], 0, 2),
    ],
)
def test_pictures_lost_to_dots_are_each_counted(tmp_path: Path, names: list[str], records: int, lost: int):
    members = [(f"{name}.{ending}", b"x") for name in names for ending in ("jpg", "txt")]
    (tmp_path / "0.tar").write_bytes(archive(members))
    source = open_records(str(tmp_path))
    assert len(source) == records
    assert source.damaged == {"dots in the name": lost}  # type: ignore[attr-defined]
    report = build([str(tmp_path)], tmp_path / "index")
    assert all("rename it" in example["detail"] for example in report["examples"])


def test_masks_beside_a_picture_are_not_lost(tmp_path: Path):
    (tmp_path / "0.tar").write_bytes(archive([("a.jpg", b"x"), ("a.seg.png", b"x"), ("a.txt", b"x")]))
    assert open_records(str(tmp_path)).damaged == {}  # type: ignore[attr-defined]


# -- what a folder is --------------------------------------------------------------------------------------------


LIST = b'{"file_name": "a.jpg", "text": "by the list"}\n'


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a folder holds data of several kinds",
    then="the first of these is read: tar shards, Parquet with pictures, a manifest, pictures; the rest is counted",
)
@pytest.mark.parametrize(
    ("files", "tables", "kind"),
    [
        ({"0.tar": archive([("a.jpg", b"x")]), **captioned("b.jpg")}, {"t.parquet": True}, "tar"),
        (captioned("b.jpg"), {"t.parquet": True, "u.parquet": False}, "parquet"),
        (captioned("00000/a.jpg", "00000/b.jpg"), {"00000.parquet": False}, "folder"),
        (captioned("a.jpg") | {"metadata.jsonl": LIST}, {}, "manifest"),
        (captioned("a.jpg") | {"metadata.csv": b"file_name,text\na.jpg,x"}, {}, "folder"),
        (captioned("a.jpg") | {"deep/metadata.jsonl": LIST}, {"captions.parquet": False}, "folder"),
        ({"a.jpg": picture(), "metadata.csv": b"file_name,text\na.jpg,x"}, {}, "manifest"),
        ({"train/a.jpg": picture(), "train/metadata.jsonl": LIST}, {}, "manifest"),
        ({"a.jpg": picture()}, {}, "folder"),
    ],
)
def test_a_folder_is_the_first_kind_that_is_there(
    tmp_path: Path, files: dict[str, bytes], tables: dict[str, bool], kind: str
):
    fill(tmp_path, files)
    for name, pictures in tables.items():
        table(tmp_path / name, url=["x"], **({"jpg": [picture()]} if pictures else {}))
    assert discover(str(tmp_path)).kind == kind
    assert len(open_records(str(tmp_path))) >= 1


def test_a_table_without_pictures_alone_is_refused_as_such(tmp_path: Path):
    table(tmp_path / "0.parquet", url=["x"], caption=["y"])
    with pytest.raises(ValueError, match=r"no column of pictures.*its columns: url \(string\), caption"):
        open_records(str(tmp_path))


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a folder has Hugging Face's splits (train, test, validation)",
    then="train is read; files of the others are counted, with the path that selects them",
)
@pytest.mark.parametrize(
    ("train", "test", "takes"),
    [
        ("train/a.jpg", "test/a.jpg", "test"),
        ("data/train/a.jpg", "data/validation/a.jpg", "data/validation"),
        ("training/a.jpg", "eval/a.jpg", "eval"),
        ("train2017/a.jpg", "val2017/a.jpg", "val2017"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "data/test*.parquet"),
    ],
)
def test_of_splits_train_is_taken(tmp_path: Path, train: str, test: str, takes: str):
    for name in (train, test):
        if name.endswith(".parquet"):
            table(tmp_path / name, jpg=[picture()], txt=[name])
        else:
            fill(tmp_path, captioned(name))
    source = open_records(str(tmp_path))
    assert [captions for i in range(len(source)) for captions in source.read(i).captions["txt"]] == [
        train if train.endswith(".parquet") else f"it is {train}"
    ]
    assert source.damaged == {  # type: ignore[attr-defined]
        f"of a split other than train (give {tmp_path / takes} to take it)": 1
    }
    assert len(open_records(str(tmp_path / takes))) == 1


def test_without_train_or_in_other_folders_nothing_is_a_split(tmp_path: Path):
    fill(tmp_path, captioned("test/a.jpg", "val/b.jpg", "cars/train.jpg", "cars/test.jpg", "trains/c.jpg"))
    assert len(open_records(str(tmp_path))) == 5


# -- surroundings ------------------------------------------------------------------------------------------------


@pytest.mark.behaviour(
    "Surroundings",
    when="data is moved or copied together with its index",
    then="the index still works; if the copied files have other times, it is ignored with a warning",
)
@pytest.mark.parametrize("kind", ["tar", "folder", "manifest", "parquet"])
def test_an_index_moves_with_its_data(tmp_path: Path, kind: str):
    here = tmp_path / "here"
    if kind == "tar":
        fill(here, {"x/0.tar": archive([("a.png", picture()), ("a.txt", b"x")])})
    elif kind == "parquet":
        table(here / "0.parquet", jpg=[picture()], txt=["x"])
    else:
        fill(here, captioned("a.jpg") | ({"metadata.jsonl": LIST} if kind == "manifest" else {}))
    build([str(here)], here / DEFAULT, look_inside=True)
    before = open_records(str(here)).read(0)
    shutil.move(here, tmp_path / "there")
    source = open_records(str(tmp_path / "there"))
    assert source.read(0) == before
    assert source.dimensions().tolist() == [[8, 6]]  # type: ignore[attr-defined]  # only the index holds them
    (found,) = open_indexed(tmp_path / "there" / DEFAULT)
    assert found.read(0) == source.read(0)


def test_an_index_in_another_folder_moves_too(tmp_path: Path):
    fill(tmp_path / "all" / "data", {"0.tar": archive([("a.png", picture()), ("a.txt", b"x")])})
    build([str(tmp_path / "all" / "data")], tmp_path / "all" / "index", look_inside=True)
    shutil.move(tmp_path / "all", tmp_path / "other")
    source = open_records(str(tmp_path / "other" / "data"), tmp_path / "other" / "index")
    assert source.dimensions().tolist() == [[8, 6]]  # type: ignore[attr-defined]
    shutil.move(tmp_path / "other" / "index", tmp_path / "index")  # without its data
    assert len(open_records(str(tmp_path / "other" / "data"))) == 1


def test_a_copy_with_other_times_is_scanned(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fill(tmp_path / "here", {"0.tar": archive([("a.png", picture()), ("a.txt", b"x")])})
    build([str(tmp_path / "here")], tmp_path / "here" / DEFAULT)
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copyfile)
    assert len(open_records(str(tmp_path / "there"))) == 1
    assert "was written in another place and is not used" in caplog.text


def test_an_index_of_the_earlier_version_loads(tmp_path: Path):
    fill(tmp_path / "data", captioned("a.jpg", "b.png"))
    build([str(tmp_path / "data")], tmp_path / "index", look_inside=True)
    listed = json.loads((tmp_path / "index" / INDEX).read_text())
    del listed["folder"], listed["left_out"]  # earlier versions did not write them
    (tmp_path / "index" / INDEX).write_text(json.dumps(listed))
    (source,) = open_indexed(tmp_path / "index")
    assert len(source) == 2
    again = open_records(str(tmp_path / "data"), tmp_path / "index")
    assert again.dimensions().tolist() == [[8, 6]] * 2  # type: ignore[attr-defined]


@pytest.mark.behaviour(
    "Pictures and captions",
    when='a folder of pictures has the name of the toy world ("shapes")',
    then='every command takes the bare name to mean the toy world, and says so; write "./shapes" for the folder',
)
def test_shapes_is_the_toy_world_to_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fill(tmp_path / "shapes", captioned("a.jpg"))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = open_data(DataConfig(paths=("shapes",)), image_size=16, seed=0)
    assert data.load(0, 1, range(1))[0].key == ""  # drawn
    assert "shapes means the toy world; for the folder of that name write ./shapes" in caplog.text
    refusing = [
        lambda: index(IndexArguments(paths=("shapes",), out=tmp_path / "index")),
        lambda: stats(StatsArguments(paths=("shapes",))),
        lambda: recaption(RecaptionArguments(paths=("shapes",), out=tmp_path / "o.parquet")),
    ]
    for command in refusing:
        with pytest.raises(ValueError, match=r"'shapes' is the toy world.* write \./shapes"):
            command()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shapes"]
    for path in ("./shapes", "shapes/", str(tmp_path / "shapes")):
        assert len(open_records(path)) == 1
