"""Files of data for tests: pictures, captions, tar archives and Parquet tables."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

File = tuple[str, bytes]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(seed: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    """Make a PNG of noise, of this (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def archive(files: Sequence[File], kind: str = "pax", mtime: float = 0) -> bytes:
    """Make a tar archive of files (name, content) in one of ``FORMATS``."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[kind]) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def records(count: int) -> list[File]:
    """Return the files of records with a picture, a .json and a .txt each; their pictures cannot be decoded."""
    return [
        file
        for i in range(count)
        for file in (
            (f"{i:09d}.jpg", b"%d" % i * (i + 1)),
            (f"{i:09d}.json", b'{"caption": "json %d", "width": 5}' % i),
            (f"{i:09d}.txt", b"text %d" % i),
        )
    ]


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files by their names into a folder, and return it."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def captioned(*names: str) -> dict[str, bytes]:
    """Return pictures by name, and a .txt file of captions for each."""
    files = {name: picture() for name in names}
    return files | {f"{name.rpartition('.')[0]}.txt": f"it is {name}".encode() for name in names}


def table(path: Path, **columns: list[Any]) -> Path:
    """Write a Parquet table, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path
