"""Files of data by path or URL: listing, versions, and reads of any range of bytes.

Local files are read with plain system calls; URLs such as ``s3://`` or ``hf://`` are read through fsspec (an extra).
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from semantic_routing.common.extras import require

OPEN_FILES = 16
"""Local files that a reader keeps open."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "modified", "created")


@dataclass(frozen=True)
class Stored:
    """A file and its version."""

    path: str
    """Absolute path or URL."""
    size: int
    """In bytes."""
    version: str
    """Changes when the file is written again: its modification time, or the storage's own version."""


def is_url(path: str) -> bool:
    """Tell whether fsspec is needed."""
    return "://" in path


def absolute(path: str) -> str:
    """Return an absolute path or a URL, which means the same in every process; ``file://`` becomes a path."""
    return path if is_url(path) and not path.startswith("file://") else os.path.abspath(path.removeprefix("file://"))


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path inside it."""
    fsspec = require("fsspec.core", what=url, extra="data")
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:  # fsspec knows the protocol, but not without another package
        raise ValueError(f"{url} cannot be read: {error}") from error


def stat(path: str) -> Stored:
    """Return a file's size and version; FileNotFoundError if it does not exist."""
    path = absolute(path)
    if not is_url(path):
        found = os.stat(path)
        return Stored(path, found.st_size, str(found.st_mtime_ns))
    storage, inner = filesystem(path)
    facts = storage.info(inner)
    if facts.get("size") is None:
        raise ValueError(f"{path} has no known size, so parts of it cannot be read; copy it to this machine")
    return Stored(path, facts["size"], next((str(facts[name]) for name in _VERSIONS if facts.get(name)), ""))


def is_file(path: str) -> bool:
    """Tell whether a file has that path or URL."""
    if not is_url(path):
        return os.path.isfile(path)
    storage, inner = filesystem(path)
    return storage.isfile(inner)


def is_folder(path: str) -> bool:
    """Tell whether a path or URL is a folder."""
    if not is_url(path):
        return os.path.isdir(path)
    storage, inner = filesystem(path)
    return storage.isdir(inner)


def everything_below(folder: str) -> list[tuple[str, int]]:
    """List all files below a folder, sorted, with their sizes in bytes (-1 for a broken link).

    Includes hidden files, and skips hidden folders.
    """
    folder = absolute(folder)
    if is_url(folder):
        storage, inner = filesystem(folder)
        facts = storage.find(inner, detail=True)
        sizes = [1 if one.get("size") is None else one["size"] for one in facts.values()]  # unknown: not empty
        return sorted(zip(_urls(folder, inner, list(facts)), sizes, strict=True))
    found = []
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (os.path.join(base, name) for name in names):
            try:
                found.append((path, os.stat(path).st_size))
            except OSError:
                found.append((path, -1))
    return sorted(found)


def expand(pattern: str) -> list[str]:
    """Return the paths of a pattern: ``{00000..00127}`` counts, and ``*``, ``?``, ``[]`` match existing files."""
    counted = _RANGE.search(pattern)
    if counted:
        first, last = counted.groups()
        numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        before, after = pattern[: counted.start()], pattern[counted.end() :]
        return [path for number in numbers for path in expand(f"{before}{number}{after}")]
    pattern = absolute(pattern)
    if not has_magic(pattern) or (not is_url(pattern) and os.path.exists(pattern)):
        return [pattern]
    if not is_url(pattern):
        return sorted(glob(pattern, recursive=True))
    storage, inner = filesystem(pattern)
    fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    fixed = fixed[: fixed.rfind("/") + 1]
    return sorted(_urls(fixed, filesystem(fixed)[1], storage.glob(inner)))


def _urls(base: str, inner: str, paths: Sequence[str]) -> list[str]:
    """Return the URLs of paths that a file system lists below ``inner``, each beginning with ``base``."""
    base = base if base.endswith("://") else f"{base.rstrip('/')}/"
    return [base + path[len(inner.rstrip("/")) :].lstrip("/") for path in paths]


def shard_names(paths: Sequence[str]) -> list[str]:
    """Return short names of files: their paths inside the last folder that all of them share."""
    split = [path.split("/") for path in paths]
    shared = min((len(parts) for parts in split), default=1) - 1
    for depth, level in enumerate(zip(*split, strict=False)):
        if len(set(level)) > 1:
            shared = min(shared, depth)
            break
    return ["/".join(parts[shared:]) for parts in split]


class Reader:
    """Reads ranges of bytes of any number of files; picklable, thread-safe and fork-safe."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Handle] = OrderedDict()

    def __reduce__(self) -> tuple[type[Reader], tuple[()]]:
        return Reader, ()

    def read(self, path: str, start: int, size: int) -> bytes:
        """Read ``size`` bytes from ``start``, fewer at the end of the file; OSError if it cannot be read."""
        if is_url(path):
            return _request(path, start, size) if size else b""
        # The local name keeps the handle open until this read is done, even if another thread drops it.
        handle = self._handle(path)
        parts = []
        while size > 0 and (part := os.pread(handle.number, size, start)):
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _handle(self, path: str) -> _Handle:
        if self._process != os.getpid():
            self._reset()
        with self._lock:
            handle = self._open.pop(path, None) or _Handle(path)
            self._open[path] = handle
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return handle


def _request(url: str, start: int, size: int) -> bytes:
    storage, inner = filesystem(url)
    try:
        from aiohttp import ClientError
    except ImportError:  # fsspec does not use it either
        return storage.cat_file(inner, start=start, end=start + size)
    try:
        return storage.cat_file(inner, start=start, end=start + size)
    except ClientError as error:
        raise OSError(f"{url}: {error}") from error


class _Handle:
    """An open file, closed with its last reference."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Arrays:
    """Arrays in memory or in .npy files, which are mapped into memory at first use; picklable and thread-safe."""

    def __init__(self, arrays: Sequence[Path | np.ndarray]) -> None:
        self._arrays = tuple(arrays)
        self._open: dict[int, np.ndarray] = {}

    def __reduce__(self) -> tuple[type[Arrays], tuple[Sequence[Path | np.ndarray]]]:
        return Arrays, (self._arrays,)

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.__getitem__, range(len(self._arrays)))

    def __getitem__(self, number: int) -> np.ndarray:
        array = self._arrays[number]
        if isinstance(array, np.ndarray):
            return array
        found = self._open.get(number)
        if found is None:
            if len(self._open) >= OPEN_FILES:
                self._open.clear()
            found = self._open[number] = np.load(array, mmap_mode="r", allow_pickle=False)
        return found


def read_all(path: str | Path) -> bytes:
    """Read a complete local file or URL."""
    found = stat(str(path))
    return Reader().read(found.path, 0, found.size)
