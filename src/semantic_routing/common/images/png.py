"""What is left out of a PNG before it is read: parts that may unpack to far more than the picture itself."""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
UNPACKED = 2**20
"""Bytes to which a compressed text or profile may grow; what is longer is left out, as Pillow would refuse the file."""
LONGEST = 2**24
"""Bytes of a text that is not compressed."""
_TURNING = (b"XML:com.adobe.xmp", b"Raw profile type exif")
"""Keywords of the texts in which the orientation may be."""
_HIGH_RANGE = {16: "PQ", 18: "HLG"}
"""Transfer functions of ITU-T H.273 whose pictures are brighter than white."""


def lightened(data: bytes) -> bytes:
    """A PNG without texts (a drawing's workflow may be megabytes long) and profiles that cannot be unpacked.

    Texts that may turn the picture stay. Other files, and the beginning of one, are given back as they are.
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
    """The name of a PNG's transfer function where that is of high dynamic range; empty for all others."""
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
    """Whether this can be unpacked and is then of a usual length."""
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed, UNPACKED)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail
