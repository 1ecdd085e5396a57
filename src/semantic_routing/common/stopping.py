"""Handlers for the signals that end programs, so that work is saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PEOPLE = (signal.SIGINT, signal.SIGQUIT)
"""Signals from a terminal's keys; a second one ends the program immediately."""
ENDING = (*PEOPLE, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""All handled signals: also from closing terminals, from Slurm, LSF and Grid Engine, and for used-up CPU time."""
ALWAYS = (signal.SIGINT, signal.SIGTERM)
"""Signals that are handled even if ignored at the start, as in background jobs of a shell."""


@contextmanager
def stop_signals(*, patient: bool = False) -> Iterator[list[int]]:
    """Yield a list that collects the signals ``ENDING``, which then do not end the process.

    Ignored signals stay ignored, such as SIGHUP under nohup. A second signal of ``PEOPLE`` raises KeyboardInterrupt,
    unless ``patient``.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number in PEOPLE and not patient:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals only to the main thread
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    noted = [n for n, handler in before.items() if n in ALWAYS or handler is not signal.SIG_IGN]
    for number in noted:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in noted:
            signal.signal(number, before[number] or signal.SIG_DFL)


def leave_to_parent() -> None:
    """Ignore the signals in a worker process; a terminal sends them to its parent too."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
