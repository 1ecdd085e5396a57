"""Records of training data (encoded pictures with captions), and the interface of their random-access sources.

A source is picklable and thread-safe. It opens files only when it reads, so it is cheap to send to workers. Pictures
stay encoded here.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32

from semantic_routing.data.sources.storage import Arrays


@dataclass(frozen=True)
class Record:
    """One encoded picture and its captions."""

    key: str
    """Unique inside its source, such as ``00012.tar/000120034``."""
    image: bytes
    """The encoded picture: not empty, and not validated."""
    captions: Mapping[str, tuple[str, ...]]
    """Captions by key: ``txt`` for a .txt file, and every column or JSON field of strings under its own name. Blank
    and unencodable texts are left out, as are keys without captions."""


@runtime_checkable
class RecordSource(Protocol):
    """Random access to records, which are in consecutive shards."""

    @property
    def name(self) -> str:
        """Name for messages: the path it was opened from."""
        ...

    @property
    def shards(self) -> Sequence[int]:
        """Number of records in each shard; their sum is ``len``."""
        ...

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def read(self, index: int) -> Record:
        """Return a record by its index from 0 to ``len - 1``.

        Raises IndexError outside that range, and BadData for a damaged record.
        """
        ...

    def shard_name(self, shard: int) -> str:
        """Return a shard's name for messages: its file name."""
        ...


class Sharded:
    """Base of sources: maps an index to its shard, and knows the pictures' dimensions from an index on disk."""

    def __init__(
        self,
        name: str,
        shard_names: Sequence[str],
        shards: Sequence[int],
        sizes: Sequence[Path | np.ndarray] | None = None,
    ) -> None:
        """
        Args:
            name: Name for messages.
            shard_names: Name of each shard.
            shards: Number of records in each shard.
            sizes: Arrays with the fields of ``scan.SIZE``, or their .npy files, with a row for each record in order.
        """
        self.name = name
        self.shards = tuple(shards)
        self.damaged: dict[str, int] = {}
        """Counts of what a scan left out or found damaged, by reason; empty without a scan."""
        self._shard_names = tuple(shard_names)
        self._ends = tuple(accumulate(self.shards))
        self._sizes = Arrays(sizes) if sizes else None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def shard_name(self, shard: int) -> str:
        """Return the file's name, with as many of its folders as make it unique."""
        return self._shard_names[shard]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the shard of a record, and its number inside the shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.name}")
        shard = bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self.shards[shard]

    def dimensions(self) -> UInt32[np.ndarray, "N 2"] | None:
        """Return width and height of every picture, 0 where unknown; None without an index that holds them."""
        if self._sizes is None:
            return None
        return np.concatenate([np.stack([part["width"], part["height"]], axis=1) for part in self._sizes])


class ConcatRecords:
    """Several sources as one, in order."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        self._sources = tuple(sources)
        self._ends = tuple(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def source(self, index: int) -> RecordSource:
        """Return the source that holds a record."""
        return self._sources[bisect_right(self._ends, index)]

    def read(self, index: int) -> Record:
        """Return a record by its index; BadData for a damaged one."""
        number = bisect_right(self._ends, index)
        return self._sources[number].read(index - self._ends[number] + len(self._sources[number]))


def texts(value: Any) -> tuple[str, ...]:
    """Return the captions in a JSON value, a string or a list of strings, without blank and unencodable ones."""
    found = value if isinstance(value, list | tuple) else [value]
    return tuple(text for text in found if isinstance(text, str) and text.strip() and _encodable(text))


def caption_fields(fields: Iterable[tuple[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return the captions of an object's fields by their names, as for ``Record.captions``."""
    return {name: found for name, value in fields if (found := texts(value))}


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON, with or without a byte order mark; ValueError names the place of a mistake in a few words."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if b"\n" in data.strip() else ""
        raise ValueError(f"not JSON at {place}column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise ValueError("nested too deeply; expected an object of captions") from None


def captions_of(text: bytes, extra: bytes, kohya: bytes = b"") -> dict[str, tuple[str, ...]]:
    """Return the captions of a record's files: .txt (under ``txt``, stripped), .json and .caption (under ``caption``).

    Raises ValueError that names the file that cannot be read.
    """
    captions = {}
    if extra:
        try:
            fields = parse_json(extra)
        except ValueError as error:
            raise ValueError(f".json: {error}") from None
        captions = caption_fields(fields.items() if isinstance(fields, dict) else ())
    said = {}
    for name, data, ending in (("caption", kohya, ".caption"), ("txt", text, ".txt")):
        try:
            if written := texts(data.decode("utf-8-sig").strip()):
                said[name] = written
        except UnicodeDecodeError as error:
            raise ValueError(f"{ending}: byte {error.start + 1} is not UTF-8") from None
    if "caption" in captions:  # the JSON's field wins
        said.pop("caption", None)
    return captions | said


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
