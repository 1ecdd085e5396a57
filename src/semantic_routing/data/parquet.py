"""Parquet files with the pictures' bytes in a column, as img2dataset and Hugging Face write them.

A row group is a shard: it is read whole, with the columns that are needed, and the last few are kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from semantic_routing.data.dimensions import dimensions
from semantic_routing.data.files import Arrays, filesystem, is_url, shard_names
from semantic_routing.data.found import SIZE, Damage, Found
from semantic_routing.data.images import Unusable
from semantic_routing.data.records import DamagedRecord, Record, Sharded, caption_fields

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise ValueError('Parquet files need pyarrow: pip install "semantic-routing[data]"') from error

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "img", "image_bytes", "bytes")
"""Names of the pictures' column, the first that is there."""
KEY_COLUMN = "key"
KEPT = 2
"""Row groups kept in memory."""


class ParquetRecords(Sharded):
    """The rows of Parquet files; a record's key is its file and its ``key`` column or, without one, its row number.

    Pictures are bytes, or Hugging Face's struct of ``bytes`` and ``path``; captions are all columns of strings and
    lists of strings.
    """

    def __init__(self, name: str, paths: Sequence[str], sizes: Sequence[Path] | None = None) -> None:
        """Read the files' footers.

        Args:
            name: What messages call the source.
            paths: Absolute paths or URLs.
            sizes: For each file an array of dtype ``found.SIZE``, from the index.

        Raises ValueError for a file that is no Parquet or has no column of pictures.
        """
        self._paths = tuple(paths)
        self._columns: list[tuple[str, list[str]]] = []  # of each file: of the pictures, of keys and captions
        self._groups: list[tuple[int, int, int]] = []  # of each shard: file, row group, its first row in the file
        names, counts = [], []
        for number, (path, short) in enumerate(zip(paths, shard_names(paths), strict=True)):
            first = 0
            with open_parquet(path) as file:
                self._columns.append(_columns(path, file.schema_arrow))
                groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            for group, rows in enumerate(groups):
                self._groups.append((number, group, first))
                names.append(short)
                counts.append(rows)
                first += rows
        super().__init__(name, names, counts)
        self._sizes = None if sizes is None else Arrays(sizes)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def read(self, index: int) -> Record:
        """The record of that index; see ``RecordSource.read``."""
        shard, row = self.locate(index)
        file, group, first = self._groups[shard]
        where = self.shard_name(shard)
        image, others = self._columns[file]
        key = f"{where}/{first + row}"
        table = self._table(shard, self._paths[file], group, [image, *others])
        if isinstance(table, str):
            raise DamagedRecord("unreadable", where, key, f"row group {group}: {table}")
        values = {name: table.column(name)[row].as_py() for name in [image, *others]}
        found = values.pop(image)
        if isinstance(own := values.pop(KEY_COLUMN, None), str):
            key = f"{where}/{own}"
        picture = picture_bytes(found)
        if picture is None:
            raise DamagedRecord("no picture", where, key, f"column {image!r} is null")
        if not picture:
            raise DamagedRecord("zero bytes", where, key, "the picture is empty")
        return Record(key, picture, caption_fields(values.items()))

    def _table(self, shard: int, path: str, group: int, columns: list[str]) -> Any:
        """The table of a row group, or what is wrong with it."""
        with self._lock:  # threads that want the same row group shall not each read it
            table = self._kept.pop(shard, None)
            if table is None:
                try:
                    with open_parquet(path) as file:
                        table = file.read_row_group(group, columns=columns, use_threads=False)
                except (OSError, ValueError, pa.ArrowException) as error:
                    table = str(error)  # kept as well, or each of its records would be tried anew
            self._kept[shard] = table
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return table

    def dimensions(self) -> UInt32[np.ndarray, "N 2"] | None:
        """Width and height of every picture, 0 where they cannot be told; None where the index does not hold them."""
        if self._sizes is None:
            return None
        files = range(len(self._paths))
        return np.concatenate([np.stack([self._sizes[i]["width"], self._sizes[i]["height"]], axis=1) for i in files])


@contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A ``ParquetFile`` of a local file or a URL; ValueError where it is none."""
    storage, inner = filesystem(path) if is_url(path) else (None, path)
    with open(path, "rb") if storage is None else storage.open(inner, "rb") as stream:
        try:
            yield pq.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no whole Parquet file ({error}); take it out or write it again") from error


def scan_parquet(path: str, *, look_inside: bool = False) -> Found:
    """Count a file's rows from its footer; ``look_inside`` reads the pictures and reports what is none."""
    found = Found(np.empty(0, SIZE))
    try:
        with open_parquet(path) as file:
            image, _ = _columns(path, file.schema_arrow)
            found.rows = np.zeros(file.metadata.num_rows, SIZE)
            first = 0
            for group in range(file.metadata.num_row_groups if look_inside else 0):
                cells = file.read_row_group(group, columns=[image], use_threads=False).column(0)
                for row, cell in enumerate(cells, first):
                    _look(found, row, picture_bytes(cell.as_py()))
                first += len(cells)
    except (OSError, ValueError, pa.ArrowException) as error:
        found.report(Damage("unreadable", 0, b"", str(error)))
    return found


def _look(found: Found, row: int, picture: bytes | None) -> None:
    if picture is None:
        found.report(Damage("no picture", row, b"", "null"))
        return
    try:
        found.rows[row] = dimensions(picture)
    except Unusable as error:
        found.report(Damage(error.reason, row, b"", error.detail))


def _columns(path: str, schema: Any) -> tuple[str, list[str]]:
    """The column of pictures, and those that may hold captions or the key."""
    image = picture_column(schema)
    if image is None:
        raise ValueError(
            f"{path} has no column of pictures, which is of bytes and called {', '.join(IMAGE_COLUMNS[:5])} ...; "
            f"its columns: {', '.join(schema.names)}"
        )
    return image, text_columns(schema)


def picture_column(schema: Any) -> str | None:
    """The name of the column of pictures; None where a schema has none."""
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    return next((name for name in IMAGE_COLUMNS if name in pictures), None)


def text_columns(schema: Any) -> list[str]:
    """The names of the columns of strings and lists of strings."""
    return [field.name for field in schema if _holds_text(field.type)]


def _holds_pictures(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: Any) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def picture_bytes(value: Any) -> bytes | None:
    """What a cell of a pictures' column holds; None where it is null."""
    return value.get("bytes") if isinstance(value, dict) else value
