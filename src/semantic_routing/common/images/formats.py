"""Supported picture formats, and the reasons to report for files in other formats."""

from __future__ import annotations

import re
from functools import lru_cache

PLAIN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""Formats that every Pillow opens safely; some of its others (EPS) run programs on the file."""
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
}
"""File endings of each format, in lower case."""
INSTALL = {"AVIF": 'pip install "pillow>=11.3"', "HEIF": 'pip install "semantic-routing[heif]"'}
"""Command that installs a format that may be missing."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Return Pillow's names of the supported formats."""
    return (*PLAIN, *("AVIF",) * _knows_avif(), *("HEIF",) * _knows_heif())


def _knows_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:  # Pillow before 11.3
        return False
    return bool(AvifImagePlugin.SUPPORTED)


def _knows_heif() -> bool:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


@lru_cache(maxsize=1)
def picture_endings() -> tuple[str, ...]:
    """Return the file endings of pictures."""
    return tuple(ending for name in formats() for ending in ENDINGS[name])


def unknown(ending: str) -> str:
    """Return the reason for leaving out a file with this ending, with what to install if that helps."""
    if not re.fullmatch(r"\.[a-z0-9]{1,8}", ending) or ending[1:].isdigit():
        return "unknown format"  # not the name of a format
    name = next((name for name, endings in ENDINGS.items() if ending in endings), "")
    hint = f" ({INSTALL[name]})" if name in INSTALL else ""
    return f"unknown format {ending}{hint}"


def hint(begin: bytes) -> str:
    """Return what to install for a picture with these first bytes; an empty string if nothing helps."""
    brand = begin[8:12] if begin[4:8] == b"ftyp" else b""
    name = "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else ""
    return "" if name in ("", *formats()) else f"; {INSTALL[name]}"


def is_outdated(reason: str) -> bool:
    """Tell whether files that were left out for this reason can be read now."""
    return any(reason == unknown(ending) for ending in picture_endings())
