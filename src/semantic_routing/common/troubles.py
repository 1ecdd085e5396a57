"""Handling of failures beside the main work, such as writing metrics: reported once, then ignored."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm


def say(message: str) -> None:
    """Print a line on stderr; do nothing if stderr is gone."""
    with suppress(OSError):
        tqdm.write(f"semroute: {' '.join(message.split())}", file=sys.stderr)  # above a progress bar


class Troubles:
    """The failures so far; each is reported once."""

    def __init__(self) -> None:
        self._reported: set[str] = set()

    @contextmanager
    def survived(self, what: str | Path, *more: type[Exception]) -> Iterator[None]:
        """Ignore an OSError or one of ``more`` in the context; report the first failure of ``what``."""
        kinds: tuple[type[Exception], ...] = (OSError, *more)
        try:
            yield
        except kinds as error:
            if str(what) not in self._reported:
                self._reported.add(str(what))
                reason = getattr(error, "strerror", None) or error
                say(f"{what}: {reason}; continuing without it (reported once)")


class Forgiving:
    """A text stream that drops what cannot be written, as when its terminal is gone or its disk is full."""

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
    """Keep failures to write to stderr from ending the work during the context."""
    with redirect_stderr(Forgiving(sys.stderr)):
        yield
