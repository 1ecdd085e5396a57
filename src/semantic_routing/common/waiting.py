"""How OpenMP's threads wait for each other, chosen by how busy the machine is before torch is loaded."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection
from math import fsum
from pathlib import Path

from semantic_routing.common.troubles import say

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
STAT = Path("/proc/stat")
SECONDS = 0.3
BUSY = 0.5
"""Busy processors from which on sleeping is faster: half of one."""


def wait_without_spinning_if_busy() -> None:
    """Let waiting threads sleep if other processes keep processors busy.

    Threads that wait for each other spin. On an idle machine that is faster than to sleep, and beside a busy process it
    keeps the very processor that the other thread needs (docs/log.md has measurements). Choices of the user stay, and
    nothing is changed after torch is loaded, with a single thread, or where the load is unknown.
    """
    chosen = any(name in os.environ for name in SETTINGS) or os.environ.get("OMP_NUM_THREADS") == "1"
    if chosen or "torch" in sys.modules or not hasattr(os, "sched_getaffinity"):
        return
    ours = os.sched_getaffinity(0)
    if len(ours) < 2:
        return
    busy = busy_processors(ours)
    if busy >= BUSY:
        os.environ["GOMP_SPINCOUNT"] = "0"
        say(f"other processes keep {busy:.1f} of {len(ours)} processors busy: threads sleep when they wait")


def busy_processors(ours: Collection[int], seconds: float = SECONDS) -> float:
    """Return how many of these processors compute during the next seconds; 0 where Linux's /proc is missing."""
    before = _idle_ticks(ours)
    time.sleep(seconds)
    after = _idle_ticks(ours)
    passed = seconds * os.sysconf("SC_CLK_TCK")
    return fsum(max(0.0, 1 - (after[name] - idle) / passed) for name, idle in before.items() if name in after)


def _idle_ticks(ours: Collection[int]) -> dict[int, int]:
    """Return the clock ticks that each of these processors has been idle."""
    try:
        lines = STAT.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines if line.startswith("cpu") and not line.startswith("cpu "))
    idle = {int(row[0][3:]): int(row[4]) + int(row[5]) for row in rows}  # idle, and waiting for a disk
    return {name: ticks for name, ticks in idle.items() if name in ours}
