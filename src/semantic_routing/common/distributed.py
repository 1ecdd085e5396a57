"""The processes of one job under torchrun; without torchrun, a single process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed import DeviceMesh, ProcessGroup

from semantic_routing.common.errors import TrainingFailed, exit_code

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""Longest wait for the slowest process. If one fails, torchrun ends the job earlier."""


@dataclass(frozen=True)
class Processes:
    """Rank of this process and number of processes (world size)."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is rank 0, which writes what the job writes once."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """Return this process's part of the work: every ``count``-th piece, so that parts have similar lengths."""
        return list(work[self.rank :: self.count])

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.count > 1:
            dist.barrier()

    def all_gather(self, thing: T) -> list[T]:
        """Return every process's ``thing``, in order of rank."""
        found: list[Any] = [thing] * self.count
        if self.count > 1:
            dist.all_gather_object(found, thing)
        return cast(list[T], found)


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the job's processes for the context, so that they can wait for each other (over gloo, on the host)."""
    with _joined("gloo") as (rank, count):
        yield Processes(rank, count)


ALONE = Processes()
CPU = torch.device("cpu")
HEAD_START = 1.0
"""Seconds for rank 0 to print why the run ends, before torchrun sees another process end and stops it."""
SETTLE = 0.25
"""Seconds for gloo's threads to release the last tensors; at interpreter shutdown they would abort the process."""


@dataclass(frozen=True)
class World(Processes):
    """The processes of a run, this one's device, and their communication."""

    device: torch.device = CPU
    """Device of this process."""
    mesh: DeviceMesh | None = None
    """Mesh of all processes as (replicas, shards), or of shards only; None for one process."""
    threads: ProcessGroup | None = None
    """Second process group of all processes, for a thread beside the training; None for one process."""

    def everywhere(self, act: Callable[[], T]) -> T:
        """Run ``act`` on every process and return its result here; if one fails, all end with the first error."""
        result: list[T] = []
        trouble: Exception | None = None
        try:
            result.append(act())
        except (ValueError, TrainingFailed) as error:
            trouble = error
        troubles = [trouble]
        if self.count > 1:
            troubles = [None] * self.count
            dist.all_gather_object(troubles, trouble)
        first = next(filter(None, troubles), None)
        if first is not None:
            self.fail(first)
        return result[0]

    def on_first(self, act: Callable[[], T]) -> T:
        """Run ``act`` on the first process and return its result on all of them."""
        found: list[Any] = [self.everywhere(act if self.first else lambda: None)]
        if self.count > 1:
            dist.broadcast_object_list(found)
        return cast(T, found[0])

    def first_then_rest(self, act: Callable[[], T]) -> T:
        """Run ``act`` on rank 0, then on the others, which find what rank 0 cached; return its result here."""
        if self.first:
            result = self.everywhere(act)
            self.everywhere(lambda: None)
            return result
        self.everywhere(lambda: None)
        return self.everywhere(act)

    def fail(self, error: Exception) -> NoReturn:
        """End every process because of an error that all of them have: rank 0 raises it, the others exit silently."""
        if self.first:
            raise error
        time.sleep(HEAD_START)
        raise SystemExit(exit_code(error))

    def mean(self, x: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """Return the mean of a number over all processes."""
        if self.count == 1:
            return x
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.count

    def max(self, *numbers: int) -> list[int]:
        """Return the largest of each number over all processes."""
        if self.count == 1:
            return list(numbers)
        x = torch.tensor(numbers)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return cast(list[int], x.tolist())


@contextmanager
def open_world() -> Iterator[World]:
    """Join the run's processes for the context: over gloo on CPUs and NCCL on GPUs."""
    backend = "gloo"
    if torch.cuda.is_available() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    with _joined(backend) as (rank, count):
        yield World(rank, count)


@contextmanager
def _joined(backend: str) -> Iterator[tuple[int, int]]:
    """Open the process group of torchrun's processes, unless it is open; yield rank and world size."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        yield dist.get_rank() if count > 1 else 0, count
        return
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield dist.get_rank(), count
    finally:
        time.sleep(SETTLE)
        dist.destroy_process_group()
