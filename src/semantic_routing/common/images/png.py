"""Removes PNG chunks that may unpack to far more than the picture itself, before Pillow reads the file."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNPACKED = 2**20
"""Most bytes of an unpacked text or profile; longer ones are removed, because Pillow would refuse the file."""
LONGEST = 2**24
"""Most bytes of an uncompressed text."""
_TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif")
"""Keywords of texts that may hold the orientation."""
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
"""Transfer functions of ITU-T H.273 for high dynamic range."""


def lightened(data: bytes) -> bytes:
    """Remove texts (a workflow may be megabytes long) and unreadable profiles from a PNG.

    Texts that may turn the picture stay. Other files, and chunks that are cut off, stay as they are.
    """
    if not data.startswith(SIGNATURE):
        return data
    kept, start, place = [], 0, len(SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind in _UNNEEDED and end <= len(data) and _UNNEEDED[kind](data[place + 8 : end - 4]):
            kept.append(data[start:place])
            start = end
        place = end
    return b"".join([*kept, data[start:]]) if kept else data


def high_range(data: bytes) -> str:
    """Return the name of a PNG's high-dynamic-range transfer function; an empty string for other files."""
    head = data[: max(data.find(b"IDAT"), 0)] if data.startswith(SIGNATURE) else b""
    place = head.find(b"\0\0\0\4cICP")
    return _HIGH_RANGE.get(data[place + 9], "") if place >= 0 else ""


def _is_unneeded_text(body: bytes) -> bool:
    return not body.startswith(_TURNING) or len(body) > LONGEST


def _is_unneeded_packed_text(body: bytes) -> bool:
    _, _, packed = body.partition(b"\0")
    return not body.startswith(_TURNING) or not _unpacks(packed[1:])


def _is_unneeded_international_text(body: bytes) -> bool:
    _, _, rest = body.partition(b"\0")
    if not rest.startswith(b"\1"):
        return _is_unneeded_text(body)
    return not body.startswith(_TURNING) or not _unpacks(rest[2:].split(b"\0", 2)[-1])


def _is_unneeded_profile(body: bytes) -> bool:
    _, _, packed = body.partition(b"\0")
    return not packed.startswith(b"\0") or not _unpacks(packed[1:])


_UNNEEDED = {
    b"tEXt": _is_unneeded_text,
    b"zTXt": _is_unneeded_packed_text,
    b"iTXt": _is_unneeded_international_text,
    b"iCCP": _is_unneeded_profile,
}


def _unpacks(packed: bytes) -> bool:
    """Tell whether data can be unpacked to at most ``UNPACKED`` bytes."""
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, UNPACKED)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail
