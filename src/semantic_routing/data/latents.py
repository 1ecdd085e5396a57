"""Cached latents of images that a VAE has encoded before training: their keys, and how they are read. Imports no torch.

The folder holds the output of one VAE, in shards that appear completely or not at all (``latents_writer.py``). A shard
is a safetensors file with three tensors: ``posteriors`` [N, 2, C, h, w], mean and standard deviation of N images of one
size; their ``keys`` [N, 16]; and their ``checksums`` [N]. The key of an image is a digest of everything that determines
its pixels. An image that was changed, cropped to another size or mirrored therefore has another key, and data may be
moved.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from safetensors import SafetensorError, safe_open

from semantic_routing.common.files import read_json
from semantic_routing.common.images.decode import Limits

RULE = 1
"""Number of the rule by which pictures become pixels; raise it whenever ``decode`` returns other ones."""
KEY_BYTES = 16
FACTS = "vae.json"
"""File of the folder with the facts of its VAE."""
SHARDS = "*.safetensors"
OPEN = 128
"""Shards that are mapped into memory at the same time."""


def record_key(image: bytes, height: int, width: int, limits: Limits, *, mirrored: bool) -> bytes:
    """Return the key of an encoded picture that is cropped to ``height`` x ``width`` pixels."""
    return _digest(image, "record", height, width, limits, mirrored)


def pixels_key(image: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """Return the key of a picture that was drawn and not read."""
    return _digest(image.tobytes(), "pixels", image.shape)


def _digest(data: bytes, *facts: object) -> bytes:
    digest = blake2b(repr((RULE, *facts)).encode(), digest_size=KEY_BYTES)
    digest.update(data)
    return digest.digest()


class KeptLatents:
    """A folder of cached posteriors, memory-mapped; any number of processes may read it. Picklable.

    It contains what was there at the first access. A damaged shard or posterior is reported and treated as absent.
    """

    def __init__(self, folder: Path) -> None:
        """Read ``folder``, which may be empty or absent, when a key is first looked up."""
        self.folder = folder
        self._open = lru_cache(maxsize=OPEN)(_opened)
        self._reported: set[Path] = set()

    def __reduce__(self) -> tuple[type[KeptLatents], tuple[Path]]:
        return KeptLatents, (self.folder,)

    def __len__(self) -> int:
        """Return the number of posteriors."""
        return len(self._index[0])

    def get(self, key: bytes) -> Shaped[np.ndarray, "2 C h w"] | None:
        """Return the posterior of a key, bfloat16 as int16; None if it is absent or damaged."""
        keys, shards, rows, checksums = self._index
        wanted = np.array(key, f"S{KEY_BYTES}")
        first, last = (int(np.searchsorted(keys, wanted, side)) for side in ("left", "right"))
        for i in range(first, last):  # more than one where a damaged one was made again
            path = self._paths[shards[i]]
            try:
                posterior: np.ndarray = self._open(path).get_slice("posteriors")[int(rows[i])]
            except (OSError, SafetensorError):
                self._report(path)
                continue
            if checksum(posterior) == checksums[i]:
                return posterior
            self._report(path)
        return None

    def facts(self) -> dict[str, dict[str, str]] | None:
        """Return the facts about the VAE, by kind; None if the folder holds no latents yet."""
        path = self.folder / FACTS
        if not path.exists():
            if next(self.folder.glob(SHARDS), None) is not None:
                raise ValueError(
                    f"{self.folder} holds safetensors files, but no {FACTS}: it is not a folder of latents"
                )
            return None
        found = read_json(path, "a folder's facts about its VAE")
        if not isinstance(found, dict) or not all(isinstance(facts, dict) for facts in found.values()):
            raise ValueError(f"{path} is damaged: delete the folder and make its latents again")
        return found

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(SHARDS))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Keys in order, and for each the number of its shard, its row there and its checksum."""
        keys, shards, rows, checksums = [np.empty(0, f"S{KEY_BYTES}")], [], [], []
        for number, path in enumerate(self._paths):
            try:
                file = self._open(path)
                names = np.ascontiguousarray(file.get_tensor("keys")).view(f"S{KEY_BYTES}").ravel()
                sums = file.get_tensor("checksums")
            except (OSError, SafetensorError):
                self._report(path)
                continue
            keys.append(names)
            checksums.append(sums)
            shards.append(np.full(len(names), number, np.int32))
            rows.append(np.arange(len(names), dtype=np.int32))
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        numbers = [np.concatenate([np.empty(0, np.int64), *parts])[order] for parts in (shards, rows, checksums)]
        return joined[order], numbers[0], numbers[1], numbers[2]

    def _report(self, path: Path) -> None:
        if path not in self._reported:
            self._reported.add(path)
            warnings.warn(f"{path} is damaged: delete it; its pictures are encoded again", stacklevel=3)


def _opened(path: Path) -> Any:
    return safe_open(path, framework="np")


def checksum(posterior: np.ndarray) -> int:
    """Return the CRC-32 of a posterior's bytes."""
    return zlib.crc32(np.ascontiguousarray(posterior).view(np.uint8).data)


def check_facts(
    folder: Path, found: Mapping[str, Mapping[str, str]], vae: Mapping[str, str], rounding: Mapping[str, str]
) -> list[str]:
    """Compare a folder's facts with those of a VAE; return messages about what changes latents only by rounding.

    Raises ValueError if the folder's latents belong to another VAE, dtype or tiling.
    """
    other = [
        f"{name} {found['vae'].get(name)} instead of {value}" if len(value) < 40 else f"other {name}"
        for name, value in vae.items()
        if found["vae"].get(name) != value
    ]
    if other:
        raise ValueError(
            f"{folder} holds latents of another VAE ({', '.join(other)}): give another --codec.keep-on-disk"
        )
    changed = [
        f"{name} {found['rounding'].get(name)!r} and not {value!r}"
        for name, value in rounding.items()
        if found["rounding"].get(name) != value
    ]
    return [f"the latents in {folder} were made with {', '.join(changed)}: they differ by rounding"] if changed else []


def facts_file(vae: Mapping[str, str], rounding: Mapping[str, str]) -> str:
    """Return the content of the file ``FACTS``."""
    return json.dumps({"vae": dict(vae), "rounding": dict(rounding)}, indent=2) + "\n"
