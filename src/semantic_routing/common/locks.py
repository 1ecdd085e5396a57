"""Folder locks: one writing process per folder, and an error for others that names it.

The lock is the system's (``flock``) on a small file. It ends with its process, so that a file left by a dead process
blocks nobody. Over NFS it also holds between machines. In a job of several processes, the first one holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

LOCK = ".lock"
"""Usual name of the lock file in the locked folder."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks, such as Lustre mounted without ``flock``."""
_HELD: set[int] = set()
"""File descriptors of this process's locks."""


@contextmanager
def claimed(lock: Path, what: str | Path) -> Iterator[None]:
    """Hold the lock file ``lock`` for the context; messages call what it protects ``what``.

    Raises ValueError if another process holds it or it cannot be written. At the end the file is deleted, and with it
    the folders that were made for it if they are empty.
    """
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(lock, what)
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(_self()).encode())
    except OSError as error:
        place = lock if lock.parent.is_dir() else lock.parent
        raise ValueError(f"cannot write {place}: {error.strerror}") from error
    _HELD.add(handle)
    try:
        yield
    finally:
        _HELD.discard(handle)
        with suppress(OSError):  # the folder was deleted, or the disk became read-only
            if _is_same(handle, lock):
                lock.unlink()
        os.close(handle)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _take(lock: Path, what: str | Path) -> int:
    """Open and lock the file; return its descriptor."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"{what} is in use: {_holder(lock)}") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise
            sys.stderr.write(
                f"semroute: the disk of {lock.parent} has no file locks; do not let another command write there\n"
            )
        if _is_same(handle, lock):
            return handle
        os.close(handle)  # its previous holder has deleted it


def _is_same(handle: int, lock: Path) -> bool:
    """Return whether ``lock`` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _self() -> dict[str, str | int]:
    """Return the holder's facts for the lock file."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}


def _holder(lock: Path, patience: float = 1.0) -> str:
    """Return the end of an error message: the holder and what to do. A new lock file may still be empty."""
    deadline = time.monotonic() + patience
    while True:
        try:
            found = json.loads(lock.read_text(encoding="utf-8"))
            host, pid, since = found["host"], found["pid"], found["since"]
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                return f"another process holds {lock}; wait until it ends, or stop it"
            time.sleep(0.05)
            continue
        where = "" if host == socket.gethostname() else f"; if that machine is gone, delete {lock}"
        return f"process {pid} on host {host} has used it since {since}; wait until it ends, or stop it{where}"


def _forget() -> None:
    """Close the locks in a forked process, so that they end with the process that took them."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
