"""The signals by which terminals and schedulers end a program: noted, so that work is saved before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PEOPLE = (signal.SIGINT, signal.SIGQUIT)
"""What keys of a terminal send; a second one does not wait."""
ENDING = (*PEOPLE, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Beside them: what ends jobs, a terminal that closes, the warnings of Slurm, LSF and Grid Engine, used up time."""
ALWAYS = (signal.SIGINT, signal.SIGTERM)
"""Noted also where they are ignored when the program starts, as shells start what runs in the background."""


@contextmanager
def stop_signals(*, patient: bool = False) -> Iterator[list[int]]:
    """A list that receives the signals ``ENDING`` instead of their ending the process.

    What is ignored stays so, such as SIGHUP under nohup. A second one of ``PEOPLE`` raises KeyboardInterrupt, unless
    ``patient``.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and number in PEOPLE and not patient:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
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
    """Ignore the signals in a process beside the one that notes them: a terminal sends them to both."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
