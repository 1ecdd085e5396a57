"""One process at a time in a folder: who writes there holds a lock, which says who that is.

The lock is the system's own (``flock``) on a small file. It goes with its process, however that ends: a file that was
left behind, by whatever process of whatever machine, hinders nobody. Over NFS it holds between machines, too. Of a job
of several processes the first holds it for all.
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
"""The usual name of the file in the folder that it guards."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that know no locks, as Lustre does where it is mounted without."""
_HELD: set[int] = set()
"""Handles of this process's locks."""


@contextmanager
def claimed(lock: Path, what: str | Path) -> Iterator[None]:
    """Hold the file ``lock`` while the context lasts; ``what`` is what it guards, as messages name it.

    ValueError where another process holds it, or where it cannot be written. The file goes at the end, and with it the
    folders that were made for it, if nothing else came into them.
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
        with suppress(OSError):  # the folder was taken away, or the disk is read-only by now
            if _is_same(handle, lock):
                lock.unlink()
        os.close(handle)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _take(lock: Path, what: str | Path) -> int:
    """Open and lock the file; its handle."""
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
            sys.stderr.write(f"semroute: {lock.parent} is on a disk without locks: let no other process write there\n")
        if _is_same(handle, lock):
            return handle
        os.close(handle)  # who held it before has deleted it meanwhile


def _is_same(handle: int, lock: Path) -> bool:
    """Whether the file by that name is the one that was opened."""
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _self() -> dict[str, str | int]:
    """What a lock says of its holder."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now(UTC).isoformat(timespec="seconds")}


def _holder(lock: Path, patience: float = 1.0) -> str:
    """Who holds a lock and what to do; it may have been taken this very moment and say nothing yet."""
    deadline = time.monotonic() + patience
    while True:
        try:
            found = json.loads(lock.read_text(encoding="utf-8"))
            host, pid, since = found["host"], found["pid"], found["since"]
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                return f"another process holds {lock}; wait for its end or stop it"
            time.sleep(0.05)
            continue
        where = "" if host == socket.gethostname() else f"; if that machine is gone, delete {lock}"
        return f"process {pid} on host {host} is at it since {since}; wait for its end or stop it{where}"


def _forget() -> None:
    """Close the locks in a process that was forked, so that they end with the one that took them."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


os.register_at_fork(after_in_child=_forget)
