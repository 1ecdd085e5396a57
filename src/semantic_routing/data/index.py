"""Opening data by its path, and the index that spares opening it a scan.

An index is a folder: ``index.json`` lists the files of data as they were, and for each of them a .npy file has one row
for each record, which is mapped into memory. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tqdm import tqdm

from semantic_routing.config import from_dict
from semantic_routing.data.files import Stored, absolute, expand, files_below, is_file, is_folder, is_url, stat
from semantic_routing.data.found import SIZE, Found
from semantic_routing.data.records import RecordSource, Sharded
from semantic_routing.data.tars import ROW, TarRecords, scan_tar

INDEX = "index.json"
DEFAULT = ".semroute-index"
"""Where an index lies unless told otherwise: in the folder of the data."""
FORMAT = "semantic-routing index 1"
MANY = 16
"""Shards from which a missing index is worth a word."""
TAR, PARQUET, MANIFEST, FOLDER = "tar", "parquet", "manifest", "folder"
ENDINGS = {".tar": TAR, ".parquet": PARQUET, ".jsonl": MANIFEST, ".json": MANIFEST}
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
        except FileNotFoundError as error:
            raise ValueError(f"{folder} holds no index; write one: semroute data index PATHS --out {folder}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); run semroute data index again") from error
        self.entries = {entry.path: entry for entry in entries}

    def check(self, kind: str, paths: Sequence[str]) -> list[Entry]:
        """The entries of files; ValueError where one is missing, or the file is not the one that was scanned."""
        again = f"run: semroute data index --out {self.folder} with all paths"
        missing = [path for path in paths if path not in self.entries]
        if missing:
            raise ValueError(f"the index {self.folder} lacks {missing[0]} ({len(missing)} in all); {again}")
        with ThreadPoolExecutor(16) as pool:  # of URLs each is a request
            states = list(pool.map(lambda path: state(kind, path), paths))
        entries = [self.entries[path] for path in paths]
        for entry, now in zip(entries, states, strict=True):
            if (entry.size, entry.version) != (now.size, now.version):
                raise ValueError(f"{entry.path} has changed since the index {self.folder} was made; {again}")
            if not is_whole(self.folder, entry):
                raise ValueError(f"{self.folder / entry.rows} is missing or damaged; {again}")
        return entries


def is_whole(folder: Path, entry: Entry) -> bool:
    """Whether the rows of an entry are all there."""
    try:
        rows = np.load(folder / entry.rows, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return rows.shape == (entry.records,) and rows.dtype == (ROW if entry.kind == TAR else SIZE)


def discover(path: str) -> tuple[str, list[str]]:
    """What kind of data a path, pattern or URL means, and its files.

    A folder is searched for .tar, then .parquet files, and else is a folder of pictures, with a manifest or without.
    Raises ValueError where there is nothing, or files of several kinds.
    """
    paths = expand(path)
    if len(paths) == 1 and is_folder(paths[0]):
        return _discover_folder(paths[0])
    if not paths or not all(is_file(found) for found in paths[:1]):
        raise ValueError(f"{path!r} does not exist; give shards, a Parquet file, a manifest or a folder")
    kinds = {ENDINGS.get(found[found.rfind(".") :].lower(), "") for found in paths}
    if "" in kinds:
        other = next(found for found in paths if found[found.rfind(".") :].lower() not in ENDINGS)
        hint = "unpack it to .tar: a compressed one has no random access" if ".tar." in other or ".tgz" in other else ""
        raise ValueError(f"{other} is none of {', '.join(ENDINGS)}; {hint or 'give such files or a folder'}")
    if len(kinds) > 1:
        raise ValueError(f"{path!r} means files of several kinds ({', '.join(sorted(kinds))}); give each its own path")
    kind = kinds.pop()
    if kind == MANIFEST and len(paths) > 1:
        raise ValueError(f"{path!r} means several manifests; give each its own path")
    return kind, paths


def _discover_folder(folder: str) -> tuple[str, list[str]]:
    for ending in (".tar", ".parquet"):
        if paths := files_below(folder, (ending,)):
            return ENDINGS[ending], paths
    from semantic_routing.data.folder import find_manifest, manifests_in

    if manifests_in(folder):
        return MANIFEST, [find_manifest(folder)]
    return FOLDER, [folder]


def state(kind: str, path: str) -> Stored:
    """What changes when a file of data does; of a folder of pictures, when one of them does."""
    if kind != FOLDER:
        return stat(path)
    from semantic_routing.data.folder import PICTURES

    pictures = [stat(picture) for picture in files_below(path, PICTURES)]
    seen = blake2b(repr(pictures).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return Stored(path, sum(picture.size for picture in pictures), seen)


def scan(kind: str, path: str, length: int, look_inside: bool) -> Found:
    """Find the records of a file of data; see ``scan_tar``. Runs in worker processes, so imports are late."""
    if kind == TAR:
        return scan_tar(path, length, look_inside=look_inside)
    if kind == PARQUET:
        from semantic_routing.data.parquet import scan_parquet

        return scan_parquet(path, look_inside=look_inside)
    from semantic_routing.data.folder import scan_folder, scan_manifest

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
    if not is_url(path) and (Path(path) / INDEX).is_file():
        sources = open_indexed(Path(path))
        if len(sources) > 1:
            raise ValueError(f"the index {path} is of several kinds of data; give their paths and --index")
        return sources[0]
    kind, paths = discover(path)
    if index is None and (default := default_folder(path)) is not None and (default / INDEX).is_file():
        index = default
    return _open(path, kind, paths, Index(index) if index is not None else None)


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
    return [_open(name, kind, found, index) for name, kind, found in together + apart]


def _open(name: str, kind: str, paths: list[str], index: Index | None) -> RecordSource:
    entries = index.check(kind, paths) if index is not None else []
    folder = index.folder if index is not None else Path()
    sizes = (
        [folder / entry.rows for entry in entries] if entries and all(entry.dimensions for entry in entries) else None
    )
    source: Sharded
    if kind == TAR and entries:
        rows = [folder / entry.rows for entry in entries]
        source = TarRecords(name, paths, [entry.records for entry in entries], rows)
    elif kind == TAR:
        return _scanned(name, paths)
    elif kind == PARQUET:
        from semantic_routing.data.parquet import ParquetRecords

        source = ParquetRecords(name, paths, sizes)
    else:
        from semantic_routing.data.folder import FolderRecords, ManifestRecords

        records = ManifestRecords if kind == MANIFEST else FolderRecords
        source = records(paths[0], name=name, sizes=sizes[0] if sizes else None)
    source.damaged = dict(sum((Counter(entry.damaged) for entry in entries), Counter()))
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
    if source.damaged:
        _LOG.warning("%s: damaged and left out: %s; semroute data index lists them", name, source.damaged)
    return source
