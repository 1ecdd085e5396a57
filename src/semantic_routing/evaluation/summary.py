"""Means, intervals and tables of the records of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, nan, sqrt
from typing import Any, SupportsFloat

import numpy as np

from semantic_routing.evaluation.records import CORRECT, MISSING, UNREADABLE, UNSCORED, Record

Z95 = 1.959963984540054
"""The standard normal distribution's 0.975 quantile."""
Column = tuple[tuple[str, ...], ...]
"""A number of the table: the plain mean over these groups of tags, each the mean over all images with such a tag."""
Columns = Mapping[str, Column]
"""The numbers of the table by name."""


def wilson(correct: float | int, n: float | int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of ``correct`` among ``n`` > 0 independent trials."""
    p = correct / n
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return max(0.0, center - half), min(1.0, center + half)


def spread(values: Sequence[SupportsFloat]) -> dict[str, Any]:
    """Return mean, unbiased standard deviation and number of values; nan if there are too few."""
    array = np.array([float(value) for value in values])
    return {
        "mean": float(array.mean()) if len(array) else nan,
        "std": float(array.std(ddof=1)) if len(array) > 1 else nan,
        "n": len(array),
    }


def grouped(records: Iterable[Record], column: Column, metric: str) -> list[list[float]]:
    """Return the scores that a column averages, by group, without unscored images."""
    scored = [(set(r.tags), score) for r in records if (score := r.scores.get(metric)) is not None]
    return [[score for tags, score in scored if tags & set(group)] for group in column]


def gaps(records: Iterable[Record], metrics: Sequence[str]) -> dict[str, int]:
    """Count the images that are not in any mean, by reason: missing, unreadable, or unscored by some metric."""
    found = dict.fromkeys([MISSING, UNREADABLE, *(f"{UNSCORED} {metric}" for metric in metrics)], 0)
    for record in records:
        if record.gap in (MISSING, UNREADABLE):
            found[record.gap] += 1
            continue
        for metric in metrics:
            found[f"{UNSCORED} {metric}"] += record.scores.get(metric) is None
    return {name: n for name, n in found.items() if n}


def tag_columns(tags: Iterable[str]) -> dict[str, Column]:
    """Return the columns ``overall``, the mean over images, and every tag."""
    known = tuple(dict.fromkeys(tags))
    columns: dict[str, Column] = {"overall": (known,)}
    return columns | {tag: ((tag,),) for tag in known}


def summarize(records: Sequence[Record], columns: Columns) -> dict[str, Any]:
    """Return accuracies with image counts and 95 % intervals: ``{"accuracy", "n", "interval"}`` by column.

    Intervals are Wilson's; that of a mean over k groups takes the number of images that would give the same variance
    if all groups were equally hard: k² / sum(1 / n_k). Images without a score are left out; ``gaps`` counts them.
    """
    if not records:
        raise ValueError("there are no records to summarize")
    summary: dict[str, Any] = {"accuracy": {}, "n": {}, "interval": {}, "gaps": gaps(records, [CORRECT])}
    for name, column in columns.items():
        groups = grouped(records, column, CORRECT)
        if not all(groups):
            continue
        mean = sum(sum(group) / len(group) for group in groups) / len(groups)
        effective = len(groups) ** 2 / sum(1 / len(group) for group in groups)
        summary["accuracy"][name] = mean
        summary["n"][name] = sum(map(len, groups))
        summary["interval"][name] = list(wilson(mean * effective, effective))
    return summary


def markdown_table(summary: dict[str, Any]) -> str:
    """Format a summary as a Markdown table with a row for each accuracy."""
    lines = ["| | accuracy | 95 % interval | images |", "| --- | ---: | :---: | ---: |"]
    for name, accuracy in summary["accuracy"].items():
        low, high = summary["interval"][name]
        lines.append(f"| {name} | {accuracy:.3f} | {low:.3f} to {high:.3f} | {summary['n'][name]} |")
    return "\n".join(lines) + "\n" + gap_note(summary["gaps"])


def scores_table(summary: dict[str, Any]) -> str:
    """Format a summary of scores, ``{"scores": {metric: {name: spread}}}``, as Markdown: mean ± std (images)."""
    scores: dict[str, dict[str, dict[str, Any]]] = summary["scores"]
    names = list(dict.fromkeys(name for by_name in scores.values() for name in by_name))
    lines = [f"| | {' | '.join(scores)} |", f"| --- |{' ---: |' * len(scores)}"]
    lines += [f"| {name} | {' | '.join(_cell(by_name[name]) for by_name in scores.values())} |" for name in names]
    return "\n".join(lines) + "\n\nMean ± standard deviation (images).\n" + gap_note(summary["gaps"])


def _cell(row: Mapping[str, Any]) -> str:
    mean, std = (None if row[key] is None or not isfinite(row[key]) else row[key] for key in ("mean", "std"))
    if mean is None:
        return f"none ({row['n']})"
    return f"{mean:.4f} ({row['n']})" if std is None else f"{mean:.4f} ± {std:.4f} ({row['n']})"


def gap_note(found: Mapping[str, int]) -> str:
    """Return the note under a table about images that are not in any of its means."""
    return f"\nNot in any mean: {', '.join(f'{n} {name}' for name, n in found.items())}.\n" if found else ""


def without_nan(value: Any) -> Any:
    """Replace NaN in nested results by None, because JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
