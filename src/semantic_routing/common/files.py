"""Atomic writing of files and folders, and reading with one-line errors."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = ".partial-"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` for a file or folder; flush it and rename it to ``path`` on success.

    Replaces an existing file, and an existing folder only if it is empty. Raises ValueError if it cannot be written.
    """
    scratch = path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")  # unique among processes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        items = [*scratch.rglob("*"), scratch] if scratch.is_dir() else [scratch]
        as_umask_says(scratch, [item for item in items if item.is_file()])
        for item in items:
            flush(item)
        scratch.replace(path)
        flush(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        _remove(scratch)


def check_writable(folder: Path) -> None:
    """Raise ValueError if ``folder`` cannot be made or written to; for use before hours of work."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"cannot write {folder}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {folder}: no permission to write in {there}")


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with written_whole(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    """Delete a file or folder that this program has written."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; errors are ValueErrors that call the file ``what``."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not {what}: it is not JSON ({error})") from error


def read_json_lines(path: Path, what: str) -> list[Any]:
    """Read a file with one JSON value per line; ValueError names the first line that is not JSON."""
    values = []
    for number, line in enumerate(read_text(path, what).split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} is not {what}: line {number} is not JSON ({error.msg})") from error
    return values


def read_text(path: Path, what: str) -> str:
    """Read a UTF-8 file that the user named; errors are ValueErrors that call it ``what``."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {what} {path}: {error.strerror}") from error


def hash_files(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the files' contents in order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Write a file, or a folder's list of files, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_umask_says(path: Path, files: Iterable[Path]) -> None:
    """Give files the mode of a new file beside ``path``; some libraries leave the mode of a private temporary file.

    Reading the umask itself would change it for other threads.
    """
    probe = path.with_name(f".{path.name}-{os.getpid()}-mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in files:
        if file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)
