"""Buckets of aspect ratios: pictures keep more of their shape, and a batch is of one bucket.

As in SDXL (Podell et al., 2023, appendix I), all buckets have about the same area. Which bucket a record is in follows
from its dimensions in the index. Every bucket is an endless stream of its own, in which each of its records comes once
an epoch; which bucket a batch is from follows from the batch's number alone (``order.Mixture``, weighted by size).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

from semantic_routing.data.order import Mixture

PERIOD = 2**14
"""Batches after which the buckets' turns repeat; sizes are rounded to shares of it, but never to nothing."""


def bucket_shapes(size: int, multiple: int, longest: float = 2.0) -> list[tuple[int, int]]:
    """The (height, width) of about ``size`` squared pixels in multiples, up to ``longest`` times as long as wide."""
    if multiple < 1 or size % multiple:
        raise ValueError(f"an image size of {size} pixels is no multiple of {multiple}; change one of the two")
    shapes = {(size, size)}
    for width in range(multiple, 2 * size + 1, multiple):
        height = max(round(size * size / width / multiple), 1) * multiple
        if max(height, width) <= longest * min(height, width):
            shapes |= {(height, width), (width, height)}
    return sorted(shapes, key=lambda shape: (shape[1] / shape[0], shape))


def assign(dimensions: Integer[np.ndarray, "N 2"], shapes: Sequence[tuple[int, int]]) -> UInt8[np.ndarray, " N"]:
    """The bucket of each (width, height) with the nearest aspect ratio; the most square one where they are unknown."""
    heights, widths = np.asarray(shapes, dtype=np.float32).T
    ratios = np.log(widths / heights)
    borders = (ratios[1:] + ratios[:-1]) / 2
    known = dimensions.min(axis=1) > 0
    width, height = np.where(known[:, None], dimensions, 1).astype(np.float32).T
    return np.searchsorted(borders, np.log(width / height)).astype(np.uint8)


def turns(counts: Sequence[int]) -> Mixture:
    """Which of the non-empty buckets each batch is from, and how many batches that bucket has given before."""
    shares = np.asarray(counts, dtype=np.float64) * min(PERIOD / sum(counts), 1.0)
    return Mixture(np.maximum(np.rint(shares), 1).tolist())
