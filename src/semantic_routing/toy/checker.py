"""Exact checker of the toy world: determines from pixels alone whether an image shows what its caption claims.

The background is the border's median colour. Every pixel is a blend of the background and one of the palette's colours;
connected pixels of one colour make an object. An object gets the name of the drawn shape that overlaps it best. If no
shape fits well it is a ``blob``, which satisfies no claim, so a weak model's smudge never passes for a circle.

Lengths are in pixels of a 32 x 32 image; other sizes are first resized to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from scipy.ndimage import binary_dilation, gaussian_filter, label

from semantic_routing.toy.claims import Box, Claim
from semantic_routing.toy.scenes import BACKGROUNDS, CANVAS, COLORS, SHAPES, SIZES, Object, Scene, render

BLOB, STRANGE, MEDIUM = "blob", "strange", "medium"
"""Shape, colour and size of objects that are clearly not of the toy world."""
COLOR_TOLERANCE = 75.0
"""Largest distance of a colour from its name's colour, in RGB levels of 0 to 255."""
SPECK = 8
"""Least number of connected pixels of an object."""
MIN_OVERLAP = 0.85
"""Least overlap (intersection over union of coverages) with the drawn shape that gives an object its name."""
MIN_LEAD = 0.03
"""Least lead in overlap over the second-best shape."""
WINDOW = 22
"""Side of the square window for comparing an object with drawn shapes."""
EXTENTS = tuple(range(6, 18))
"""Sides of shapes to try; more than are ever drawn, so that a wrong size is found."""
BLURS = (0.0, 0.6, 0.9)
"""Standard deviations of blurs to try: generated edges are softer than drawn ones."""
STEPS = 4
"""Positions within a pixel to try along each axis."""

Coverage = Float[np.ndarray, "height width"]
"""Share of each pixel that an object covers."""


@dataclass(frozen=True)
class DetectedObject:
    """An object found in a picture."""

    shape: str
    color: str
    size: str
    box: Box
    area: float
    """Covered pixels."""
    overlap: float
    """Overlap with the drawn shape, from 0 to 1."""

    @property
    def center(self) -> tuple[float, float]:
        """The middle of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class DetectedScene:
    """The background and the objects found in a picture."""

    background: str
    objects: tuple[DetectedObject, ...]


@dataclass(frozen=True)
class Verdict:
    """Result of checking a picture's claims."""

    correct: bool
    reason: str
    """Fault of the first false claim, such as ``found 2 red circles, wanted 3``."""


def check(image: UInt8[np.ndarray, "height width 3"], claims: Sequence[Claim]) -> Verdict:
    """Test claims on a picture's pixels."""
    found = find_objects(image)
    for claim in claims:
        fault = claim.fault(found.objects, found.background)
        if fault is not None:
            return Verdict(False, fault)
    return Verdict(True, "everything claimed was found")


def find_objects(image: UInt8[np.ndarray, "height width 3"]) -> DetectedScene:
    """Find and name the background and the objects of a square picture; ValueError for another shape."""
    height, width, _ = image.shape
    if height != width:
        raise ValueError(f"the picture is {width} x {height}; the toy world's pictures are square")
    if height != CANVAS:
        image = np.asarray(Image.fromarray(image).resize((CANVAS, CANVAS), Image.Resampling.BOX))
    pixels = image.astype(np.float64)
    edge = np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))
    ground = np.median(edge, axis=0)
    hue, coverage = _unblend(pixels, ground)
    objects = []
    for index, color in enumerate(COLORS):
        solid = (hue == index) & (coverage > 0.5)
        labels, count = label(solid)
        for number in range(1, count + 1):
            part = labels == number
            if part.sum() >= SPECK:
                objects.append(_name(part, color, pixels, coverage))
    return DetectedScene(_nearest(ground, BACKGROUNDS), tuple(objects))


def _unblend(
    pixels: Float[np.ndarray, "height width 3"], ground: Float[np.ndarray, "3"]
) -> tuple[Int[np.ndarray, "height width"], Coverage]:
    """Fit each pixel as ``ground + coverage * (color - ground)``; return the best colour's index and its coverage."""
    rays = np.array(list(COLORS.values())) - ground
    offset = pixels - ground
    shares = np.clip(offset @ rays.T / (rays**2).sum(axis=1), 0.0, 1.0)
    misfit = ((offset[..., None, :] - shares[..., None] * rays) ** 2).sum(axis=-1)
    hue = misfit.argmin(axis=-1)
    return hue, np.take_along_axis(shares, hue[..., None], axis=-1)[..., 0]


