"""Folders of picture files, with captions in files next to them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt16

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.dimensions import look
from semantic_routing.common.images.formats import picture_endings
from semantic_routing.data.sources.records import (
    Record,
    Sharded,
    captions_of,
)
from semantic_routing.data.sources.scan import SIZE, Damage, ScanResult
from semantic_routing.data.sources.splits import without_other_splits
from semantic_routing.data.sources.storage import Reader, absolute, everything_below, read_all, stat

BESIDE = (".txt", ".json", ".caption")
"""Endings of caption files next to pictures, in upper or lower case; ``.caption`` is kohya's."""


class PictureFiles(Sharded):
    """Base of sources whose pictures are separate files, in one shard."""

    def __init__(self, name: str, shard: str, count: int, sizes: Path | None = None) -> None:
        super().__init__(name, [shard], [count], None if sizes is None else [sizes])
        self._reader = Reader()

    def picture(self, key: str, path: str) -> bytes:
        """Read a picture's file; BadData if it is missing, unreadable or empty."""
        try:
            image = self._reader.read(path, 0, stat(path).size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadData("missing file", path, self.shard_name(0), key) from error
        except OSError as error:
            raise BadData("unreadable", str(error), self.shard_name(0), key) from error
        if not image:
            raise BadData("zero bytes", path, self.shard_name(0), key)
        return image


class FolderRecords(PictureFiles):
    """Pictures below a folder, with any captions in files next to them (``BESIDE``).

    A record's key is its path inside the folder.
    """

    def __init__(self, folder: str | Path, *, name: str = "", sizes: Path | None = None) -> None:
        """List the folder; ``name`` and ``sizes`` as for ``ManifestRecords``.

        Raises ValueError for a folder without pictures.
        """
        self.folder = absolute(str(folder))
        found = list_pictures(self.folder)
        if not found.pictures:
            raise ValueError(f"{self.folder!r} holds no pictures ({', '.join(picture_endings())})")
        self._paths, self._beside, self._endings = found.pictures, found.beside, found.endings
        super().__init__(name or self.folder, self.folder.rsplit("/", 1)[-1], len(self._paths), sizes)
        self.damaged = dict(Counter(damage.reason for damage in found.damages()))

    def read(self, index: int) -> Record:
        """Return a record by its index; see ``RecordSource.read``."""
        self.locate(index)
        path = self._paths[index]
        key = path[len(self.folder) :].lstrip("/")
        image = self.picture(key, path)
        stem = path.rpartition(".")[0]
        endings = [self._endings[number] for number in self._beside[index].tolist()]
        try:
            captions = captions_of(*(read_all(stem + ending) if ending else b"" for ending in endings))
            return Record(key, image, captions)
        except (OSError, ValueError) as error:
            raise BadData("bad captions", str(error), self.shard_name(0), key) from error


@dataclass(frozen=True)
class Listing:
    """Pictures below a folder, and the caption files next to them."""

    pictures: list[str]
    sizes: list[int]
    """Bytes of each picture; -1 for a broken link."""
    beside: UInt16[np.ndarray, "N 3"]
    """For each picture and kind of caption file (``BESIDE``), the index in ``endings`` of that file's ending."""
    endings: list[str]
    """Endings of caption files, after the picture's name without its own; the first, "", means no file."""
    empty: set[str]
    """Caption files of zero length."""

    def damages(self) -> Iterator[Damage]:
        """Yield the damage that shows without reading the files."""
        each = zip(self.pictures, self.sizes, self.beside.tolist(), strict=True)
        for number, (path, size, beside) in enumerate(each, 1):
            if size < 1:
                yield Damage("missing file" if size else "zero bytes", number, os.fsencode(path), path)
            stem = path.rpartition(".")[0]
            if all(not found or stem + self.endings[found] in self.empty for found in beside):
                detail = f"no file of captions beside it ({', '.join(BESIDE)})"
                yield Damage("no caption", number, os.fsencode(path), detail)


def list_pictures(folder: str, files: Sequence[tuple[str, int]] | None = None) -> Listing:
    """List the pictures below a folder; ``files`` may give the files below it, with their sizes."""
    sizes = {path: size for path, size in files or everything_below(folder) if not is_hidden(path)}
    kept, _ = without_other_splits(folder, sizes)
    pictures = [path for path in kept if path.lower().endswith(picture_endings())]
    captions = [path for path in kept if path.lower().endswith(BESIDE)]
    # Capitals sort first, so that 1.txt wins over 1.TXT.
    there = {path[: path.rfind(".")] + path[path.rfind(".") :].lower(): path[path.rfind(".") :] for path in captions}
    numbers = {"": 0}
    beside = []
    for path in pictures:
        stem, _, own = path.rpartition(".")
        found = [there.get(stem + ending, "") for ending in BESIDE]
        if not any(found):  # fall back to 1.jpg.txt
            found = [f".{own}{there[path + ending]}" if path + ending in there else "" for ending in BESIDE]
        beside += [numbers.setdefault(ending, len(numbers)) for ending in found]
    table = np.array(beside, np.uint16).reshape(-1, len(BESIDE))
    empty = {path for path in captions if not sizes[path]}
    return Listing(pictures, [sizes[path] for path in pictures], table, list(numbers), empty)


def is_hidden(path: str) -> bool:
    """Tell whether a file's name hides it, like the ``._1.jpg`` that macOS adds."""
    return path.rsplit("/", 1)[-1].startswith(".")


def scan_folder(path: str, *, look_inside: bool = False) -> ScanResult:
    """Count the pictures of a folder; ``look_inside`` also finds their dimensions."""
    found = ScanResult(np.empty(0, SIZE))
    listing = list_pictures(path)
    for damage in listing.damages():
        if not look_inside or damage.reason == "no caption":  # looking inside finds the others again
            found.report(damage)
    scan_pictures(found, list(enumerate(listing.pictures, 1)), look_inside)
    return found


def scan_pictures(found: ScanResult, pictures: Sequence[tuple[int, str]], look_inside: bool) -> None:
    """Add a row for each picture (number, path); ``look_inside`` fills in its dimensions."""
    reader = Reader()
    found.rows = np.zeros(len(pictures), SIZE)
    for row, (number, path) in zip(found.rows, pictures if look_inside else (), strict=look_inside):

        def head(count: int, path: str = path) -> bytes:
            return reader.read(path, 0, count)

        try:
            row["width"], row["height"] = look(head, stat(path).size)
        except BadData as error:
            found.report(Damage(error.reason, number, os.fsencode(path), error.detail))
        except OSError as error:
            found.report(Damage("unreadable", number, os.fsencode(path), str(error)))
