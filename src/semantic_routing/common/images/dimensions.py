"""Reads a picture's size from its first bytes, without decoding it."""

from __future__ import annotations

from collections.abc import Callable

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.decode import BROKEN, open_picture

HEAD = 2**16
"""Bytes that nearly always hold the header; only large profiles and previews make it longer."""
_ORIENTATION = 0x0112


def dimensions(image: bytes) -> tuple[int, int]:
    """Return width and height of an encoded picture after its EXIF orientation; its first bytes are enough.

    Raises BadData if it is not a picture.
    """
    with open_picture(image) as opened:
        width, height = opened.size
        try:
            turned = "exif" in opened.info and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        except BROKEN:  # as in decoding: unreadable metadata does not turn the picture
            turned = False
    return (height, width) if turned else (width, height)


def look(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """Return ``dimensions`` of a picture of ``size`` bytes; ``read(count)`` returns its first bytes, mostly 64 KiB."""
    try:
        return dimensions(read(min(size, HEAD)))
    except BadData:
        if size <= HEAD:
            raise
    return dimensions(read(size))
