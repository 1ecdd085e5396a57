"""What worker processes make: the rows of one rank for one step, in arrays. Nothing heavy is imported here."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from multiprocessing import parent_process
from typing import Any

import numpy as np

from semantic_routing.common.stopping import leave_to_parent
from semantic_routing.data.dataset import Dataset
from semantic_routing.data.draws import draw, posterior_noise

ENDLESS = 2**48
"""More steps than anybody takes."""


@dataclass(frozen=True, kw_only=True)
class RankRows:
    """The batches of one rank from a step on, at random access; a source for ``grain.MapDataset``."""

    data: Dataset
    batch: int
    """Rows of all ranks together."""
    rows: range
    """Those of this rank."""
    noise_shape: tuple[int, ...]
    """Shape (C, h, w) of the latents of a square picture."""
    posterior: bool
    """Whether the codec wants noise too."""
    first: int = 0
    """Step of the item 0."""

    def __len__(self) -> int:
        return ENDLESS - self.first

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Fields of ``loader.Batch``, arrays instead of tensors."""
        loaded = self.data.load(self.first + item, self.batch, self.rows)
        rows = [row for _, row in loaded]
        shape = self._latent(*rows[0].image.shape[:2])
        draws = [draw(row.seed, row.sample, row.epoch, shape) for row in rows]
        fields = {
            "images": np.stack([row.image for row in rows]),
            "captions": [row.caption for row in rows],
            "noise": np.stack([d.noise for d in draws]),
            "posterior_noise": None,
            "time_uniform": np.array([d.time_uniform for d in draws], np.float32),
            "drop_uniform": np.array([d.drop_uniform for d in draws], np.float32),
            "samples": [(number, row.epoch, row.sample) for number, row in loaded],
            "damaged": [skipped for row in rows for skipped in row.skipped],
        }
        if self.posterior:
            extra = [posterior_noise(row.seed, row.sample, row.epoch, shape) for row in rows]
            fields["posterior_noise"] = np.stack(extra)
        return fields

    def _latent(self, height: int, width: int) -> tuple[int, ...]:
        *channels, down, across = self.noise_shape
        size = self.data.image_size
        return (*channels, height * down // size, width * across // size)


def begin_worker(number: int, count: int) -> None:
    """What a worker process does first: leave signals to the training process, and end with it even if it is killed."""
    leave_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
