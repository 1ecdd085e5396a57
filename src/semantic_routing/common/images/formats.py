"""Which formats of pictures are read here, and what to say of files in others."""

from __future__ import annotations

import re
from functools import lru_cache

PLAIN = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What every Pillow opens. It knows more, but some of those (EPS) run other programs on the file."""
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
"""The endings of each format's files, in lower case."""
INSTALL = {"AVIF": 'pip install "pillow>=11.3"', "HEIF": 'pip install "semantic-routing[heif]"'}
"""What brings a format that may be missing."""

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened here."""
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
    """The endings of files that are taken for pictures."""
    return tuple(ending for name in formats() for ending in ENDINGS[name])


def unknown(ending: str) -> str:
    """The reason for which a file of this ending is passed over, with what to install where something helps."""
    if not re.fullmatch(r"\.[a-z0-9]{1,8}", ending) or ending[1:].isdigit():
        return "unknown format"  # what stands behind the dot names none
    name = next((name for name, endings in ENDINGS.items() if ending in endings), "")
    hint = f" ({INSTALL[name]})" if name in INSTALL else ""
    return f"unknown format {ending}{hint}"


def hint(begin: bytes) -> str:
    """What to install for a picture that begins so; empty where that would not help."""
    brand = begin[8:12] if begin[4:8] == b"ftyp" else b""
    name = "AVIF" if brand in (b"avif", b"avis") else "HEIF" if brand in _HEIF_BRANDS else ""
    return "" if name in ("", *formats()) else f"; {INSTALL[name]}"


def is_outdated(reason: str) -> bool:
    """Whether files that were passed over for a reason can be read by now."""
    return any(reason == unknown(ending) for ending in picture_endings())
