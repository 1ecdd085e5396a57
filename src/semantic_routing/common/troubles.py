"""Trouble with what is written beside the work, such as metrics: told once and survived."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm


def say(message: str) -> None:
    """Tell the user a line on stderr, if there still is one."""
    with suppress(OSError):
        tqdm.write(f"semroute: {' '.join(message.split())}", file=sys.stderr)  # above a bar, if there is one


class Troubles:
    """What went wrong so far; each thing is told once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    @contextmanager
    def survived(self, what: str | Path, *more: type[Exception]) -> Iterator[None]:
        """Go on after the context where it ends in an OSError or one of ``more``; the first of ``what`` is told."""
        kinds: tuple[type[Exception], ...] = (OSError, *more)
        try:
            yield
        except kinds as error:
            if str(what) not in self._told:
                self._told.add(str(what))
                reason = getattr(error, "strerror", None) or error
                say(f"{what}: {reason}; going on without it, and saying so once")


class Forgiving:
    """A stream of text that loses what cannot be written: its terminal is gone, its disk is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def forgiving_stderr() -> Iterator[None]:
    """Nothing that is only shown can end the work while the context lasts."""
    with redirect_stderr(Forgiving(sys.stderr)):
        yield
