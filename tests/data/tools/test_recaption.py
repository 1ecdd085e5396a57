"""Captions from a server process, written to a sidecar that training reads."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from semantic_routing.chat.server import ChatConfig
from semantic_routing.common.errors import TrainingFailed
from semantic_routing.data.sidecar import Sidecar
from semantic_routing.data.sources.index import open_records
from semantic_routing.data.tools.caption_parts import CaptionRow, Parts
from semantic_routing.data.tools.recaption import INSTRUCTION, RecaptionArguments, recaption
from tests.helpers.chat_server import MODEL, ChatServer


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def server() -> Iterator[ChatServer]:
    with ChatServer() as running:
        yield running


def encoded(number: int, side: int = 8, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (side, 2 * side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def shard(path: Path, pictures: list[bytes], captions: dict[int, str] | None = None) -> Path:
    """Write a tar as img2dataset does."""
    with tarfile.open(path, "w") as tar:
        for number, picture in enumerate(pictures):
            for ending, content in (("png", picture), ("txt", (captions or {}).get(number, f"old {number}").encode())):
                info = tarfile.TarInfo(f"{number:09d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def arguments(server: ChatServer, paths: list[Path], out: Path, **changes: Any) -> RecaptionArguments:
    quick = {"model": MODEL, "first_wait": 0.01, "longest_wait": 0.5, "timeout": 10.0, "part_rows": 10} | changes
    names = {field.name for field in fields(ChatConfig)} & quick.keys()
    config = ChatConfig(base_url=server.url, **{name: quick.pop(name) for name in names})
    return RecaptionArguments(server=config, paths=tuple(str(path) for path in paths), out=out, **quick)


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def as_sent(picture: bytes) -> str:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(buffer, format="JPEG", quality=90)
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def test_every_picture_gets_its_caption(server: ChatServer, tmp_path: Path) -> None:
    pictures = [encoded(number) for number in range(47)]
    first, second = shard(tmp_path / "0.tar", pictures[:30]), shard(tmp_path / "1.tar", pictures[30:])  # the same names
    out = tmp_path / "captions.parquet"
    summary = recaption(arguments(server, [first, second], out, completion_price=100.0))
    assert "47 of 47 records have captions by tiny-judge" in summary
    assert "4,700 prompt and 470 completion tokens, cost 0.05" in summary
    found = rows(out)
    assert list(found[0]) == ["key", "caption", "model", "prompt_tokens", "completion_tokens"]
    for picture, row in zip(pictures, found, strict=True):
        assert f"I see {as_sent(picture)}" in row["caption"]
        assert row["caption"].endswith(f"You ask: {INSTRUCTION}")
        assert (row["model"], row["prompt_tokens"], row["completion_tokens"]) == (f"{MODEL}-2026", 100, 10)
    # The data pipeline finds them by the records' keys.
    sidecar = Sidecar(out)
    for number, source, place in ((3, first, 3), (33, second, 3)):
        records = open_records(str(source))
        (caption,) = sidecar.captions(records.read(place).key, records.name)
        assert f"I see {as_sent(pictures[number])}" in caption
    # All parts are complete, and no answer is stored twice.
    parts = tmp_path / "captions.parquet.parts"
    assert sorted(path.name for path in parts.glob("*.parquet")) == [f"part-{i:06d}.parquet" for i in range(5)]
    assert not [*parts.rglob("answers/*/*")]
    # A second run requests nothing.
    before = server.counts()["asked"]
    assert "0 requests" in recaption(arguments(server, [first, second], out))
    assert server.counts()["asked"] == before
    assert rows(out) == found


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    with ChatServer() as server:
        pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        path = shard(tmp_path / "0.tar", [buffer.getvalue()])
        recaption(arguments(server, [path], tmp_path / "o.parquet", pixels=1350, cache=tmp_path / "kept"))
        half = Image.fromarray(pixels).resize((45, 30), Image.Resampling.LANCZOS, reducing_gap=3.0)
        buffer = io.BytesIO()
        half.save(buffer, format="JPEG", quality=90)
        assert server.counts()["pictures"] == {hashlib.sha256(buffer.getvalue()).hexdigest(): 1}
    (entry,) = (tmp_path / "kept").rglob("*.json")  # a cache that the user named is kept
    assert json.loads(entry.read_text())["question"]["parameters"] == {"max_tokens": 512}


def test_failures_are_counted_listed_and_tried_again(server: ChatServer, tmp_path: Path) -> None:
    pictures = [encoded(300 + number) for number in range(25)]
    pictures[3] = b"no picture at all, whatever its name says"
    pictures[4] = pictures[4][:40]
    told = {5: "[[400]]", 6: "[[blank]]", 7: "[[length]]", 8: "[[500]]", 9: "[[429*1]]"}
    path, out = shard(tmp_path / "0.tar", pictures, told), tmp_path / "captions.parquet"
    args = arguments(server, [path], out, show_caption=True, retries=1, max_failed=0.5)
    summary = recaption(args)
    assert "19 of 25" in summary
    reasons = {" ".join(line.split()[:-1]): int(line.split()[-1]) for line in summary.splitlines() if line[:2] == "  "}
    assert reasons == {"not an image": 1, "truncated": 1, "HTTP 400": 1, "empty answer": 1, "cut off": 1, "HTTP 500": 1}
    keys = [row["key"][-2:] for row in rows(out)]
    assert keys == [f"{number:02d}" for number in range(25) if number not in (3, 4, 5, 6, 7, 8)]
    assert "wrong: [[429*1]]" in rows(out)[3]["caption"]
    parts = sorted((tmp_path / "captions.parquet.parts").glob("part-*.parquet"))
    assert [row["key"] for part in parts for row in rows(part)] == [f"0.tar/{number:09d}" for number in range(25)]
    # Bad pictures and refused questions are not tried again; the others are.
    before = server.counts()["asked"]
    recaption(args)
    after = server.counts()["asked"]
    asked_again = {text.rpartition("wrong: ")[2] for text in after if after[text] != before[text]}
    assert asked_again == {"[[blank]]", "[[length]]", "[[500]]"}
    with pytest.raises(TrainingFailed, match=r"6 of 25 records have no caption .*1 HTTP 500.* more than the 10%"):
        recaption(arguments(server, [path], out, show_caption=True, retries=1, max_failed=0.1))
    assert len(rows(out)) == 19


def test_nothing_paid_for_is_lost_when_the_process_is_killed(tmp_path: Path) -> None:
    pictures = [encoded(600 + number) for number in range(60)]
    path, out = shard(tmp_path / "0.tar", pictures), tmp_path / "captions.parquet"
    with ChatServer(faults=0.2, delay=0.02, stall=0.2) as server:
        options = {"base-url": server.url, "model": MODEL, "out": str(out), "concurrency": "3", "part-rows": "8"}
        waits = {"first-wait": "0.01", "longest-wait": "0.5", "timeout": "20"}
        command = [sys.executable, "-m", "semantic_routing", "data", "recaption", str(path)]
        command += [word for name, value in (options | waits).items() for word in (f"--{name}", value)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        parts = tmp_path / "captions.parquet.parts"
        patience = time.monotonic() + 60
        while len([*parts.glob("part-*.parquet")]) < 2 and time.monotonic() < patience:
            time.sleep(0.02)
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
        assert not out.exists()
        kept = {
            row["caption"].partition("I see ")[2][:64] for part in parts.glob("part-*.parquet") for row in rows(part)
        }
        entries = [json.loads(entry.read_text()) for entry in parts.glob("answers/*/[!.]*.json")]
        kept |= {entry["question"]["parts"][0]["sha256"] for entry in entries}
        paid = server.counts()["pictures"].keys()
        assert len(kept) >= 16
        assert kept <= paid
        assert len(paid - kept) <= 3  # only requests in flight may be lost
        summary = recaption(arguments(server, [path], out, part_rows=8))
        assert "60 of 60 records have captions" in summary
        answered = server.counts()["pictures"]
        assert answered.keys() == {as_sent(picture) for picture in pictures}
        assert sum(answered.values()) <= 60 + 3
    for picture, row in zip(pictures, rows(out), strict=True):
        assert f"I see {as_sent(picture)}" in row["caption"]
    assert not [*parts.rglob("answers/*/*")]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a model that writes captions reasons first, or never stops reasoning",
    then="its reasoning is not part of a caption; an answer with only reasoning counts as failed",
)
def test_thoughts_are_no_captions(server: ChatServer, tmp_path: Path) -> None:
    told = {1: "[[thinks]]", 2: "[[parts]]", 3: "[[thinking]]", 4: "[[length]]"}
    path, out = shard(tmp_path / "0.tar", [encoded(500 + i) for i in range(6)], told), tmp_path / "captions.parquet"
    summary = recaption(arguments(server, [path], out, show_caption=True, max_failed=0.5))
    reasons = {" ".join(line.split()[:-1]): int(line.split()[-1]) for line in summary.splitlines() if line[:2] == "  "}
    assert reasons == {"thoughts without an answer": 1, "cut off": 1}
    assert [row["key"][-1] for row in rows(out)] == ["0", "1", "2", "5"]
    for row in rows(out):
        assert row["caption"].startswith("Alignment Score")
        assert "dog" not in row["caption"]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="no image got a caption",
    then="exit code 2 and the first reason; no file is written, and the same output can be used with other settings",
)
@pytest.mark.parametrize(
    ("fault", "reason", "setting"),
    [
        ("400", r"HTTP 400: .*something is wrong \(400\)", ""),
        ("length", "cut off: Alignment Score", "--max-tokens"),
        ("thinking", "thoughts without an answer", "--extra"),
        ("blank", "empty answer", "--extra"),
    ],
)
def test_captioning_fails_if_every_picture_fails(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str, reason: str, setting: str
) -> None:
    told = dict.fromkeys(range(5), f"[[{fault}]]")
    path, out = shard(tmp_path / "0.tar", [encoded(600 + i) for i in range(5)], told), tmp_path / "captions.parquet"
    args = arguments(server, [path], out, show_caption=True, max_failed=1.0)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"none of 5 records got a caption; the first reason: {reason}"):
            recaption(args)
        assert not out.exists()
    said = [line for line in capsys.readouterr().err.split("\n") if "answers cannot be used" in line]
    assert len(said) == (2 if setting else 0)
    assert all(setting in line for line in said)
    assert "5 of 5" in recaption(replace(args, show_caption=False, server=replace(args.server, extra='{"seed": 1}')))


def test_another_request_into_the_same_parts_is_refused(server: ChatServer, tmp_path: Path) -> None:
    path, out = shard(tmp_path / "0.tar", [encoded(800)]), tmp_path / "captions.parquet"
    with pytest.raises(ValueError, match="give the name of the model"):
        recaption(arguments(server, [path], out, model=""))
    with pytest.raises(ValueError, match=r"serves 'mistyped'"):
        recaption(arguments(server, [path], out, model="mistyped"))
    recaption(arguments(server, [path], out))  # no answer yet, so nothing to refuse
    (tmp_path / "ask.txt").write_text("Name the colours.\n")
    with pytest.raises(ValueError, match=r"another instruction; choose another --out or delete it"):
        recaption(arguments(server, [path], out, instruction=tmp_path / "ask.txt"))
    with pytest.raises(ValueError, match=r"another pixels, part_rows"):
        recaption(arguments(server, [path], out, pixels=100, part_rows=9))
    other = tmp_path / "other.parquet"
    recaption(arguments(server, [path], other, instruction=tmp_path / "ask.txt"))
    assert rows(other)[0]["caption"].endswith("You ask: Name the colours.")


def test_damaged_parts_are_named(server: ChatServer, tmp_path: Path) -> None:
    path, out = shard(tmp_path / "0.tar", [encoded(900 + i) for i in range(12)]), tmp_path / "captions.parquet"
    recaption(arguments(server, [path], out))
    whole, part = rows(out), tmp_path / "captions.parquet.parts" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-000001.parquet is damaged .* delete it"):
        recaption(arguments(server, [path], out))
    part.unlink()
    assert "2 requests" in recaption(arguments(server, [path], out))
    assert rows(out) == whole
    (part.parent / "request.json").write_text("{")
    with pytest.raises(ValueError, match=r"request.json is damaged"):
        recaption(arguments(server, [path], out))


def test_finished_file_is_written_in_row_groups_of_about_ten_thousand(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "parts", 13_000, 1000)
    for position in parts.missing(lambda count: None):
        odd = position % 9 == 0
        parts.add(CaptionRow(position=position, key=str(position), caption=None if odd else "new", reason="odd" * odd))
    assert parts.join(tmp_path / "out.parquet") == {"odd": 1445}
    assert [row["key"] for row in rows(tmp_path / "out.parquet")] == [str(i) for i in range(13_000) if i % 9]
    metadata = pq.read_metadata(tmp_path / "out.parquet")
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [10_666, 889]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": ()}, "needs paths"),
        ({"out": Path("captions.json")}, "name it .parquet"),
        ({"part_rows": 0}, "part_rows"),
        ({"paths": ("a/photos", "b/photos/")}, "several paths end in photos"),
        ({"instruction": Path("nowhere.txt")}, "cannot read the instruction"),
    ],
)
def test_wrong_settings(server: ChatServer, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = shard(tmp_path / "0.tar", [encoded(1)])
    with pytest.raises(ValueError, match=message):
        recaption(replace(arguments(server, [path], tmp_path / "captions.parquet"), **change))
