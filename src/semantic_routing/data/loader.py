"""Batches for training: in the training process, ahead of it on a thread, or made by worker processes.

All three give the same batches, bit for bit, at any number of ranks and workers: each row is a pure function of its
step and its number in the global batch, and nobody holds a state. Worker processes are Grain's (an extra).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from types import ModuleType
from typing import Any, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.extras import require
from semantic_routing.data.damage import Skipped
from semantic_routing.data.dataset import Dataset
from semantic_routing.data.worker import RankRows, begin_worker

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """All that one training step reads."""

    images: UInt8[Tensor, "B H W 3"]
    captions: list[str]
    noise: Float[Tensor, " B *latent"]
    posterior_noise: Float[Tensor, " B *latent"] | None
    """For the codec's ``encode``; None where it needs none."""
    time_uniform: Float[Tensor, " B"]
    drop_uniform: Float[Tensor, " B"]
    samples: list[tuple[int, int, int]]
    """(stream, epoch, sample) of each row."""
    damaged: list[Skipped]
    """Records that were skipped for these rows; ``DamageLog.add`` counts them."""


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
            data: What to train on.
            batch: Rows of one step, of all ranks together; each has an equal part.
            noise_shape: Shape of the latents of a square picture (``Codec.latent_shape``).
            posterior: Whether the codec wants noise (``Codec.has_posterior``).
            rank: Which process of ``world`` this is.
            workers: Processes that make the batches.
            ahead: Batches that each worker keeps ready; without workers, that a thread does, 0 for none.
        """
        if batch < 1 or world < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(f"a batch of {batch} does not divide among {world} processes; use a multiple of {world}")
        if workers < 0 or ahead < 0:
            raise ValueError(f"workers {workers} and ahead {ahead} must be at least 0")
        share = batch // world
        rows = range(rank * share, (rank + 1) * share)
        self._rows = RankRows(data=data, batch=batch, rows=rows, noise_shape=noise_shape, posterior=posterior)
        self._workers, self._ahead = workers, ahead

    def load(self, step: int) -> Batch:
        """The batch of a step, made here and now."""
        return _to_tensors(self._rows[step])

    def batches(self, first: int = 0) -> Generator[Batch, None, None]:
        """The batches from a step on, without end; closing the generator ends threads and processes."""
        if self._workers:
            return _from_workers(replace(self._rows, first=first), self._workers, max(self._ahead, 1))
        if self._ahead:
            return prefetch(self.load, first, ahead=self._ahead)
        return _one_by_one(self.load, first)


def prefetch(load: Callable[[int], T], start: int = 0, *, ahead: int = 2) -> Generator[T, None, None]:
    """Yield ``load(start)``, ``load(start + 1)`` ... without end, ``ahead`` of them made early on a thread.

    An exception of ``load`` is raised here, in its turn. The thread ends when the iterator is closed or
    dropped, after the ``load`` that it is at.
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


def _from_workers(rows: RankRows, workers: int, ahead: int) -> Generator[Batch, None, None]:
    grain = _grain()
    made = grain.MapDataset.source(rows).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    batches = iter(made.mp_prefetch(options, worker_init_fn=begin_worker))
    try:
        while True:
            # Copied, because arrays that are alive at the interpreter's end would leave their shared memory behind.
            yield _to_tensors(next(batches), torch.tensor)
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
    with _without_warnings():  # that there is no JAX to profile with
        return require("grain", what="data.workers", extra="data")


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Nothing below an error is logged; and a first message does not set up the logging of the whole program."""
    before, silent = logging.root.manager.disable, logging.NullHandler()
    logging.root.addHandler(silent)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.removeHandler(silent)


def _one_by_one(load: Callable[[int], T], first: int) -> Generator[T, None, None]:
    for step in count(first):
        yield load(step)


def _to_tensors(fields: dict[str, Any], convert: Callable[[Any], Tensor] = torch.from_numpy) -> Batch:
    names = ("images", "noise", "posterior_noise", "time_uniform", "drop_uniform")
    tensors = {name: None if fields[name] is None else convert(fields[name]) for name in names}
    return Batch(**(fields | tensors))