def _name(
    part: Bool[np.ndarray, "height width"],
    color: str,
    pixels: Float[np.ndarray, "height width 3"],
    coverage: Coverage,
) -> DetectedObject:
    """Name the object whose solid pixels are ``part``."""
    covered = np.where(binary_dilation(part), coverage, 0.0)
    core = part & (coverage > 0.9)
    typical = np.median(pixels[core if core.any() else part], axis=0)
    color = color if _nearest(typical, COLORS) == color else STRANGE
    shape, box, overlap = _fit(covered)
    if shape == BLOB:
        rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
        box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    middle = (SIZES["small"] + SIZES["large"]) / 2
    side = max(box[2] - box[0], box[3] - box[1])
    size = "small" if side < middle else "large" if side > middle else MEDIUM
    return DetectedObject(shape, color, size, box, float(covered.sum()), overlap)


def _nearest(color: Float[np.ndarray, "3"], palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the palette's name for a colour, or ``STRANGE`` if it is close to no colour."""
    distances = {name: float(np.linalg.norm(color - np.array(rgb))) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOR_TOLERANCE else STRANGE


def _fit(covered: Coverage) -> tuple[str, Box, float]:
    """Return the drawn shape that overlaps best (``BLOB`` if no shape is clearly best), its box and the overlap."""
    total = covered.sum()
    x = float(covered.sum(axis=0) @ np.arange(CANVAS) / total) + 0.5
    y = float(covered.sum(axis=1) @ np.arange(CANVAS) / total) + 0.5
    # Put the window's middle pixel corner just left of and above the centroid; the remainder is the phase.
    phase_x, phase_y = round(x * STEPS) % STEPS, round(y * STEPS) % STEPS
    left, top = (round(c * STEPS) // STEPS - WINDOW // 2 for c in (x, y))
    padded = np.pad(covered, WINDOW)
    window = padded[top + WINDOW : top + 2 * WINDOW, left + WINDOW : left + 2 * WINDOW]
    drawn, boxes = _drawn(phase_x, phase_y)
    shared = np.minimum(drawn, window).sum(axis=(-2, -1))
    overlaps = shared / (drawn.sum(axis=(-2, -1)) + total - shared)
    by_shape = overlaps.max(axis=(1, 2))
    best, second = by_shape.argsort()[::-1][:2]
    extent = int(overlaps[best].max(axis=0).argmax())
    clear = by_shape[best] >= MIN_OVERLAP and by_shape[best] - by_shape[second] >= MIN_LEAD
    box_left, box_top, box_right, box_bottom = boxes[best][extent]
    box = (box_left + left, box_top + top, box_right + left, box_bottom + top)
    return SHAPES[best] if clear else BLOB, box, float(by_shape[best])


@cache
def _drawn(
    phase_x: int, phase_y: int
) -> tuple[Float[np.ndarray, "shapes blurs extents window window"], list[list[Box]]]:
    """Draw all shapes, blurs and extents, with centroids at the window's middle plus a phase.

    Returns their coverages, and their boxes by shape and extent, in the window's coordinates.
    """
    drawn = np.zeros((len(SHAPES), len(BLURS), len(EXTENTS), WINDOW, WINDOW))
    boxes: list[list[Box]] = []
    low, high = BACKGROUNDS["black"][0], COLORS["red"][0]
    x, y = WINDOW / 2 + phase_x / STEPS, WINDOW / 2 + phase_y / STEPS
    for i, shape in enumerate(SHAPES):
        boxes.append([])
        for j, extent in enumerate(EXTENTS):
            # A triangle's centroid is a sixth of its height below the centre of its box.
            rise = round(extent / 6 * STEPS) / STEPS if shape == "triangle" else 0.0
            thing = Object(shape, "red", "", x, y - rise, extent)
            red = render(Scene("black", (thing,)))[:WINDOW, :WINDOW, 0].astype(np.float64)
            for k, blur in enumerate(BLURS):
                drawn[i, k, j] = gaussian_filter((red - low) / (high - low), blur)
            boxes[i].append(thing.box)
    return drawn, boxes
