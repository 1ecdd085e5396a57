"""Decodes an image file to the RGB pixels that viewers show, whatever its orientation, colours or depth."""

from __future__ import annotations

import struct
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.colours import to_srgb
from semantic_routing.common.images.formats import formats, hint
from semantic_routing.common.images.png import high_range, lightened

BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    UserWarning,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Errors of Pillow for files that are not pictures, truncated or damaged; warnings only if they are made errors."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_PHOTOMETRIC = 262
"""TIFF tag of the meaning of pixel values."""
_COLOURS = {"1": "L", "L": "L", "LA": "L", "La": "L", "CMYK": "CMYK", "LAB": "LAB"}
"""Mode of the colours without alpha, if it is not RGB."""
_OURS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xff\x4f\xff")
"""First bytes of files in supported formats."""
_FOREIGN = (b"%!PS", b"%PDF", b"8BPS", b"\0\0\1\0", b"<svg", b"\xff\x0a", b"\0\0\0\x0cJXL", b"#?RADI", b"v/1\x01")
"""First bytes of PostScript, PDF, Photoshop, icon, SVG, JPEG XL, Radiance and OpenEXR files."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of picture sizes, checked by the header before pixels take memory."""

    max_pixels: int = 2**26
    """Most pixels of a picture; more count as a decompression bomb."""
    min_side: int = 0
    """Least pixels of the shorter side."""
    max_aspect: float = 16.0
    """Largest ratio of the longer side to the shorter one."""

    def __post_init__(self) -> None:
        highest = Image.MAX_IMAGE_PIXELS or 2**26
        if not 1 <= self.max_pixels <= highest:
            raise ValueError(f"max_pixels is {self.max_pixels}; Pillow opens from 1 to {highest} pixels safely")
        if self.min_side < 0 or not self.max_aspect >= 1:
            raise ValueError(f"min_side {self.min_side} must be at least 0, and max_aspect {self.max_aspect} 1")

    def check(self, width: int, height: int) -> None:
        """Raise BadData unless a picture's size is within the limits."""
        size = f"{width} x {height} pixels"
        if width * height > self.max_pixels:
            raise BadData("decompression bomb", f"{size}, at most {self.max_pixels} are decoded")
        if min(width, height) < max(self.min_side, 1):
            raise BadData("too small", f"{size}, at least {self.min_side} a side are required")
        if max(width, height) > self.max_aspect * min(width, height):
            raise BadData("extreme aspect", f"{size}, an aspect ratio of at most {self.max_aspect:g} is required")


def decode(
    data: bytes, height: int, width: int, limits: Limits | None = None
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Decode a picture and crop its centre to ``height`` x ``width`` RGB pixels; BadData if that is impossible."""
    with open_picture(data) as image:
        (limits or Limits()).check(image.width, image.height)
        if image.mode == "F":
            raise BadData("floating point", "pixels have no known range")
        if function := high_range(data):
            raise BadData("high dynamic range", f"its brightness is coded by {function}")
        # Decode a large JPEG at 1/2, 1/4 or 1/8 of its size, but at least at twice the requested size.
        side = 2 * max(height, width)
        image.draft(None, (side, side))
        try:
            image.load()
            return np.array(centre_crop(to_rgb(image), height, width))
        except BROKEN as error:
            cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
            raise BadData("truncated" if cut else "damaged", str(error)) from error


def open_picture(data: bytes) -> Image.Image:
    """Open a picture and read its header only; BadData if that fails."""
    if not data:
        raise BadData("zero bytes", "the file is empty")
    _settle_warnings()
    try:
        return Image.open(BytesIO(lightened(data)), formats=formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadData("decompression bomb", str(error)) from error
    except BROKEN as error:
        begin = bytes(data[:12])
        if begin.startswith(_OURS):
            whole = int.from_bytes(data[4:8], "little") + 8 if begin.startswith(b"RIFF") else 1024
            reason = "truncated" if len(data) < whole else "damaged"
        else:
            reason = "unsupported format" if begin.startswith(_FOREIGN) or begin[4:8] == b"ftyp" else "not an image"
        raise BadData(reason, f"{len(data)} bytes that begin with {begin!r}{hint(begin)}") from error


@lru_cache(maxsize=1)
def _settle_warnings() -> None:
    # Once a process instead of around every picture: decoding threads would race for the warning filters.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # odd metadata of intact pictures


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to upright 8-bit sRGB: apply orientation and colour profile, scale 16 bits, put white behind alpha."""
    white_is_zero = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # of a TIFF
    with suppress(*BROKEN):  # unreadable metadata does not turn the picture; its pixels are intact
        image = ImageOps.exif_transpose(image)
    info = image.info
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image, white_is_zero and image.mode != "I")
    elif isinstance(key := info.get("transparency"), tuple) and max(key) > 255:
        info["transparency"] = tuple(level >> 8 for level in key)  # 16 bits, but Pillow has read the upper 8
    colours = _COLOURS.get(image.mode, "RGB")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        seen = to_srgb(image.convert(colours), info)
        seen.putalpha(image.getchannel("A"))
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), seen).convert("RGB")
    return to_srgb(image if image.mode == colours else image.convert(colours), info)


def centre_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Crop the largest centre with the aspect of ``height`` x ``width``, and resize it with Lanczos.

    Pictures more than three times as large are first reduced by averaging.
    """
    scale = min(image.width / width, image.height / height)
    across, down = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - across) / 2, (image.height - down) / 2
    box = (left, top, left + across, top + down)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _eight_bits(image: Image.Image, white_is_zero: bool) -> Image.Image:
    """Scale 16-bit grey down, and make its transparent level an alpha channel."""
    levels = np.asarray(image)
    # 65535 / 255 = 257. Older releases of Pillow read 16-bit files as mode "I", which has 32 bits.
    gray = np.rint(levels.clip(0, 65535) / 257).astype(np.uint8)
    small = Image.fromarray(255 - gray if white_is_zero else gray)
    if isinstance(key := image.info.get("transparency"), int):
        small.putalpha(Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8)))
    return small
