"""Aspect-ratio buckets: less of each image is cropped, and all images of a batch are from one bucket.

As in SDXL (Podell et al., 2023, appendix I), all buckets have about the same area. A record's bucket follows from its
dimensions in the index. Every bucket is an endless stream with each of its records once per epoch; the bucket of a
batch is a function of the batch's number (``order.Mixture``, weighted by size).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer, UInt8

from semantic_routing.data.order import Mixture

PERIOD = 2**14
"""Batches after which the buckets' turns repeat; bucket sizes are rounded to shares of it, at least 1."""


def bucket_shapes(size: int, multiple: int, longest: float = 2.0) -> list[tuple[int, int]]:
    """Return all (height, width) in multiples of about ``size`` squared pixels and aspect ratios up to ``longest``."""
    if multiple < 1 or size % multiple:
        raise ValueError(f"an image size of {size} pixels is not a multiple of {multiple}; change one of them")
    shapes = {(size, size)}
    for width in range(multiple, 2 * size + 1, multiple):
        height = max(round(size * size / width / multiple), 1) * multiple
        if max(height, width) <= longest * min(height, width):
            shapes |= {(height, width), (width, height)}
    return sorted(shapes, key=lambda shape: (shape[1] / shape[0], shape))


def assign(dimensions: Integer[np.ndarray, "N 2"], shapes: Sequence[tuple[int, int]]) -> UInt8[np.ndarray, " N"]:
    """Return the bucket with the nearest aspect ratio for each (width, height); the most square one for (0, 0)."""
    heights, widths = np.asarray(shapes, dtype=np.float32).T
    ratios = np.log(widths / heights)
    borders = (ratios[1:] + ratios[:-1]) / 2
    known = dimensions.min(axis=1) > 0
    width, height = np.where(known[:, None], dimensions, 1).astype(np.float32).T
    return np.searchsorted(borders, np.log(width / height)).astype(np.uint8)


def turns(counts: Sequence[int]) -> Mixture:
    """Return the mixture that gives the bucket of each batch, from the number of records in each bucket."""
    shares = np.asarray(counts, dtype=np.float64) * min(PERIOD / sum(counts), 1.0)
    return Mixture(np.maximum(np.rint(shares), 1).tolist())
