"""Parquet files with encoded pictures in a column, as img2dataset, Hugging Face, polars and pandas write them.

A row group is a shard: all its rows are read at once, in the needed columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.dimensions import dimensions
from semantic_routing.data.sources.records import Record, Sharded, caption_fields
from semantic_routing.data.sources.row_groups import ERRORS, RowGroups, batches, open_parquet, pa
from semantic_routing.data.sources.scan import SIZE, Damage, ScanResult
from semantic_routing.data.sources.storage import shard_names

IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp", "image", "images", "img", "image_bytes", "bytes")
"""Names of the pictures' column; the first one in the file counts."""
CAPTION_COLUMNS = ("txt", "text", "caption", "captions", "prompt")
"""Names of columns that must hold captions."""
KEY_COLUMN = "key"


class ParquetRecords(Sharded):
    """Rows of Parquet files; a record's key is its file and its ``key`` column or, without one, its row number.

    Pictures are bytes, or Hugging Face's struct of ``bytes`` and ``path``. All columns of strings and lists of strings
    are captions.
    """

    def __init__(self, name: str, paths: Sequence[str], sizes: Sequence[Path] | None = None) -> None:
        """Read the files' footers.

        Args:
            name: Name for messages.
            paths: Absolute paths or URLs.
            sizes: For each file, the index's .npy file of dtype ``scan.SIZE``.

        Raises ValueError for a file that is not Parquet or has no column of pictures.
        """
        self._paths = tuple(paths)
        self._columns: list[tuple[str, list[str]]] = []  # of each file: pictures; keys and captions
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
        super().__init__(name, names, counts, sizes)
        self._row_groups = RowGroups()

    def keep(self, count: int) -> None:
        """Cache the last ``count`` row groups: as many as the order draws from."""
        self._row_groups = RowGroups(count)

    def read(self, index: int) -> Record:
        """Return a record by its index; see ``RecordSource.read``."""
        shard, row = self.locate(index)
        file, group, first = self._groups[shard]
        where = self.shard_name(shard)
        image, others = self._columns[file]
        key = f"{where}/{first + row}"
        table = self._row_groups.table(self._paths[file], group, [image, *others])
        if isinstance(table, str):
            raise BadData("unreadable", f"row group {group}: {table}", where, key)
        values: dict[str, Any] = {}
        for name, column in zip(table.column_names, table.columns, strict=True):
            try:
                values.setdefault(name, column[row].as_py())  # the first of several columns with one name
            except UnicodeDecodeError as error:
                raise BadData("bad captions", f"column {name!r} is not UTF-8", where, key) from error
        found = values.pop(image)
        if isinstance(own := values.pop(KEY_COLUMN, None), str):
            key = f"{where}/{own}"
        if isinstance(found, list) and len(found) > 1:
            raise BadData("several pictures", f"column {image!r} holds {len(found)}; give each a row", where, key)
        picture = picture_bytes(found)
        if picture is None:
            raise BadData("no picture", f"column {image!r} is null", where, key)
        if not picture:
            raise BadData("zero bytes", "the picture is empty", where, key)
        return Record(key, picture, caption_fields(values.items()))


def scan_parquet(path: str, *, look_inside: bool = False) -> ScanResult:
    """Count a file's rows from its footer; ``look_inside`` also reads the pictures, and reports damaged ones."""
    found = ScanResult(np.empty(0, SIZE))
    try:
        with open_parquet(path) as file:
            image, _ = _columns(path, file.schema_arrow)
            found.rows = np.zeros(file.metadata.num_rows, SIZE)
            first = 0
            for group in range(file.metadata.num_row_groups if look_inside else 0):
                for batch in batches(file, group, [image]):
                    for row, cell in enumerate(batch.column(0), first):
                        _look(found, row, cell.as_py())
                    first += len(batch)
    except ERRORS as error:
        found.report(Damage("unreadable", 0, b"", str(error)))
    return found


def _look(found: ScanResult, row: int, cell: Any) -> None:
    """Fill in a picture's dimensions, or report its damage."""
    picture = picture_bytes(cell)
    if isinstance(cell, list) and len(cell) > 1:
        found.report(Damage("several pictures", row, b"", f"{len(cell)} of them"))
    elif picture is None:
        found.report(Damage("no picture", row, b"", "null"))
    else:
        try:
            found.rows[row] = dimensions(picture)
        except BadData as error:
            found.report(Damage(error.reason, row, b"", error.detail))


def _columns(path: str, schema: Any) -> tuple[str, list[str]]:
    """Return the column of pictures, and the columns that may hold captions or the key."""
    image = picture_column(schema)
    if image is None:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"{path} has no column of pictures; name a column of bytes {', '.join(IMAGE_COLUMNS[:5])} ...; "
            f"its columns: {columns}"
        )
    others = [name for name in text_columns(schema) if name != image]
    named = next((field for field in schema if field.name in CAPTION_COLUMNS and field.name not in others), None)
    if named is not None and not pa.types.is_null(named.type) and not {*others} - {KEY_COLUMN}:
        raise ValueError(
            f"{path}: the column {named.name!r} is of the type {named.type}; write captions as strings or lists of "
            "strings"
        )
    return image, others


def picture_column(schema: Any) -> str | None:
    """Return the name of the column of pictures; None if a schema has no such column."""
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    return next((name for name in IMAGE_COLUMNS if name in pictures), None)


def text_columns(schema: Any) -> list[str]:
    """Return the names of the columns of strings and lists of strings."""
    return [field.name for field in schema if _holds_text(field.type)]


def _holds_pictures(kind: Any) -> bool:
    kind = _item(kind)
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return _is_bytes(kind)


def _holds_text(kind: Any) -> bool:
    kind = _item(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: Any) -> bool:
    kind, types = _plain(kind), pa.types
    checks = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return any(check(kind) for check in checks)


def _plain(kind: Any) -> Any:
    """Return the type of a column's values without extension types and dictionaries."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def _item(kind: Any) -> Any:
    """Return the type of a column's values; for lists of any kind, the type of their items."""
    kind, types = _plain(kind), pa.types
    lists = (
        *(types.is_list, types.is_large_list, types.is_fixed_size_list),
        *(types.is_list_view, types.is_large_list_view),
    )
    return _plain(kind.value_type) if any(check(kind) for check in lists) else kind


def picture_bytes(cell: Any) -> bytes | None:
    """Return the picture in a cell, or the first one of a list; None for null."""
    if isinstance(cell, list):
        cell = cell[0] if cell else None
    return cell.get("bytes") if isinstance(cell, dict) else cell
