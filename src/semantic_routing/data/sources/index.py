"""Opening data by its path, and the index that spares opening it a scan.

An index is a folder: ``index.json`` lists the files of data as they were, and for each of them a .npy file has one row
for each record, which is mapped into memory. Nothing in it is pickled.
"""

from __future__ import annotations

import json
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
from semantic_routing.data.sources.discover import (
    FOLDER,
    MANIFEST,
    PARQUET,
    TAR,
    UNNAMED,
    Data,
    discover,
    refuse_world,
    told,
)
from semantic_routing.data.sources.records import RecordSource, Sharded
from semantic_routing.data.sources.scan import SIZE, Found
from semantic_routing.data.sources.storage import Stored, absolute, is_url, stat
from semantic_routing.data.sources.webdataset import ROW, TarRecords, scan_tar

INDEX = "index.json"
DEFAULT = ".semroute-index"
"""Where an index lies unless told otherwise: in the folder of the data."""
FORMAT = "semantic-routing index 1"
MANY = 16
"""Shards from which a missing index is worth a word."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file of data, as it was when it was scanned."""

    path: str
    """Absolute path or URL."""
    kind: str
    """tar, parquet, manifest, or folder for a folder of pictures without one."""
    size: int
    version: str
    """Of ``files.Stored``."""
    records: int
    rows: str
    """Name of the .npy file with a row for each record."""
    dimensions: bool
    """Whether pictures were looked into."""
    damaged: dict[str, int]
    """How many records are damaged, by reason."""
    examples: tuple[dict[str, str | int], ...] = ()
    """The first few of each reason; only beside the .npy file."""


class Index:
    """An index by its folder."""

    def __init__(self, folder: Path) -> None:
        """Read the list; ValueError where there is none or it is damaged."""
        self.folder = folder
        path = folder / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            entries = [from_dict(Entry, entry) for entry in found["entries"]]
            self.left_out: dict[str, int] = dict(found.get("left_out", {}))
            home = str(found.get("folder", ""))
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no index; write one: semroute data index PATHS --out {folder}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); run semroute data index again") from error
        now = os.path.abspath(folder)
        self.moved = home not in ("", now)
        """Whether the index lies elsewhere than where it was written; then its data may have come along."""
        places = [_moved(entry.path, home, now) if self.moved else entry.path for entry in entries]
        self.entries = {place: replace(entry, path=place) for place, entry in zip(places, entries, strict=True)}
        self._scanned_as = {place: entry.path for place, entry in zip(places, entries, strict=True)}

    def check(self, kind: str, paths: Sequence[str]) -> list[Entry]:
        """The entries of files; ValueError where one is missing, or the file is not the one that was scanned."""
        again = f"run: semroute data index --out {self.folder} with all paths"
        missing = [path for path in paths if path not in self.entries]
        if missing:
            raise ValueError(f"the index {self.folder} lacks {missing[0]} ({len(missing)} in all); {again}")
        with ThreadPoolExecutor(16) as pool:  # of URLs each is a request
            states = list(pool.map(lambda path: state(kind, path, self._scanned_as[path]), paths))
        entries = [self.entries[path] for path in paths]
        for entry, now in zip(entries, states, strict=True):
            if (entry.size, entry.version) != (now.size, now.version):
                raise ValueError(f"{entry.path} has changed since the index {self.folder} was made; {again}")
            if not is_whole(self.folder, entry):
                raise ValueError(f"{self.folder / entry.rows} is missing or damaged; {again}")
        return entries


def _moved(path: str, home: str, now: str) -> str:
    """Where a file is that was scanned when its index lay at ``home``: as it lay to that, if there is one."""
    if is_url(path):
        return path
    place = os.path.normpath(os.path.join(now, os.path.relpath(path, home)))
    return place if os.path.exists(place) else path


