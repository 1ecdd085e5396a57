"""Validation: the loss on held-out images, at fixed times and with fixed noise.

The training loss is too noisy to compare runs: every step has other images, times and noise. In validation these are
fixed by the configuration, so two values differ only if the networks do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor

from semantic_routing.common.distributed import ALONE, Processes
from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.troubles import Troubles
from semantic_routing.data.batch import collate
from semantic_routing.data.dataset import DataConfig, open_data
from semantic_routing.data.latents import KeptLatents
from semantic_routing.data.streams import Row, with_kept
from semantic_routing.flow import FIXED_TIMES, path, velocity
from semantic_routing.model.runtime import autocast
from semantic_routing.sampling.text_plan import TextPlan
from semantic_routing.sampling.text_to_image import TextToImage
from semantic_routing.toy.worlds import WORLDS
from semantic_routing.training.latents import batch_latents

HeldOut = Callable[[int], Row]
"""Function from a number from 0 to a held-out row."""
Errors = Callable[[Any, Sequence[Row], Sequence[float]], Tensor]
"""(model, rows, times) -> the velocity's mean squared error [T, B]."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Data and interval of validation."""

    every: int = 0
    """Steps between validations; 0 turns validation off."""
    paths: tuple[str, ...] = ()
    """Held-out data, in the form of data.paths. The toy world and the world of words have their own."""
    samples: int = 512
    """Number of images."""
    batch: int = 64
    """Images per forward pass of each process; does not change the result."""
    times: tuple[float, ...] = FIXED_TIMES
    """Times at which the loss of every image is computed, from 0 (noise) to 1 (data)."""
    seed: int = 0
    """Random seed of the choice of images and of their noise."""

    def __post_init__(self) -> None:
        if self.every < 0 or self.samples < 1 or self.batch < 1:
            raise ValueError(
                f"validation every {self.every} steps on {self.samples} samples, {self.batch} at a time: use 0 for "
                "none, and at least 1 sample"
            )
        if not self.times or not all(0 <= t <= 1 for t in self.times):
            raise ValueError(f"times {self.times} of the validation must be at least one number from 0 to 1")


def held_out(cfg: ValidationConfig, data: DataConfig, image_size: int, latents: KeptLatents | None = None) -> HeldOut:
    """Open a run's held-out images: those of ``cfg.paths``, or the evaluation split of a generated world.

    They are square and never mirrored. Raises ValueError if there are none, because only the user knows which images
    are not used in training.
    """
    if not cfg.paths or cfg.paths[0] in WORLDS:
        found = [name for name in data.paths if name in WORLDS and cfg.paths in ((), (name,))]
        if not found:
            raise ValueError("validation needs images that are not used in training: give validation.paths")
        world = WORLDS[found[0]]
        drawn = world.prompts(cfg.seed, cfg.samples, world.trained_tags)
        return lambda i: with_kept(
            Row(replace(drawn[i], size=image_size).image, drawn[i].caption, cfg.seed, 0, i), latents
        )
    own = replace(data, paths=cfg.paths, weights=(), captions=0, buckets=False, flip=False)
    opened = open_data(own, image_size=image_size, seed=cfg.seed, latents=latents)
    return lambda i: opened.load(0, cfg.samples, range(i, i + 1))[0]


def validate(
    bundle: Any,
    pictures: HeldOut,
    cfg: ValidationConfig,
    job: Processes = ALONE,
    troubles: Troubles | None = None,
    errors: Errors | None = None,
) -> dict[str, float]:
    """Return the velocity's mean squared error: ``val_loss``, and at each time ``val_loss_t0.05`` ...

    This is a collective call: each process computes its share, and all get the result. It is NaN if images can no
    longer be read, which ``troubles`` reports once. ``errors`` computes the errors of a model other than a
    ``TextToImage``.
    """
    sums = error_sums(bundle, pictures, cfg, job, troubles, errors)
    if job.count > 1:
        dist.all_reduce(sums)
    means = (sums / cfg.samples).tolist()
    return {"val_loss": sum(means) / len(means)} | {
        f"val_loss_t{t:g}": mean for t, mean in zip(cfg.times, means, strict=True)
    }


def error_sums(
    bundle: Any,
    pictures: HeldOut,
    cfg: ValidationConfig,
    job: Processes,
    troubles: Troubles | None = None,
    errors: Errors | None = None,
) -> Float64[Tensor, " T"]:
    """Sum the errors of one process's share of the images at each time.

    With sharding and compilation all processes need the same number of forward passes and batches of one size, so
    incomplete batches are padded with rows that do not count.
    """
    share = -(-cfg.samples // job.count)
    batch = min(cfg.batch, share)
    own = range(job.rank, cfg.samples, job.count)
    troubles, errors = troubles or Troubles(), errors or batch_errors
    sums = torch.zeros(len(cfg.times), dtype=torch.float64, device=bundle.device)
    for first in range(0, share, batch):
        rows, filling = list[Row](), [_padding(bundle.image_size)]
        unread = True
        with troubles.survived("validation", TrainingFailed):
            rows = [pictures(i) for i in own[first : first + batch]]
            filling = [rows[0] if rows else pictures(0)]
            unread = False
        sums += errors(bundle, rows + filling * (batch - len(rows)), cfg.times)[:, : len(rows)].sum(1)
        if unread:
            sums += math.nan
    return sums


def _padding(size: int) -> Row:
    """Return a black image, which pads a batch without rows."""
    return Row(np.zeros((size, size, 3), np.uint8), "", 0, 0, 0)


@torch.no_grad()
def batch_errors(bundle: TextToImage, rows: Sequence[Row], times: Sequence[float]) -> Float64[Tensor, "T B"]:
    """Return the velocity's mean squared error of each image at each time, with the same noise at all times."""
    device, codec = bundle.device, bundle.codec
    arrays = collate(rows, codec.latent_shape(*rows[0].image.shape[:2]), posterior=codec.has_posterior)
    batch = arrays.tensors(lambda values: torch.from_numpy(values).to(device))
    latents = batch_latents(codec, batch)
    target = velocity(latents, batch.noise)
    plan, errors = TextPlan(bundle.model, bundle.encode(batch.captions, strict=False)), []
    for time in times:
        t = torch.full((len(rows),), time, device=device)
        with autocast(device, bundle.bf16):
            noisy = path(latents, batch.noise, t)
            predicted = bundle.model(noisy, t, plan.at(noisy, t))
        errors.append((predicted.float() - target).square().flatten(1).double().mean(1))
    return torch.stack(errors)
