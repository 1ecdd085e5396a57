"""A user's own pictures: a folder and a manifest that gives each picture its captions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semantic_routing.data.images import load_square
from semantic_routing.data.order import Example

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


@dataclass(frozen=True)
class _Row:
    path: str
    captions: tuple[str, ...]


class ImageFolder:
    """Pictures named by a manifest: a JSONL file, or a JSON file with a list, of objects such as

    ``{"image": "cats/1.jpg", "text": "a cat"}`` or ``{"image": "2.png", "text": ["a dog", "a brown dog"]}``,

    where one of several texts is chosen anew in every epoch. Other keys are ignored.
    """

    def __init__(self, manifest: str | Path, root: str | Path | None = None, *, size: int) -> None:
        """Read and check the whole manifest; pictures must exist but are not opened yet.

        Args:
            manifest: The manifest, or a folder that holds exactly one of ``MANIFESTS``.
            root: Folder that the images' paths start from; the manifest's own by default.
            size: Side in pixels to which pictures are resized and cropped.

        Raises ValueError at the first row that is not as it should be, naming file and line.
        """
        if size < 1:
            raise ValueError(f"pictures of {size} pixels cannot be made; ask for a size of at least 1")
        self.size = size
        self.manifest = find_manifest(Path(manifest))
        self.root = Path(os.path.abspath(root if root is not None else self.manifest.parent))
        if not self.root.is_dir():
            raise ValueError(f"image root {str(self.root)!r} is not a folder; give the one of the images")
        self._rows: list[_Row] = []
        for where, record in _records(self.manifest):
            try:
                self._rows.append(_Row(_image(record, str(self.root)), _captions(record)))
            except ValueError as error:
                raise ValueError(f"{self.manifest}, {where}: {error}") from None
        if not self._rows:
            raise ValueError(f"{self.manifest} is empty; add rows such as {EXAMPLE}")

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self._rows)

    def load(self, sample: int, rng: np.random.Generator) -> Example:
        """The picture of one row, and one of its captions."""
        row = self._rows[sample]
        caption = row.captions[int(rng.random() * len(row.captions))]
        return Example(load_square(row.path, self.size), caption)

    def captions(self, count: int) -> list[str]:
        """The first caption of the first ``count`` pictures."""
        return [row.captions[0] for row in self._rows[:count]]


def find_manifest(path: Path) -> Path:
    """The manifest file that ``path`` is or, if it is a folder, holds."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} does not exist; give a manifest file or a folder that holds one")
    found = [path / name for name in MANIFESTS if (path / name).is_file()]
    if not found:
        raise ValueError(f"{str(path)!r} holds no manifest; write one of {', '.join(MANIFESTS)} into it")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{str(path)!r} holds several manifests ({names}); give the path of the one to use")
    return found[0]


def _records(manifest: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a manifest, with words for where it stands."""
    if manifest.suffix.lower() == ".json":
        rows = _parse(manifest.read_bytes(), str(manifest))
        if not isinstance(rows, list):
            raise ValueError(f"{manifest} holds {_kind(rows)}; expected a list of rows, or name it .jsonl")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    with manifest.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _parse(line, f"{manifest}, line {number}")


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if b"\n" in data.strip() else ""
        raise ValueError(f"{where}: not JSON at {place}column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; expected an object with image and text") from None


def _image(record: Any, root: str) -> str:
    """The absolute path of a row's picture, which lies under the root and exists."""
    if not isinstance(record, dict):
        raise ValueError(f"found {_kind(record)}; expected an object such as {EXAMPLE}")
    name = record.get("image")
    if not isinstance(name, str) or not name:
        raise ValueError(f'"image" is {_kind(name)}; expected the path of a picture')
    # os.path rather than pathlib: a manifest may have millions of rows.
    path = os.path.normpath(os.path.join(root, name))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"image {name!r} lies outside {root!r}; move it there or give a root that holds it")
    if not os.path.isfile(path):
        raise ValueError(f"image {name!r} is no file in {root!r}; correct the path or take the row out")
    return path


def _captions(record: dict[str, Any]) -> tuple[str, ...]:
    """A row's texts, at least one, each of them text that can be encoded."""
    text = record.get("text")
    texts = text if isinstance(text, list) else [text]
    if not texts:
        raise ValueError('"text" is an empty list; give at least one caption or take the row out')
    for caption in texts:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f'"text" is {_kind(caption)}; expected a caption or a list of captions')
        try:
            caption.encode()
        except UnicodeEncodeError:
            raise ValueError(f'"text" {caption!r} has half of a surrogate pair; correct the text') from None
    return tuple(texts)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "missing or null"
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]
