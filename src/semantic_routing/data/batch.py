"""Batch: everything that a training step reads, in one form from the worker process to the step. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from operator import itemgetter
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8

from semantic_routing.data.damage import Skipped
from semantic_routing.data.draws import draw, posterior_noise
from semantic_routing.data.streams import Row

A = TypeVar("A")
"""The type of the arrays: ``np.ndarray`` in worker processes, ``Tensor`` in the training process."""
B = TypeVar("B")


@dataclass(frozen=True)
class Batch(Generic[A]):
    """Rows of a training step; every field has one entry per row."""

    images: UInt8[A, "B H W 3"]
    captions: list[str]
    noise: Float[A, " B *latent"]
    posterior_noise: Float[A, " B *latent"] | None
    """Noise for the codec's ``encode``; None if the codec needs none."""
    time_uniform: Float[A, " B"]
    drop_uniform: Float[A, " B"]
    samples: list[tuple[int, int, int]]
    """(stream, epoch, sample) of each row."""
    skipped: list[tuple[Skipped, ...]]
    """Records that were skipped for each row; ``DamageLog.add`` counts them."""
    posteriors: Shaped[A, "B 2 *latent"] | None = None
    """Kept posteriors of the images, bfloat16 as int16; None if no row has one."""
    kept: Bool[A, " B"] | None = None
    """Whether a row has a kept posterior, in place of its image, which is black then."""

    def tensors(self, convert: Callable[[Any], B]) -> Batch[B]:
        """Convert the arrays with ``convert``, such as ``torch.from_numpy``."""
        return self._map(lambda values: convert(values) if isinstance(values, np.ndarray) else values)

    def split(self, parts: int) -> list[Batch[A]]:
        """Cut into ``parts`` microbatches of equal size."""
        size = len(self.captions) // parts
        return [self._map(itemgetter(slice(i * size, (i + 1) * size))) for i in range(parts)]

    def _map(self, change: Callable[[Any], Any]) -> Batch[Any]:
        values = (getattr(self, field.name) for field in fields(self))
        changed: list[Any] = [None if value is None else change(value) for value in values]
        return Batch(*changed)


def collate(rows: Sequence[Row], latent: tuple[int, ...], *, posterior: bool) -> Batch[np.ndarray]:
    """Stack rows and draw their noise, times and dropout.

    Args:
        rows: Rows whose images have one shape.
        latent: Shape (C, h, w) of the latents of these images.
        posterior: Whether the codec needs noise.
    """
    draws = [draw(row.seed, row.sample, row.epoch, latent) for row in rows]
    extra = [posterior_noise(row.seed, row.sample, row.epoch, latent) for row in rows] if posterior else None
    posteriors, kept = _kept([row.posterior for row in rows])
    return Batch(
        images=np.stack([row.image for row in rows]),
        captions=[row.caption for row in rows],
        noise=np.stack([d.noise for d in draws]),
        posterior_noise=None if extra is None else np.stack(extra),
        time_uniform=np.array([d.time_uniform for d in draws], np.float32),
        drop_uniform=np.array([d.drop_uniform for d in draws], np.float32),
        samples=[(row.stream, row.epoch, row.sample) for row in rows],
        skipped=[row.skipped for row in rows],
        posteriors=posteriors,
        kept=kept,
    )


def _kept(found: Sequence[np.ndarray | None]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Stack kept posteriors, with zeros for rows that have none; return them and which rows have one."""
    some = next((posterior for posterior in found if posterior is not None), None)
    if some is None:
        return None, None
    filled = [np.zeros_like(some) if posterior is None else posterior for posterior in found]
    return np.stack(filled), np.array([posterior is not None for posterior in found])
