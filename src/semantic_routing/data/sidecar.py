"""Sidecar: captions by record key from a file beside the data, such as captions written by a model."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from semantic_routing.common.extras import require
from semantic_routing.data.sources.storage import Reader, is_url, stat

RECAPTION = "recaption"
"""Caption key of the captions in a sidecar."""
_LOOKUP = ".keys.npy"
_ROW_GROUPS = 64


class Sidecar:
    """Captions by record key in a Parquet or JSONL file with ``key`` and ``caption``.

    The sorted hashes of the keys and the positions of the rows are written once to ``FILE.keys.npy`` and
    memory-mapped, so that all processes share them. Captions stay in the file: JSONL rows are read one at a time; for
    Parquet the last row groups are cached, which is fast if rows are in about the order of the records.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        if is_url(self.path):
            raise ValueError(f"a sidecar is read at every sample: copy {self.path} to a local file")
        if not Path(self.path).is_file():
            raise ValueError(f"there is no sidecar {self.path}; give a .parquet or .jsonl file with key and caption")
        self._file: Any = _parquet(self.path) if self.path.endswith(".parquet") else None
        self._hashes, self._places, self._has_folders = _lookup(self.path, self._file)
        self._reader = Reader()
        self._group = lru_cache(maxsize=_ROW_GROUPS)(self._read_group)
        if self._file is not None:
            groups = range(self._file.metadata.num_row_groups)
            self._ends = np.cumsum([self._file.metadata.row_group(i).num_rows for i in groups])

    def __reduce__(self) -> tuple[type[Sidecar], tuple[str]]:
        return Sidecar, (self.path,)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._hashes)

    def captions(self, key: str, source: str = "") -> tuple[str, ...]:
        """Return the captions of a record of ``source`` by the key that names both, or else by the record's key.

        If no key of the file has a folder, as those of img2dataset, a record is found by its key's last part.
        """
        names = [with_source(source, key), key] + ([] if self._has_folders else [key.rpartition("/")[2]])
        return next(filter(None, map(self._named, names)), ())

    def names_source(self, key: str, source: str) -> bool:
        """Return whether a record's captions have a key that names its source, too."""
        return bool(self._named(with_source(source, key)))

    def _named(self, key: str) -> tuple[str, ...]:
        wanted = np.uint64(_hash(key))
        first, last = (int(np.searchsorted(self._hashes, wanted, side)) for side in ("left", "right"))
        rows = (self._row(int(place)) for place in self._places[first:last])
        return tuple(caption for name, caption in rows if name == key and isinstance(caption, str) and caption.strip())

    def _row(self, place: int) -> tuple[Any, Any]:
        if self._file is None:
            row = json.loads(self._line(place))
            return row["key"], row.get("caption")
        group = int(np.searchsorted(self._ends, place, side="right"))
        table = self._group(group)
        within = place - int(self._ends[group]) + table.num_rows
        return table["key"][within].as_py(), table["caption"][within].as_py()

    def _line(self, start: int) -> bytes:
        size = 2048
        while True:
            line, end, _ = self._reader.read(self.path, start, size).partition(b"\n")
            if end or len(line) < size:
                return line
            size *= 4

    def _read_group(self, group: int) -> Any:
        return self._file.read_row_group(group, columns=["key", "caption"])


def with_source(source: str, key: str) -> str:
    """Return a key that is unique among several sources: with the last part of the source's path."""
    return f"{source_label(source)}::{key}"


def source_label(source: str) -> str:
    """Return the last part of a source's path."""
    return source.rstrip("/").rpartition("/")[2]


def _hash(key: str) -> int:
    return int.from_bytes(blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _parquet(path: str) -> Any:
    parquet = require("pyarrow.parquet", what="a Parquet sidecar", extra="data")
    file = parquet.ParquetFile(path)
    missing = [name for name in ("key", "caption") if name not in file.schema_arrow.names]
    if missing:
        raise ValueError(f"{path} has no column {' or '.join(missing)}; a sidecar has key and caption")
    return file


def _lookup(path: str, file: Any) -> tuple[np.ndarray, np.ndarray, bool]:
    """Map the sorted hashes of keys and the rows' places from the file beside ``path``; make it if needed.

    The last result is whether any key has a folder.
    """
    found = stat(path)
    stamp = np.array([found.size, int(found.version)], np.uint64)
    kept = Path(path + _LOOKUP)
    if not kept.is_file() or not np.array_equal(np.load(kept, mmap_mode="r")[:2], stamp):
        hashes, places, folders = array("Q"), array("Q"), False
        for key, place in _rows(path) if file is None else _parquet_rows(file):
            hashes.append(_hash(key))
            places.append(place)
            folders = folders or "/" in key
        sorting = np.argsort(np.asarray(hashes, np.uint64), kind="stable")
        columns = np.asarray(hashes, np.uint64)[sorting], np.asarray(places, np.uint64)[sorting]
        table = np.concatenate([stamp, np.array([folders], np.uint64), *columns])
        scratch = kept.with_name(f".{kept.name}.{os.getpid()}.npy")
        try:
            np.save(scratch, table)
            scratch.replace(kept)
        except OSError as error:
            raise ValueError(f"cannot write {kept}: {error.strerror}; copy the sidecar to a writable folder") from error
    table = np.load(kept, mmap_mode="r")
    rows = table[3:]
    return rows[: len(rows) // 2], rows[len(rows) // 2 :], bool(table[2])


def _rows(path: str) -> Iterator[tuple[str, int]]:
    start = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}, line {number}: not JSON in UTF-8; fix or remove the line") from error
                if not isinstance(row, dict) or not isinstance(row.get("key"), str):
                    example = '{"key": "0001", "caption": "a cat"}'
                    raise ValueError(f"{path}, line {number}: expected a row such as {example}")
                yield row["key"], start
            start += len(line)


def _parquet_rows(file: Any) -> Iterator[tuple[str, int]]:
    place = 0
    for batch in file.iter_batches(columns=["key"]):
        for key in batch.column(0).to_pylist():
            yield str(key), place
            place += 1
