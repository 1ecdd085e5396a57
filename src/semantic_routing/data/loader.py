"""Loads training batches: in the training process, on a prefetch thread, or in worker processes.

All three give the same batches, bit for bit, with any number of ranks and workers, because each row is a pure function
of its step and its index in the global batch, without any state. Worker processes are Grain's (an extra).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.extras import require
from semantic_routing.data.batch import Batch
from semantic_routing.data.dataset import Dataset
from semantic_routing.data.worker import RankBatches, begin_worker

T = TypeVar("T")


class Loader:
    """The batches of one rank."""

    def __init__(
        self,
        data: Dataset,
        *,
        batch: int,
        noise_shape: tuple[int, ...],
        posterior: bool = False,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        ahead: int = 0,
    ) -> None:
        """
        Args:
            data: Training data.
            batch: Global batch size; every rank has an equal share.
            noise_shape: Shape (C, h, w) of the latents of a square image (``Codec.latent_shape``).
            posterior: Whether the codec needs noise (``Codec.has_posterior``).
            rank: Rank of this process.
            world: World size.
            workers: Number of worker processes; 0 loads in this process.
            ahead: Batches that each worker prefetches, or a thread if there are no workers; 0 for no thread.
        """
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(f"a batch of {batch} does not divide among {world} processes; use a multiple of {world}")
        if workers < 0 or ahead < 0:
            raise ValueError(f"workers {workers} and ahead {ahead} must be at least 0")
        share = batch // world
        rows = range(rank * share, (rank + 1) * share)
        self._source = RankBatches(data=data, batch=batch, rows=rows, noise_shape=noise_shape, posterior=posterior)
        self._workers, self._ahead = workers, ahead

    def load(self, step: int) -> Batch[Tensor]:
        """Load the batch of a step in this process."""
        return self._source[step].tensors(torch.from_numpy)

    def batches(self, first: int = 0) -> Generator[Batch[Tensor], None, None]:
        """Yield the batches from step ``first`` on, endlessly; closing the generator ends threads and processes."""
        if self._workers:
            return _from_workers(replace(self._source, first=first), self._workers, max(self._ahead, 1))
        if self._ahead:
            return prefetch(self.load, first, ahead=self._ahead)
        return (self.load(step) for step in count(first))


def prefetch(load: Callable[[int], T], start: int = 0, *, ahead: int = 2) -> Generator[T, None, None]:
    """Yield ``load(start)``, ``load(start + 1)`` ... endlessly, prefetching ``ahead`` of them on a thread.

    An exception of ``load`` is raised here, in its turn. The thread ends when the iterator is closed or dropped, after
    the running ``load``.
    """
    if ahead < 1:
        raise ValueError(f"ahead is {ahead}; expected at least 1")
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    waiting: deque[Future[T]] = deque()
    try:
        for step in count(start):
            waiting.append(pool.submit(load, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _from_workers(source: RankBatches, workers: int, ahead: int) -> Generator[Batch[Tensor], None, None]:
    grain = _grain()
    # A dict of the batch's fields: Grain moves the arrays in a dict through shared memory, but not those in a class.
    made = grain.MapDataset.source(source).map(vars)
    made = made.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    batches = iter(made.mp_prefetch(options, worker_init_fn=begin_worker))
    try:
        while True:
            # Copied, because arrays that are alive at the interpreter's end would leave their shared memory behind.
            yield Batch(**next(batches)).tensors(torch.tensor)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise TrainingFailed(
            f"a process that reads the data was killed ({error}): use fewer data.workers if memory ran out, or give "
            "the container more shared memory, such as docker run --ipc=host"
        ) from error
    finally:
        batches.close()


def _grain() -> ModuleType:
    with _without_warnings():  # about JAX, which is missing and only used for profiling
        return require("grain", what="data.workers", extra="data")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Log only errors, and keep the first message from configuring the logging of the whole program."""
    before, silent = logging.root.manager.disable, logging.NullHandler()
    logging.root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(silent)
