"""Where training samples come from: one name or path, one ``Source``."""

from __future__ import annotations

import numpy as np

from semantic_routing.data.folder import ImageFolder
from semantic_routing.data.order import Example, Source
from semantic_routing.data.scenes import CANVAS
from semantic_routing.data.shapes import prompts
from semantic_routing.data.shapes import sample as draw_sample

SHAPES = "shapes"
"""The name of the toy world."""


class ShapesSource:
    """The training split of the toy world; no run comes to the end of its first epoch."""

    def __init__(self, seed: int, size: int = CANVAS) -> None:
        self.seed = seed
        self.size = size

    def __len__(self) -> int:
        return 2**40

    def load(self, sample: int, rng: np.random.Generator) -> Example:
        """The toy world's sample of that index; all of it follows from the index, so ``rng`` is not used."""
        drawn = draw_sample(self.seed, sample, split="train", size=self.size)
        return Example(drawn.image, drawn.caption)

    def captions(self, count: int) -> list[str]:
        """Captions of the evaluation split, which training never sees."""
        return [drawn.caption for drawn in prompts(self.seed, count)]


def open_source(data: str | None, *, size: int, seed: int) -> Source:
    """The toy world for "shapes" or None; otherwise the pictures of a manifest or of a folder with one.

    Args:
        data: Name or path.
        size: Side of the pictures in pixels.
        seed: Seed of the toy world.
    """
    if data is None or data == SHAPES:
        return ShapesSource(seed, size)
    return ImageFolder(data, size=size)
