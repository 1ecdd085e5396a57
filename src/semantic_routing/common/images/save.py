"""Image grids, and PNG files: writing and checking them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from semantic_routing.common.files import written_whole


def grid(images: Sequence[UInt8[np.ndarray, "H W 3"]], columns: int, gap: int = 2) -> UInt8[np.ndarray, "GH GW 3"]:
    """Arrange images of one size in rows of ``columns``, on light grey."""
    height, width, _ = images[0].shape
    rows = -(-len(images) // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 200, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def save_png(path: Path, image: UInt8[np.ndarray, "H W 3"], scale: int = 1) -> None:
    """Write a PNG atomically, each pixel enlarged to ``scale`` x ``scale``."""
    with written_whole(path) as scratch:
        Image.fromarray(image.repeat(scale, 0).repeat(scale, 1)).save(scratch, format="PNG")


def is_valid_image(path: Path, size: tuple[int, int]) -> bool:
    """Tell whether a file is an intact image of this (height, width)."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == size[::-1]
    except (OSError, SyntaxError):  # missing, truncated or not a PNG
        return False
