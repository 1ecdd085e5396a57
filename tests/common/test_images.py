"""Decoding pictures of every kind, and the reasons for refusing damaged ones."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile, PngImagePlugin

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.decode import Limits, centre_crop, decode
from semantic_routing.common.images.dimensions import look
from tests.helpers.damaged import encoded

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def png(width: int, height: int) -> bytes:
    """Make a PNG that claims to have this size, but has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def scrambled(data: bytes) -> bytes:
    """Overwrite some of a PNG's compressed pixels."""
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
def test_each_kind_of_bad_picture_has_its_reason(reason: str):
    with pytest.raises(BadData) as caught:
        decode(BAD[reason], 8, 8)
    assert caught.value.reason == reason
    assert caught.value.detail


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_files_cut_short_are_truncated_in_every_format(form: str, kept: float):
    whole = encoded(NOISE, form)
    with pytest.raises(BadData, match="truncated"):
        decode(whole[: int(kept * len(whole))], 8, 8)


def test_a_decompression_bomb_is_refused_whether_pillow_warns_or_raises():
    for side in (9_000, 12_000, 50_000):  # below Pillow's limits, where it warns, where it raises
        with pytest.raises(BadData, match="decompression bomb"):
            decode(png(side, side), 8, 8)


def test_limits_are_checked_by_the_header():
    small = encoded(NOISE[:32], "PNG")
    decode(small, 8, 8, Limits(min_side=32, max_pixels=64 * 32, max_aspect=2.0))
    for limits, reason in (
        (Limits(min_side=33), "too small"),
        (Limits(max_pixels=64 * 32 - 1), "decompression bomb"),
        (Limits(max_aspect=1.9), "extreme aspect"),
    ):
        with pytest.raises(BadData) as caught:
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


def test_unreadable_metadata_does_not_turn_a_picture():
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
    difference = np.abs(decode(file, 128, 128).astype(int) - exact)
    assert 0 < difference.mean() < 0.7  # not zero: it was decoded at a quarter of its size


def test_a_size_is_read_from_the_first_64_kibibytes_if_they_are_enough(monkeypatch):
    monkeypatch.setattr(ImageFile, "MAXBLOCK", 2**18)  # Pillow 12 writes all that precedes the pixels at once
    for comment, expected in ((b"short", [2**16]), (b"c" * 60_000, [2**16, 2**18])):
        file = encoded(NOISE, "JPEG", comment=comment, icc_profile=bytes(30_000)) + bytes(2**18)
        read: list[int] = []
        assert look(lambda count, file=file, read=read: read.append(count) or file[:count], 2**18) == (64, 64)
        assert read == expected


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SPLIT = np.zeros((64, 64, 3), np.uint8)
SPLIT[:, :32], SPLIT[:, 32:] = (220, 30, 60), (20, 90, 200)


def exchanged(profile: bytes = SRGB) -> bytes:
    """Swap red and green in an RGB profile."""
    found = bytearray(profile)
    red, green = found.index(b"rXYZ") + 4, found.index(b"gXYZ") + 4  # place and size follow the name
    found[red : red + 8], found[green : green + 8] = found[green : green + 8], found[red : red + 8]
    return bytes(found)


