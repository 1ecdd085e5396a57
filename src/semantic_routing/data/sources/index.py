"""Opens data by its path, with an index if there is one, which saves scanning the shards.

An index is a folder. Its ``index.json`` lists the files of data with their sizes and versions. A .npy file for each of
them has one row for each record, and is mapped into memory. Nothing in it is pickled.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from semantic_routing.common.config import from_dict
from semantic_routing.common.files import read_json
from semantic_routing.data.sources.discover import (
    FOLDER,
    MANIFEST,
    PARQUET,
    TAR,
    UNNAMED,
    Data,
    describe,
    discover,
    refuse_world,
)
from semantic_routing.data.sources.records import RecordSource, Sharded
from semantic_routing.data.sources.scan import SIZE, ScanResult
from semantic_routing.data.sources.storage import Stored, absolute, is_url, stat
from semantic_routing.data.sources.webdataset import ROW, TarRecords, scan_tar

INDEX = "index.json"
DEFAULT = ".semroute-index"
"""Default folder of an index, inside the data's folder."""
FORMAT = "semantic-routing index 1"
MANY = 16
"""Number of shards from which a missing index gives a warning."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of data at the time of its scan."""

    path: str
    """Absolute path or URL."""
    kind: str
    """tar, parquet, manifest, or folder for a folder of pictures without a manifest."""
    size: int
    version: str
    """See ``storage.Stored``."""
    records: int
    rows: str
    """Name of the .npy file with a row for each record."""
    dimensions: bool
    """Whether the rows hold the pictures' dimensions."""
    damaged: dict[str, int]
    """Counts of damage, by reason."""
    examples: tuple[dict[str, str | int], ...] = ()
    """The first few damaged records of each reason; not in ``index.json``."""


