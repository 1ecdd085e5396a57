"""Evaluations side by side, as in the paper's Tables 1 and 2: numbers, differences to a baseline, how sure they are."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Annotated, Any

import tyro

from semantic_routing.checkpoint import write_text
from semantic_routing.evaluate.resampling import bootstrap, permutation_test, prompt_sums
from semantic_routing.evaluate.scores import CORRECT, MANIFEST, RECORDS, Column, Record, read_records
from semantic_routing.evaluate.scoring import read_manifest, same_scorer

SHARES = (CORRECT, "vqascore")
"""Metrics from 0 to 1, shown in percent."""
SAME = {"benchmark": "benchmark", "prompt_set": "set of prompts", "scorer": "scorer"}
"""What compared evaluations must share."""
TOLD = ("sampler", "resolution")
"""What they may differ in, but not in silence."""
METHOD = (
    "Brackets: 95 % percentile bootstrap over prompts ({resamples} resamples, images of a prompt together; the same "
    "prompts on both sides of a difference; none where prompts are too few). p: two-sided paired permutation test that "
    "exchanges the sides of prompts, {resamples} permutations, not corrected for the number of columns."
)


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Line evaluations up: numbers, differences to a baseline, bootstrap intervals, paired tests."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that semroute evaluate wrote; the first is the baseline if no other is named."""
    out: Path
    """A folder for compare.md, compare.csv and compare.tex, or one file with such an ending."""
    baseline: Path | None = None
    """The evaluation that differences are to."""
    labels: tuple[str, ...] = ()
    """Names of the rows, one for each folder; by default the folders' names."""
    headlines: bool = False
    """One number for each benchmark, as in Table 1: folders of several benchmarks, one row for each label."""
    anyway: bool = False
    """Compare also what differs in benchmark details, prompts or judge."""
    resamples: int = 10_000
    """Resamples of the bootstrap and the permutation test."""
    seed: int = 0
    """Seed of the resampling."""

    def __post_init__(self) -> None:
        if self.resamples < 1:
            raise ValueError(f"resamples is {self.resamples}; it must be at least 1")
        if self.labels and len(self.labels) != len(self.folders):
            raise ValueError(f"{len(self.labels)} labels for {len(self.folders)} folders; give one for each")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A finished evaluation."""

    label: str
    folder: Path
    facts: dict[str, Any]
    """Its manifest."""
    records: tuple[Record, ...]

    @property
    def benchmark(self) -> str:
        return str(self.facts["benchmark"])

    @property
    def ids(self) -> list[str]:
        return list(dict.fromkeys(record.id for record in self.records))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of the table; metrics from 0 to 1 in percent."""

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


def compare(args: CompareArguments) -> str:
    """Write the tables; returns the Markdown one."""
    suffix = args.out.suffix.lower()
    if suffix and suffix not in WRITERS:
        raise ValueError(f"cannot write {args.out}: give a folder, or a file that ends in {', '.join(WRITERS)}")
    evaluations, baseline = open_evaluations(args)
    notes = _differences(evaluations, args)
    cells = [cell for e in evaluations for cell in _cells(e, _counterpart(e, evaluations, baseline), args)]
    notes.append(METHOD.format(resamples=f"{args.resamples:,}"))
    written = {ending: writer(cells, baseline, notes) for ending, writer in WRITERS.items()}
    for ending, text in written.items():
        if not suffix:
            write_text(args.out / f"compare{ending}", text)
        elif ending == suffix:
            write_text(args.out, text)
    return written[".md"]


