"""Manifests: tables of picture paths and captions, in JSON lines, JSON, CSV or Parquet."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from semantic_routing.common.errors import BadData
from semantic_routing.data.sources.folder import PictureFiles, scan_pictures
from semantic_routing.data.sources.manifest_rows import (
    EXAMPLE,
    MissingPicture,
    checked,
    find_manifest,
    picture_name,
    picture_path,
    rows,
)
from semantic_routing.data.sources.records import Record, caption_fields, parse_json
from semantic_routing.data.sources.scan import SIZE, Damage, ScanResult
from semantic_routing.data.sources.storage import absolute, is_folder


class ManifestRecords(PictureFiles):
    """Pictures and captions of a manifest: a JSONL file, a JSON file with a list, or a table (CSV, Parquet).

    A row is such as ``{"image": "cats/1.jpg", "text": "a cat"}`` or ``{"file_name": "2.png", "text": ["a dog", "a
    brown dog"]}``. Other strings and lists of strings are captions too, under their own names. A record's key is its
    image; further rows with the same image get ``#2`` and so on.
    """

    def __init__(
        self, manifest: str | Path, root: str | Path | None = None, *, name: str = "", sizes: Path | None = None
    ) -> None:
        """Read and check the complete manifest; local pictures must exist, but are not opened.

        Args:
            manifest: The manifest, or a folder that holds exactly one; a path or URL.
            root: Folder that relative paths of images start from; default: the manifest's folder.
            name: Name for messages; default: the manifest.
            sizes: The index's .npy file of dtype ``scan.SIZE``.

        Raises ValueError at the first bad row, naming file and line.
        """
        self.manifest = find_manifest(absolute(str(manifest)))
        self.root = _root(self.manifest, root)
        # A JSONL file may have millions of rows: keep their places, and read them again when needed.
        places = array("q")
        self._rows: list[dict[str, Any]] = []
        self._again: dict[int, int] = {}
        seen: Counter[str] = Counter()
        for number, (where, start, size, row) in enumerate(rows(self.manifest)):
            try:
                key = checked(row, self.root)
            except ValueError as error:
                raise ValueError(f"{self.manifest}, {where}: {error}") from None
            seen[key] += 1
            if seen[key] > 1:
                self._again[number] = seen[key]
            if size:
                places.extend((start, size))
            else:
                self._rows.append(row)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)
        count = len(self._rows) or len(self._places)
        if not count:
            raise ValueError(f"{self.manifest} is empty; add rows such as {EXAMPLE}")
        super().__init__(name or self.manifest, self.manifest.rsplit("/", 1)[-1], count, sizes)
        self.pictures = len(seen)
        """Number of different pictures."""

    def read(self, index: int) -> Record:
        """Return a record by its index; see ``RecordSource.read``."""
        try:
            row = self._row(index)
            name = row[picture_name(row)]
            path = picture_path(name, self.root)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            detail = "the manifest has changed since the run began"
            raise BadData("bad captions", detail, self.shard_name(0), f"{index}") from error
        key = name + (f"#{self._again[index]}" if index in self._again else "")
        captions = caption_fields(item for item in row.items() if item[0] != picture_name(row))
        return Record(key, self.picture(key, path), captions)

    def _row(self, index: int) -> dict[str, Any]:
        self.locate(index)
        if self._rows:
            return self._rows[index]
        start, size = self._places[index].tolist()
        return parse_json(self._reader.read(self.manifest, start, size))


def scan_manifest(path: str, *, look_inside: bool = False) -> ScanResult:
    """Check all rows of a manifest, reporting bad ones; ``look_inside`` also finds the pictures' dimensions."""
    found = ScanResult(np.empty(0, SIZE))
    root = _root(path, None)
    pictures = []
    try:
        for number, (_, _, _, row) in enumerate(rows(path), 1):
            try:
                pictures.append((number, picture_path(checked(row, root), root)))
            except MissingPicture as error:
                found.report(Damage("missing file", number, b"", str(error)))
            except ValueError as error:
                found.report(Damage("bad captions", number, b"", str(error)))
    except ValueError as error:  # the file itself is bad
        found.report(Damage("unreadable", 0, b"", str(error)))
    scan_pictures(found, pictures, look_inside)
    return found


def _root(manifest: str, root: str | Path | None) -> str:
    found = absolute(str(root)) if root is not None else manifest.rsplit("/", 1)[0] or "/"
    if not is_folder(found):
        raise ValueError(f"image root {found!r} is not a folder; give the one of the images")
    return found
