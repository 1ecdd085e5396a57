"""Skips unusable records, counts and logs them, and fails the run when there are too many."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.troubles import Troubles

FILE = "damaged.jsonl"
"""Name of the list in a run's folder."""
ROWS = "rows"
"""Key of ``counts`` for the number of rows; the others are reasons."""


@dataclass(frozen=True)
class Skipped:
    """A record that was skipped, and why."""

    source: str
    shard: str
    key: str
    reason: str
    """A fixed phrase, by which records are counted."""
    detail: str
    stand_in: bool = False
    """Whether it was drawn as a replacement of another; such records are logged, but not counted."""


@dataclass(frozen=True)
class Tally:
    """Rows and skipped records of one process since its last tally; picklable, to be sent to all others."""

    rows: int = 0
    skipped: tuple[Skipped, ...] = ()


class DamageLog:
    """Counts rows and skipped records, and lists each such record once in a JSONL file.

    Every process adds its own rows. From time to time all processes exchange their tallies, and each merges all of them
    in the same order. So all have the same counts and stop at the same step. Every record is loaded once per epoch and
    counted then, by the process that loads it.
    """

    def __init__(self, path: Path | None, *, most: float, enough: int = 1000) -> None:
        """
        Args:
            path: File of the list, which one process of a job writes; None in the others.
            most: Largest share of damaged rows; ``merge`` raises above it.
            enough: Number of rows from which ``merge`` may raise.
        """
        self.path, self.most, self.enough = path, most, enough
        self._counts = Counter[str]()
        self._rows, self._skipped = 0, list[Skipped]()
        self._troubles = Troubles()
        self._listed: set[tuple[str, str, str]] = set()
        if path is not None and path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self._listed = {(row["source"], row["shard"], row["key"]) for row in map(json.loads, whole)}

    def restore(self, counts: Mapping[str, int]) -> None:
        """Continue from the ``counts()`` of a checkpoint."""
        self._counts = Counter(counts)

    def add(self, skipped: Sequence[Sequence[Skipped]]) -> None:
        """Add the rows of a batch, each by the records that were skipped for it."""
        self._rows += len(skipped)
        self._skipped += chain.from_iterable(skipped)

    def take(self) -> Tally:
        """Return what was added since the last call."""
        tally = Tally(self._rows, tuple(self._skipped))
        self._rows, self._skipped = 0, []
        return tally

    def merge(self, tallies: Sequence[Tally]) -> None:
        """Count the tallies of all processes; raise TrainingFailed if too large a share was skipped."""
        for tally in tallies:
            self._counts[ROWS] += tally.rows
            self._counts.update(skipped.reason for skipped in tally.skipped if not skipped.stand_in)
        if self.path is not None:
            self._list([skipped for tally in tallies for skipped in tally.skipped])
        rows, damaged = self._counts[ROWS], self.damaged
        if rows >= self.enough and damaged > self.most * rows:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.reasons().items())
            raise TrainingFailed(
                f"{damaged} of {rows} records could not be used ({reasons}), more than the {self.most:.0%} allowed; "
                f"{FILE} in the run's folder lists them: fix the data or raise max_damaged"
            )

    @property
    def damaged(self) -> int:
        """Number of rows whose own record was skipped."""
        return sum(self.reasons().values())

    def reasons(self) -> dict[str, int]:
        """Return the count of each reason, the most frequent first."""
        return {reason: count for reason, count in self._counts.most_common() if reason != ROWS}

    def counts(self) -> dict[str, int]:
        """Return all counts so far, for a checkpoint."""
        return dict(self._counts)

    def _list(self, skipped: Sequence[Skipped]) -> None:
        new = {(row.source, row.shard, row.key): row for row in skipped}
        rows = [asdict(row) for name, row in new.items() if name not in self._listed]
        if rows and self.path is not None:
            for row in rows:
                del row["stand_in"]
            with self._troubles.survived(self.path), self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            self._listed |= new.keys()
