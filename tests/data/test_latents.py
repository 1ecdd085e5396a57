"""Latents on disk: by the picture's bytes and how it is cropped, whole or absent, and picklable."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from semantic_routing.common.images.decode import Limits
from semantic_routing.data import latents_writer
from semantic_routing.data.latents import KeptLatents, pixels_key, record_key
from semantic_routing.data.latents_writer import LatentWriter

KEYS = [bytes([i]) * 15 + b"\0" for i in range(9)]
"""Keys that end in a zero byte."""


def posterior(i: int, dtype: torch.dtype = torch.float32, side: int = 4) -> torch.Tensor:
    return torch.full((2, 3, side, side), float(i)).to(dtype)


def write(folder: Path, numbers: range, side: int = 4, most: int = 10**6) -> LatentWriter:
    with LatentWriter(folder, most) as writer:
        for i in numbers:
            writer.add(KEYS[i], posterior(i, side=side))
    return writer


def found(kept: KeptLatents) -> dict[int, float]:
    """The first value of each posterior that is there."""
    got = {i: kept.get(key) for i, key in enumerate(KEYS)}
    return {i: float(x[0, 0, 0, 0]) for i, x in got.items() if x is not None}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert (found(KeptLatents(tmp_path / "none")), len(KeptLatents(tmp_path / "none"))) == ({}, 0)
    assert write(tmp_path, range(3)).written == 3
    write(tmp_path, range(3, 5), side=6)
    write(tmp_path, range(6, 8))
    kept = KeptLatents(tmp_path)
    assert len(kept) == 7
    assert found(kept) == found(pickle.loads(pickle.dumps(kept))) == {i: i for i in (0, 1, 2, 3, 4, 6, 7)}
    shapes = [x.shape for i in (2, 3) if (x := kept.get(KEYS[i])) is not None]
    assert shapes == [(2, 3, 4, 4), (2, 3, 6, 6)]
    assert kept.get(b"x" * 16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_type_is_read_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    expected = torch.randn(2, 3, 4, 4).to(dtype)
    with LatentWriter(tmp_path, 10**6) as writer:
        writer.add(KEYS[0], expected)
    got = KeptLatents(tmp_path).get(KEYS[0])
    assert got is not None
    assert torch.equal(torch.from_numpy(got).view(dtype), expected)


def test_shards_are_written_as_they_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latents_writer, "SHARD", 3 * posterior(0).nbytes)
    with LatentWriter(tmp_path, 10**6) as writer:
        for i in (0, 1, 1, 0, 2, 3):
            writer.add(KEYS[i], posterior(i))
        assert found(KeptLatents(tmp_path)) == {0: 0, 1: 1, 2: 2}
        assert [key in writer for key in KEYS[:5]] == [True] * 4 + [False]
    assert found(KeptLatents(tmp_path)) == {i: i for i in range(4)}
    assert len([*tmp_path.iterdir()]) == 2


def broken_off(folder: Path, error: BaseException) -> None:
    with LatentWriter(folder, 10**6) as writer:
        writer.add(KEYS[0], posterior(0))
        raise error


def test_nothing_is_written_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"):
        broken_off(tmp_path, ValueError("broken"))
    assert not [*tmp_path.iterdir()]
    with pytest.raises(KeyboardInterrupt):
        broken_off(tmp_path, KeyboardInterrupt())
    assert found(KeptLatents(tmp_path)) == {0: 0}


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    size = posterior(0).nbytes
    with pytest.raises(ValueError, match=f"holds 0 bytes, and {size} more exceed {size - 1}: raise codec.keep_on_disk"):
        write(tmp_path, range(1), most=size - 1)
    assert not [*tmp_path.iterdir()]
    write(tmp_path, range(1), most=size)
    there = next(tmp_path.iterdir()).stat().st_size
    for first, most in ((1, there + size - 1), (2, 2 * size)):
        with pytest.raises(ValueError, match=f"holds {there} bytes, and {size} more exceed {most}"):
            write(tmp_path, range(first, first + 1), most=most)
    write(tmp_path, range(2, 3), most=there + size)
    assert found(KeptLatents(tmp_path)) == {0: 0, 2: 2}


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another", "gone"])
@pytest.mark.behaviour(
    "Pictures and captions",
    when="a shard of cached latents is truncated, damaged or deleted",
    then="a warning names it, its images are encoded again, and the next data encode adds them to the folder again",
)
def test_damaged_shards_count_as_absent(damage: str, tmp_path: Path) -> None:
    write(tmp_path, range(3))
    (shard,) = tmp_path.iterdir()
    write(tmp_path, range(4, 6))
    opened = KeptLatents(tmp_path)
    assert len(opened) == 5
    content = shard.read_bytes()
    at = content.index(posterior(1).numpy().tobytes())
    changed = {
        "truncated": content[:-9],
        "flipped": content[:at] + b"\1" + content[at + 1 :],
        "empty": b"",
        "another": b"x" * 99,
        "gone": b"",
    }
    shard.unlink()  # a mapped file must not change
    if damage != "gone":
        shard.write_bytes(changed[damage])
    left = {0: 0, 2: 2, 4: 4, 5: 5} if damage == "flipped" else {4: 4, 5: 5}
    kept = KeptLatents(tmp_path)
    if damage == "gone":
        assert found(kept) == left
    else:
        with pytest.warns(UserWarning, match=f"{shard} is damaged: delete it; its pictures are encoded") as caught:
            assert found(kept) == found(kept) == left
        assert len(caught) == 1
    write(tmp_path, range(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found(KeptLatents(tmp_path)) == left | {1: 1}
    write(tmp_path, range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(KeptLatents(tmp_path)) == {i: i for i in (0, 1, 2, 4, 5)}


def test_keys_name_all_that_decides_the_pixels() -> None:
    def key(
        data: bytes = b"a picture", size: tuple[int, int] = (8, 6), mirrored: bool = False, least: int = 0
    ) -> bytes:
        return record_key(data, *size, Limits(min_side=least), mirrored=mirrored)

    drawn = [np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8), np.ones((2, 3, 3), np.uint8)]
    others = [key(), key(b"a pictura"), key(size=(6, 8)), key(mirrored=True), key(least=1), *map(pixels_key, drawn)]
    assert len(set(others)) == 8
    assert {len(one) for one in others} == {16}
    assert key() == key()
    assert pixels_key(drawn[0]) == pixels_key(drawn[0].copy()[:, ::-1])


def test_threads_read_one_folder(tmp_path: Path) -> None:
    write(tmp_path, range(9))
    kept, results = KeptLatents(tmp_path), list[dict[int, float]]()
    threads = [threading.Thread(target=lambda: results.append(found(kept))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{i: i for i in range(9)}] * 8


def test_reading_imports_no_torch() -> None:
    code = "import sys, semantic_routing.data.latents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
