"""Captions from a file beside the data."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from semantic_routing.data.sidecar import Sidecar

ROWS = [(f"{i:05d}", f"a picture of {i} things é" + " and more" * (i * 50)) for i in range(50)]


def parquet(path: Path, rows: list[tuple[str, str | None]], group: int = 7) -> Path:
    keys, captions = zip(*rows, strict=True)
    pq.write_table(pa.table({"key": keys, "caption": captions, "model": ["m"] * len(keys)}), path, row_group_size=group)
    return path


def jsonl(path: Path, rows: list[tuple[str, str | None]]) -> Path:
    path.write_text("\n".join(json.dumps({"key": k, "caption": c}, ensure_ascii=False) for k, c in rows) + "\n\n")
    return path


@pytest.fixture(params=["parquet", "jsonl"])
def write(request: pytest.FixtureRequest):
    return {"parquet": parquet, "jsonl": jsonl}[request.param]


def test_every_caption_is_found_by_its_key(write, tmp_path: Path):
    sidecar = Sidecar(write(tmp_path / f"s.{write.__name__}", ROWS[::-1]))
    assert len(sidecar) == 50
    for copy in (sidecar, pickle.loads(pickle.dumps(sidecar))):
        assert [copy.captions(key) for key, _ in ROWS] == [(caption,) for _, caption in ROWS]
    assert sidecar.captions("00012.tar/00003") == (ROWS[3][1],)
    assert sidecar.captions("50") == ()


def test_a_whole_key_goes_before_its_end_and_keys_may_repeat(write, tmp_path: Path):
    rows = [("a/1", "whole"), ("1", "end"), ("2", "first"), ("2", "second"), ("3", None), ("4", " ")]
    sidecar = Sidecar(write(tmp_path / f"s.{write.__name__}", rows))
    assert sidecar.captions("a/1") == ("whole",)
    assert sidecar.captions("b/1") == ()  # "1" is another record, because keys have folders here
    assert sidecar.captions("2") == ("first", "second")
    assert sidecar.captions("3") == sidecar.captions("4") == ()


def test_the_lookup_is_kept_and_made_anew_for_another_file(write, tmp_path: Path):
    path = write(tmp_path / f"s.{write.__name__}", ROWS)
    Sidecar(path)
    kept = path.with_name(path.name + ".keys.npy")
    before = kept.stat().st_mtime_ns
    Sidecar(path)
    assert kept.stat().st_mtime_ns == before
    write(path, [("other", "new")])
    os.utime(path, ns=(before, before + 10**9))
    assert Sidecar(path).captions("other") == ("new",)
    assert Sidecar(path).captions("00003") == ()


def test_keys_that_name_their_source_go_first(write, tmp_path: Path):
    sidecar = Sidecar(write(tmp_path / f"s.{write.__name__}", [("A::1", "of A"), ("B::1", "of B"), ("1", "of any")]))
    assert [sidecar.captions("1", source) for source in ("data/A", "B/", "C")] == [("of A",), ("of B",), ("of any",)]
    assert (sidecar.names_source("1", "A"), sidecar.names_source("1", "C")) == (True, False)


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no sidecar"):
        Sidecar(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="local file"):
        Sidecar("s3://bucket/s.parquet")
    (tmp_path / "a.jsonl").write_text('{"key": "1", "caption": "x"}\n{"key": 2}\n')
    with pytest.raises(ValueError, match="line 2: expected a row such as"):
        Sidecar(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        Sidecar(tmp_path / "b.jsonl")
    pq.write_table(pa.table({"key": ["1"], "text": ["x"]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="has no column caption"):
        Sidecar(tmp_path / "c.parquet")
