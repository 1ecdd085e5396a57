"""WebDataset shards with damaged records, one for each reason."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def encoded(pixels: np.ndarray | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """Encode a picture in one of Pillow's formats."""
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, form, **options)
    return file.getvalue()


def bomb() -> bytes:
    """Make the first bytes of a PNG of 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 10**6) + b"IDAT"


NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
PNG = encoded(NOISE)
TEN = {
    "zero bytes": (b"", b"a caption"),
    "not an image": (b"<html>404</html>", b"a caption"),
    "unsupported format": (encoded(NOISE, "EPS"), b"a caption"),
    "truncated": (encoded(NOISE, "JPEG")[:-100], b"a caption"),
    "damaged": (PNG[:60] + bytes(80) + PNG[140:], b"a caption"),
    "decompression bomb": (bomb(), b"a caption"),
    "floating point": (encoded(np.ones((8, 8), np.float32), "TIFF"), b"a caption"),
    "extreme aspect": (encoded(np.zeros((2, 64, 3), np.uint8)), b"a caption"),
    "no caption": (PNG, b" \n"),
    "bad captions": (PNG, b"\xff\xfe not UTF-8"),
}
"""A picture and a caption for each reason."""
RECORDS, EVERY = 200, 20


def write_shards(folder: Path) -> Path:
    """Write four shards of 50 records, one in twenty damaged, each for another reason; return the folder."""
    folder.mkdir(exist_ok=True)
    reasons = list(TEN.values())
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, RECORDS, 4):
                color = np.full((16, 16, 3), number, np.uint8)
                image, caption = encoded(color), f"number {number}".encode()
                if number % EVERY == EVERY // 2 + number // EVERY:  # spread over all shards
                    image, caption = reasons[number // EVERY]
                for ending, content in ((".png", image), (".txt", caption)):
                    member = tarfile.TarInfo(f"{number:09d}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder
