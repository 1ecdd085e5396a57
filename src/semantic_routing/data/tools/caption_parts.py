"""Captions of a long run on disk, in parts: Parquet files of a fixed number of records each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from semantic_routing.common.extras import require
from semantic_routing.common.files import read_json, write_text, written_whole

REQUEST = "request.json"
CAPTIONS = {
    "key": "string",
    "caption": "string",
    "model": "string",
    "prompt_tokens": "int64",
    "completion_tokens": "int64",
}
"""The columns of the finished file, and their Arrow types."""
ROWS = CAPTIONS | {"position": "int64", "reason": "string", "detail": "string", "final": "bool"}
"""The columns of a part."""
GROUP = 10_000
"""Rows of a row group of the finished file."""


@dataclass(frozen=True, kw_only=True)
class CaptionRow:
    """The caption of one record, or the reason why it has none."""

    position: int
    """Number of the record among all."""
    key: str
    caption: str | None = None
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reason: str = ""
    """Why there is no caption: a fixed phrase, so that equal reasons can be counted."""
    detail: str = ""
    final: bool = True
    """Whether another request would give the same."""


@dataclass
class _Open:
    """An incomplete part."""

    rows: list[CaptionRow]
    names: list[str] = field(default_factory=list)


class Parts:
    """The parts in a folder; each is written once all its records have rows."""

    def __init__(self, folder: Path, records: int, size: int) -> None:
        """Divide ``records`` into parts of ``size``."""
        self._parquet = require("pyarrow.parquet", what="a file of captions", extra="data")
        self._arrow = pyarrow = require("pyarrow", what="a file of captions", extra="data")
        self._schema = pyarrow.schema(ROWS.items())
        self.folder, self.records, self.size = folder, records, size
        self._open: dict[int, _Open] = {}

    def claim(self, request: dict[str, Any]) -> None:
        """Write down the request; ValueError if the folder has captions of another request.

        Parts of another request are deleted if they hold no caption, because that request failed.
        """
        path = self.folder / REQUEST
        parts = sorted(self.folder.glob("part-*.parquet"))
        if parts:
            try:
                found = read_json(path, "a request")
            except ValueError as error:
                raise ValueError(f"{path} is damaged; delete {self.folder} or choose another --out") from error
            other = [name for name in request if not isinstance(found, dict) or found.get(name) != request[name]]
            if other and any(row.caption for part in parts for row in self._read(part)):
                raise ValueError(
                    f"{self.folder} holds captions of a request with another {', '.join(other)}; choose another --out "
                    "or delete it"
                )
            for part in parts if other else ():
                part.unlink()
        write_text(path, json.dumps(request, indent=2) + "\n")

    def missing(self, kept: Callable[[int], object]) -> Iterator[int]:
        """Yield the positions without a final row, and pass the number of final rows of each part to ``kept``."""
        for first in range(0, self.records, self.size):
            number, last = first // self.size, min(first + self.size, self.records)
            rows = [row for row in self._read(self._path(number)) if row.final]
            missing = sorted({*range(first, last)} - {row.position for row in rows})
            kept(len(rows))
            if missing:
                self._open[number] = _Open(rows)
            yield from missing

    def add(self, row: CaptionRow, name: str = "") -> list[str]:
        """Add a row; once its part is complete and on disk, return the names that came with the part's rows."""
        number = row.position // self.size
        part = self._open[number]
        part.rows.append(row)
        part.names += [name] if name else []
        if len(part.rows) < min(self.size, self.records - number * self.size):
            return []
        del self._open[number]
        rows = sorted(part.rows, key=lambda row: row.position)
        with written_whole(self._path(number)) as scratch:
            table = self._arrow.Table.from_pylist([asdict(row) for row in rows], schema=self._schema)
            self._parquet.write_table(table, scratch)
        return part.names

    def join(self, out: Path) -> Counter[str]:
        """Write the captions of all parts to one file, and count the records without a caption by reason.

        Raises ValueError, and writes nothing, if no record has a caption.
        """
        reasons, first = Counter[str](), ""
        schema = self._arrow.schema(CAPTIONS.items())
        with written_whole(out) as scratch, self._parquet.ParquetWriter(scratch, schema) as writer:
            waiting = schema.empty_table()
            for number in range(-(-self.records // self.size)):
                part = self._parquet.read_table(self._path(number))
                for reason, detail in zip(part["reason"].to_pylist(), part["detail"].to_pylist(), strict=True):
                    if reason:
                        reasons[reason] += 1
                        first = first or (f"{reason}: {detail}" if detail else reason)
                captioned = part.filter(part["caption"].is_valid()).select(schema.names)
                waiting = self._arrow.concat_tables([waiting, captioned])
                if len(waiting) >= GROUP:
                    writer.write_table(waiting)
                    waiting = schema.empty_table()
            if len(waiting):
                writer.write_table(waiting)
            if reasons.total() == self.records:
                raise ValueError(f"none of {self.records} records got a caption; the first reason: {first}")
        return reasons

    def _read(self, path: Path) -> list[CaptionRow]:
        if not path.is_file():
            return []
        try:
            return [CaptionRow(**row) for row in self._parquet.read_table(path, schema=self._schema).to_pylist()]
        except (self._arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to caption its records again") from error

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.parquet"
