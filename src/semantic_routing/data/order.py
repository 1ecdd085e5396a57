"""The order of training samples as pure functions of (seed, position).

There is no state, so a run resumes at any step, on any machine, without replaying or saving anything. Grain's
``MapDataset`` also shuffles, but its shuffle reads every record from a different shard.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, isqrt, lcm

import numpy as np
import numpy.typing as npt

from semantic_routing.data.draws import WORD, digest_of

IntArray = npt.NDArray[np.int64]

ROUNDS = 8
"""Rounds of the Feistel network; each changes one half of the index."""


def locate(seed: int, position: int, length: int) -> tuple[int, int]:
    """Return the (epoch, sample) at a position of the endless training stream over ``length`` samples.

    Each epoch has every sample once, in an order that is a pure function of (seed, epoch): a keyed permutation of
    0..length - 1, evaluated at one place, so that no table limits the length.
    """
    if length < 1 or position < 0:
        raise ValueError(f"position {position} of {length} samples; expected at least 0 of at least 1")
    epoch, place = divmod(position, length)
    return epoch, _permute(place, length, _keys(b"order", seed, epoch))


class ShardOrder:
    """An endless stream over the records of shards: each record once per epoch, from few shards at a time.

    Every epoch permutes the shards, takes them in groups of ``window``, and permutes the records of each group. So at
    most ``window`` shards are open, and everything is a pure function of (seed, position); the tables are only a cache.
    """

    def __init__(self, seed: int, sizes: Sequence[int], window: int = 16) -> None:
        """Order shards with ``sizes`` records each; some of them may be empty."""
        if window < 1:
            raise ValueError(f"a window of {window} shards has no records; use at least 1")
        if min(sizes, default=0) < 0 or not sum(sizes):
            raise ValueError("there are no records to order")
        self.seed, self.window = seed, window
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(self.sizes)
        self._length = int(self._ends[-1])
        self._latest: tuple[int, IntArray, IntArray] | None = None

    def __len__(self) -> int:
        """Records in one epoch."""
        return self._length

    def locate(self, position: int) -> tuple[int, int, int]:
        """Return (epoch, shard, record of that shard) at a position of the stream; O(log shards) within an epoch."""
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
        """Return the shard of the ``index``-th record in stored order, and its number in that shard."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard]) + int(self.sizes[shard])

    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Return the shards in the order of an epoch, and the number of records up to the end of each."""
        latest = self._latest
        if latest is None or latest[0] != epoch:
            keys = _keys(b"shards", self.seed, epoch)
            shards = np.array([_permute(i, len(self.sizes), keys) for i in range(len(self.sizes))])
            latest = self._latest = (epoch, shards, np.cumsum(self.sizes[shards]))
        return latest[1], latest[2]


class Mixture:
    """An endless stream that takes from several sources in given proportions.

    After any number of positions each source has given its exact share, to within one: the quota method of
    apportionment (Balinski and Young, 1975). Its period is the sum of the weights as integers without a common divisor.
    One period is kept as a table.
    """

    LONGEST = 2**16

    def __init__(self, weights: Sequence[float]) -> None:
        """Mix by ``weights``, relative to their sum and exact to their written decimals."""
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ValueError(f"weights {tuple(weights)} must be above 0, one for each source")
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(share * lcm(*(other.denominator for other in exact))) for share in exact]
        whole = [share // gcd(*whole) for share in whole]
        period = sum(whole)
        if period > self.LONGEST:
            raise ValueError(
                f"weights {tuple(weights)} repeat only after {period} positions; round them so that, as whole "
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
        """Return the source at a position of the mixture, and the position in that source's stream."""
        turn, place = divmod(position, len(self._source))
        source = int(self._source[place])
        return source, turn * self.weights[source] + int(self._place[place])


def _keys(purpose: bytes, *numbers: int) -> tuple[int, ...]:
    return struct.unpack(f"<{ROUNDS}Q", digest_of(purpose, numbers, 8 * ROUNDS))


def _permute(index: int, length: int, keys: tuple[int, ...]) -> int:
    # A Feistel network over a table of rows x columns, just larger than the length (Black and Rogaway, 2002).
    # It permutes the table; an index beyond the length is permuted again until it is inside.
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
    # Two multiplications and shifts, as in the finaliser of splitmix64.
    x = x * 0x9E3779B97F4A7C15 & WORD
    x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 & WORD
    return x ^ x >> 32
