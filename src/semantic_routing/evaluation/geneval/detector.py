"""Mask2Former as GenEval runs it: mmdetection's preprocessing and postprocessing, without mmdet.

Images are resized with the fixed-point arithmetic of OpenCV's ``INTER_LINEAR``, so pixels are bitwise those of the
official scorer (compared with OpenCV 4.10 and 5.0); decoding is Pillow's. Outputs are processed as in mmdetection 2.x's
``MaskFormerFusionHead``, not as in transformers' own post-processor, which resizes to 384, lets objects overwrite each
other and rounds scores.

mmdetection enlarges masks in two steps, to the padded input and, after a crop, to the image. Both are linear and act on
rows and columns alike, so here they are one sparse product per axis, computed in blocks that fit a processor's cache
and only where a mask can be positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from semantic_routing.common.errors import BadData
from semantic_routing.evaluation.geneval.verdict import CLASSES, Detection

LONG_SIDE, SHORT_SIDE, DIVISOR, PADDING = 1333, 800, 32, 128
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TOP = 100
"""Pairs of query and class that are looked at, by falling probability."""
ROWS, COLUMNS = 96, 128
"""Output rows and columns of a block: 96 x 1024 float32 fit a megabyte of cache."""

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of an image on its way into the network."""

    original: Size
    resized: Size
    padded: Size


class Mask2FormerDetector:
    """A Mask2Former of the 80 COCO classes."""

    def __init__(self, model: Any, identity: dict[str, Any]) -> None:
        """Take a ``Mask2FormerForUniversalSegmentation``; it is frozen and used on its device."""
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"the detector knows {model.config.num_labels} classes, GenEval needs COCO's {len(CLASSES)}; use a "
                "checkpoint of COCO instance segmentation"
            )
        self.identity = identity
        self._model = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, image: Image.Image, min_score: float = 0.0) -> dict[str, list[Detection]]:
        """Return objects by class with a score above ``min_score``, by falling probability of the class."""
        pixels, geometry = preprocess(np.asarray(image.convert("RGB")))
        answer = self._model(pixel_values=pixels[None].to(self._model.device))
        return postprocess(answer.class_queries_logits[0], answer.masks_queries_logits[0], geometry, min_score)


def preprocess(image: UInt8[np.ndarray, "h w 3"]) -> tuple[Float[Tensor, "3 H W"], Geometry]:
    """Resize a picture, pad it on the right and below, and normalise it."""
    geometry = fit(*image.shape[:2])
    (height, width), (padded_height, padded_width) = geometry.resized, geometry.padded
    pixels = np.full((padded_height, padded_width, 3), PADDING, dtype=np.uint8)
    pixels[:height, :width] = resize_bilinear(image, geometry.resized)
    normal = (torch.from_numpy(pixels).float() - torch.tensor(MEAN)) / torch.tensor(STD)
    return normal.permute(2, 0, 1).contiguous(), geometry


