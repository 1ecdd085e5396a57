"""The comparison of evaluations as Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan

from semantic_routing.evaluation.records import CORRECT, LOSS


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the table; metrics from 0 to 1 in percent, the loss in thousandths."""

    label: str
    benchmark: str
    metric: str
    column: str
    value: float
    low: float
    high: float
    n: int
    """Scored images."""
    difference: float = nan
    """To the baseline."""
    difference_low: float = nan
    difference_high: float = nan
    p: float = nan

    @property
    def key(self) -> tuple[str, str, str]:
        return self.benchmark, self.metric, self.column


def _rows(cells: Sequence[Cell]) -> tuple[list[tuple[str, str, str]], dict[str, dict[tuple[str, str, str], Cell]]]:
    """Return the columns, and the cells of each by label."""
    rows: dict[str, dict[tuple[str, str, str], Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.label, {})[cell.key] = cell
    return list(dict.fromkeys(cell.key for cell in cells)), rows


def _heads(keys: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the columns' headings: benchmark, metric and name, as far as they differ."""
    several = len({k[0] for k in keys}) > 1
    metrics = len({k[1] for k in keys}) > 1
    return [
        " ".join([benchmark] * several + [metric] * (metrics and metric != CORRECT) + [name] * (not several)).replace(
            "_", " "
        )
        for benchmark, metric, name in keys
    ]


def _ranks(cells: Sequence[Cell]) -> tuple[float, float]:
    """Return the best and the second best number of a column, as shown; the lowest loss is best."""
    more = cells[0].metric != LOSS
    first, second, *_ = [*sorted({round(c.value, 2) for c in cells if isfinite(c.value)}, reverse=more), nan, nan]
    return first, second


def _styled(
    cells: Sequence[Cell], best: Callable[[str], str], second: Callable[[str], str]
) -> dict[tuple[str, tuple[str, str, str]], str]:
    """Format every number; mark the best and the second best of each column if there are several rows."""
    keys, rows = _rows(cells)
    shown = {}
    for key in keys:
        column = [row[key] for row in rows.values() if key in row]
        first, next_best = _ranks(column)
        for cell in column:
            text = f"{cell.value:.2f}" if isfinite(cell.value) else "–"
            rank = round(cell.value, 2)
            style = best if rank == first else second if rank == next_best else str
            shown[cell.label, key] = style(text) if len(rows) > 1 else text
    return shown


def markdown(cells: Sequence[Cell], baseline: str, notes: Sequence[str]) -> str:
    """Return a row for each evaluation, and one below it with differences."""
    keys, rows = _rows(cells)
    shown = _styled(cells, lambda text: f"**{text}**", lambda text: f"<u>{text}</u>")
    lines = [f"| | {' | '.join(map(_plain, _heads(keys)))} |", "| --- |" + " ---: |" * len(keys)]
    for label, row in rows.items():
        numbers = [f"{shown[label, k]}{_interval(row[k].low, row[k].high, '.2f')}" if k in row else "" for k in keys]
        lines.append(f"| {_plain(label)} | {' | '.join(numbers)} |")
        if any(isfinite(cell.difference) for cell in row.values()):
            lines.append(f"| − {_plain(baseline)} | {' | '.join(_difference(row.get(key)) for key in keys)} |")
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n"


def _plain(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _interval(low: float, high: float, form: str) -> str:
    """Format an interval in brackets; empty if resamples give none."""
    return f" [{low:{form}}, {high:{form}}]" if isfinite(low) and isfinite(high) else ""


def _difference(cell: Cell | None) -> str:
    if cell is None or not isfinite(cell.difference):
        return ""
    if not isfinite(cell.p):
        return f"{cell.difference:+.2f}"
    return f"{cell.difference:+.2f}{_interval(cell.difference_low, cell.difference_high, '+.2f')} {_p(cell.p)}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def comma_separated(cells: Sequence[Cell], baseline: str, notes: Sequence[str]) -> str:
    """Return a CSV line for each unrounded number; missing ones are empty."""
    text = io.StringIO()
    names = list(Cell.__dataclass_fields__)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "baseline"])
    for cell in cells:
        values = [getattr(cell, name) for name in names]
        writer.writerow(["" if isinstance(v, float) and not isfinite(v) else v for v in values] + [baseline])
    return text.getvalue()


def latex(cells: Sequence[Cell], baseline: str, notes: Sequence[str]) -> str:
    """Return a booktabs table, with differences in small type below the numbers as in the paper's Table 2."""
    keys, rows = _rows(cells)
    shown = _styled(cells, lambda text: rf"\textbf{{{text}}}", lambda text: rf"\underline{{{text}}}")
    lines = [rf"% {note}" for note in notes]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(keys)}}}", r"\toprule"]
    lines += [" & ".join(["Method", *map(_escaped, _heads(keys))]) + r" \\", r"\midrule"]
    for label, row in rows.items():
        lines.append(
            " & ".join([_escaped(label)] + [shown.get((label, key), "").replace("–", "--") for key in keys]) + r" \\"
        )
        if any(isfinite(cell.difference) for cell in row.values()):
            lines.append(" & ".join([""] + [_small(row.get(key)) for key in keys]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _small(cell: Cell | None) -> str:
    """Format a difference in small type, with a star if p is below 0.05."""
    if cell is None or not isfinite(cell.difference):
        return ""
    return rf"{{\scriptsize ${cell.difference:+.2f}{'^{*}' if cell.p < 0.05 else ''}$}}"


def _escaped(text: str) -> str:
    """Escape text for LaTeX."""
    special: Mapping[str, str] = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in text)


WRITERS: dict[str, Callable[[Sequence[Cell], str, Sequence[str]], str]] = {
    ".md": markdown,
    ".csv": comma_separated,
    ".tex": latex,
}
