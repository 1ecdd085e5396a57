"""A user's own pictures: a folder and a manifest that gives each picture its captions, or files of text beside them."""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt32

from semantic_routing.data.dimensions import look
from semantic_routing.data.files import (
    Arrays,
    Reader,
    absolute,
    files_below,
    is_file,
    is_folder,
    is_url,
    read_all,
    stat,
)
from semantic_routing.data.found import SIZE, Damage, Found
from semantic_routing.data.images import Unusable
from semantic_routing.data.records import DamagedRecord, Record, Sharded, caption_fields, captions_of, parse_json, texts

MANIFESTS = (
    "metadata.jsonl",
    "manifest.jsonl",
    "captions.jsonl",
    "metadata.json",
    "manifest.json",
    "captions.json",
)
"""Names under which a folder's manifest is found."""
EXAMPLE = '{"image": "1.jpg", "text": "a cat"}'
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
"""Endings of the pictures of a folder without a manifest."""
BESIDE = (".txt", ".json")
"""Endings of the files of captions beside them."""


class PictureFiles(Sharded):
    """Pictures that are files of their own, in one shard."""

    def __init__(self, name: str, shard: str, count: int, sizes: Path | None = None) -> None:
        super().__init__(name, [shard], [count])
        self._sizes = None if sizes is None else Arrays([sizes])
        self._reader = Reader()

    def picture(self, key: str, path: str) -> bytes:
        """The bytes of a file; DamagedRecord where there are none."""
        try:
            image = self._reader.read(path, 0, stat(path).size)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedRecord("missing file", self.shard_name(0), key, path) from error
        except OSError as error:
            raise DamagedRecord("unreadable", self.shard_name(0), key, str(error)) from error
        if not image:
            raise DamagedRecord("zero bytes", self.shard_name(0), key, path)
        return image

    def dimensions(self) -> UInt32[np.ndarray, "N 2"] | None:
        """Width and height of every picture, 0 where they cannot be told; None where the index does not hold them."""
        if self._sizes is None:
            return None
        return np.stack([self._sizes[0]["width"], self._sizes[0]["height"]], axis=1)


class ManifestRecords(PictureFiles):
    """Pictures named by a manifest: a JSONL file, or a JSON file with a list, of objects such as

    ``{"image": "cats/1.jpg", "text": "a cat"}`` or ``{"image": "2.png", "text": ["a dog", "a brown dog"]}``.
    Other strings and lists of strings are captions as well, under their own names. A record's key is its image, with
    ``#2`` and so on where rows name the same one again.
    """

    def __init__(
        self, manifest: str | Path, root: str | Path | None = None, *, name: str = "", sizes: Path | None = None
    ) -> None:
        """Read and check the whole manifest; local pictures must exist but are not opened yet.

        Args:
            manifest: The manifest, or a folder that holds exactly one of ``MANIFESTS``; a path or URL.
            root: Folder that the images' paths start from; the manifest's own by default.
            name: What messages call the source; the manifest by default.
            sizes: Array of dtype ``found.SIZE``, from the index.

        Raises ValueError at the first row that is not as it should be, naming file and line.
        """
        self.manifest = find_manifest(str(manifest))
        self.root = _root(self.manifest, root)
        # The rows of a JSONL file, of which there may be millions, are read again when they are asked for.
        places = array("q")
        self._rows: list[dict[str, Any]] = []
        self._again: dict[int, int] = {}
        seen: Counter[str] = Counter()
        for number, (where, start, size, row) in enumerate(_rows(self.manifest)):
            try:
                key = _checked(row, self.root)
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

    def read(self, index: int) -> Record:
        """The record of that index; see ``RecordSource.read``."""
        try:
            row = self.row(index)
            path = _path(row["image"], self.root)
        except (OSError, ValueError, TypeError, KeyError) as error:
            detail = "the manifest is not what it was when the run began"
            raise DamagedRecord("bad captions", self.shard_name(0), f"{index}", detail) from error
        key = row["image"] + (f"#{self._again[index]}" if index in self._again else "")
        captions = caption_fields((name, value) for name, value in row.items() if name != "image")
        return Record(key, self.picture(key, path), captions)

    def row(self, index: int) -> dict[str, Any]:
        """A row of the manifest."""
        self.locate(index)
        if self._rows:
            return self._rows[index]
        start, size = self._places[index].tolist()
        return parse_json(self._reader.read(self.manifest, start, size))


class FolderRecords(PictureFiles):
    """The pictures below a folder, with their captions in .txt and .json files of the same name, if there are any.

    A record's key is its path inside the folder.
    """

    def __init__(self, folder: str | Path, *, name: str = "", sizes: Path | None = None) -> None:
        """List the folder; ``name`` and ``sizes`` as for ``ManifestRecords``.

        Raises ValueError where there are no pictures.
        """
        self.folder = absolute(str(folder))
        self._paths, self._captioned = _listing(self.folder)
        if not self._paths:
            raise ValueError(f"{self.folder!r} holds no pictures ({', '.join(PICTURES)})")
        super().__init__(name or self.folder, self.folder.rsplit("/", 1)[-1], len(self._paths), sizes)

    def read(self, index: int) -> Record:
        """The record of that index; see ``RecordSource.read``."""
        self.locate(index)
        path = self._paths[index]
        key = path[len(self.folder) :].lstrip("/")
        image = self.picture(key, path)
        stem = path.rpartition(".")[0]
        try:
            text, extra = (
                read_all(stem + ending) if beside else b""
                for ending, beside in zip(BESIDE, self._captioned[index], strict=True)
            )
            return Record(key, image, captions_of(text, extra))
        except (OSError, ValueError) as error:
            raise DamagedRecord("bad captions", self.shard_name(0), key, str(error)) from error


