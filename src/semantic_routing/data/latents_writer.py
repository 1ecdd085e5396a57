"""Writer of cached latents (``latents.py``): posteriors in shards of limited size, written completely or not at all."""

from __future__ import annotations

from collections import defaultdict
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from semantic_routing.common.files import written_whole
from semantic_routing.data.latents import KEY_BYTES, SHARDS, checksum

SHARD = 2**26
"""Bytes of posteriors from which on a shard is written."""
Posterior = Float[Tensor, "2 C h w"]


class LatentWriter:
    """Writer of one process; several may write into a folder. What is left is written at the end of the context.

    Nothing is written after an error, but the rest is after Ctrl-C.
    """

    def __init__(self, folder: Path, most: int) -> None:
        """Write into ``folder``, which may hold ``most`` bytes."""
        self.folder, self.most = folder, most
        self.written = 0
        self._keys: set[bytes] = set()
        self._waiting: dict[torch.Size, list[tuple[bytes, Posterior]]] = defaultdict(list)

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt):
            for shape in list(self._waiting):
                self._write(shape)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, key: bytes, posterior: Posterior) -> None:
        """Add a posterior, which is on the CPU; ValueError if the folder would be too large or cannot be written."""
        if key in self._keys:
            return
        self._keys.add(key)
        waiting = self._waiting[posterior.shape]
        waiting.append((key, posterior))
        if len(waiting) * posterior.nbytes >= SHARD:
            self._write(posterior.shape)

    def _write(self, shape: torch.Size) -> None:
        keys, posteriors = zip(*self._waiting.pop(shape), strict=True)
        # numpy, which reads them, has no bfloat16.
        stored = torch.stack(posteriors)
        stored = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored
        size = sum(path.stat().st_size for path in self.folder.glob(SHARDS))
        if size + stored.nbytes > self.most:
            raise ValueError(
                f"{self.folder} holds {size:,} bytes, and {stored.nbytes:,} more exceed {self.most:,}: raise "
                "codec.keep_on_disk_bytes (--keep-on-disk-bytes); existing latents stay usable"
            )
        tensors = {
            "keys": torch.from_numpy(np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES).copy()),
            "checksums": torch.tensor([checksum(one.numpy()) for one in stored]),
            "posteriors": stored,
        }
        name = blake2b(b"".join(keys), digest_size=16).hexdigest()
        with written_whole(self.folder / f"{name}.safetensors") as scratch:
            save_file(tensors, scratch)
        self.written += len(keys)
