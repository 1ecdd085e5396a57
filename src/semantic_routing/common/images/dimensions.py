"""The size of a picture from its first bytes, without decoding it."""

from __future__ import annotations

from collections.abc import Callable

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.decode import BROKEN, open_picture

HEAD = 2**16
"""Bytes that nearly always hold the header; those of large profiles and previews are longer."""
_ORIENTATION = 0x0112


def dimensions(image: bytes) -> tuple[int, int]:
    """Width and height of an encoded picture as it is seen, EXIF orientation applied; its beginning is enough.

    Raises BadData where it is no picture.
    """
    with open_picture(image) as opened:
        width, height = opened.size
        try:
            turned = "exif" in opened.info and opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        except BROKEN:  # decoding leaves a picture with unreadable metadata as it is, too
            turned = False
    return (height, width) if turned else (width, height)


def look(read: Callable[[int], bytes], size: int) -> tuple[int, int]:
    """``dimensions`` of a picture of ``size`` bytes from its beginning, ``read(count)``, mostly the first 64 KiB."""
    try:
        return dimensions(read(min(size, HEAD)))
    except BadData:
        if size <= HEAD:
            raise
    return dimensions(read(size))
