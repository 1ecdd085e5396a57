"""From an image file to square RGB pixels, whatever its orientation, palette, depth or transparency."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
"""What is opened. Pillow knows more, but some of those (EPS) run other programs on the file."""
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises for files that are not pictures, cut short or damaged."""
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def load_square(path: str | Path, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """The centre square of a picture as ``size`` x ``size`` RGB pixels.

    Raises ValueError that names the file where it cannot be read.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            # A large JPEG is decoded at 1/2, 1/4 or 1/8, but never below twice the size asked for.
            image.draft(None, (2 * size, 2 * size))
            return np.array(centre_square(to_rgb(image), size))
    except BROKEN as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a picture ({error}); replace it or take it out of the data"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB of 8 bits: EXIF orientation applied, 16 bits scaled down, transparency laid over white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The shorter side resized to ``size``, antialiased, and the middle of the longer one.

    Lanczos, after averaging over whole pixels where the picture is more than three times as large.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def _eight_bits(gray: np.ndarray) -> np.ndarray:
    # 65535 / 255 = 257. Mode "I" has 32 bits, but holds 16-bit files in older releases of Pillow.
    return np.rint(gray.clip(0, 65535) / 257).astype(np.uint8)
