"""How an ablation is scored: the exact checker's accuracy, or the velocity loss, for each prompt.

Prompts, images, noise and times are the same for every routing, and the prompts are encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from semantic_routing.evaluation.velocity_loss import VelocityLoss
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.toy.captions import Sample
from semantic_routing.toy.checker import check
from semantic_routing.toy.worlds import WORLDS


@dataclass
class Accuracy:
    """The share of images that the exact checker accepts, sampled from fixed noise."""

    bundle: TextToImage
    samples: Sequence[Sample]
    cfg: SampleConfig
    name: str = "accuracy"
    better: int = 1

    def __post_init__(self) -> None:
        self.tags = [sample.tag for sample in self.samples]
        self._batches = [
            (first, self.samples[first : first + self.cfg.batch])
            for first in range(0, len(self.samples), self.cfg.batch)
        ]
        self._read = [self.bundle.encode([sample.caption for sample in batch]) for _, batch in self._batches]

    def values(self) -> Float[np.ndarray, " N"]:
        found: list[float] = []
        for (first, batch), features in zip(self._batches, self._read, strict=True):
            names = [(first + place, 0) for place in range(len(batch))]
            captions = [sample.caption for sample in batch]
            latents = self.bundle.sample_latents(captions, names, self.cfg, features=features)
            images = self.bundle.codec.decode(latents).numpy(force=True)
            found += [float(check(image, sample.claims).correct) for image, sample in zip(images, batch, strict=True)]
        return np.array(found)


Score = Accuracy | VelocityLoss
"""A measure of a bundle's model as it is now, on fixed prompts: ``values()`` is that of each, ``tags`` their tags,
``name`` says what it is, and ``better`` is 1 if more is better and -1 if less is."""


def accuracy(bundle: TextToImage, world: str, n: int, seed: int, cfg: SampleConfig) -> Accuracy:
    """Return the checker's accuracy on ``n`` unseen captions of a world."""
    return Accuracy(bundle, WORLDS[world].prompts(seed, n), cfg)
