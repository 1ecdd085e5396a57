"""A user's own pictures: a folder and a manifest that gives each picture its captions, or files of text beside them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt16, UInt32

from semantic_routing.common.errors import BadData
from semantic_routing.common.images.dimensions import look
from semantic_routing.common.images.formats import picture_endings
from semantic_routing.data.sources.records import (
    Record,
    Sharded,
    captions_of,
)
from semantic_routing.data.sources.scan import SIZE, Damage, Found
from semantic_routing.data.sources.splits import without_other_splits
from semantic_routing.data.sources.storage import Arrays, Reader, absolute, everything_below, read_all, stat

BESIDE = (".txt", ".json", ".caption")
"""Endings of the files of captions beside pictures, in any case; ``.caption`` is kohya's."""


class PictureFiles(Sharded):
    """Pictures that are files of their own, in one shard."""

    def __init__(self, name: str, shard: str, count: int, sizes: Path | None = None) -> None:
        super().__init__(name, [shard], [count])
        self._sizes = None if sizes is None else Arrays([sizes])
        self._reader = Reader()

    def picture(self, key: str, path: str) -> bytes:
        """The bytes of a file; BadData where there are none."""
        try:
            image = self._reader.read(path, 0, stat(path).size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BadData("missing file", path, self.shard_name(0), key) from error
        except OSError as error:
            raise BadData("unreadable", str(error), self.shard_name(0), key) from error
        if not image:
            raise BadData("zero bytes", path, self.shard_name(0), key)
        return image

    def dimensions(self) -> UInt32[np.ndarray, "N 2"] | None:
        """Width and height of every picture, 0 where they cannot be told; None where the index does not hold them."""
        if self._sizes is None:
            return None
        return np.stack([self._sizes[0]["width"], self._sizes[0]["height"]], axis=1)


class FolderRecords(PictureFiles):
    """The pictures below a folder, with their captions in files beside them (``BESIDE``), if there are any.

    A record's key is its path inside the folder.
    """

    def __init__(self, folder: str | Path, *, name: str = "", sizes: Path | None = None) -> None:
        """List the folder; ``name`` and ``sizes`` as for ``ManifestRecords``.

        Raises ValueError where there are no pictures.
        """
        self.folder = absolute(str(folder))
        found = list_pictures(self.folder)
        if not found.pictures:
            raise ValueError(f"{self.folder!r} holds no pictures ({', '.join(picture_endings())})")
        self._paths, self._beside, self._endings = found.pictures, found.beside, found.endings
        super().__init__(name or self.folder, self.folder.rsplit("/", 1)[-1], len(self._paths), sizes)
        self.damaged = dict(Counter(damage.reason for damage in found.damages()))

    def read(self, index: int) -> Record:
        """The record of that index; see ``RecordSource.read``."""
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
    """The pictures below a folder, and what lies beside them."""

    pictures: list[str]
    sizes: list[int]
    """In bytes; -1 for a link to nothing."""
    beside: UInt16[np.ndarray, "N 3"]
    """Of each picture's files of captions, which of ``endings`` follows the picture's name without its own."""
    endings: list[str]
    """Begins with nothing, for where there is none."""
    empty: set[str]
    """Files of captions of zero length."""

    def damages(self) -> Iterator[Damage]:
        """What can be said of the records without reading them."""
        each = zip(self.pictures, self.sizes, self.beside.tolist(), strict=True)
        for number, (path, size, beside) in enumerate(each, 1):
            if size < 1:
                yield Damage("missing file" if size else "zero bytes", number, os.fsencode(path), path)
            stem = path.rpartition(".")[0]
            if all(not found or stem + self.endings[found] in self.empty for found in beside):
                detail = f"no file of captions beside it ({', '.join(BESIDE)})"
                yield Damage("no caption", number, os.fsencode(path), detail)


def list_pictures(folder: str, files: Sequence[tuple[str, int]] | None = None) -> Listing:
    """List a folder; ``files`` may give what is below it, with sizes."""
    sizes = {path: size for path, size in files or everything_below(folder) if not is_hidden(path)}
    kept, _ = without_other_splits(folder, sizes)
    pictures = [path for path in kept if path.lower().endswith(picture_endings())]
    captions = [path for path in kept if path.lower().endswith(BESIDE)]
    # Sorted, capitals come first, so that of 1.TXT and 1.txt the latter stays.
    there = {path[: path.rfind(".")] + path[path.rfind(".") :].lower(): path[path.rfind(".") :] for path in captions}
    numbers = {"": 0}
    beside = []
    for path in pictures:
        stem, _, own = path.rpartition(".")
        found = [there.get(stem + ending, "") for ending in BESIDE]
        if not any(found):  # then 1.jpg.txt will do
            found = [f".{own}{there[path + ending]}" if path + ending in there else "" for ending in BESIDE]
        beside += [numbers.setdefault(ending, len(numbers)) for ending in found]
    table = np.array(beside, np.uint16).reshape(-1, len(BESIDE))
    empty = {path for path in captions if not sizes[path]}
    return Listing(pictures, [sizes[path] for path in pictures], table, list(numbers), empty)


def is_hidden(path: str) -> bool:
    """Whether a file is hidden by its name, as those are that macOS puts beside others (``._1.jpg``)."""
    return path.rsplit("/", 1)[-1].startswith(".")


def scan_folder(path: str, *, look_inside: bool = False) -> Found:
    """Count the pictures of a folder; ``look_inside`` also finds their dimensions."""
    found = Found(np.empty(0, SIZE))
    listing = list_pictures(path)
    for damage in listing.damages():
        if not look_inside or damage.reason == "no caption":  # the others are seen again from inside
            found.report(damage)
    _look(found, list(enumerate(listing.pictures, 1)), look_inside)
    return found


def _look(found: Found, pictures: Sequence[tuple[int, str]], look_inside: bool) -> None:
    """A row for each picture (number, path)."""
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
