"""The numbers of a study: the accuracy of every arm and its difference to the baseline, with confidence intervals.

Intervals over prompts (paired bootstrap, seeds averaged) show whether other prompts would give the same result for
these runs. Intervals over seeds (Student's t) show whether other runs would give it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import sqrt
from typing import Any

import numpy as np
from scipy.stats import t as student

from semantic_routing.analysis.report import MEANS
from semantic_routing.evaluation.records import CORRECT, LOSS, Record
from semantic_routing.evaluation.resampling import PromptSums, bootstrap, permutation_test, prompt_sums
from semantic_routing.evaluation.shapes import shapes_columns
from semantic_routing.evaluation.summary import Columns, without_nan
from semantic_routing.study.keep import kept_records
from semantic_routing.study.plan import Job, StudyArguments, jobs

RESAMPLES = 10_000
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Number:
    """An accuracy from 0 to 1, a loss, a difference of two, or a statistic of the runs."""

    mean: float
    """Mean over the seeds."""
    seeds: tuple[float, ...]
    """Value of each seed."""
    over_prompts: Interval | None
    """95 % interval over prompts; None for a number that does not depend on them."""
    over_seeds: Interval | None
    """95 % interval over seeds; None for one seed."""
    p: float | None = None
    """p-value of a difference: two-sided paired permutation test over prompts."""

    def to_json(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "seeds": list(self.seeds),
            "interval_over_prompts": None if self.over_prompts is None else list(self.over_prompts),
            "interval_over_seeds": None if self.over_seeds is None else list(self.over_seeds),
        } | ({} if self.p is None else {"p": self.p})


@dataclass(frozen=True, kw_only=True)
class Row:
    """A variant of an arm under one clock, with its numbers by column."""

    variant: str
    arm: str
    clock: str
    """Empty for the nominal clock."""
    accuracy: dict[str, Number]
    difference: dict[str, Number]
    """Difference to the baseline, or to the nominal clock for another clock. Empty for the baseline."""
    loss: dict[str, Number] = field(default_factory=dict)
    """Velocity loss on held-out pictures by column, with the nominal clock; empty if it was not measured."""
    loss_difference: dict[str, Number] = field(default_factory=dict)
    """Its difference to the baseline's; empty for the baseline."""

    @property
    def name(self) -> str:
        return f"{self.variant}, {self.clock} clock" if self.clock else self.variant


Pairs = Mapping[tuple[str, str], Mapping[str, Number]]
"""Differences of two variants by their names, and by column."""


def over_seeds(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Return Student's interval of the mean of independent runs; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / sqrt(len(values))
    half = float(student.ppf((1 + level) / 2, len(values) - 1)) * error
    return mean - half, mean + half


def read_rows(args: StudyArguments) -> list[Row]:
    """Return the rows of a finished study, baseline first; ValueError for missing evaluations and other prompts."""
    variants = variants_of(args)
    records = {
        (variant, clock): records_of(args, runs, clock)
        for variant, runs in variants.items()
        for clock in ("", *runs[0].clocks)
    }
    first = next(iter(variants))
    rows = []
    for (variant, clock), mine in records.items():
        base = records[variant, ""] if clock else records[first, ""][: len(mine)]  # of the same seeds
        has_loss = not clock and all(LOSS in found[0].scores for found in (*mine, *base))
        rows.append(
            Row(
                variant=variant,
                arm=variants[variant][0].arm,
                clock=clock,
                accuracy=numbers(mine),
                difference={} if (variant, clock) == (first, "") else numbers(mine, base),
                loss=numbers(mine, metric=LOSS) if has_loss else {},
                loss_difference=numbers(mine, base, metric=LOSS) if has_loss and variant != first else {},
            )
        )
    return rows


def read_pairs(args: StudyArguments) -> Pairs:
    """Return the differences of all variants with the nominal clock, by (one, other): one minus the other.

    Columns are the means over tags alone, and seeds those that both have.
    """
    records = {variant: records_of(args, runs, "") for variant, runs in variants_of(args).items()}
    found = {}
    for other, one in combinations(records, 2):
        means = {name: column for name, column in columns_of(records[one]).items() if name in MEANS}
        found[one, other] = difference(records[one], records[other], means)
    return found


def variants_of(args: StudyArguments) -> dict[str, list[Job]]:
    """Return the runs of each variant, seed by seed."""
    variants: dict[str, list[Job]] = {}
    for job in jobs(args):
        variants.setdefault(job.variant, []).append(job)
    return variants


def records_of(args: StudyArguments, runs: Sequence[Job], clock: str) -> list[list[Record]]:
    """Return the records of each run."""
    return [kept_records(args, job, clock) for job in runs]


def columns_of(runs: Sequence[Sequence[Record]]) -> Columns:
    """Return the columns for the tags of the runs' prompts."""
    return shapes_columns(tag for record in runs[0] for tag in record.tags)


def difference(
    one: Sequence[Sequence[Record]], other: Sequence[Sequence[Record]], columns: Columns
) -> dict[str, Number]:
    """Return the numbers of one minus the other over the seeds that both have."""
    seeds = min(len(one), len(other))
    return numbers(one[:seeds], other[:seeds], columns)


def numbers(
    mine: Sequence[Sequence[Record]],
    base: Sequence[Sequence[Record]] | None = None,
    columns: Columns | None = None,
    metric: str = CORRECT,
) -> dict[str, Number]:
    """Return the number of each column, by default of ``columns_of``, from the records of each seed.

    With ``base`` they are those of the difference to it.
    """
    ids = [record.id for record in mine[0]]
    if any([record.id for record in records] != ids for side in (mine, base or mine) for records in side):
        raise ValueError("the runs of this study were scored on different prompts: score them all with the same --n")
    found = {}
    for name, column in (columns_of(mine) if columns is None else columns).items():
        left = [prompt_sums(records, ids, metric, column) for records in mine]
        values, one, other = [s.value for s in left], _pooled(left), None
        if base is not None:
            right = [prompt_sums(records, ids, metric, column) for records in base]
            values, other = [a.value - b.value for a, b in zip(left, right, strict=True)], _pooled(right)
        found[name] = Number(
            mean=float(np.mean(values)),
            seeds=tuple(values),
            over_prompts=bootstrap(one, other, resamples=RESAMPLES, seed=0),
            over_seeds=over_seeds(values),
            p=None if other is None else permutation_test(one, other, resamples=RESAMPLES, seed=0),
        )
    return found


def _pooled(sums: Sequence[PromptSums]) -> PromptSums:
    """Add the sums of all seeds for each prompt."""
    return PromptSums(np.sum([s.totals for s in sums], axis=0), np.sum([s.counts for s in sums], axis=0))


def results_json(rows: Sequence[Row], pairs: Pairs, facts: Mapping[str, Any]) -> str:
    """Return all numbers as JSON."""
    table = [
        {
            "variant": row.variant,
            "arm": row.arm,
            "clock": row.clock or "nominal",
            "accuracy": {name: number.to_json() for name, number in row.accuracy.items()},
            "difference": {name: number.to_json() for name, number in row.difference.items()},
            "loss": {name: number.to_json() for name, number in row.loss.items()},
            "loss_difference": {name: number.to_json() for name, number in row.loss_difference.items()},
        }
        for row in rows
    ]
    differences = [
        {"one": one, "minus": other} | {name: number.to_json() for name, number in found.items()}
        for (one, other), found in pairs.items()
    ]
    found = without_nan({**facts, "rows": table, "pairs": differences})
    return json.dumps(found, indent=2, allow_nan=False) + "\n"
