"""Result of scanning one file of data: a row for each record, and counts of damage by reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

SIZE = np.dtype([("width", "<u4"), ("height", "<u4")])
"""Size of a picture in pixels; both are 0 if unknown."""
EXAMPLES = 20
"""Damaged records that are listed for each file and reason; the others are only counted."""


class Damage(NamedTuple):
    """One thing that is wrong in a file of data."""

    reason: str
    """A fixed phrase, as in ``BadData``."""
    place: int
    """Offset in bytes in a tar file; number of the row or line in other files."""
    name: bytes
    """The record's key or file name; empty if unknown."""
    detail: str


@dataclass
class ScanResult:
    """Records and damage of one file."""

    rows: Shaped[np.ndarray, " N"]
    """One for each record, of a dtype that has the fields of ``SIZE``."""
    damaged: Counter[str] = field(default_factory=Counter)
    """Count by reason."""
    examples: list[dict[str, str | int]] = field(default_factory=list)
    """The first few of each reason."""

    def report(self, damage: Damage) -> None:
        """Count a damage, and list it if it is among the first ``EXAMPLES`` of its reason."""
        self.damaged[damage.reason] += 1
        if self.damaged[damage.reason] <= EXAMPLES:
            key = key_text(damage.name)[:200]
            self.examples.append({"reason": damage.reason, "place": damage.place, "key": key, "detail": damage.detail})


def key_text(name: bytes) -> str:
    """Decode a key to text; bytes that are not UTF-8 become escapes."""
    return name.decode("utf-8", "backslashreplace")