def open_evaluations(args: CompareArguments) -> tuple[list[Evaluation], str]:
    """The evaluations and the baseline's label; ValueError for folders that are none, or labels that clash."""
    folders = list(args.folders)
    if not folders:
        raise ValueError("nothing to compare: give folders that semroute evaluate wrote")
    if args.baseline is not None and args.baseline.resolve() not in [f.resolve() for f in folders]:
        if args.labels:
            raise ValueError("with --labels, name the baseline's folder among the others too, so that it has a label")
        folders.insert(0, args.baseline)
    labels = args.labels or _labels(folders, by_parent=args.headlines)
    found = []
    for folder, label in zip(folders, labels, strict=True):
        facts = read_manifest(folder / MANIFEST)
        if not {"benchmark", "prompt_set", "scorer", "table"} <= facts.keys():
            raise ValueError(
                f"{folder} is no finished evaluation of semroute evaluate: its {MANIFEST} tells no benchmark"
            )
        records = tuple(read_records(folder / RECORDS))
        found.append(Evaluation(label=label, folder=folder, facts=facts, records=records))
    names = [(e.benchmark, e.label) for e in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two evaluations of {name[0]} are called {name[1]!r}; tell them apart with --labels")
    chosen = folders[0] if args.baseline is None else args.baseline
    return found, next(e.label for e in found if e.folder.resolve() == chosen.resolve())


def _labels(folders: Sequence[Path], *, by_parent: bool) -> list[str]:
    """The folders' names, or those of the folders around them where the names are all alike."""
    places = [folder.absolute() for folder in folders]
    names = [place.name for place in places]
    alike = len(set(names)) < len(names)
    return [place.parent.name for place in places] if by_parent or alike else names


def _differences(evaluations: Sequence[Evaluation], args: CompareArguments) -> list[str]:
    """Refuse what cannot be compared; say what else differs."""
    benchmarks = list(dict.fromkeys(e.benchmark for e in evaluations))
    if len(benchmarks) > 1 and not args.headlines:
        raise ValueError(
            f"these are evaluations of different benchmarks ({', '.join(benchmarks)}); give --headlines for one number "
            "of each"
        )
    notes = []
    for benchmark in benchmarks:
        first, *others = (e for e in evaluations if e.benchmark == benchmark)
        for other in others:
            wrong = [words for key, words in SAME.items() if not _same(key, first.facts[key], other.facts[key])]
            if wrong and not args.anyway:
                raise ValueError(
                    f"{first.folder} and {other.folder} cannot be compared: they differ in {' and '.join(wrong)}; "
                    "give --anyway to do so all the same"
                )
            told = wrong + [key for key in TOLD if first.facts.get(key) != other.facts.get(key)]
            if told:
                notes.append(f"{other.label} differs from {first.label} in {', '.join(told)} ({benchmark}).")
    for e in evaluations:
        if gaps := sum(bool(record.gap) for record in e.records):
            notes.append(f"{e.label} has no score for {gaps} of {len(e.records)} images ({e.benchmark}).")
    return notes


def _same(key: str, one: Any, other: Any) -> bool:
    return same_scorer(one, other) if key == "scorer" else one == other


def _counterpart(e: Evaluation, evaluations: Iterable[Evaluation], baseline: str) -> Evaluation | None:
    """The baseline's evaluation on the same benchmark."""
    return next((b for b in evaluations if b.label == baseline and b.benchmark == e.benchmark and b is not e), None)


def _cells(e: Evaluation, base: Evaluation | None, args: CompareArguments) -> list[Cell]:
    """An evaluation's numbers."""
    table = e.facts["table"]
    metrics, columns = table["metrics"], {k: _column(v) for k, v in table["columns"].items()}
    wanted = [tuple(table["headline"])] if args.headlines else [(m, c) for m in metrics for c in columns]
    paired = base is not None and base.facts["prompt_set"] == e.facts["prompt_set"]
    cells = []
    for metric, name in wanted:
        unit = 100 if metric in SHARES else 1
        mine = prompt_sums(e.records, e.ids, metric, columns[name])
        low, high = bootstrap(mine, resamples=args.resamples, seed=args.seed)
        cell = {"value": mine.value, "low": low, "high": high}
        p = nan
        if base is not None:
            theirs = prompt_sums(base.records, e.ids if paired else base.ids, metric, columns[name])
            cell["difference"] = mine.value - theirs.value
            if paired:
                cell["difference_low"], cell["difference_high"] = bootstrap(
                    mine, theirs, resamples=args.resamples, seed=args.seed
                )
                p = permutation_test(mine, theirs, resamples=args.resamples, seed=args.seed)
        n = sum(
            r.scores.get(metric) is not None and bool({t for g in columns[name] for t in g} & {*r.tags})
            for r in e.records
        )
        cells.append(
            Cell(
                label=e.label, benchmark=e.benchmark, metric=metric, column=name, n=n, p=p,
                **{key: unit * value for key, value in cell.items()},
            )
        )  # fmt: skip
    return cells


def _column(groups: Iterable[Iterable[str]]) -> Column:
    return tuple(tuple(group) for group in groups)


def _rows(cells: Sequence[Cell]) -> tuple[list[tuple[str, str, str]], dict[str, dict[tuple[str, str, str], Cell]]]:
    """The columns, and by label the cells of each."""
    rows: dict[str, dict[tuple[str, str, str], Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.label, {})[cell.key] = cell
    return list(dict.fromkeys(cell.key for cell in cells)), rows


def _heads(keys: Sequence[tuple[str, str, str]]) -> list[str]:
    """What tells the columns apart: benchmark, metric and name, as far as needed."""
    several = len({k[0] for k in keys}) > 1
    metrics = len({k[1] for k in keys}) > 1
    return [
        " ".join([benchmark] * several + [metric] * (metrics and metric != CORRECT) + [name] * (not several)).replace(
            "_", " "
        )
        for benchmark, metric, name in keys
    ]


def _ranks(cells: Iterable[Cell]) -> tuple[float, float]:
    """The best and the second best number of a column, as shown."""
    first, second, *_ = [*sorted({round(c.value, 2) for c in cells if isfinite(c.value)}, reverse=True), nan, nan]
    return first, second


def _styled(
    cells: Sequence[Cell], best: Callable[[str], str], second: Callable[[str], str]
) -> dict[tuple[str, tuple[str, str, str]], str]:
    """Every number as text; the best and the second best of each column set off, where there are several rows."""
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
    """A row for each evaluation, and one below it with differences."""
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
    """Text that ends no cell of a Markdown table."""
    return text.replace("|", "\\|")


def _interval(low: float, high: float, form: str) -> str:
    """In brackets; nothing where resamples could not tell."""
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
    """A line for each number, unrounded; empty where there is none."""
    text = io.StringIO()
    names = list(Cell.__dataclass_fields__)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "baseline"])
    for cell in cells:
        values = [getattr(cell, name) for name in names]
        writer.writerow(["" if isinstance(v, float) and not isfinite(v) else v for v in values] + [baseline])
    return text.getvalue()


def latex(cells: Sequence[Cell], baseline: str, notes: Sequence[str]) -> str:
    """A table for booktabs, with differences in small type below the numbers as in the paper's Table 2."""
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
    """A difference in small type, with a star where p is below 0.05."""
    if cell is None or not isfinite(cell.difference):
        return ""
    return rf"{{\scriptsize ${cell.difference:+.2f}{'^{*}' if cell.p < 0.05 else ''}$}}"


def _escaped(text: str) -> str:
    """Text as LaTeX sets it."""
    special: Mapping[str, str] = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in text)


WRITERS: dict[str, Callable[[Sequence[Cell], str, Sequence[str]], str]] = {
    ".md": markdown,
    ".csv": comma_separated,
    ".tex": latex,
}
