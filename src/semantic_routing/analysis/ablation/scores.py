"""How an ablation is scored: the exact checker's accuracy, or the velocity loss, for each prompt.

Prompts, images, noise and times are the same for every routing, and the prompts are encoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.data.batch import collate
from semantic_routing.data.dataset import DataConfig
from semantic_routing.data.streams import Row
from semantic_routing.flow import path, velocity
from semantic_routing.model.runtime import autocast, rounded_once
from semantic_routing.sampling.text_plan import TextPlan
from semantic_routing.sampling.text_to_image import SampleConfig, TextToImage
from semantic_routing.text.features import TextFeatures
from semantic_routing.toy.captions import Sample
from semantic_routing.toy.checker import check
from semantic_routing.toy.worlds import WORLDS
from semantic_routing.training.validation import ValidationConfig, held_out


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


@dataclass
class Loss:
    """The velocity's mean squared error on held-out images, averaged over fixed times."""

    bundle: TextToImage
    rows: Sequence[Row]
    tags: list[str]
    times: Sequence[float]
    batch: int = 64
    name: str = "velocity loss"
    better: int = -1

    def __post_init__(self) -> None:
        self._batches = [self._read(self.rows[i : i + self.batch]) for i in range(0, len(self.rows), self.batch)]

    def _read(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, TextFeatures]:
        """Return latents, noise and text of some rows."""
        codec = self.bundle.codec
        arrays = collate(rows, codec.latent_shape(*rows[0].image.shape[:2]), posterior=codec.has_posterior)
        batch = arrays.tensors(lambda values: torch.from_numpy(values).to(self.bundle.device))
        with torch.no_grad():
            latents = codec.encode(batch.images, batch.posterior_noise)
        return latents, batch.noise, self.bundle.encode(batch.captions, strict=False)

    @torch.no_grad()
    def values(self) -> Float[np.ndarray, " N"]:
        model, device, found = self.bundle.model, self.bundle.device, []
        for latents, noise, features in self._batches:
            text, target, errors = TextPlan(model, features), velocity(latents, noise), []
            for time in self.times:
                t = torch.full((len(latents),), time, device=device)
                with autocast(device, self.bundle.bf16), rounded_once(model, self.bundle.bf16):
                    noisy = path(latents, noise, t)
                    predicted = model(noisy, t, text.at(noisy, t))
                errors.append((predicted.float() - target).square().flatten(1).double().mean(1))
            found.append(torch.stack(errors).mean(0).numpy(force=True))
        return np.concatenate(found)


Score = Accuracy | Loss
"""A measure of a bundle's model as it is now, on fixed prompts: ``values()`` is that of each, ``tags`` their tags,
``name`` says what it is, and ``better`` is 1 if more is better and -1 if less is."""


def world_of(bundle: TextToImage, paths: Sequence[str]) -> str | None:
    """Return the world whose captions can be checked, of ``paths`` or else of the run's data; None if there is none."""
    names = paths or bundle.config.get("data", {}).get("paths", ())
    return next((name for name in names if name in WORLDS), None)


def accuracy(bundle: TextToImage, world: str, n: int, seed: int, cfg: SampleConfig) -> Accuracy:
    """Return the checker's accuracy on ``n`` unseen captions of a world."""
    return Accuracy(bundle, WORLDS[world].prompts(seed, n), cfg)


def loss(bundle: TextToImage, paths: Sequence[str], n: int, seed: int, times: Sequence[float], batch: int) -> Loss:
    """Return the velocity loss on ``n`` images of a world, of ``paths``, or of the run's validation data.

    Raises ValueError if there are no held-out images.
    """
    world = world_of(bundle, paths)
    if world is not None:
        samples = WORLDS[world].prompts(seed, n)
        rows = [
            Row(replace(s, size=bundle.image_size).image, s.caption, seed, 0, place) for place, s in enumerate(samples)
        ]
        return Loss(bundle, rows, [sample.tag for sample in samples], times, batch)
    own = tuple(paths) or tuple(bundle.config.get("validation", {}).get("paths", ()))
    if not own:
        raise ValueError("the loss needs images that were not used in training: give them as --ablation.paths")
    read = held_out(ValidationConfig(paths=own, samples=n, seed=seed), DataConfig(), bundle.image_size)
    return Loss(bundle, [read(place) for place in range(n)], [""] * n, times, batch)
