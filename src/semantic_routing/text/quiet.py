"""Transformers without progress bars, and its errors as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide transformers' progress bars and its report of unused weights, some of which are left out on purpose."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, with the second after a colon."""
    first, _, rest = str(error).strip().partition("\n")
    return f"{first} {rest.strip()}" if first.endswith(":") else first
