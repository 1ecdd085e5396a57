"""Reads and checks the rows of manifests: JSONL, JSON, CSV, or Parquet without pictures.

A row names a picture and its captions: ``{"image": "1.jpg", "text": "a cat"}``. Hugging Face's ``file_name`` may
replace ``image``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from io import BytesIO, StringIO
from typing import Any

from semantic_routing.data.sources.records import caption_fields, parse_json, texts
from semantic_routing.data.sources.storage import is_file, is_folder, is_url, read_all

MANIFESTS = (
    "metadata.jsonl",
    "manifest.jsonl",
    "captions.jsonl",
    "metadata.json",
    "manifest.json",
    "captions.json",
)
"""File names of a folder's manifest, whatever else the folder holds."""
TABLES = ("metadata.csv", "metadata.tsv", "metadata.parquet")
"""Further file names, for folders without captions next to the pictures."""
NAMES = ("image", "file_name", "image_path", "filename")
"""Fields that name the picture; a row's first one counts."""
EXAMPLE = '{"image": "1.jpg", "text": "a cat"}'


class MissingPicture(ValueError):
    """A manifest names a picture that does not exist."""


def manifests_in(folder: str, names: tuple[str, ...] = MANIFESTS) -> list[str]:
    """Return the names of the manifests in a folder."""
    return [name for name in names if is_file(f"{folder.rstrip('/')}/{name}")]


def find_manifest(path: str) -> str:
    """Return the manifest file at ``path``, or the only one in that folder; ValueError unless there is exactly one."""
    if not is_folder(path):
        if not is_file(path):
            raise ValueError(f"{path!r} does not exist; give a manifest file or a folder that holds one")
        return path
    found = manifests_in(path) or manifests_in(path, TABLES)
    if not found:
        raise ValueError(f"{path!r} holds no manifest; write one of {', '.join(MANIFESTS)} into it")
    if len(found) > 1:
        raise ValueError(f"{path!r} holds several manifests ({', '.join(found)}); give the path of the one to use")
    return f"{path.rstrip('/')}/{found[0]}"


def rows(manifest: str) -> Iterator[tuple[str, int, int, Any]]:
    """Yield each row of a manifest as (name of its place, start, size, value).

    Start and size are in bytes in a JSONL file, and 0 in other files. The value of a line that is not JSON is a
    ValueError.
    """
    ending = manifest[manifest.rfind(".") :].lower()
    if ending == ".json":
        yield from _listed(manifest)
    elif ending in (".csv", ".tsv"):
        yield from _cells(manifest)
    elif ending == ".parquet":
        yield from _table(manifest)
    else:
        yield from _lines(manifest)


def _lines(manifest: str) -> Iterator[tuple[str, int, int, Any]]:
    start = 0
    with BytesIO(read_all(manifest)) if is_url(manifest) else open(manifest, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield f"line {number}", start, len(line), parse_json(line)
                except ValueError as error:
                    yield f"line {number}", start, len(line), error
            start += len(line)


def _listed(manifest: str) -> Iterator[tuple[str, int, int, Any]]:
    try:
        found = parse_json(read_all(manifest))
    except ValueError as error:
        raise ValueError(f"{manifest}: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f"{manifest} holds {_kind(found)}; expected a list of rows, or name it .jsonl")
    yield from ((f"row {number}", 0, 0, row) for number, row in enumerate(found, 1))


def _cells(manifest: str) -> Iterator[tuple[str, int, int, Any]]:
    """Yield the rows of a CSV file with a header line, separated by commas, semicolons or tabs."""
    try:
        text = read_all(manifest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{manifest}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    header = text.partition("\n")[0]
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        for row in reader:
            yield f"line {reader.line_num}", 0, 0, {name: cell for name, cell in row.items() if name is not None}
    except csv.Error as error:
        raise ValueError(f"{manifest}, line {reader.line_num}: {error}; write the table again") from error


def _table(manifest: str) -> Iterator[tuple[str, int, int, Any]]:
    from semantic_routing.data.sources.parquet import text_columns
    from semantic_routing.data.sources.row_groups import open_parquet

    with open_parquet(manifest) as file:
        batches = file.iter_batches(columns=text_columns(file.schema_arrow), use_threads=False)
        found = (row for batch in batches for row in batch.to_pylist())
        yield from ((f"row {number}", 0, 0, row) for number, row in enumerate(found, 1))


def picture_name(row: Any) -> str:
    """Return the field that names a row's picture; ``NAMES[0]`` if no field does."""
    return next((name for name in NAMES if isinstance(row.get(name), str)), NAMES[0])


def checked(row: Any, root: str) -> str:
    """Check a row and return its picture's name; ValueError for a bad row."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"found {_kind(row)}; expected an object such as {EXAMPLE}")
    field = picture_name(row)
    name = row.get(field)
    if not isinstance(name, str) or not name:
        there = f"; the fields: {', '.join(map(str, row))}" if row else ""
        raise ValueError(f'"{field}" is {_kind(name)}; expected the path of a picture, here or in "file_name"{there}')
    if row.get("text") is not None or not caption_fields(item for item in row.items() if item[0] != field):
        _check_text(row.get("text"))
    path = picture_path(name, root)
    if not is_url(path) and not os.path.isfile(path):  # asking for every URL takes too long
        raise MissingPicture(f"{field} {name!r} is not a file in {root!r}; correct the path or take the row out")
    return name


def picture_path(name: str, root: str) -> str:
    """Return the path of a row's picture: below the root or, on this machine, an absolute path."""
    if is_url(root):
        inner = os.path.normpath(name)
        if inner.startswith(("/", "..")) or inner == "." or is_url(name):
            raise ValueError(f"image {name!r} is outside {root!r}; move it there, or give a manifest above both")
        return f"{root.rstrip('/')}/{inner}"
    if is_url(name):
        raise ValueError(f"image {name!r} is outside {root!r}; download it: pictures are not fetched one by one")
    # os.path is faster than pathlib: a manifest may have millions of rows.
    path = os.path.normpath(os.path.join(root, name))
    if not os.path.isabs(name) and not path.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f"image {name!r} is outside {root!r}; write its absolute path ({path}) or move it there")
    return path


def _check_text(text: Any) -> None:
    """Raise ValueError unless ``text`` holds at least one caption, and all of them can be encoded."""
    given = text if isinstance(text, list) else [text]
    if not given:
        raise ValueError('"text" is an empty list; give at least one caption or take the row out')
    for caption in given:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f'"text" is {_kind(caption)}; expected a caption or a list of captions')
        if not texts(caption):
            raise ValueError(f'"text" {caption!r} has half of a surrogate pair; correct the text')


def _kind(value: Any) -> str:
    """Name the kind of a JSON value."""
    if value is None:
        return "missing or null"
    if isinstance(value, str):
        return "text" if value.strip() else "empty text"
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names[type(value)]
