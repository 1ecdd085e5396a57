"""Row groups of Parquet files as they are read: in the thread that asks, kept while the order draws from them.

All threads of Arrow's own are left out: one that lets go of a Python buffer while the interpreter ends aborts it.
"""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain
from tempfile import mkstemp
from typing import Any

from semantic_routing.common.errors import TrainingFailed
from semantic_routing.common.extras import require
from semantic_routing.data.sources.storage import Reader, is_url, stat

pq = require("pyarrow.parquet", what="a Parquet file", extra="data")
pa = require("pyarrow", what="a Parquet file", extra="data")

KEPT_BYTES = 2**29
"""Memory for the row groups that one source keeps in one process; those that need more lie in temporary files."""
COUNT = 16
"""Row groups that are kept where nobody tells how many the order draws from."""
ROWS = 1024
"""Read at once, or fewer where they are large."""
PART = 2**22
"""Bytes that are fetched or decoded at once, or a single page or picture where that is larger."""
FOOTERS = 64
"""Footers of files that are kept."""
ERRORS = (OSError, ValueError, pa.ArrowException)
"""What reading a damaged file raises."""


@contextmanager
def open_parquet(path: str, metadata: Any = None) -> Iterator[Any]:
    """A ``ParquetFile`` of a local file or a URL, all of whose reads are done by the caller's thread.

    Args:
        path: Of the file; a local one is opened by Arrow, so that no Python object is in its hands.
        metadata: Its footer, where it was read before.

    Raises ValueError where it is no Parquet file.
    """
    try:
        source = pa.PythonFile(_Remote(path), mode="r") if is_url(path) else pa.OSFile(path)
        with source, pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=PART) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no whole Parquet file ({error}); take it out or write it again") from error


def batches(file: Any, group: int, columns: Sequence[str]) -> Iterator[Any]:
    """The record batches of a row group's columns, of about ``PART`` bytes each."""
    found = file.metadata.row_group(group)
    rows = max(1, min(ROWS, PART * found.num_rows // max(found.total_byte_size, 1)))
    yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


class RowGroups:
    """The row groups that were used last; picklable, which forgets them, and safe in several threads."""

    def __init__(self, count: int = COUNT) -> None:
        """Keep ``count`` of them: as many as the order draws from, and each is read once while it does."""
        self._count = count
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._footer = lru_cache(maxsize=FOOTERS)(_footer)

    def __reduce__(self) -> tuple[type[RowGroups], tuple[int]]:
        return RowGroups, (self._count,)

    def table(self, path: str, group: int, columns: Sequence[str]) -> Any:
        """The columns of a file's row group, which are always the same ones; or what is wrong with it, as text."""
        with self._lock:  # threads that want the same row group shall not each read it
            found = self._tables.pop((path, group), None)
            if found is None:
                while len(self._tables) >= self._count:  # before the next is read, or memory would hold one more
                    self._tables.popitem(last=False)
                try:
                    with open_parquet(path, self._footer(path)) as file:
                        found = _table(batches(file, group, columns), KEPT_BYTES // self._count)
                except pa.ArrowNotImplementedError as error:
                    found = f"{error}; read were the columns {', '.join(columns)}"
                except ERRORS as error:
                    found = str(error)  # kept as well, or each of its records would be tried anew
            self._tables[path, group] = found
        return found


def _footer(path: str) -> Any:
    with open_parquet(path) as file:
        return file.metadata


def _table(found: Iterator[Any], most: int) -> Any:
    """A table in memory, or in a temporary file where it has more bytes than ``most``."""
    taken, size = deque[Any](), 0
    for batch in found:
        taken.append(batch)
        size += batch.nbytes
        if size > most:
            return _mapped(batch.schema, chain(_drained(taken), found))
    return pa.Table.from_batches(taken)


def _drained(taken: deque[Any]) -> Iterator[Any]:
    while taken:  # what is written needs no memory any more
        yield taken.popleft()


def _mapped(schema: Any, found: Iterable[Any]) -> Any:
    """A table in a temporary file that is mapped into memory; it has no name, so it ends with its last user."""
    number, path = mkstemp(prefix="semroute-", suffix=".arrow")
    os.close(number)
    try:
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in found:
                writer.write_batch(batch)
        with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
            return stream.read_all()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise TrainingFailed(
            f"{os.path.dirname(path)} has no room for a row group of Parquet that is too large to be kept in memory; "
            "let TMPDIR name a folder that has room for as many as data.window, for each worker"
        ) from error
    finally:
        os.unlink(path)


class _Remote(io.RawIOBase):
    """A URL as a file: each read is one request for exactly those bytes."""

    def __init__(self, url: str) -> None:
        self._url, self._place, self._reader = url, 0, Reader()
        self._size = stat(url).size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._place, 0)
        found = self._reader.read(self._url, self._place, left if size < 0 else min(size, left))
        self._place += len(found)
        return found