def fit(height: int, width: int) -> Geometry:
    """Return the sizes of a picture that fits 1333 x 800 either way round, then padded to multiples of 32.

    BadData for one so narrow that nothing would be left of it.
    """
    scale = min(LONG_SIDE / max(height, width), SHORT_SIDE / min(height, width))
    resized = int(height * scale + 0.5), int(width * scale + 0.5)
    if min(resized) < 1:
        raise BadData("too narrow for the detector", f"{width} x {height} pixels")
    padded = (-(-resized[0] // DIVISOR) * DIVISOR, -(-resized[1] // DIVISOR) * DIVISOR)
    return Geometry((height, width), resized, padded)


def resize_bilinear(image: UInt8[np.ndarray, "h w 3"], size: Size) -> UInt8[np.ndarray, "H W 3"]:
    """Resize as OpenCV's ``INTER_LINEAR``, bit for bit: no antialiasing, weights in 2048ths."""
    left, right, weight = _neighbours(image.shape[1], size[1])
    # Columns outside the picture take its edge whole; rows blend the edge with itself, which rounds otherwise.
    weight = np.where((left < 0) | (right > image.shape[1] - 1), np.float32(0), weight)
    left, right = np.clip(left, 0, None), np.clip(right, None, image.shape[1] - 1)
    pixels = image.astype(np.int32)
    wide = pixels[:, left] * _fixed(1 - weight)[:, None] + pixels[:, right] * _fixed(weight)[:, None] >> 4
    above, below, weight = _neighbours(image.shape[0], size[0])
    above, below = (np.clip(rows, 0, image.shape[0] - 1) for rows in (above, below))
    high = (wide[above] * _fixed(1 - weight)[:, None, None] >> 16) + (wide[below] * _fixed(weight)[:, None, None] >> 16)
    return (high + 2 >> 2).astype(np.uint8)


def _neighbours(
    n: int, n_out: int
) -> tuple[Int[np.ndarray, " out"], Int[np.ndarray, " out"], Float[np.ndarray, " out"]]:
    """Return the two inputs nearest to each output's centre, which may be outside, and the second's weight."""
    place = ((np.arange(n_out) + 0.5) * (n / n_out) - 0.5).astype(np.float32)
    first = np.floor(place).astype(np.int64)
    return first, first + 1, (place - first).astype(np.float32)


def _fixed(weight: Float[np.ndarray, " out"]) -> Int[np.ndarray, " out"]:
    return np.rint(weight * np.float32(2048)).astype(np.int32)


def postprocess(
    class_logits: Float[Tensor, "queries classes"],
    mask_logits: Float[Tensor, "queries h w"],
    geometry: Geometry,
    min_score: float = 0.0,
) -> dict[str, list[Detection]]:
    """Return objects by class with a score above ``min_score``, by falling probability of the class.

    The score is the probability of the class times the mean of the mask's sigmoid over its positive pixels, which
    is at most 1: pairs whose probability does not exceed ``min_score`` need no mask. One query may be an object of
    several classes; its mask is made once.
    """
    probabilities = class_logits.float().softmax(dim=-1)[:, :-1]
    top = probabilities.flatten().topk(min(TOP, probabilities.numel()))
    likely = top.values > min_score
    pairs = top.indices[likely].tolist()
    queries, classes = [pair // len(CLASSES) for pair in pairs], [pair % len(CLASSES) for pair in pairs]
    chosen = sorted(set(queries))
    logits = mask_logits[chosen].float().cpu()
    (height, width), padded, resized = geometry.original, geometry.padded, geometry.resized
    rows = two_resizes(logits.shape[1], padded[0], resized[0], height)
    columns = two_resizes(logits.shape[2], padded[1], resized[1], width)
    masks = np.zeros((len(chosen), height, width), dtype=bool)  # at once: large arrays come in large pages
    seen = {
        query: (*fill_mask(mask, one, rows, columns), mask)
        for query, one, mask in zip(chosen, logits, masks, strict=True)
    }
    found: dict[str, list[Detection]] = {}
    for probability, query, index in zip(top.values[likely].tolist(), queries, classes, strict=True):
        box, certainty, mask = seen[query]
        if (score := probability * certainty) > min_score:
            found.setdefault(CLASSES[index], []).append(Detection(box, score, mask))
    return found


@dataclass(frozen=True)
class Resize:
    """A linear map of one axis whose outputs each depend on a few neighbouring inputs."""

    weights: Float[Tensor, "out in"]
    first: Int[np.ndarray, " out"]
    """First input with a weight, of each output; it never falls."""
    last: Int[np.ndarray, " out"]

    def touched(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of outputs to which any of the inputs ``start`` to ``stop`` - 1 contributes."""
        return int(np.searchsorted(self.last, start)), int(np.searchsorted(self.first, stop))

    def inputs(self, start: int, stop: int) -> slice:
        """Return the inputs that the outputs ``start`` to ``stop`` - 1 depend on."""
        return slice(int(self.first[start]), int(self.last[stop - 1]) + 1)


@lru_cache(maxsize=8)
def two_resizes(n: int, padded: int, resized: int, original: int) -> Resize:
    """Resize ``n`` logits to ``padded`` places, cut to ``resized``, then to ``original``; bilinear both times.

    The map is what torch's own interpolation makes of the unit vectors.
    """
    units = torch.eye(n, dtype=torch.float64)[None]
    wide = F.interpolate(units, size=padded, mode="linear", align_corners=False)[..., :resized]
    weights = F.interpolate(wide, size=original, mode="linear", align_corners=False)[0].T
    used = weights.numpy() != 0
    return Resize(weights.float().contiguous(), used.argmax(axis=1), n - 1 - used[:, ::-1].argmax(axis=1))


def fill_mask(
    mask: Bool[np.ndarray, "height width"], logits: Float[Tensor, "h w"], rows: Resize, columns: Resize
) -> tuple[tuple[float, float, float, float], float]:
    """Set ``mask``, all False, where the enlarged logits are positive; the box around that and the mean sigmoid there.

    An empty mask has a box of zeros and the mean 0.
    """
    total = 0.0
    for y, x, block in positive_blocks(logits, rows, columns):
        height, width = block.shape
        np.greater(block.numpy(), 0, out=mask[y : y + height, x : x + width])
        total += F.threshold(block, 0.0, -torch.inf, inplace=True).sigmoid_().sum().item()  # sigmoid(-inf) = 0
    in_rows, in_columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(in_rows):
        return (0.0, 0.0, 0.0, 0.0), 0.0
    box = (float(in_columns[0]), float(in_rows[0]), float(in_columns[-1] + 1), float(in_rows[-1] + 1))
    return box, total / (int(np.count_nonzero(mask)) + 1e-6)


def positive_blocks(
    logits: Float[Tensor, "h w"], rows: Resize, columns: Resize
) -> Iterator[tuple[int, int, Float[Tensor, "height width"]]]:
    """Yield the enlarged logits in blocks of rows with their upper left corners, if they may be positive.

    An average of numbers none of which is positive is not positive, so the rest is left out. A block may be
    overwritten by the caller.
    """
    positive = logits > 0
    at_rows, at_columns = positive.any(dim=1).nonzero(), positive.any(dim=0).nonzero()
    if not len(at_rows):
        return
    top, bottom = rows.touched(int(at_rows[0]), int(at_rows[-1]) + 1)
    left, right = columns.touched(int(at_columns[0]), int(at_columns[-1]) + 1)
    if top >= bottom or left >= right:  # all positive logits are in the padding
        return
    reach = rows.inputs(top, bottom)
    wide = torch.empty(reach.stop - reach.start, right - left)
    for x in range(left, right, COLUMNS):
        end = min(x + COLUMNS, right)
        used = columns.inputs(x, end)
        torch.mm(logits[reach, used], columns.weights[x:end, used].T, out=wide[:, x - left : end - left])
    space = torch.empty(ROWS, right - left)
    for y in range(top, bottom, ROWS):
        end = min(y + ROWS, bottom)
        used = rows.inputs(y, end)
        block = space[: end - y]
        torch.mm(rows.weights[y:end, used], wide[used.start - reach.start : used.stop - reach.start], out=block)
        yield y, left, block
