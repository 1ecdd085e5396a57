"""``semroute data``: index and stats from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from semantic_routing.cli.data import SUBCOMMANDS
from semantic_routing.cli.main import main
from semantic_routing.data.sources.index import DEFAULT
from semantic_routing.data.sources.records import Record, Sharded
from semantic_routing.data.tools.stats import statistics, table
from tests.helpers.data_files import archive, picture


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    files = []
    for i in range(10):
        files.append((f"{i}.png", picture(i, size=(8 + 8 * (i % 2), 8))))
        if i < 6:
            files.append((f"{i}.txt", b"x" * (i + 1)))
        files.append((f"{i}.json", b'{"caption": ["ab", "abcd"]}'))
    files += [("bad.png", b"no picture"), ("none.txt", b"alone"), ("zero.png", b"")]
    (folder / "0.tar").write_bytes(archive(files))
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    main(["data", *args])
    return capsys.readouterr().out


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["data", *args])
    assert end.value.code == 2
    return capsys.readouterr().err


def test_subcommands_are_listed(capsys: pytest.CaptureFixture[str]):
    listed = run(capsys)
    assert listed == run(capsys, "--help")
    assert all(f"\n{name} " in listed for name in SUBCOMMANDS)
    assert "unknown subcommand 'indx'; did you mean 'index'?" in fails(capsys, "indx")


def test_index_and_then_stats(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    answer = run(capsys, "index", str(shards), "--workers", "1")
    assert answer.startswith("12 records in 1 files of ")
    assert "4 left out or damaged, examples in" in answer
    assert answer.endswith(f"{shards / DEFAULT}\n")
    run(capsys, "index", str(shards), "--out", str(tmp_path / "other"), "--dimensions")
    for where in ([str(shards)], [str(tmp_path / "other")], [str(shards), "--index", str(tmp_path / "other")]):
        facts = json.loads(run(capsys, "stats", *where, "--json"))
        assert (facts["records"], facts["shards"], facts["sample"]) == (12, 1, 12)
        looked = str(tmp_path / "other") in where
        expected = {"no caption": 2, "no picture": 1, "zero bytes": 1} | ({"not an image": 1} if looked else {})
        assert facts["damaged"]["scan"] == expected
        assert facts["damaged"]["sample"] == {"not an image": 1, "zero bytes": 1}
        caption, text = facts["captions"]["caption"], facts["captions"]["txt"]
        assert (caption["share"], text["share"]) == (10 / 11, 6 / 11)
        assert [caption["characters"][percent] for percent in ("0", "25", "75", "100")] == [2, 2, 4, 4]
        assert (text["characters"]["0"], text["characters"]["100"]) == (1, 6)
        assert facts["width"] | {"50": 0} == {"0": 8, "5": 8, "25": 8, "50": 0, "75": 16, "95": 16, "100": 16}
        assert set(facts["height"].values()) == {8}
        assert {name: share for name, share in facts["aspect"].items() if share} == {"0.8 to 1.25": 0.5, "from 2": 0.5}
    shown = run(capsys, "stats", str(shards))
    assert "12 records in 1 shards; all were read" in shown
    assert "left out or damaged, found by scanning: 4" in shown


def test_a_sample_is_spread_evenly_over_all_sources():
    class Numbers(Sharded):
        def __init__(self, first: int, count: int) -> None:
            super().__init__("numbers", ["a"], [count])
            self.first = first

        def read(self, index: int) -> Record:
            self.locate(index)
            return Record("", picture(0), {"n": ("x" * (self.first + index),)})

    facts = statistics([Numbers(1, 30), Numbers(31, 70)], 10)
    assert (facts["records"], facts["shards"], facts["sample"]) == (100, 2, 10)
    assert facts["captions"]["n"]["characters"] == {"0": 1, "5": 1, "25": 21, "50": 41, "75": 71, "95": 91, "100": 91}
    assert facts["picture_bytes"]["total"] == 100 * len(picture(0))
    assert "from 10 of them, evenly spread" in table(facts)
    assert statistics([Numbers(1, 3)], 0)["sample"] == 3
    empty = statistics([], 5)
    assert (empty["records"], empty["aspect"], empty["width"]) == (0, {}, {})
    assert "0 records" in table(empty)


def test_bad_arguments_are_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "needs paths" in fails(capsys, "index")
    assert "needs paths" in fails(capsys, "stats")
    assert "needs paths" in fails(capsys, "recaption", "--out", "captions.parquet")
    assert "concurrency is 0" in fails(capsys, "recaption", str(shards), "--out", "a.parquet", "--concurrency", "0")
    assert "give --out" in fails(capsys, "index", "memory://x/a.tar")
    assert "give --out" in fails(capsys, "index", str(shards), str(tmp_path))
    assert "does not exist" in fails(capsys, "stats", str(tmp_path / "nothing"))
    assert "sample is -1" in fails(capsys, "stats", str(shards), "--sample", "-1")
    assert "holds no index" in fails(capsys, "stats", str(shards), "--index", str(tmp_path))
