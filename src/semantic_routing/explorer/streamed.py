"""Work that reports its progress through a callback, as an iterator: a page shows each report as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Work = Callable[[Callable[[Item], None]], None]
"""(report) -> None; it calls ``report`` with each item."""


def streamed(work: Work[Item]) -> Iterator[Item]:
    """Yield what ``work`` reports, which runs in a thread of its own; its errors are raised here.

    If the iterator is closed early, the work is stopped at its next report.
    """
    queue: SimpleQueue[tuple[Item | None, BaseException | None, bool]] = SimpleQueue()
    closed = threading.Event()

    def report(item: Item) -> None:
        if closed.is_set():
            raise _Closed
        queue.put((item, None, False))

    def run() -> None:
        try:
            work(report)
            queue.put((None, None, True))
        except BaseException as error:
            queue.put((None, error, True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            item, error, last = queue.get()
            if error is not None:
                raise error
            if last:
                return
            yield item  # type: ignore[misc]  # an item of the work's own type
    finally:
        closed.set()
        thread.join()


class _Closed(Exception):
    """Nobody reads the reports any more."""
