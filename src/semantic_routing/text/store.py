"""Cache of the hidden states of prompts, in main memory and on disk.

A prompt's states depend only on its tokens (``TextEncoder.encode``), so cached states are bitwise those that the model
would compute again. Both caches have a maximum size in bytes.
"""

from __future__ import annotations

import os
import secrets
import threading
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from semantic_routing.common.files import PARTIAL, check_writable

CHECKSUM = "crc32"


class States(NamedTuple):
    """A language model's outputs for one prompt of n tokens, without padding."""

    hidden: Float[Tensor, "L n C"]
    keys: Float[Tensor, "L Hkv n hd"] | None = None
    values: Float[Tensor, "L Hkv n hd"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are present, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}

    def copied(self) -> States:
        """Return a copy in main memory that shares no memory with a batch."""
        return States(**{name: x.to("cpu", copy=True).contiguous() for name, x in self.tensors().items()})

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in self.tensors().values())


class StateStore:
    """Cached states by key: the most recently used ones in memory, and all of them on disk until its folder is full."""

    def __init__(self, memory: int, disk: DiskStates | None = None) -> None:
        """``memory`` is the maximum number of bytes in main memory; 0 turns this cache off."""
        self.memory, self.disk = memory, disk
        self._kept: OrderedDict[str, States] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    @property
    def active(self) -> bool:
        """Whether anything is cached."""
        return bool(self.memory or self.disk)

    @property
    def disk_is_full(self) -> bool:
        """Whether a folder has stopped to take states, because it is full or cannot be written."""
        return self.disk is not None and self.disk.full

    def get(self, key: str) -> States | None:
        """Return cached states, in main memory; None if there are none under this key."""
        with self._lock:
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        found = self.disk.get(key) if self.disk else None
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, key: str, states: States) -> None:
        """Cache a copy of states; the least recently used ones in memory are dropped to make room."""
        if self.active:
            states = states.copied()
            self._remember(key, states)
            if self.disk:
                self.disk.put(key, states)

    def clear(self) -> None:
        """Empty the cache in memory."""
        with self._lock:
            self._kept.clear()
            self._size = 0

    def _remember(self, key: str, states: States) -> None:
        with self._lock:
            if key in self._kept or states.size > self.memory:
                return
            self._kept[key] = states
            self._size += states.size
            while self._size > self.memory:
                self._size -= self._kept.popitem(last=False)[1].size


class DiskStates:
    """States in a folder, one safetensors file per prompt; any number of processes can use it at the same time.

    A file appears under its name only when it is complete. A damaged one is reported and treated as absent.
    """

    def __init__(self, root: Path, most: int) -> None:
        """Cache states in ``root`` until its files have ``most`` bytes; raise ValueError if it cannot be written."""
        check_writable(root)
        self.root, self.most = root, most
        self._size = self._added = most  # unknown until the first scan
        self.full = False
        self._whole = set[str]()  # keys of files whose checksum was right: files never change, so once is enough
        self._lock = threading.Lock()

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> States | None:
        """Return cached states, memory-mapped; None if they are absent or damaged, with a warning if damaged."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                states = States(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                whole = key in self._whole or (file.metadata() or {}).get(CHECKSUM) == _checksum(states)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, TypeError):
            whole = False
        if whole:
            self._whole.add(key)
            return states
        warnings.warn(f"{path} is damaged: its prompt is encoded again", stacklevel=2)
        return None

    def put(self, key: str, states: States) -> None:
        """Write states, unless the folder is full or cannot be written; one warning reports that."""
        path = self._path(key)
        if self.full or not self._has_room(states.size):
            return
        scratch = path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not flushed to the disk: after a power failure the checksum tells.
            save_file(states.tensors(), scratch, metadata={CHECKSUM: _checksum(states)})
            os.replace(scratch, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                scratch.unlink()
            self._stop(f"cannot write {path}: {getattr(error, 'strerror', None) or error}")

    def _has_room(self, size: int) -> bool:
        with self._lock:
            if self._added >= self.most // 16:  # other processes write, too
                self._size, self._added = sum(_sizes(self.root)), 0
            self._size += size
            self._added += size
            fits = self._size <= self.most
        if not fits:
            self._stop(f"{self.root} holds {self.most:,} bytes of states, as many as text.keep_on_disk_bytes allows")
        return fits

    def _stop(self, reason: str) -> None:
        self.full = True
        warnings.warn(f"{reason}; no more are cached there", stacklevel=2)


def _checksum(states: States) -> str:
    total = 0
    for x in states.tensors().values():
        total = zlib.crc32(x.contiguous().view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _sizes(folder: Path) -> Iterator[int]:
    """Yield the sizes of all files in a folder and its subfolders."""
    for path in folder.rglob("*"):
        try:
            yield path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # another process has renamed it
            continue


def state_key(*facts: object) -> str:
    """Return the key under which the states that ``facts`` determine are cached."""
    return blake2b(repr(facts).encode(), digest_size=20).hexdigest()
