"""The order of training samples and all that is random about them, as pure functions of (seed, position).

Nothing here has a state, so a run resumes at any step, on any machine, without replaying or saving anything.
Random numbers come from counter-based generators keyed by a hash of (purpose, seed, sample, epoch): a change
of augmentation does not move the noise, and neither depends on the batch that a sample happens to be in.

Grain's ``MapDataset`` shuffles and draws too, but its shuffle goes to another shard with every record, and its
generators are keyed by the position in the stream instead of (seed, sample, epoch).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from math import gcd, isqrt, lcm

import numpy as np
import numpy.typing as npt
from jaxtyping import Float32

IntArray = npt.NDArray[np.int64]

ROUNDS = 8
"""Rounds of the Feistel network; each half of an index is changed in every second one."""
_WORD = 2**64 - 1


def locate(seed: int, position: int, length: int) -> tuple[int, int]:
    """The (epoch, sample) at a position of the endless training stream over ``length`` samples.

    Each epoch has every sample once, in an order that is a pure function of (seed, epoch). It is a keyed
    permutation of 0..length - 1, evaluated at one place and never written out, so any length will do.
    """
    if length < 1 or position < 0:
        raise ValueError(f"position {position} of {length} samples; expected at least 0 of at least 1")
    epoch, place = divmod(position, length)
    return epoch, _permute(place, length, _keys(b"order", seed, epoch))


class ShardOrder:
    """An endless stream over records that lie in shards: each once an epoch, from few shards at a time.

    In every epoch the shards are permuted and taken in groups of ``window``; the records of a group are permuted
    among each other. So whoever reads along has ``window`` shards open, and everything is a pure function of
    (seed, position): the tables below only save their repetition.
    """

    def __init__(self, seed: int, sizes: Sequence[int], window: int = 16) -> None:
        """The records of each shard are counted by ``sizes``; shards may be empty, but not all."""
        if window < 1:
            raise ValueError(f"a window of {window} shards has no records; use at least 1")
        if min(sizes, default=0) < 0 or not sum(sizes):
            raise ValueError("there are no records to bring into an order")
        self.seed, self.window = seed, window
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self._length = int(self._ends[-1])
        self._latest: tuple[int, IntArray, IntArray] | None = None

    def __len__(self) -> int:
        """Records in one epoch."""
        return self._length

    def locate(self, position: int) -> tuple[int, int, int]:
        """The (epoch, shard, record of that shard) at a position of the stream; O(log shards) within an epoch."""
        if position < 0:
            raise ValueError(f"position {position}; expected at least 0")
        epoch, place = divmod(position, self._length)
        shards, ends = self._epoch(epoch)
        group, first, last = 0, 0, self._length
        if len(shards) > self.window:
            group = int(np.searchsorted(ends, place, side="right")) // self.window
            first = int(ends[group * self.window - 1]) if group else 0
            last = int(ends[min((group + 1) * self.window, len(ends)) - 1])
        within = _permute(place - first, last - first, _keys(b"window", self.seed, epoch, group))
        at = int(np.searchsorted(ends, first + within, side="right"))
        shard = int(shards[at])
        return epoch, shard, first + within - int(ends[at]) + int(self.sizes[shard])

    def place(self, index: int) -> tuple[int, int]:
        """The shard of the ``index``-th record as they lie, and its number in that shard."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + int(self.sizes[shard])

    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """The shards as an epoch visits them, and how many records have passed at the end of each."""
        latest = self._latest
        if latest is None or latest[0] != epoch:
            keys = _keys(b"shards", self.seed, epoch)
            shards = np.array([_permute(i, len(self.sizes), keys) for i in range(len(self.sizes))])
            latest = self._latest = (epoch, shards, np.cumsum(self.sizes[shards]))
        return latest[1], latest[2]


class Mixture:
    """An endless stream that takes from several sources in given proportions.

    After any number of positions each source has given its exact share, to within one: the quota method of
    apportionment (Balinski and Young, 1975), which repeats with a period as long as the sum of the weights as whole
    numbers without a common divisor. One period is held as a table.
    """

    LONGEST = 2**16

    def __init__(self, weights: Sequence[float]) -> None:
        """Weights count relative to their sum and are taken as the decimals that they are written as."""
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights {tuple(weights)} must be above 0, one for each source")
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(share * lcm(*(other.denominator for other in exact))) for share in exact]
        whole = [share // gcd(*whole) for share in whole]
        period = sum(whole)
        if period > self.LONGEST:
            raise ValueError(
                f"weights {tuple(weights)} need {period} positions to come out even; round them so that, as whole "
                f"numbers, they sum to at most {self.LONGEST}, such as 70 20 10"
            )
        self.weights = tuple(whole)
        self._source, self._place = np.empty(period, np.int32), np.empty(period, np.int32)
        given = [0] * len(whole)
        for position in range(period):
            behind = [i for i, share in enumerate(whole) if given[i] * period < share * (position + 1)]
            source = min(behind, key=lambda i: (given[i] + 1) / whole[i])
            self._source[position], self._place[position] = source, given[source]
            given[source] += 1

    def locate(self, position: int) -> tuple[int, int]:
        """The source at a position of the mixture, and the position in that source's own stream."""
        turn, place = divmod(position, len(self._source))
        source = int(self._source[place])
        return source, turn * self.weights[source] + int(self._place[place])


def stream_seed(seed: int, source: int) -> int:
    """The seed of one source of a mixture, so that equal samples of two sources differ; the first keeps the run's."""
    return seed if source == 0 else int.from_bytes(_digest(b"source", (seed, source), 8), "little")


def another(seed: int, sample: int, epoch: int, attempt: int, length: int) -> int:
    """The ``attempt``-th candidate (from 1) of 0..length - 1 to stand in for a damaged sample."""
    digest = _digest(b"another", (seed, sample, epoch, attempt), 8)
    return int.from_bytes(digest, "little") % length


def _keys(purpose: bytes, *numbers: int) -> tuple[int, ...]:
    return struct.unpack(f"<{ROUNDS}Q", _digest(purpose, numbers, 8 * ROUNDS))


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
