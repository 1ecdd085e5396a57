"""Watchdog: ends a hung job and names the process that stopped first.

Every process records its step and phase (``Watchdog.beat``), and a thread writes this note to a store that all share.
Rank 0's thread reads all notes. If one has not changed for too long, it names the process that is furthest behind, all
processes write their stacks to stderr, and all exit with code 1, so that torchrun ends the job and the run can be
resumed. The threads of the other ranks watch rank 0. Clocks of different machines are never compared: the age of a note
is the time since its reader last saw it change.
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
"""The current activity of a process."""
SLOW = ("starting", "validating", "sampling", "saving")
"""Phases that may take up to ``WatchdogConfig.grace``."""
POLLS = 20
"""Polls per timeout."""
LONGEST_POLL = 10.0
"""Most seconds between two polls."""
ALARM = "alarm"


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """Time limits after which a job counts as hung."""

    timeout: float | None = None
    """Seconds without progress after which the job is ended. 0: never. None: 600 with several processes, otherwise
    never."""
    grace: float = 3600.0
    """The same limit, if longer, for slow phases: the first step (compilation), checkpoints, samples, validation."""

    def __post_init__(self) -> None:
        if (self.timeout or 0) < 0 or self.grace <= 0:
            raise ValueError(f"timeout {self.timeout} must be at least 0 and grace {self.grace} above 0 seconds")

    def seconds(self, world: int) -> float:
        """Return the timeout in seconds of a job of ``world`` processes; 0 is none."""
        return (600.0 if world > 1 else 0.0) if self.timeout is None else self.timeout


@dataclass(frozen=True)
class Note:
    """Step and phase of a process. Notes are ordered by progress: (step, beats since the step began)."""

    host: str
    step: int = 0
    beats: int = 0
    """Number of beats since the step began."""
    phase: Phase = "starting"
    slow: bool = True
    """Whether ``grace`` applies instead of ``timeout``."""
    pulse: int = 0
    """Number of writes of the note to the store: it increases as long as the process can run its threads."""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, self.beats


class Seen:
    """A reader's view of one process: its note, and when it last changed."""

    def __init__(self, rank: int, now: float) -> None:
        self.rank = rank
        self.note = Note(host="?")
        self.moved = self.alive = now
        """Times at which its progress and its pulse were last seen to change."""

    def update(self, note: Note, now: float) -> None:
        if note.progress != self.note.progress:
            self.moved = now
        if note.pulse != self.note.pulse:
            self.alive = now
        self.note = note


def hung(seen: Sequence[Seen], now: float, excused: float, timeout: float, grace: float) -> list[Seen]:
    """Return the processes that caused a hang: those furthest behind of all that are stuck; none if there is no hang.

    Processes wait for each other, so a process in a slow phase excuses all others, and ``timeout`` counts from
    ``excused``, the end of the last slow phase. All processes stop at almost the same time, and notes arrive out of
    order, so a process without progress for half the timeout counts as stuck.
    """
    if not any(now - one.moved > grace or now - max(one.moved, excused) > timeout for one in seen):
        return []
    still = [one for one in seen if now - one.moved > timeout / 2]
    behind = min(one.note.progress for one in still)
    return [one for one in still if one.note.progress == behind]


def describe(blamed: Sequence[Seen], now: float) -> str:
    """Return the message that names the blamed processes."""
    first = blamed[0]
    others = ", ".join(str(one.rank) for one in blamed[1:9]) + (" ..." if len(blamed) > 9 else "")
    return (
        f"rank {first.rank} on host {first.note.host} has not moved since step {first.note.step} "
        f"({first.note.phase}) for {now - first.moved:.0f} s"
        + (f"; nor have ranks {others}, which are as far" if others else "")
    )


def describe_silence(first: Seen, now: float) -> str:
    """Return the other ranks' message about a rank 0 that does not run at all."""
    note = first.note
    return (
        f"rank 0 on host {note.host} has not answered since step {note.step} ({note.phase}) "
        f"for {now - first.alive:.0f} s"
    )


class Watchdog:
    """One process's watchdog; a context manager whose thread ends with it.

    The thread calls ``end`` with the exit code; the default exits at once, without cleanup that could block.
    """

    def __init__(
        self,
        cfg: WatchdogConfig,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
        end: Callable[[int], object] = os._exit,
    ) -> None:
        """Watch over ``world`` processes that share ``store`` (``job_store``); a single process needs none."""
        if world > 1 and store is None:
            raise ValueError("several processes need a store that they share: pass job_store()")
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
        """Record that this process is in ``phase`` after ``step`` finished steps; takes microseconds."""
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
        """Write this process's note and read the watched ones; return the alarm message if there is one.

        If the store's host is gone or busy, nothing is read, and the earlier notes age.
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
        """Return whether rank 0 has had time to raise an alarm, and does not even run."""
        allowed = self.grace if first.note.slow else self.timeout
        return now - first.alive > allowed + 2 * self.interval

    def _raise_alarm(self, message: str) -> None:
        """Send the message to the other processes, give them time to write their stacks, and end."""
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
    """Connect to the store of torchrun's job, whose process group exists; return None without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    # torchrun's store survives a restart of the processes, and so would an alarm.
    return PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
