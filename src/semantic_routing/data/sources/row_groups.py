"""Reads row groups of Parquet files in the caller's thread, and caches those that the order draws from.

Arrow's own threads are not used: one that releases a Python buffer during interpreter shutdown aborts the process.
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
"""Memory for one source's cached row groups in one process; larger ones are kept in temporary files."""
COUNT = 16
"""Row groups that are cached by default."""
ROWS = 1024
"""Rows read at once; fewer if they are large."""
PART = 2**22
"""Bytes fetched or decoded at once; a larger page or picture is read in one piece."""
FOOTERS = 64
"""Footers of files that are cached."""
ERRORS = (OSError, ValueError, pa.ArrowException)
"""Errors of reading a damaged file."""


@contextmanager
def open_parquet(path: str, metadata: Any = None) -> Iterator[Any]:
    """Open a local file or a URL as a ``ParquetFile`` that reads in the caller's thread.

    Args:
        path: Path or URL. Arrow opens a local file itself, so that it holds no Python object.
        metadata: The file's footer, if already read.

    Raises ValueError if it is not a Parquet file.
    """
    try:
        source = pa.PythonFile(_Remote(path), mode="r") if is_url(path) else pa.OSFile(path)
        with source, pq.ParquetFile(source, metadata=metadata, pre_buffer=False, buffer_size=PART) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a complete Parquet file ({error}); remove it or write it again") from error


def batches(file: Any, group: int, columns: Sequence[str]) -> Iterator[Any]:
    """Yield a row group's columns in record batches of about ``PART`` bytes."""
    found = file.metadata.row_group(group)
    rows = max(1, min(ROWS, PART * found.num_rows // max(found.total_byte_size, 1)))
    yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)


class RowGroups:
    """Cache of the last used row groups; thread-safe, and picklable without its content."""

    def __init__(self, count: int = COUNT) -> None:
        """Cache ``count`` row groups; if the order draws from no more, it reads each only once."""
        self._count = count
        self._lock = threading.Lock()
        self._tables: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._footer = lru_cache(maxsize=FOOTERS)(_footer)

    def __reduce__(self) -> tuple[type[RowGroups], tuple[int]]:
        return RowGroups, (self._count,)

    def table(self, path: str, group: int, columns: Sequence[str]) -> Any:
        """Return a row group's columns (the same at every call), or a text that tells why it cannot be read."""
        with self._lock:  # so that threads do not read the same row group twice
            found = self._tables.pop((path, group), None)
            if found is None:
                while len(self._tables) >= self._count:  # first, so that memory never holds one more
                    self._tables.popitem(last=False)
                try:
                    with open_parquet(path, self._footer(path)) as file:
                        found = _table(batches(file, group, columns), KEPT_BYTES // self._count)
                except pa.ArrowNotImplementedError as error:
                    found = f"{error}; while reading the columns {', '.join(columns)}"
                except ERRORS as error:
                    found = str(error)  # cached too, so that its other records do not try again
            self._tables[path, group] = found
        return found


def _footer(path: str) -> Any:
    with open_parquet(path) as file:
        return file.metadata


def _table(found: Iterator[Any], most: int) -> Any:
    """Collect batches in a table: in memory up to ``most`` bytes, beyond that in a temporary file."""
    taken, size = deque[Any](), 0
    for batch in found:
        taken.append(batch)
        size += batch.nbytes
        if size > most:
            return _mapped(batch.schema, chain(_drained(taken), found))
    return pa.Table.from_batches(taken)


def _drained(taken: deque[Any]) -> Iterator[Any]:
    while taken:  # free each batch once it is written
        yield taken.popleft()


def _mapped(schema: Any, found: Iterable[Any]) -> Any:
    """Write batches to a temporary file and map it as a table; the file is unlinked, so it ends with its last user."""
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
            f"{os.path.dirname(path)} has no space for a Parquet row group that is too large for memory; set TMPDIR to "
            "a folder with space for data.window row groups for each worker"
        ) from error
    finally:
        os.unlink(path)


class _Remote(io.RawIOBase):
    """A URL as a file object: each read is one request for exactly those bytes."""

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
