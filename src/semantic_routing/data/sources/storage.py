"""Files of data by path or URL: what there is, whether it has changed, and any range of its bytes.

Local files are read with plain system calls, anything else through fsspec (an extra), such as ``s3://`` or ``hf://``.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
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
    """A file as it is now."""

    path: str
    """Absolute path or URL."""
    size: int
    """In bytes."""
    version: str
    """Differs when the file is written anew: the time of its last change, or what the storage gives for it."""


def is_url(path: str) -> bool:
    """Whether fsspec is needed."""
    return "://" in path


def absolute(path: str) -> str:
    """A path that means the same in every process: absolute, or a URL; ``file://`` becomes a path."""
    return path if is_url(path) and not path.startswith("file://") else os.path.abspath(path.removeprefix("file://"))


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path inside it."""
    fsspec = require("fsspec.core", what=url, extra="data")
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:  # fsspec knows the protocol, but not without another package
        raise ValueError(f"{url} cannot be read: {error}") from error


def stat(path: str) -> Stored:
    """A file's size and version; FileNotFoundError where there is none."""
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
    """Whether there is a file of that path or URL."""
    if not is_url(path):
        return os.path.isfile(path)
    storage, inner = filesystem(path)
    return storage.isfile(inner)


def is_folder(path: str) -> bool:
    """Whether the path or URL is a folder."""
    if not is_url(path):
        return os.path.isdir(path)
    storage, inner = filesystem(path)
    return storage.isdir(inner)


def files_below(folder: str, endings: Sequence[str]) -> list[str]:
    """All files below a folder whose names end so (in lower case), sorted; hidden ones are left out."""
    folder = absolute(folder)
    if is_url(folder):
        storage, inner = filesystem(folder)
        found = _urls(folder, inner, storage.find(inner))
    else:
        found = []
        for base, folders, names in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(base, name) for name in names]
    return sorted(path for path in found if _name(path).endswith(tuple(endings)) and not _name(path).startswith("."))


def everything_below(folder: str) -> list[tuple[str, int]]:
    """All files below a folder, sorted, with their sizes in bytes (-1 for a link to nothing).

    Hidden files are among them, but nothing in hidden folders.
    """
    folder = absolute(folder)
    if is_url(folder):
        storage, inner = filesystem(folder)
        facts = storage.find(inner, detail=True)
        sizes = [1 if one.get("size") is None else one["size"] for one in facts.values()]  # unknown is not nothing
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
    """The paths that a pattern stands for: ``{00000..00127}`` counts, ``*``, ``?``, ``[]`` match what is there."""
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
    """The URLs of what a file system lists below ``inner``, beginning as ``base`` was written."""
    base = base if base.endswith("://") else f"{base.rstrip('/')}/"
    return [base + path[len(inner.rstrip("/")) :].lstrip("/") for path in paths]


def shard_names(paths: Sequence[str]) -> list[str]:
    """Short names of files: what follows the last folder that all of them share."""
    split = [path.split("/") for path in paths]
    shared = min((len(parts) for parts in split), default=1) - 1
    for depth, level in enumerate(zip(*split, strict=False)):
        if len(set(level)) > 1:
            shared = min(shared, depth)
            break
    return ["/".join(parts[shared:]) for parts in split]


class Reader:
    """Ranges of bytes of any number of files; picklable, and safe in several threads and after a fork."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Handle] = OrderedDict()

    def __reduce__(self) -> tuple[type[Reader], tuple[()]]:
        return Reader, ()

    def read(self, path: str, start: int, size: int) -> bytes:
        """``size`` bytes from ``start``, fewer where the file ends; OSError where it cannot be read."""
        if is_url(path):
            return _request(path, start, size) if size else b""
        # A local name keeps the handle open until this read is done, whoever drops it meanwhile.
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
    except ImportError:  # then fsspec does not use it either
        return storage.cat_file(inner, start=start, end=start + size)
    try:
        return storage.cat_file(inner, start=start, end=start + size)
    except ClientError as error:
        raise OSError(f"{url}: {error}") from error


class _Handle:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Arrays:
    """Arrays that lie in .npy files, mapped into memory when they are first asked for; those in memory as they are.

    Picklable, and safe in several threads.
    """

    def __init__(self, arrays: Sequence[Path | np.ndarray]) -> None:
        self._arrays = tuple(arrays)
        self._open: dict[int, np.ndarray] = {}

    def __reduce__(self) -> tuple[type[Arrays], tuple[Sequence[Path | np.ndarray]]]:
        return Arrays, (self._arrays,)

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


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1].lower()


def read_all(path: str | Path) -> bytes:
    """The whole of a local file or URL."""
    found = stat(str(path))
    return Reader().read(found.path, 0, found.size)
