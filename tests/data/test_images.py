"""Pixels from the bytes of files of every kind, and the reason where there are none."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from semantic_routing.data.images import Limits, Unusable, centre_crop, decode

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray | Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, form, **options)
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG that claims to have this size, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def scrambled(data: bytes) -> bytes:
    """A PNG whose compressed pixels are noise, with their length as it was."""
    start = data.index(b"IDAT") + 4
    return data[: start + 20] + bytes(100) + data[start + 120 :]


BAD = {
    "zero bytes": b"",
    "not an image": b"<!DOCTYPE html><title>404</title>",
    "unsupported format": encoded(NOISE, "EPS"),
    "truncated": encoded(NOISE, "JPEG")[:-500],
    "damaged": scrambled(encoded(NOISE, "PNG")),
    "decompression bomb": png(50_000, 50_000),
    "floating point": encoded(np.ones((8, 8), np.float32), "TIFF"),
    "extreme aspect": encoded(NOISE[:2], "PNG"),
}


@pytest.mark.parametrize("reason", BAD)
def test_reasons(reason: str):
    with pytest.raises(Unusable) as caught:
        decode(BAD[reason], 8, 8)
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_files_cut_short_are_truncated_in_every_format(form: str, kept: float):
    whole = encoded(NOISE, form)
    with pytest.raises(Unusable, match="truncated"):
        decode(whole[: int(kept * len(whole))], 8, 8)


def test_a_bomb_is_one_whether_pillow_warns_or_raises():
    for side in (9_000, 12_000, 50_000):  # below Pillow's limits, where it warns, where it raises
        with pytest.raises(Unusable, match="decompression bomb"):
            decode(png(side, side), 8, 8)


def test_limits_are_of_the_header():
    small = encoded(NOISE[:32], "PNG")
    decode(small, 8, 8, Limits(min_side=32, max_pixels=64 * 32, max_aspect=2.0))
    for limits, reason in (
        (Limits(min_side=33), "too small"),
        (Limits(max_pixels=64 * 32 - 1), "decompression bomb"),
        (Limits(max_aspect=1.9), "extreme aspect"),
    ):
        with pytest.raises(Unusable) as caught:
            decode(small, 8, 8, limits)
        assert caught.value.reason == reason


@pytest.mark.parametrize("wrong", [{"max_pixels": 0}, {"max_pixels": 10**12}, {"min_side": -1}, {"max_aspect": 0.5}])
def test_impossible_limits(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}"):
        Limits(**wrong)


def test_cmyk_of_adobe_is_inverted_in_the_file_and_right_in_rgb():
    inks = np.zeros((32, 64, 4), np.uint8)
    inks[:, :32] = (0, 255, 255, 0)  # magenta and yellow are red
    inks[:, 32:] = (255, 0, 0, 128)  # cyan and half black
    file = encoded(Image.fromarray(inks, mode="CMYK"), "JPEG", quality=100)
    assert b"Adobe" in file  # the marker by which readers know that 255 is no ink
    rgb = decode(file, 32, 64).astype(int)
    assert np.abs(rgb[:, 4:28] - (255, 0, 0)).max() <= 3
    assert np.abs(rgb[:, 36:60] - (0, 127, 127)).max() <= 3


def test_sixteen_bits_and_exif_and_alpha_from_bytes():
    gray = np.array([[0, 257], [32896, 65535]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(gray, "PNG"), 2, 2)[..., 0], [[0, 1], [128, 255]])
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode(encoded(NOISE, "PNG", exif=exif), 64, 64), np.rot90(NOISE, -1))
    clear = np.dstack([NOISE, np.zeros((64, 64), np.uint8)])
    assert (decode(encoded(clear, "PNG"), 64, 64) == 255).all()


def test_metadata_that_cannot_be_read_turns_nothing():
    file = encoded(NOISE, "PNG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff not at all")
    np.testing.assert_array_equal(decode(file, 64, 64), NOISE)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 4), (4, 8), (2, 8)])
def test_the_largest_middle_of_the_shape_is_kept(height: int, width: int):
    pixels = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    top, left = (8 - height) // 2, (8 - width) // 2
    kept = np.asarray(centre_crop(Image.fromarray(pixels), height, width))
    np.testing.assert_array_equal(kept, pixels[top : top + height, left : left + width])


def test_large_jpegs_are_decoded_small_and_still_right():
    y, x = np.mgrid[:1024, :1024] / 1024
    smooth = np.stack([x, y, 0.5 + 0.5 * np.sin(20 * x * y)], axis=-1)
    file = encoded((255 * smooth).astype(np.uint8), "JPEG", quality=95, subsampling=0)
    exact = np.asarray(centre_crop(Image.open(io.BytesIO(file)), 128, 128)).astype(int)
    assert np.abs(decode(file, 128, 128).astype(int) - exact).max() <= 6
    assert np.abs(decode(file, 128, 128).astype(int) - exact).mean() < 0.7
