"""Evaluations side by side, as in the paper's Tables 1 and 2: numbers, differences to a baseline, intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Annotated, Any

import tyro

from semantic_routing.common.files import write_text
from semantic_routing.evaluation.compare_tables import WRITERS, Cell
from semantic_routing.evaluation.records import CORRECT, LOSS, MANIFEST, RECORDS, Record, read_records
from semantic_routing.evaluation.resampling import bootstrap, permutation_test, prompt_sums
from semantic_routing.evaluation.scoring import read_manifest, same_scorer
from semantic_routing.evaluation.summary import Column

UNITS = {CORRECT: 100, "vqascore": 100, LOSS: 1000}
"""Metrics that are shown in percent or in thousandths, by how many of these make 1."""
SAME = {"benchmark": "benchmark", "prompt_set": "set of prompts", "scorer": "scorer"}
"""Facts that compared evaluations must share."""
TOLD = ("sampler", "resolution", "routing")
"""Facts that may differ, which is reported."""
METHOD = (
    "Brackets: 95 % percentile bootstrap over prompts ({resamples} resamples, images of a prompt together; the same "
    "prompts on both sides of a difference; none where prompts are too few). p: two-sided paired permutation test that "
    "exchanges the sides of prompts, {resamples} permutations, not corrected for the number of columns."
)


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Compare evaluations: numbers, differences to a baseline, bootstrap intervals, paired tests."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders written by semroute evaluate; by default the first is the baseline."""
    out: Path
    """A folder for compare.md, compare.csv and compare.tex, or a single file with one of these endings."""
    baseline: Path | None = None
    """The evaluation to which differences are computed."""
    labels: tuple[str, ...] = ()
    """Names of the rows, one for each folder; by default the folders' names."""
    headlines: bool = False
    """Show one number per benchmark, as in Table 1: folders of several benchmarks, one row for each label."""
    anyway: bool = False
    """Compare although benchmark details, prompts or judge differ."""
    resamples: int = 10_000
    """Resamples of the bootstrap and the permutation test."""
    seed: int = 0
    """Random seed of the resampling."""

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


def compare(args: CompareArguments) -> str:
    """Write the tables; return the Markdown one."""
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
    """Return the evaluations and the baseline's label; ValueError for other folders and equal labels."""
    folders = list(args.folders)
    if not folders:
        raise ValueError("nothing to compare: give folders that semroute evaluate wrote")
    if args.baseline is not None and args.baseline.resolve() not in [f.resolve() for f in folders]:
        if args.labels:
            raise ValueError("with --labels, give the baseline's folder among the others too, so that it has a label")
        folders.insert(0, args.baseline)
    labels = args.labels or _labels(folders, by_parent=args.headlines)
    found = []
    for folder, label in zip(folders, labels, strict=True):
        facts = read_manifest(folder / MANIFEST)
        if not {"benchmark", "prompt_set", "scorer", "table"} <= facts.keys():
            raise ValueError(
                f"{folder} is not a finished evaluation of semroute evaluate: its {MANIFEST} names no benchmark"
            )
        records = tuple(read_records(folder / RECORDS))
        found.append(Evaluation(label=label, folder=folder, facts=facts, records=records))
    names = [(e.benchmark, e.label) for e in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two evaluations of {name[0]} are called {name[1]!r}; distinguish them with --labels")
    chosen = folders[0] if args.baseline is None else args.baseline
    return found, next(e.label for e in found if e.folder.resolve() == chosen.resolve())


def _labels(folders: Sequence[Path], *, by_parent: bool) -> list[str]:
    """Return the folders' names, or their parents' names if all are equal."""
    places = [folder.absolute() for folder in folders]
    names = [place.name for place in places]
    repeated = len(set(names)) < len(names)
    return [place.parent.name for place in places] if by_parent or repeated else names


def _differences(evaluations: Sequence[Evaluation], args: CompareArguments) -> list[str]:
    """Raise ValueError for evaluations that cannot be compared; return other differences as messages."""
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
                    "give --anyway to compare them nevertheless"
                )
            differing = wrong + [key for key in TOLD if first.facts.get(key) != other.facts.get(key)]
            if differing:
                notes.append(f"{other.label} differs from {first.label} in {', '.join(differing)} ({benchmark}).")
    for e in evaluations:
        if gaps := sum(bool(record.gap) for record in e.records):
            notes.append(f"{e.label} has no score for {gaps} of {len(e.records)} images ({e.benchmark}).")
    return notes


def _same(key: str, one: Any, other: Any) -> bool:
    return same_scorer(one, other) if key == "scorer" else one == other


def _counterpart(e: Evaluation, evaluations: Iterable[Evaluation], baseline: str) -> Evaluation | None:
    """Return the baseline's evaluation on the same benchmark."""
    return next((b for b in evaluations if b.label == baseline and b.benchmark == e.benchmark and b is not e), None)


def _cells(e: Evaluation, base: Evaluation | None, args: CompareArguments) -> list[Cell]:
    """Return an evaluation's numbers."""
    table = e.facts["table"]
    metrics, columns = table["metrics"], {k: _column(v) for k, v in table["columns"].items()}
    wanted = [tuple(table["headline"])] if args.headlines else [(m, c) for m in metrics for c in columns]
    paired = base is not None and base.facts["prompt_set"] == e.facts["prompt_set"]
    cells = []
    for metric, name in wanted:
        unit = UNITS.get(metric, 1)
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
