"""What a scan finds in one file of data: a row for each record, and what is damaged, by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

SIZE = np.dtype([("width", "<u4"), ("height", "<u4")])
"""Of a picture in pixels; both 0 where it was not looked at or cannot be told."""
EXAMPLES = 20
"""Damaged records of one reason and file that are named; the others are only counted."""


class Damage(NamedTuple):
    """Something that is not as it should be."""

    reason: str
    """A fixed phrase, as of ``BadData``."""
    place: int
    """Offset in bytes in a tar, number of the row or line elsewhere."""
    name: bytes
    """The record's key, or the name of its file; empty where unknown."""
    detail: str


@dataclass
class Found:
    """What a scan of one file found."""

    rows: Shaped[np.ndarray, " N"]
    """One for each record, of a dtype that has the fields of ``SIZE``."""
    damaged: Counter[str] = field(default_factory=Counter)
    """How many by reason."""
    examples: list[dict[str, str | int]] = field(default_factory=list)
    """The first few of each reason."""

    def report(self, damage: Damage) -> None:
        """Count a damage, and keep it if there are few such."""
        self.damaged[damage.reason] += 1
        if self.damaged[damage.reason] <= EXAMPLES:
            key = key_text(damage.name)[:200]
            self.examples.append({"reason": damage.reason, "place": damage.place, "key": key, "detail": damage.detail})


def key_text(name: bytes) -> str:
    """A key as text, whatever its bytes."""
    return name.decode("utf-8", "backslashreplace")
