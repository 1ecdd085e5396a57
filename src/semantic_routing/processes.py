"""The processes of one job as torchrun starts them; without torchrun, one process that is alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for the slowest of them. One that fails ends the job sooner: torchrun stops the rest."""


@dataclass(frozen=True)
class Processes:
    """Which process of how many this is."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what the job writes once."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> list[T]:
        """This process's part of the work: every ``count``-th piece, so that all parts are alike in length."""
        return list(work[self.rank :: self.count])

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Processes]:
    """The job's processes, able to wait for each other (over gloo, on the host) while the context lasts."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or dist.is_initialized():
        yield Processes(int(os.environ.get("RANK", "0")), count)
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Processes(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
