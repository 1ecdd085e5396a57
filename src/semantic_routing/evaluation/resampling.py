"""Bootstrap intervals and paired permutation tests over prompts: the uncertainty of a benchmark's numbers.

The unit is the prompt: images of one prompt are correlated, so they are drawn, or exchanged, together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt16

from semantic_routing.evaluation.records import Record
from semantic_routing.evaluation.summary import Column

BATCH = 500
"""Resamples computed at once."""
Sums = Float[np.ndarray, "groups prompts"]


@dataclass(frozen=True)
class PromptSums:
    """The scores of one column, summed over the images of every prompt, by group."""

    totals: Sums
    counts: Sums
    """Scored images."""

    @property
    def value(self) -> float:
        """Return the column's number: the plain mean of the groups' means over images."""
        return float(_values(np.ones((1, self.totals.shape[1])), self)[0])


def prompt_sums(records: Sequence[Record], ids: Sequence[str], metric: str, column: Column) -> PromptSums:
    """Sum a column by prompt, in the order of ``ids``; unscored images do not count."""
    places = {name: place for place, name in enumerate(ids)}
    totals, counts = (np.zeros((len(column), len(ids))) for _ in range(2))
    groups = [set(group) for group in column]
    for record in records:
        score = record.scores.get(metric)
        if score is None:
            continue
        for row, group in enumerate(groups):
            if group.intersection(record.tags):
                totals[row, places[record.id]] += score
                counts[row, places[record.id]] += 1
    return PromptSums(totals, counts)


def bootstrap(
    sums: PromptSums, other: PromptSums | None = None, *, resamples: int, seed: int, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile interval of the column's number, or of its difference to ``other``.

    Prompts are drawn with replacement; both sides of a difference get the same draws, so that they are paired. The
    interval is nan if resamples have no scored image of some group.
    """
    draws = []
    for weights in _draws(sums.totals.shape[1], resamples, seed):
        values = _values(weights, sums)
        draws.append(values if other is None else values - _values(weights, other))
    tail = 50 * (1 - level)
    low, high = np.percentile(np.concatenate(draws), [tail, 100 - tail])
    return float(low), float(high)


def permutation_test(sums: PromptSums, other: PromptSums, *, resamples: int, seed: int) -> float:
    """Return the two-sided p-value: how often random exchanges of prompts' sides give a difference at least as large.

    The observed arrangement counts as one of them, so p is at least 1 / (resamples + 1).
    """
    observed = abs(sums.value - other.value)
    if not np.isfinite(observed):
        return float("nan")
    extreme = 0
    for swap in _swaps(sums.totals.shape[1], resamples, seed):
        difference = _mixed(swap, sums, other) - _mixed(1 - swap, sums, other)
        # Equal arrangements may differ in the last bits.
        extreme += int((np.abs(difference) >= observed - 1e-12).sum())
    return (extreme + 1) / (resamples + 1)


def _values(weights: Float[np.ndarray, "R prompts"], sums: PromptSums) -> Float[np.ndarray, " R"]:
    """Return the column's number under each row of prompt weights."""
    return _ratio(weights @ sums.totals.T, weights @ sums.counts.T)


def _mixed(swap: Float[np.ndarray, "R prompts"], sums: PromptSums, other: PromptSums) -> Float[np.ndarray, " R"]:
    """Return the column's number with the prompts marked 1 from ``other`` and the rest from ``sums``."""
    stay = 1 - swap
    return _ratio(
        stay @ sums.totals.T + swap @ other.totals.T,
        stay @ sums.counts.T + swap @ other.counts.T,
    )


def _ratio(totals: Float[np.ndarray, "R groups"], counts: Float[np.ndarray, "R groups"]) -> Float[np.ndarray, " R"]:
    means = np.divide(totals, counts, out=np.full_like(totals, np.nan), where=counts > 0)
    return means.mean(axis=1)


def _draws(prompts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "R prompts"]]:
    """Draw the count of each prompt, a row for each resample."""
    yield from (rows.astype(float) for rows in _counts(prompts, resamples, seed))


def _swaps(prompts: int, resamples: int, seed: int) -> Iterator[Float[np.ndarray, "R prompts"]]:
    """Draw 1 for prompts that change sides, a row for each resample."""
    yield from (rows.astype(float) for rows in _coins(prompts, resamples, seed))


# All columns of a table are resampled alike, and drawing takes much longer than what is done with the draws.
@lru_cache(maxsize=1)
def _counts(prompts: int, resamples: int, seed: int) -> list[UInt16[np.ndarray, "R prompts"]]:
    rng = np.random.default_rng(seed)
    share = np.full(prompts, 1 / prompts)
    return [rng.multinomial(prompts, share, size=size).astype(np.uint16) for size in _batches(resamples)]


@lru_cache(maxsize=1)
def _coins(prompts: int, resamples: int, seed: int) -> list[Bool[np.ndarray, "R prompts"]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 2, (size, prompts)).astype(bool) for size in _batches(resamples)]


def _batches(resamples: int) -> Iterator[int]:
    for first in range(0, resamples, BATCH):
        yield min(BATCH, resamples - first)
