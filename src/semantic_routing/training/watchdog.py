"""A job whose processes stop moving ends, and says which of them stopped first.

Every process notes where it is (``Watchdog.beat``); a thread beside it puts that note on a store which all
processes share. The first process's thread reads the notes of all: where one has not changed for too long, it
names the process that is furthest behind, everybody's stack is written to stderr, and all end with exit code 1,
so that torchrun tears the job down and the run can be resumed. The other threads only see to it that the first
process is still there. No clock is compared with another machine's: a note is old when its reader has seen no
other for that long.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Literal

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

Phase = Literal[
    "starting", "loading data", "forward", "backward", "updating", "logging", "validating", "sampling", "saving"
]
"""What a process is at."""
SLOW = ("starting", "validating", "sampling", "saving")
"""Phases that may last as long as ``WatchdogConfig.grace``."""
POLLS = 20
"""Looks at the notes within one timeout ..."""
LONGEST_POLL = 10.0
"""... and the most seconds between two of them."""
ALARM = "alarm"


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a job counts as hung."""

    timeout: float | None = None
    """Seconds without movement after which the job ends. 0: never. None: 600 with several processes, else never."""
    grace: float = 3600.0
    """The same, if longer, for what may take long: the first step (compilation), checkpoints, samples, validation."""

    def __post_init__(self) -> None:
        if (self.timeout or 0) < 0 or self.grace <= 0:
            raise ValueError(f"timeout {self.timeout} must be at least 0 and grace {self.grace} above 0 seconds")

    def seconds(self, world: int) -> float:
        """The timeout of a job of ``world`` processes; 0 is none."""
        return (600.0 if world > 1 else 0.0) if self.timeout is None else self.timeout


@dataclass(frozen=True)
class Note:
    """Where a process is. Notes are ordered by progress: (step, beats since)."""

    host: str
    step: int = 0
    beats: int = 0
    """Beats since the step began."""
    phase: Phase = "starting"
    slow: bool = True
    """Whether the grace applies."""
    pulse: int = 0
    """Times that the note was put on the store: it rises as long as the process can run its threads."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, self.beats


class Seen:
    """What a reader knows of one process, and since when."""

    def __init__(self, rank: int, now: float) -> None:
        self.rank = rank
        self.note = Note(host="?")
        self.moved = self.alive = now
        """When its progress and when its pulse were last seen to change."""

    def update(self, note: Note, now: float) -> None:
        if note.progress != self.note.progress:
            self.moved = now
        if note.pulse != self.note.pulse:
            self.alive = now
        self.note = note


def hung(seen: Sequence[Seen], now: float, excused: float, timeout: float, grace: float) -> list[Seen]:
    """The processes to blame where one has not moved for too long: those furthest behind among all that stand still.

    Processes wait for each other, so one that is slow for a good reason gives all of them its grace, and ``timeout``
    counts from ``excused``, when one was last known to be. All stop almost at once, and notes arrive out of order: who
    has not moved for half the timeout stands still.
    """
    if not any(now - one.moved > grace or now - max(one.moved, excused) > timeout for one in seen):
        return []
    still = [one for one in seen if now - one.moved > timeout / 2]
    behind = min(one.note.progress for one in still)
    return [one for one in still if one.note.progress == behind]


def describe(blamed: Sequence[Seen], now: float) -> str:
    """The message that names them."""
    first = blamed[0]
    others = ", ".join(str(one.rank) for one in blamed[1:9]) + (" ..." if len(blamed) > 9 else "")
    return (
        f"rank {first.rank} on host {first.note.host} has not moved since step {first.note.step} "
        f"({first.note.phase}) for {now - first.moved:.0f} s"
        + (f"; nor have ranks {others}, which are as far" if others else "")
    )


def describe_silence(first: Seen, now: float) -> str:
    """The message of the others about a first process that does not run at all."""
    note = first.note
    return (
        f"rank 0 on host {note.host} has not answered since step {note.step} ({note.phase}) "
        f"for {now - first.alive:.0f} s"
    )


class Watchdog:
    """One process's part in watching over a job; a context whose thread ends with it.

    ``end`` is what the thread does at last: the default ends the process at once, which nothing can hold up.
    """

    def __init__(
        self,
        cfg: WatchdogConfig,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """``store`` is shared by the ``world`` processes (``job_store``); a process that is alone needs none."""
        if world > 1 and store is None:
            raise ValueError("several processes need one store that they share")
        self.rank, self.world, self.end = rank, world, end
        self.timeout = cfg.seconds(world)
        self.grace = max(cfg.grace, self.timeout)
        self.interval = min(LONGEST_POLL, self.timeout / POLLS)
        self._store = PrefixStore("semroute/watchdog", HashStore() if store is None else store)
        self._note = Note(host=socket.gethostname())
        self._first_step: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.timeout:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self, step: int, phase: Phase) -> None:
        """Note that this process, after ``step`` finished steps, is now at ``phase``. Costs microseconds."""
        if self._first_step is None:
            self._first_step = step
        beats = self._note.beats + 1 if step == self._note.step else 0
        slow = phase in SLOW or step == self._first_step
        self._note = replace(self._note, step=step, beats=beats, phase=phase, slow=slow)

    def _watch(self) -> None:
        excused = time.monotonic()
        watched = [Seen(rank, excused) for rank in (range(self.world) if self.rank == 0 else [0])]
        pulse = 0
        while not self._done.wait(self.interval):
            pulse += 1
            alarm = self._exchange(watched, pulse)
            if alarm:
                return self._end(alarm)
            now = time.monotonic()
            if self.rank:
                if self._silent(watched[0], now):
                    return self._end(describe_silence(watched[0], now))
                continue
            if any(one.note.slow for one in watched):
                excused = now
            blamed = hung(watched, now, excused, self.timeout, self.grace)
            if blamed:
                return self._raise_alarm(describe(blamed, now))

    def _exchange(self, watched: Sequence[Seen], pulse: int) -> str:
        """Show the own note and read the others'; returns the alarm where one was raised.

        Where the store's host is gone or busy nothing is read, and what was read before grows old.
        """
        with suppress(DistError):
            self._store.set(str(self.rank), json.dumps(asdict(replace(self._note, pulse=pulse))))
            for one in watched:
                if self._store.check([str(one.rank)]):
                    one.update(Note(**json.loads(self._store.get(str(one.rank)))), time.monotonic())
            if self._store.check([ALARM]):
                return self._store.get(ALARM).decode()
        return ""

    def _silent(self, first: Seen, now: float) -> bool:
        """Whether the first process, which had time to say who hangs, cannot even say that."""
        allowed = self.grace if first.note.slow else self.timeout
        return now - first.alive > allowed + 2 * self.interval

    def _raise_alarm(self, message: str) -> None:
        """Tell the others, give them time to write their stacks, and end."""
        with suppress(DistError):
            self._store.set(ALARM, message)
        self._done.wait(2 * self.interval)
        self._end(message)

    def _end(self, message: str) -> None:
        sys.stderr.write(f"semroute: {message}; this is rank {self.rank} at step {self._note.step}\n")
        sys.stderr.flush()
        faulthandler.dump_traceback()
        self.end(1)


def job_store() -> Store | None:
    """A connection to the store of the job that torchrun started, once its process group is there; else None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    # torchrun's store outlives a restart of the processes, and so would an alarm.
    return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
