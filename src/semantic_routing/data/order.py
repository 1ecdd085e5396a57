"""The order of training samples and all that is random about them, as pure functions of (seed, position).

Nothing here has a state, so a run resumes at any step, on any machine, without replaying or saving anything.
Random numbers come from counter-based generators keyed by a hash of (purpose, seed, sample, epoch): a change
of augmentation does not move the noise, and neither depends on the batch that a sample happens to be in.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count
from math import isqrt
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

T = TypeVar("T")

ROUNDS = 8
"""Rounds of the Feistel network; each half of an index is changed in every second one."""
_WORD = 2**64 - 1


@dataclass(frozen=True)
class Example:
    """A picture and one caption of it."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str


@runtime_checkable
class Source(Protocol):
    """Pictures with captions, at random access."""

    def __len__(self) -> int:
        """Number of samples in one epoch."""
        ...

    def load(self, sample: int, rng: np.random.Generator) -> Example:
        """The sample 0..len - 1; ``rng`` decides augmentation and which of several captions is taken."""
        ...

    def captions(self, count: int) -> list[str]:
        """Up to ``count`` captions to watch the training by."""
        ...


def locate(seed: int, position: int, length: int) -> tuple[int, int]:
    """The (epoch, sample) at a position of the endless training stream over ``length`` samples.

    Each epoch has every sample once, in an order that is a pure function of (seed, epoch). It is a keyed
    permutation of 0..length - 1, evaluated at one place and never written out, so any length will do.
    """
    if length < 1 or position < 0:
        raise ValueError(f"position {position} of {length} samples; expected at least 0 of at least 1")
    epoch, place = divmod(position, length)
    digest = _digest(b"order", (seed, epoch), 8 * ROUNDS)
    return epoch, _permute(place, length, struct.unpack(f"<{ROUNDS}Q", digest))


def _permute(index: int, length: int, keys: tuple[int, ...]) -> int:
    # A Feistel network over a table of rows x columns, just larger than the length (Black and Rogaway, 2002).
    # It permutes the table; an index that lands behind the length walks on until it is back inside.
    rows = isqrt(length - 1) + 1
    columns = -(-length // rows)
    while True:
        row, column = divmod(index, columns)
        for i in range(0, ROUNDS, 2):
            row = (row + _scramble(column ^ keys[i])) % rows
            column = (column + _scramble(row ^ keys[i + 1])) % columns
        index = row * columns + column
        if index < length:
            return index


def _scramble(x: int) -> int:
    # Two multiplications and shifts, after the finalisers of splitmix64 and its kin.
    x = x * 0x9E3779B97F4A7C15 & _WORD
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & _WORD
    return x ^ x >> 32


def _digest(purpose: bytes, numbers: tuple[int, ...], size: int) -> bytes:
    if min(numbers) < 0 or max(numbers) > _WORD:
        raise ValueError(f"seed, sample and epoch must be from 0 to 2**64 - 1, not {numbers}")
    return blake2b(struct.pack(f"<{len(numbers)}Q", *numbers), digest_size=size, person=purpose).digest()


def _generator(purpose: bytes, seed: int, sample: int, epoch: int) -> np.random.Generator:
    key = np.frombuffer(_digest(purpose, (seed, sample, epoch), 16), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def sample_rng(seed: int, sample: int, epoch: int) -> np.random.Generator:
    """The generator that ``Source.load`` gets for a sample in an epoch."""
    return _generator(b"sample", seed, sample, epoch)


@dataclass(frozen=True)
class Draw:
    """What the training step needs at random for one sample."""

    noise: Float32[np.ndarray, "*latent"]
    """Standard normal, of the shape of the latents."""
    time_uniform: float
    """In [0, 1): becomes the time of the path."""
    drop_uniform: float
    """In [0, 1): the prompt is dropped where it is below the dropout's probability."""


def draw(seed: int, sample: int, epoch: int, shape: tuple[int, ...]) -> Draw:
    """Noise, time and dropout for a sample in an epoch; independent of ``sample_rng``."""
    rng = _generator(b"draw", seed, sample, epoch)
    time_uniform, drop_uniform = rng.random(2, dtype=np.float32).tolist()
    return Draw(rng.standard_normal(shape, dtype=np.float32), time_uniform, drop_uniform)


def posterior_noise(seed: int, sample: int, epoch: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "*latent"]:
    """Standard normal noise that picks a codec's latents from their posterior; independent of ``draw``."""
    return _generator(b"posterior", seed, sample, epoch).standard_normal(shape, dtype=np.float32)


@dataclass(frozen=True)
class Batch:
    """All that one training step reads."""

    images: UInt8[Tensor, "B H W 3"]
    captions: list[str]
    noise: Float[Tensor, "B *latent"]
    posterior_noise: Float[Tensor, "B *latent"] | None
    """For the codec's ``encode``; None where it needs none."""
    time_uniform: Float[Tensor, " B"]
    drop_uniform: Float[Tensor, " B"]
    samples: list[tuple[int, int]]
    """(epoch, sample) of each row."""


def load_batch(
    source: Source,
    seed: int,
    step: int,
    batch_size: int,
    noise_shape: tuple[int, ...],
    *,
    posterior: bool = False,
) -> Batch:
    """The batch of one step: positions ``step * batch_size`` up to ``(step + 1) * batch_size`` of the stream.

    ``noise_shape`` is the latents' (``Codec.latent_shape``); ``posterior`` is ``Codec.has_posterior``.
    """
    if batch_size < 1 or step < 0:
        raise ValueError(f"batch_size {batch_size} at step {step}; expected at least 1 at a step from 0")
    first = step * batch_size
    samples = [locate(seed, position, len(source)) for position in range(first, first + batch_size)]
    examples = [source.load(sample, sample_rng(seed, sample, epoch)) for epoch, sample in samples]
    draws = [draw(seed, sample, epoch, noise_shape) for epoch, sample in samples]
    extra = [posterior_noise(seed, sample, epoch, noise_shape) for epoch, sample in samples if posterior]
    return Batch(
        images=torch.from_numpy(np.stack([example.image for example in examples])),
        captions=[example.caption for example in examples],
        noise=torch.from_numpy(np.stack([d.noise for d in draws])),
        posterior_noise=torch.from_numpy(np.stack(extra)) if posterior else None,
        time_uniform=torch.tensor([d.time_uniform for d in draws], dtype=torch.float32),
        drop_uniform=torch.tensor([d.drop_uniform for d in draws], dtype=torch.float32),
        samples=samples,
    )


def prefetch(load: Callable[[int], T], start: int = 0, *, ahead: int = 2) -> Generator[T, None, None]:
    """Yield ``load(start)``, ``load(start + 1)`` ... without end, ``ahead`` of them made early on a thread.

    An exception of ``load`` is raised here, in its turn. The thread ends when the iterator is closed or
    dropped, after the ``load`` that it is at.
    """
    if ahead < 1:
        raise ValueError(f"ahead is {ahead}; expected at least 1")
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    waiting: deque[Future[T]] = deque()
    try:
        for step in count(start):
            waiting.append(pool.submit(load, step))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
