"""Code of the worker processes: the batches of one rank at random access. Imports nothing heavy."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from multiprocessing import parent_process

import numpy as np

from semantic_routing.common.stopping import leave_to_parent
from semantic_routing.data.batch import Batch, collate
from semantic_routing.data.dataset import Dataset

ENDLESS = 2**48
"""More steps than any run takes."""


@dataclass(frozen=True, kw_only=True)
class RankBatches:
    """One rank's batches from a step on, at random access; a source for ``grain.MapDataset``. See ``Loader``."""

    data: Dataset
    batch: int
    """Global batch size."""
    rows: range
    """Rows of this rank."""
    noise_shape: tuple[int, ...]
    posterior: bool
    first: int = 0
    """Step of item 0."""

    def __len__(self) -> int:
        return ENDLESS - self.first

    def __getitem__(self, item: int) -> Batch[np.ndarray]:
        """Make the batch of step ``first + item``."""
        rows = self.data.load(self.first + item, self.batch, self.rows)
        return collate(rows, self._latent(*rows[0].image.shape[:2]), posterior=self.posterior)

    def _latent(self, height: int, width: int) -> tuple[int, ...]:
        (*channels, down, across), size = self.noise_shape, self.data.image_size
        return (*channels, height * down // size, width * across // size)


def begin_worker(number: int, count: int) -> None:
    """Prepare a worker process: ignore signals, which the training process handles, and exit if that is killed."""
    leave_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
