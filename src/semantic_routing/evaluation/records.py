"""From the results of single images to a table: records, and their means by tag.

An evaluation's folder holds ``records.jsonl`` with one line for each image, ``summary.json``, ``table.md``,
``index.html`` and ``manifest.json``, which says what was evaluated and how.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from semantic_routing.common.config import from_dict
from semantic_routing.common.files import write_text

RECORDS, SUMMARY, TABLE, MANIFEST, PAGE = "records.jsonl", "summary.json", "table.md", "manifest.json", "index.html"
CORRECT = "correct"
"""The score of a verdict: 1 right, 0 wrong."""
LOSS = "loss"
"""The velocity loss of a held-out picture: less is better."""
MISSING, UNREADABLE, UNSCORED = "missing", "unreadable", "unscored"
"""Why a record has no score: there is no image, it cannot be opened, or it could not be scored."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The result for one image."""

    prompt: int
    """Index of the prompt, which together with ``image`` determines the noise."""
    id: str
    """The benchmark's own name of the prompt."""
    image: int
    """Index of the image among those of its prompt."""
    caption: str
    tags: tuple[str, ...]
    """The skills that the prompt tests."""
    file: str
    """Path of the image relative to the evaluation's folder; the expected path if the image is missing."""
    scores: dict[str, float | None]
    """Scores by metric; None if the image could not be scored. The metric of a verdict is ``correct``."""
    reason: str
    """The reason, in a few words."""
    answer: str = ""
    """A judge's answer, word for word."""
    gap: str = ""
    """Why there is no score: ``missing``, ``unreadable`` or ``unscored``; empty if there is one."""
    sha256: str = ""
    """Of the image's file."""

    @property
    def tag(self) -> str:
        """The first tag."""
        return self.tags[0] if self.tags else ""

    @property
    def correct(self) -> bool | None:
        """The verdict, where it is one."""
        score = self.scores.get(CORRECT)
        return None if score is None else score == 1


def record_line(record: Record) -> str:
    """Format a record as a line of JSON."""
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines, atomically."""
    write_text(path, "".join(map(record_line, records)))


def read_records(path: Path) -> list[Record]:
    """Read records from JSON lines; ValueError names the file and line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read; give the folder of a finished evaluation") from error
    return [parse_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]


def parse_record(line: str, where: str) -> Record:
    """Parse a line of JSON; ValueError begins with ``where``."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    missing = [f.name for f in fields(Record) if not isinstance(values, dict) or f.name not in values]
    if missing:
        raise ValueError(f"{where} is not a record: it lacks {', '.join(missing)}")
    return from_dict(Record, values, f"{where}: ")


def unscored(records: Iterable[Record]) -> dict[str, int]:
    """Count images without a score, or without all scores, by the reason before its colon."""
    found = Counter(record.reason.partition(":")[0] for record in records if record.gap == UNSCORED)
    return dict(found.most_common())


def reason_note(found: Mapping[str, int]) -> str:
    """Return the note under a table with the reasons why images were not scored."""
    return f"\nNot scored: {', '.join(f'{n} {reason}' for reason, n in found.items())}.\n" if found else ""


def scorer_name(identity: Any) -> str:
    """Describe the scorer in a few words: its name, the model that it asks, the label of a variant."""
    if not isinstance(identity, dict):
        return "an unknown scorer"
    names = [str(identity[key]) for key in ("scorer", "model", "label") if identity.get(key)]
    return ", ".join(names) or "another scorer"
