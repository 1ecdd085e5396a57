"""What is done about records that cannot be trained on: they are skipped, counted, written down, and have a limit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.troubles import Troubles

FILE = "damaged.jsonl"
"""Name of the list in a run's folder."""
ROWS = "rows"
"""The key of ``counts`` that is no reason but the number of rows seen."""


@dataclass(frozen=True)
class Skipped:
    """A record that was skipped, and why."""

    source: str
    shard: str
    key: str
    reason: str
    """In words that do not vary."""
    detail: str
    stand_in: bool = False
    """Whether it was itself drawn to stand in for another; such are written down, but not counted."""


@dataclass(frozen=True)
class Tally:
    """What one process saw since it was last asked; picklable, to be sent to all others."""

    rows: int = 0
    skipped: tuple[Skipped, ...] = ()


class DamageLog:
    """Counts rows and skipped records, and lists each such record once in a JSONL file.

    Every process adds its own rows. Now and then all exchange their tallies and each merges all of them, in the same
    order: so all have the same counts, and stop at the same step if it comes to that. Every record has its turn once
    an epoch and is counted in its turn, by whichever process has it.
    """

    def __init__(
        self, path: Path | None, *, most: float, enough: int = 1000, counts: Mapping[str, int] | None = None
    ) -> None:
        """
        Args:
            path: Where the list is written, by one process of a job; None in the others.
            most: Share of the rows beyond which ``merge`` raises.
            enough: Rows before which it does not.
            counts: ``counts()`` of a checkpoint to go on from.
        """
        self.path, self.most, self.enough = path, most, enough
        self._counts = Counter(counts or {})
        self._rows, self._skipped = 0, list[Skipped]()
        self._troubles = Troubles()
        self._listed: set[tuple[str, str, str]] = set()
        if path is not None and path.is_file():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            self._listed = {(row["source"], row["shard"], row["key"]) for row in map(json.loads, whole)}

    def add(self, rows: int, skipped: Sequence[Skipped]) -> None:
        """Note the rows of one batch and what was skipped for them."""
        self._rows += rows
        self._skipped += skipped

    def take(self) -> Tally:
        """What was added since this was last called."""
        tally = Tally(self._rows, tuple(self._skipped))
        self._rows, self._skipped = 0, []
        return tally

    def merge(self, tallies: Sequence[Tally]) -> None:
        """Count what all processes took; TrainingFailed where too large a share had to be skipped."""
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
                f"{FILE} in the run's folder lists them: mend the data or raise max_damaged"
            )

    @property
    def damaged(self) -> int:
        """Rows whose own record had to be skipped."""
        return sum(self.reasons().values())

    def reasons(self) -> dict[str, int]:
        """How often each reason came up, the most frequent first."""
        return {reason: count for reason, count in self._counts.most_common() if reason != ROWS}

    def counts(self) -> dict[str, int]:
        """Everything counted so far, for a checkpoint."""
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