def gray_profile(gamma: float) -> bytes:
    """Make a profile of grey levels with this gamma."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)  # D50 in 16.16
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma)) + b"\0\0"
    text = b"text\0\0\0\0made by hand\0\0\0\0"
    parts, table, body = {b"wtpt": white, b"kTRC": curve, b"cprt": text, b"desc": text}, b"", b""
    for name, part in parts.items():
        table += name + struct.pack(">II", 132 + 12 * len(parts) + len(body), len(part))
        body += part
    head = struct.pack(">I4sI4s4s4s12s4s", 0, b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ", bytes(12), b"acsp")
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    whole = head.ljust(128, b"\0") + struct.pack(">I", len(parts)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


@pytest.mark.behaviour(
    "Pictures and captions",
    when="an image has a colour profile, such as Adobe RGB, in any colour space",
    then="it is converted to sRGB, as viewers show it; an image that is already sRGB is not changed",
)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_colour_profiles_are_applied(form: str):
    options: dict[str, Any] = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(form, {})
    shown = decode(encoded(SPLIT, form, icc_profile=exchanged(), **options), 64, 64).astype(int)
    assert np.abs(shown[:, 4:28] - (30, 220, 60)).max() <= 4
    assert np.abs(shown[:, 36:60] - (90, 20, 200)).max() <= 4
    plain = decode(encoded(SPLIT, form, **options), 64, 64)
    np.testing.assert_array_equal(decode(encoded(SPLIT, form, icc_profile=SRGB, **options), 64, 64), plain)


def test_profiles_of_palettes_and_pictures_with_alpha_are_applied():
    palette = Image.fromarray(SPLIT).quantize(2)
    assert np.abs(decode(encoded(palette, "PNG", icc_profile=exchanged()), 64, 64)[0, 0] - (30.0, 220, 60)).max() <= 3
    clear = np.dstack([SPLIT, np.full((64, 64), 255, np.uint8)])
    clear[:32, :, 3] = 0
    shown = decode(encoded(clear, "PNG", icc_profile=exchanged()), 64, 64).astype(int)
    assert (shown[:32] == 255).all()
    assert np.abs(shown[32:, :32] - (30, 220, 60)).max() <= 3


def test_profiles_of_grey_levels_are_applied():
    levels = np.repeat(np.arange(256, dtype=np.uint8)[None], 16, axis=0)
    light = levels[0] / 255.0
    encoded_light = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1
    for picture in (levels, np.dstack([levels, np.full_like(levels, 255)])):
        file = encoded(picture, "PNG", icc_profile=gray_profile(1.0))
        shown = decode(file, 16, 256).astype(int)
        assert np.abs(shown - 255 * encoded_light[None, :, None]).max() <= 2


def test_lab_is_read():
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    for colour in ((200, 60, 80), (60, 120, 160), (128, 128, 128)):
        lab = ImageCms.applyTransform(Image.new("RGB", (8, 8), colour), to_lab)
        assert lab is not None
        for options in ({}, {"icc_profile": b""}):
            assert np.abs(decode(encoded(lab, "TIFF", **options), 8, 8).astype(int) - colour).max() <= 3


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a colour profile is broken, or is for another colour space than the image's",
    then="it is ignored",
)
@pytest.mark.parametrize("profile", [b"no profile at all", SRGB[:200], SRGB[:128] + bytes(400), gray_profile(1.0)])
def test_profiles_that_do_not_fit_are_ignored(profile: bytes):
    np.testing.assert_array_equal(decode(encoded(SPLIT, "PNG", icc_profile=profile), 64, 64), SPLIT)
    gray = SPLIT[..., 0]
    np.testing.assert_array_equal(decode(encoded(gray, "PNG", icc_profile=exchanged()), 64, 64)[..., 0], gray)


def with_chunk(kind: bytes, body: bytes, *, last: bool = False, picture: bytes = b"") -> bytes:
    """Add a chunk to a PNG, before its pixels or after them."""
    file = picture or encoded(SPLIT, "PNG")
    place = file.index(b"IEND" if last else b"IDAT") - 4
    return (
        file[:place]
        + struct.pack(">I", len(body))
        + kind
        + body
        + struct.pack(">I", zlib.crc32(kind + body))
        + file[place:]
    )


LONG = b"{" + b" " * 3 * 2**20 + b"}"
PACKED = zlib.compress(LONG)


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a PNG contains long texts, such as the workflow of an image generator, or a profile that cannot be unpacked",
    then="the image is read without them",
)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"workflow\0\0" + PACKED),
        (b"iTXt", b"workflow\0\1\0\0\0" + PACKED),
        (b"tEXt", b"prompt\0" + 25 * LONG),
        (b"zTXt", b"Raw profile type exif\0\0" + PACKED),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + PACKED),
        (b"zTXt", b"workflow\0\0not packed at all"),
        (b"iCCP", b"bomb\0\0" + PACKED),
        (b"iCCP", b"other packing\0\7" + PACKED),
    ],
)
def test_parts_of_a_png_that_no_viewer_needs_are_skipped(kind: bytes, body: bytes, last: bool):
    file = with_chunk(kind, body, last=last)
    np.testing.assert_array_equal(decode(file, 64, 64), SPLIT)
    assert look(lambda count: file[:count], len(file)) == (64, 64)


@pytest.mark.parametrize("compressed", [False, True])
def test_texts_that_turn_a_png_are_kept(compressed: bool):
    said = PngImagePlugin.PngInfo()
    said.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=compressed)
    said.add_text("workflow", LONG.decode(), zip=True)
    file = encoded(Image.fromarray(NOISE), "PNG", pnginfo=said)
    np.testing.assert_array_equal(decode(file, 64, 64), np.rot90(NOISE, -1))


def test_a_decompression_bomb_behind_long_texts_is_refused():
    with pytest.raises(BadData, match="decompression bomb"):
        decode(with_chunk(b"zTXt", b"workflow\0\0" + PACKED, picture=png(50_000, 50_000)), 8, 8)


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a PNG is encoded for high dynamic range (PQ, HLG), which 8 bits cannot represent",
    then="it is skipped and counted under that reason",
)
@pytest.mark.parametrize("function", [16, 18])
def test_high_dynamic_range(function: int):
    with pytest.raises(BadData, match="high dynamic range"):
        decode(with_chunk(b"cICP", bytes([9, function, 0, 1])), 64, 64)
    np.testing.assert_array_equal(decode(with_chunk(b"cICP", bytes([1, 13, 0, 1])), 64, 64), SPLIT)


@pytest.mark.behaviour(
    "Pictures and captions",
    when="a PNG states its gamma and has no profile",
    then="its colours are converted to sRGB, unless the gamma is within 5% of sRGB's",
)
@pytest.mark.parametrize(("gamma", "expected"), [(1.0, 1 / 2.2), (0.55, 1 / 1.21), (0.45455, 1), (0.46, 1), (0, 1)])
def test_the_gamma_of_a_png(gamma: float, expected: float):
    file = with_chunk(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    shown = np.rint(255 * (SPLIT / 255.0) ** expected)
    assert np.abs(decode(file, 64, 64) - shown).max() <= (1 if expected != 1 else 0)
    known = with_chunk(b"sRGB", b"\0", picture=file)
    np.testing.assert_array_equal(decode(known, 64, 64), SPLIT)


def test_transparent_levels_of_16_bits():
    rows = np.array([[1000, 40000]] * 2, np.uint16)
    gray = with_chunk(b"tRNS", struct.pack(">H", 1000), picture=encoded(rows, "PNG"))
    np.testing.assert_array_equal(decode(gray, 2, 2)[..., 0], [[255, 156]] * 2)
    data = zlib.compress((b"\0" + struct.pack(">6H", 1000, 2000, 3000, 40000, 50000, 60000)) * 2)
    file = with_chunk(
        b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0), picture=b"\x89PNG\r\n\x1a\n" + png(1, 1)[33:]
    )
    file = with_chunk(b"IDAT", data, last=True, picture=file)
    colours = with_chunk(b"tRNS", struct.pack(">3H", 1000, 2000, 3000), picture=file)
    np.testing.assert_array_equal(decode(colours, 2, 2)[0], [[255, 255, 255], [156, 195, 234]])


def test_interlaced_palettes_and_first_frames_are_what_viewers_show():
    palette = Image.new("P", (2, 2))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1, 0, 1])
    for half, expected in ((b"\x80\xff", (255, 127, 127)), (b"\x00\xff", (255, 255, 255))):
        shown = decode(encoded(palette, "PNG", transparency=half), 2, 2)
        np.testing.assert_array_equal(shown[0], [expected, (0, 255, 0)])
    frames = {"save_all": True, "append_images": [Image.fromarray(255 - SPLIT)]}
    for form, options in (("WEBP", {"lossless": True}), ("PNG", {}), ("GIF", {}), ("TIFF", {})):
        shown = decode(encoded(Image.fromarray(SPLIT), form, **options, **frames), 64, 64)
        np.testing.assert_array_equal(shown, SPLIT)


def test_white_may_be_zero_in_a_tiff():
    levels = np.array([[0, 65535], [0, 65535]], np.uint16)
    black_is_zero = encoded(levels, "TIFF")
    tag = struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert tag in black_is_zero
    shown = decode(black_is_zero.replace(tag, struct.pack("<HHIHH", 262, 3, 1, 0, 0)), 2, 2)
    np.testing.assert_array_equal(shown[..., 0], [[255, 0]] * 2)
