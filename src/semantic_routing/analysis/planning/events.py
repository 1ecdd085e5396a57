"""A discrete simulation of tasks on resources: each resource does one task at a time, the most urgent that is ready."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A piece of work that cannot be interrupted."""

    resource: str
    """Name of what does it."""
    seconds: float
    after: tuple[int, ...] = ()
    """Positions of the tasks, in the list, that must end before."""
    urgency: int = 0
    """Of the tasks that are ready, the resource does the one with the smallest number; of equal ones the earliest."""


def simulate(tasks: Sequence[Task]) -> list[tuple[float, float]]:
    """Return start and end of each task; ValueError if some wait for each other."""
    waiting = [len(set(task.after)) for task in tasks]
    followers = defaultdict[int, list[int]](list)
    for i, task in enumerate(tasks):
        for before in set(task.after):
            followers[before].append(i)
    ready = defaultdict[str, list[tuple[int, int]]](list)
    busy = set[str]()
    running: list[tuple[float, int]] = []
    spans = [(0.0, 0.0)] * len(tasks)

    def start(resource: str, now: float) -> None:
        if resource not in busy and ready[resource]:
            _, i = heapq.heappop(ready[resource])
            busy.add(resource)
            spans[i] = (now, now + tasks[i].seconds)
            heapq.heappush(running, (spans[i][1], i))

    for i, task in enumerate(tasks):
        if not waiting[i]:
            heapq.heappush(ready[task.resource], (task.urgency, i))
    for resource in list(ready):
        start(resource, 0.0)
    ended = 0
    while running:
        now = running[0][0]
        freed = set[str]()
        while running and running[0][0] == now:  # all events of one moment, before anything starts
            _, i = heapq.heappop(running)
            ended += 1
            busy.discard(tasks[i].resource)
            freed.add(tasks[i].resource)
            for j in followers[i]:
                waiting[j] -= 1
                if not waiting[j]:
                    heapq.heappush(ready[tasks[j].resource], (tasks[j].urgency, j))
                    freed.add(tasks[j].resource)
        for resource in sorted(freed):
            start(resource, now)
    if ended < len(tasks):
        raise ValueError(f"{len(tasks) - ended} of {len(tasks)} tasks wait for each other")
    return spans