def find_manifest(path: str) -> str:
    """The manifest file that ``path`` is or, if it is a folder, holds; ValueError where there is not exactly one."""
    path = absolute(path)
    if not is_folder(path):
        if not is_file(path):
            raise ValueError(f"{path!r} does not exist; give a manifest file or a folder that holds one")
        return path
    found = manifests_in(path)
    if not found:
        raise ValueError(f"{path!r} holds no manifest; write one of {', '.join(MANIFESTS)} into it")
    if len(found) > 1:
        raise ValueError(f"{path!r} holds several manifests ({', '.join(found)}); give the path of the one to use")
    return f"{path.rstrip('/')}/{found[0]}"


def manifests_in(folder: str) -> list[str]:
    """Which of ``MANIFESTS`` a folder holds."""
    return [name for name in MANIFESTS if is_file(f"{folder.rstrip('/')}/{name}")]


def scan_manifest(path: str, *, look_inside: bool = False) -> Found:
    """Check all rows of a manifest, reporting bad ones; ``look_inside`` also finds the pictures' dimensions."""
    found = Found(np.empty(0, SIZE))
    root = _root(path, None)
    pictures = []
    try:
        for number, (_, _, _, row) in enumerate(_rows(path), 1):
            try:
                pictures.append((number, _path(_checked(row, root), root)))
            except MissingPicture as error:
                found.report(Damage("missing file", number, b"", str(error)))
            except ValueError as error:
                found.report(Damage("bad captions", number, b"", str(error)))
    except ValueError as error:  # no JSON at all
        found.report(Damage("unreadable", 0, b"", str(error)))
    _look(found, pictures, look_inside)
    return found


def scan_folder(path: str, *, look_inside: bool = False) -> Found:
    """Count the pictures of a folder; ``look_inside`` also finds their dimensions."""
    found = Found(np.empty(0, SIZE))
    _look(found, list(enumerate(_listing(path)[0], 1)), look_inside)
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
        except Unusable as error:
            found.report(Damage(error.reason, number, path.encode(), error.detail))
        except OSError as error:
            found.report(Damage("unreadable", number, path.encode(), str(error)))


def _listing(folder: str) -> tuple[list[str], Bool[np.ndarray, "N 2"]]:
    """The pictures below a folder, and which of the files of ``BESIDE`` each of them has."""
    files = files_below(folder, (*PICTURES, *BESIDE))
    pictures = [path for path in files if path.lower().endswith(PICTURES)]
    others = {path for path in files if path.endswith(BESIDE)}
    captioned = [[path.rpartition(".")[0] + ending in others for ending in BESIDE] for path in pictures]
    return pictures, np.array(captioned, dtype=bool).reshape(-1, 2)


def _root(manifest: str, root: str | Path | None) -> str:
    found = absolute(str(root)) if root is not None else manifest.rsplit("/", 1)[0] or "/"
    if not is_folder(found):
        raise ValueError(f"image root {found!r} is not a folder; give the one of the images")
    return found


def _rows(manifest: str) -> Iterator[tuple[str, int, int, Any]]:
    """Each row of a manifest: words for where it stands, its place in a JSONL file in bytes (0 of 0 elsewhere) and
    what it holds, which is a ValueError where it is no JSON."""
    if manifest.lower().endswith(".json"):
        try:
            rows = parse_json(read_all(manifest))
        except ValueError as error:
            raise ValueError(f"{manifest}: {error}") from None
        if not isinstance(rows, list):
            raise ValueError(f"{manifest} holds {_kind(rows)}; expected a list of rows, or name it .jsonl")
        yield from ((f"row {number}", 0, 0, row) for number, row in enumerate(rows, 1))
        return
    start = 0
    with BytesIO(read_all(manifest)) if is_url(manifest) else open(manifest, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", start, len(line), parse_json(line)
                except ValueError as error:
                    yield f"line {number}", start, len(line), error
            start += len(line)


class MissingPicture(ValueError):
    """A manifest names a picture that is not there."""


def _checked(row: Any, root: str) -> str:
    """The name of a row's picture, when the row is as it should be."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"found {_kind(row)}; expected an object such as {EXAMPLE}")
    name = row.get("image")
    if not isinstance(name, str) or not name:
        raise ValueError(f'"image" is {_kind(name)}; expected the path of a picture')
    _check_text(row.get("text"))
    path = _path(name, root)
    if not is_url(path) and not os.path.isfile(path):  # at a URL it would take too long
        raise MissingPicture(f"image {name!r} is no file in {root!r}; correct the path or take the row out")
    return name


def _path(name: str, root: str) -> str:
    """Where a row's picture is: under the root."""
    if is_url(root):
        inner = os.path.normpath(name)
        if inner.startswith(("/", "..")) or inner == "." or is_url(name):
            raise ValueError(f"image {name!r} lies outside {root!r}; move it there or give a root that holds it")
        return f"{root.rstrip('/')}/{inner}"
    # os.path rather than pathlib: a manifest may have millions of rows.
    path = os.path.normpath(os.path.join(root, name))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"image {name!r} lies outside {root!r}; move it there or give a root that holds it")
    return path


def _check_text(text: Any) -> None:
    """Raise where a row's texts are not at least one, each of them text that can be encoded."""
    given = text if isinstance(text, list) else [text]
    if not given:
        raise ValueError('"text" is an empty list; give at least one caption or take the row out')
    for caption in given:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f'"text" is {_kind(caption)}; expected a caption or a list of captions')
        if not texts(caption):
            raise ValueError(f'"text" {caption!r} has half of a surrogate pair; correct the text')


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing or null"
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]