def is_whole(folder: Path, entry: Entry) -> bool:
    """Whether the rows of an entry are all there."""
    try:
        rows = np.load(folder / entry.rows, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return rows.shape == (entry.records,) and rows.dtype == (ROW if entry.kind == TAR else SIZE)


def state(kind: str, path: str, scanned_as: str = "") -> Stored:
    """What changes when a file of data does; of a folder of pictures, when one of them does.

    ``scanned_as`` is where the folder was when it was scanned, if it has moved since.
    """
    if kind != FOLDER:
        return stat(path)
    from semantic_routing.data.sources.folder import list_pictures

    pictures = [stat(picture) for picture in list_pictures(path).pictures]
    if scanned_as:
        pictures = [replace(one, path=scanned_as + one.path.removeprefix(path)) for one in pictures]
    seen = blake2b(repr(pictures).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return Stored(path, sum(picture.size for picture in pictures), seen)


def scan(kind: str, path: str, length: int, look_inside: bool) -> Found:
    """Find the records of a file of data; see ``scan_tar``. Runs in worker processes, so imports are late."""
    if kind == TAR:
        return scan_tar(path, length, look_inside=look_inside)
    if kind == PARQUET:
        from semantic_routing.data.sources.parquet import scan_parquet

        return scan_parquet(path, look_inside=look_inside)
    from semantic_routing.data.sources.folder import scan_folder
    from semantic_routing.data.sources.manifest import scan_manifest

    return (scan_manifest if kind == MANIFEST else scan_folder)(path, look_inside=look_inside)


def default_folder(path: str) -> Path | None:
    """Where the index of a path lies unless told otherwise: in its folder; None for a URL."""
    if is_url(absolute(path)):
        return None
    place = Path(absolute(path))
    while not place.is_dir():  # a file, a pattern of files
        place = place.parent
    return place / DEFAULT


def open_records(path: str, index: Path | None = None) -> RecordSource:
    """The records of data.

    Args:
        path: Tar shards, Parquet files, a manifest or a folder: a path, pattern or URL; or an index's own folder.
        index: Folder of the index. Without, the one in the data's folder is used if there is one, and else shards are
            scanned now, which takes about a second for 50,000 records.

    Raises ValueError for what is missing, or has changed since the index was made.
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
    """The records of data as ``open_records`` opens them, or everything that an index knows."""
    refuse_world(path)
    return open_indexed(Path(path)) if (Path(path) / INDEX).is_file() else [open_records(path, index)]


def open_indexed(folder: Path) -> list[RecordSource]:
    """Everything that an index knows, a source for all its tars, one for its Parquet files and one for each other."""
    index = Index(folder)
    paths: dict[str, list[str]] = {kind: [] for kind in (TAR, PARQUET, MANIFEST, FOLDER)}
    for entry in index.entries.values():
        paths[entry.kind].append(entry.path)
    together = [(str(folder), kind, paths[kind]) for kind in (TAR, PARQUET) if paths[kind]]
    apart = [(path, kind, [path]) for kind in (MANIFEST, FOLDER) for path in paths[kind]]
    if not together + apart:
        raise ValueError(f"the index {folder} is empty; run semroute data index with paths of data")
    # What was left out is not known of each; all of it is said once.
    all_left_out = [index.left_out, *[{}] * len(index.entries)]
    return [
        _open(name, Data(kind, found, left_out), index)
        for (name, kind, found), left_out in zip(together + apart, all_left_out, strict=False)
    ]


def _index_of(path: str, data: Data, folder: Path | None) -> Index | None:
    """The index given, or the one in the data's folder unless that was moved there and does not fit."""
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
    """The records of files, of which is said what is left out or damaged."""
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
        _LOG.warning("%s: left out or damaged: %s", name, told(source.damaged))
    return source


def _scanned(name: str, paths: Sequence[str]) -> TarRecords:
    if len(paths) >= MANY:
        _LOG.warning("scanning %d shards; semroute data index %s would spare it", len(paths), name)
    found = [
        scan_tar(path, stat(path).size)
        for path in tqdm(paths, desc="Scanning", unit="shard", disable=len(paths) < MANY)
    ]
    source = TarRecords(name, paths, [len(one.rows) for one in found], [one.rows for one in found])
    source.damaged = dict(sum((one.damaged for one in found), Counter()))
    return source