class Index:
    """The list of an index's files."""

    def __init__(self, folder: Path) -> None:
        """Read the list; ValueError if it is missing or damaged."""
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            raise ValueError(f"{folder} holds no index; write one: semroute data index PATHS --out {folder}")
        try:
            found = read_json(path, "an index")
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            entries = [from_dict(Entry, entry) for entry in found["entries"]]
            self.left_out: dict[str, int] = dict(found.get("left_out", {}))
            home = str(found.get("folder", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"the index {folder} is damaged: {error}; run semroute data index again") from error
        now = os.path.abspath(folder)
        self.moved = home not in ("", now)
        """Whether the index's folder was moved; its data may have moved with it."""
        places = [_moved(entry.path, home, now) if self.moved else entry.path for entry in entries]
        self.entries = {place: replace(entry, path=place) for place, entry in zip(places, entries, strict=True)}
        self._scanned_as = {place: entry.path for place, entry in zip(places, entries, strict=True)}

    def check(self, kind: str, paths: Sequence[str]) -> list[Entry]:
        """Return the entries of files; ValueError if one is missing, or the file has changed since its scan."""
        again = f"run: semroute data index --out {self.folder} with all paths"
        missing = [path for path in paths if path not in self.entries]
        if missing:
            raise ValueError(f"the index {self.folder} lacks {missing[0]} ({len(missing)} in all); {again}")
        with ThreadPoolExecutor(16) as pool:  # each URL is a request
            states = list(pool.map(lambda path: state(kind, path, self._scanned_as[path]), paths))
        entries = [self.entries[path] for path in paths]
        for entry, now in zip(entries, states, strict=True):
            if (entry.size, entry.version) != (now.size, now.version):
                raise ValueError(f"{entry.path} has changed since the index {self.folder} was made; {again}")
            if not has_rows(self.folder, entry):
                raise ValueError(f"{self.folder / entry.rows} is missing or damaged; {again}")
        return entries


def _moved(path: str, home: str, now: str) -> str:
    """Return a file's place after its index moved from ``home`` to ``now``: the same relative path, if it exists."""
    if is_url(path):
        return path
    place = os.path.normpath(os.path.join(now, os.path.relpath(path, home)))
    return place if os.path.exists(place) else path


def has_rows(folder: Path, entry: Entry) -> bool:
    """Tell whether an entry's .npy file holds all its rows."""
    try:
        rows = np.load(folder / entry.rows, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return rows.shape == (entry.records,) and rows.dtype == (ROW if entry.kind == TAR else SIZE)


def state(kind: str, path: str, scanned_as: str = "") -> Stored:
    """Return a file's size and version; a folder of pictures gets a version of all its pictures.

    ``scanned_as`` is the folder's path at its scan, if it has moved since.
    """
    if kind != FOLDER:
        return stat(path)
    from semantic_routing.data.sources.folder import list_pictures

    pictures = [stat(picture) for picture in list_pictures(path).pictures]
    if scanned_as:
        pictures = [replace(one, path=scanned_as + one.path.removeprefix(path)) for one in pictures]
    seen = blake2b(repr(pictures).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return Stored(path, sum(picture.size for picture in pictures), seen)


def scan(kind: str, path: str, length: int, look_inside: bool) -> ScanResult:
    """Find the records of a file of data; see ``scan_tar``. Imports are late, because workers import this file."""
    if kind == TAR:
        return scan_tar(path, length, look_inside=look_inside)
    if kind == PARQUET:
        from semantic_routing.data.sources.parquet import scan_parquet

        return scan_parquet(path, look_inside=look_inside)
    from semantic_routing.data.sources.folder import scan_folder
    from semantic_routing.data.sources.manifest import scan_manifest

    return (scan_manifest if kind == MANIFEST else scan_folder)(path, look_inside=look_inside)


def default_folder(path: str) -> Path | None:
    """Return the default folder of a path's index, inside the data's folder; None for a URL."""
    if is_url(absolute(path)):
        return None
    place = Path(absolute(path))
    while not place.is_dir():  # a file, a pattern of files
        place = place.parent
    return place / DEFAULT


def open_records(path: str, index: Path | None = None) -> RecordSource:
    """Open the records of data.

    Args:
        path: Tar shards, Parquet files, a manifest or a folder: a path, pattern or URL; or the folder of an index.
        index: Folder of the index; default: the one in the data's folder. Without an index, shards are scanned now, in
            about a second for 50,000 records.

    Raises ValueError for data that is missing or has changed since the index was made.
    """
    refuse_world(path)
    if not is_url(path) and (Path(path) / INDEX).is_file():
        sources = open_indexed(Path(path))
        if len(sources) > 1:
            raise ValueError(f"the index {path} is of several kinds of data; give their paths and --index")
        return sources[0]
    data = discover(path)
    return _open(path, data, _index_of(path, data, index))


def open_all(path: str, index: Path | None = None) -> list[RecordSource]:
    """Open a path as ``open_records`` does; for an index's folder, open everything in the index."""
    refuse_world(path)
    return open_indexed(Path(path)) if (Path(path) / INDEX).is_file() else [open_records(path, index)]


def open_indexed(folder: Path) -> list[RecordSource]:
    """Open everything in an index: one source for its tars, one for its Parquet files, and one for each other entry."""
    index = Index(folder)
    paths: dict[str, list[str]] = {kind: [] for kind in (TAR, PARQUET, MANIFEST, FOLDER)}
    for entry in index.entries.values():
        paths[entry.kind].append(entry.path)
    together = [(str(folder), kind, paths[kind]) for kind in (TAR, PARQUET) if paths[kind]]
    apart = [(path, kind, [path]) for kind in (MANIFEST, FOLDER) for path in paths[kind]]
    if not together + apart:
        raise ValueError(f"the index {folder} is empty; run semroute data index with paths of data")
    # The index has no counts of left-out files for each source: report all of them with the first.
    all_left_out = [index.left_out, *[{}] * len(index.entries)]
    return [
        _open(name, Data(kind, found, left_out), index)
        for (name, kind, found), left_out in zip(together + apart, all_left_out, strict=False)
    ]


def _index_of(path: str, data: Data, folder: Path | None) -> Index | None:
    """Open the given index, or the one in the data's folder unless it was moved there and does not fit."""
    if folder is not None:
        return Index(folder)
    default = default_folder(path)
    if default is None or not (default / INDEX).is_file():
        return None
    index = Index(default)
    if index.moved:
        try:
            index.check(data.kind, data.paths)
        except ValueError as error:
            _LOG.warning("%s was written in another place and is not used: %s", default, error)
            return None
    return index


def _open(name: str, data: Data, index: Index | None) -> RecordSource:
    """Open the records of files, and warn of what is left out or damaged."""
    entries = index.check(data.kind, data.paths) if index is not None else []
    folder = index.folder if index is not None else Path()
    rows = [folder / entry.rows for entry in entries]
    sizes = rows if entries and all(entry.dimensions for entry in entries) else None
    left_out = Counter(data.left_out)
    source: Sharded
    if data.kind == TAR and entries:
        source = TarRecords(name, data.paths, [entry.records for entry in entries], rows)
    elif data.kind == TAR:
        source = _scanned(name, data.paths)
    elif data.kind == PARQUET:
        from semantic_routing.data.sources.parquet import ParquetRecords

        source = ParquetRecords(name, data.paths, sizes)
    elif data.kind == MANIFEST:
        from semantic_routing.data.sources.manifest import ManifestRecords

        source = ManifestRecords(data.paths[0], name=name, sizes=sizes[0] if sizes else None)
        left_out[UNNAMED] += max(data.pictures - source.pictures, 0)
    else:
        from semantic_routing.data.sources.folder import FolderRecords

        source = FolderRecords(data.paths[0], name=name, sizes=sizes[0] if sizes else None)
    indexed = sum((Counter(entry.damaged) for entry in entries), Counter[str]())
    source.damaged = dict(left_out + Counter(source.damaged | indexed))
    if source.damaged:
        _LOG.warning("%s: left out or damaged: %s", name, describe(source.damaged))
    return source


def _scanned(name: str, paths: Sequence[str]) -> TarRecords:
    """Open tar shards without an index, by scanning them."""
    if len(paths) >= MANY:
        _LOG.warning("scanning %d shards; to scan them only once, run: semroute data index %s", len(paths), name)
    found = [
        scan_tar(path, stat(path).size)
        for path in tqdm(paths, desc="Scanning", unit="shard", disable=len(paths) < MANY)
    ]
    source = TarRecords(name, paths, [len(one.rows) for one in found], [one.rows for one in found])
    source.damaged = dict(sum((one.damaged for one in found), Counter()))
    return source
