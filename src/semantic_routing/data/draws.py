"""Random numbers of a training sample as functions of (seed, sample, epoch)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import Float32

WORD = 2**64 - 1


def stream_seed(seed: int, source: int) -> int:
    """Derive the seed of one source of a mixture, so that equal sample numbers differ; the first has the run's seed."""
    return seed if source == 0 else int.from_bytes(digest_of(b"source", (seed, source), 8), "little")


def another(seed: int, sample: int, epoch: int, attempt: int, length: int) -> int:
    """Draw the ``attempt``-th candidate (from 1) of 0..length - 1 to replace a damaged sample."""
    digest = digest_of(b"another", (seed, sample, epoch, attempt), 8)
    return int.from_bytes(digest, "little") % length


def digest_of(purpose: bytes, numbers: tuple[int, ...], size: int) -> bytes:
    """Hash numbers for a purpose into ``size`` bytes."""
    if min(numbers) < 0 or max(numbers) > WORD:
        raise ValueError(f"seed, sample and epoch must be from 0 to 2**64 - 1, not {numbers}")
    return blake2b(struct.pack(f"<{len(numbers)}Q", *numbers), digest_size=size, person=purpose).digest()


def _generator(purpose: bytes, seed: int, sample: int, epoch: int) -> np.random.Generator:
    key = np.frombuffer(digest_of(purpose, (seed, sample, epoch), 16), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def sample_rng(seed: int, sample: int, epoch: int) -> np.random.Generator:
    """Return the random generator of a sample in an epoch."""
    return _generator(b"sample", seed, sample, epoch)


@dataclass(frozen=True)
class Draw:
    """The random numbers of one sample in a training step."""

    noise: Float32[np.ndarray, "*latent"]
    """Standard normal, in the shape of the latents."""
    time_uniform: float
    """In [0, 1): determines the time."""
    drop_uniform: float
    """In [0, 1): the prompt is dropped if this is below the dropout probability."""


def draw(seed: int, sample: int, epoch: int, shape: tuple[int, ...]) -> Draw:
    """Draw noise, time and dropout for a sample in an epoch; independent of ``sample_rng``."""
    rng = _generator(b"draw", seed, sample, epoch)
    time_uniform, drop_uniform = rng.random(2, dtype=np.float32).tolist()
    return Draw(rng.standard_normal(shape, dtype=np.float32), time_uniform, drop_uniform)


def posterior_noise(seed: int, sample: int, epoch: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "*latent"]:
    """Draw the standard normal noise that samples a codec's posterior; independent of ``draw``."""
    return _generator(b"posterior", seed, sample, epoch).standard_normal(shape, dtype=np.float32)
