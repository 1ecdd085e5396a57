"""What every source of training data gives: encoded pictures with their captions, at random access.

A source is picklable and cheap to send to worker processes: it opens files when it reads, in the process that reads,
and may be read by several threads at once. Pictures are decoded elsewhere; here they are bytes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Record:
    """One encoded picture and its captions."""

    key: str
    """Unique inside its source, such as ``00012.tar/000120034``."""
    image: bytes
    """The encoded picture; never empty, but not yet known to be one."""
    captions: Mapping[str, tuple[str, ...]]
    """By caption key: ``txt`` (a .txt file or column), every string or list of strings of the JSON under its own
    name, such as ``text`` of manifests. Only texts that are not blank and can be encoded; a key without any is
    left out."""


@runtime_checkable
class RecordSource(Protocol):
    """Records at random access, in shards that lie one after the other."""

    @property
    def name(self) -> str:
        """What messages call the source: the path it was opened from."""
        ...

    @property
    def shards(self) -> Sequence[int]:
        """Number of records in each shard, in order; their sum is ``len``."""
        ...

    def __len__(self) -> int:
        """Number of records."""
        ...

    def read(self, index: int) -> Record:
        """The record 0..len - 1; IndexError beyond.

        Raises BadData for what is broken.
        """
        ...

    def shard_name(self, shard: int) -> str:
        """What messages call a shard: its file name."""
        ...


class Sharded:
    """What sources of several shards share: which shard holds an index."""

    def __init__(self, name: str, shard_names: Sequence[str], shards: Sequence[int]) -> None:
        self.name = name
        self.shards = tuple(shards)
        self.damaged: dict[str, int] = {}
        """What a scan left out or found broken, by reason; empty where there was none."""
        self._shard_names = tuple(shard_names)
        self._ends = tuple(accumulate(self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def shard_name(self, shard: int) -> str:
        """The file's name, with as many of its folders as tell it from others."""
        return self._shard_names[shard]

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a record, and its number inside the shard."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.name}")
        shard = bisect_right(self._ends, index)
        return shard, index - self._ends[shard] + self.shards[shard]


def texts(value: Any) -> tuple[str, ...]:
    """The usable captions in a JSON value: a string, or the strings of a list; blank and unencodable ones left out."""
    found = value if isinstance(value, list | tuple) else [value]
    return tuple(text for text in found if isinstance(text, str) and text.strip() and _encodable(text))


def caption_fields(fields: Iterable[tuple[str, Any]]) -> dict[str, tuple[str, ...]]:
    """The fields of an object that hold captions, see ``Record.captions``."""
    return {name: found for name, value in fields if (found := texts(value))}


def parse_json(data: bytes) -> Any:
    """JSON in UTF-8, with or without a byte order mark; ValueError that says in a few words where it is wrong."""
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
    """The captions of a .txt file (under ``txt``, without the white space around it), of a .json file and of a
    .caption file (under ``caption``) beside it.

    Raises ValueError that says which of them cannot be read.
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
    if "caption" in captions:  # what the JSON says
        said.pop("caption", None)
    return captions | said


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True
