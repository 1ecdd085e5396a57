"""The results of a study as Markdown tables and as an HTML page: Tables 1 to 5."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from semantic_routing.analysis.distances import mean_similarity
from semantic_routing.analysis.figures import INK, Drawn, label_axes, new_axes, to_svg
from semantic_routing.analysis.report import MEANS, words
from semantic_routing.analysis.routers import TIME, TIMES, row_label, row_names
from semantic_routing.analysis.statistics import js_divergence
from semantic_routing.analysis.table import Table
from semantic_routing.analysis.weights import plot_heatmap
from semantic_routing.common.files import write_text
from semantic_routing.common.manifest import manifest
from semantic_routing.common.webpage import document
from semantic_routing.model.arms import ARMS
from semantic_routing.study.claims import Judged, judge_claims, judge_skills
from semantic_routing.study.keep import kept_weights
from semantic_routing.study.plan import Job, StudyArguments, jobs
from semantic_routing.study.results import Number, Pairs, Row, read_pairs, read_rows, results_json

METHOD = (
    "Accuracies in percent, the mean over seeds; every run has the same budget, and for one seed the same backbone, "
    "data order and noise; prompts and sampling noise are the same for all. Brackets are 95 % intervals: first over "
    "prompts (paired bootstrap, seeds averaged: would other prompts give the same result for these runs?), "
    "then over seeds (Student's t: would other runs give it?). p: paired permutation test over prompts. The velocity "
    "loss is that of the prompts' own pictures at eight times of training, with the same noise for all; less is better."
)
JUDGING = (
    "A claim holds if both intervals are on its side of zero, does not hold if both are on the other side, and is "
    "undecided otherwise; one run has no interval over seeds and decides nothing. Differences between strategies are "
    "of all images, in percentage points; the paper's are on GenEval and GenAI-Bench, by skill on GenAI-Bench. "
    "Statistics of weights are of S2 and have an interval over seeds alone; chance means layers in random order."
)


def write_results(args: StudyArguments) -> Path:
    """Write ``results.json``, ``tables.md``, ``report.html`` and figures from finished runs; return the page's path."""
    rows, pairs = read_rows(args), read_pairs(args)
    every = jobs(args)
    facts = manifest(
        scale=args.scale, arms=list(args.all_arms), steps=every[0].config.steps, prompts=args.n,
        seeds={"runs": list(args.all_seeds), "prompts": 0, "sampling": 0},
    )  # fmt: skip
    figures = [accuracy_figure(rows), *_routing_figures(args, every)]
    for drawn in figures:
        drawn.save(args.out / "figures")
    stability = seed_stability(args, every)
    write_text(args.out / "manifest.json", json.dumps(facts, indent=2) + "\n")
    claims, skills = judge_claims(args), judge_skills(args)
    judged = {"claims": [found.to_json() for found in claims], "skills": [found.to_json() for found in skills]}
    write_text(args.out / "results.json", results_json(rows, pairs, {"seed_similarity": stability} | judged))
    parts = [*sections(rows, pairs, stability), *claim_sections(claims, skills)]
    write_text(args.out / "tables.md", to_markdown(parts))
    write_text(args.out / "report.html", page(args, parts, figures, facts))
    return args.out / "report.html"


Sections = Sequence[tuple[str, Table]]
"""Tables under their headings."""


def sections(rows: Sequence[Row], pairs: Pairs, stability: dict[str, float]) -> Sections:
    """Return the tables of a study's numbers."""
    nominal, clocked = [r for r in rows if not r.clock], [r for r in rows if r.clock]
    found = [("Table 1: strategies", _strategies(nominal)), ("Table 2: by skill", _skills(nominal))]
    if clocked:
        found.append(("Table 3: gates with other clocks", _clocks(clocked)))
    if len(pairs) > 1:
        found.append(("Table 4: one strategy minus another", _pairs(pairs)))
    if all(row.loss for row in nominal):
        found.append(("Table 5: velocity loss on held-out pictures (thousandths)", _losses(nominal)))
    if stability:
        table = Table(("arm", "similarity"), [(name, f"{value:.4f}") for name, value in stability.items()])
        found.append(("Stability of routing across seeds (Jensen-Shannon similarity)", table))
    return found


def claim_sections(claims: Sequence[Judged], skills: Sequence[Judged]) -> Sections:
    """Return the tables of the paper's claims."""
    head = ("the paper's claim", "as a number", "in the paper", "here", "verdict", "what would decide it")
    cells = [(c.claim.text, c.claim.inequality, *_judged(c)) for c in claims]
    found = [("The paper's claims", Table(head, cells))]
    if skills:
        by_skill = [(words(s.claim.text), *_judged(s)) for s in skills]
        found.append(("S2 minus B2, by skill", Table(("", *head[2:]), by_skill)))
    return found


def _judged(found: Judged) -> tuple[str, ...]:
    scale, digits = (100, 1) if found.claim.measure.percent else (1, 4)
    number = _number(found.number, sign=True, scale=scale, digits=digits)
    return found.claim.source, number, found.verdict, found.to_decide


def to_markdown(parts: Sections) -> str:
    """Return the tables and the method as Markdown."""
    tables = "\n\n".join(f"## {title}\n\n{table.markdown()}\n" for title, table in parts)
    return f"{tables}\n{METHOD}\n\n{JUDGING}\n"


def to_html(parts: Sections) -> str:
    """Return the tables and the method as HTML."""
    found = "".join(f"<h2>{escape(title)}</h2>\n{table.html()}\n" for title, table in parts)
    return found + "".join(f'<p class="soft">{escape(text)}</p>' for text in (METHOD, JUDGING))


def _strategies(rows: Sequence[Row]) -> Table:
    means = [name for name in MEANS if name in rows[0].accuracy]
    cells = []
    for row in rows:
        own = [_number(row.accuracy.get(name)) for name in means]
        other = row.difference.get("overall")
        cells.append((_label(row), *own, _number(other, sign=True), _p(other)))
    return Table(("", *(MEANS[name] for name in means), f"overall minus {rows[0].name}", "p"), cells)


def _skills(rows: Sequence[Row]) -> Table:
    names = [name for name in rows[0].accuracy if name not in MEANS]
    cells = [(words(name), *(_number(row.accuracy[name]) for row in rows)) for name in names]
    return Table(("", *map(_label, rows)), cells)


def _clocks(rows: Sequence[Row]) -> Table:
    cells = []
    for row in rows:
        other = row.difference["overall"]
        cells.append((_label(row), _number(row.accuracy["overall"]), _number(other, sign=True), _p(other)))
    return Table(("", "overall", "minus the nominal clock", "p"), cells)


def _losses(rows: Sequence[Row]) -> Table:
    means = [name for name in MEANS if name in rows[0].loss]
    cells = []
    for row in rows:
        own = _number(row.loss["overall"], scale=1000, digits=2)
        other = [_number(row.loss_difference.get(name), sign=True, scale=1000, digits=2) for name in means]
        cells.append((_label(row), own, *other, _p(row.loss_difference.get("overall"))))
    minus = (f"{MEANS[name]}, minus {rows[0].name}" for name in means)
    return Table(("", MEANS["overall"], *minus, "p"), cells)


def _pairs(pairs: Pairs) -> Table:
    columns = list(next(iter(pairs.values())))
    cells = [
        (f"{one} minus {other}", *(_number(numbers[name], sign=True) for name in columns))
        for (one, other), numbers in pairs.items()
    ]
    return Table(("", *(MEANS[name] for name in columns)), cells)


def _label(row: Row) -> str:
    return ARMS[row.arm].title + row.name.removeprefix(row.arm)


def _number(number: Number | None, *, sign: bool = False, scale: int = 100, digits: int = 1) -> str:
    if number is None:
        return ""
    form = f"{'+' if sign else ''}.{digits}f"
    intervals = filter(None, (number.over_prompts, number.over_seeds))
    spans = [f"{scale * low:{form}} to {scale * high:{form}}" for low, high in intervals if low <= high]  # not NaN
    return f"{scale * number.mean:{form}}" + (f" [{'; '.join(spans)}]" if spans else "")


def _p(number: Number | None) -> str:
    return "" if number is None or number.p is None else f"{number.p:.4f}"


def accuracy_figure(rows: Sequence[Row]) -> Drawn:
    """Draw the overall accuracy of every row with its interval over prompts, and a point for each seed."""
    return accuracy_bars({row.name: (_label(row), row.accuracy["overall"]) for row in rows}, title="Overall accuracy")


def accuracy_bars(bars: Mapping[str, tuple[str, Number]], *, title: str) -> Drawn:
    """Draw accuracies as labelled bars, by name, with the interval over prompts and a point for each seed."""
    labels, numbers = zip(*bars.values(), strict=True)
    figure, axes = new_axes(6.4, 0.9 + 0.42 * len(bars))
    places = np.arange(len(bars))
    means = np.array([number.mean for number in numbers])
    spans = np.array([number.over_prompts for number in numbers])
    axes.barh(places, 100 * means, color="#4477aa", height=0.6, alpha=0.75)
    axes.errorbar(
        100 * means, places, xerr=100 * np.abs(spans - means[:, None]).T, fmt="none", ecolor=INK, elinewidth=1.2
    )
    for place, number in zip(places, numbers, strict=True):
        axes.plot(100 * np.array(number.seeds), np.full(len(number.seeds), place), "o", color=INK, markersize=3)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    label_axes(axes, "accuracy (%)\ninterval over prompts, a point for each seed", "")
    return Drawn(
        name="accuracy", title=title, figure=figure, rows=list(bars), columns=["mean", "low", "high"],
        values=np.column_stack([means, spans]),
    )  # fmt: skip


def _routing_figures(args: StudyArguments, every: Sequence[Job]) -> list[Drawn]:
    """Draw the final weights of each learned arm's first seed: the mean over times by row, or of S1 by time."""
    found = []
    for job in (job for job in every if job.seed == 0):
        weights = kept_weights(args, job)
        if weights is not None and np.ptp(weights) > 0 and ARMS[job.arm].learned:
            over_time = not ARMS[job.arm].by_block and ARMS[job.arm].by_time
            values = weights[:, 0] if over_time else weights.mean(0)
            names = [f"{t:g}" for t in TIMES] if over_time else row_names(job.config.model)
            axis = TIME if over_time else row_label(job.config.model)
            found.append(
                Drawn(
                    name=f"weights-{job.variant}", title=f"Weights of {job.variant}, seed 0",
                    figure=plot_heatmap(values, rows=names, label=axis), rows=names,
                    columns=[f"layer {i + 1}" for i in range(values.shape[1])], values=values,
                )
            )  # fmt: skip
    return found


def seed_stability(args: StudyArguments, every: Sequence[Job]) -> dict[str, float]:
    """Return the mean Jensen-Shannon similarity between the seeds of each variant with learned weights."""
    by_variant: dict[str, list[Any]] = {}
    for job in every:
        weights = kept_weights(args, job)
        if weights is not None and ARMS[job.arm].learned:
            by_variant.setdefault(job.variant, []).append(weights)
    found = {}
    for variant, of_seeds in by_variant.items():
        if len(of_seeds) > 1:
            stack = np.stack(of_seeds)[:, ::5].astype(float)  # seeds, times, blocks, layers
            found[variant] = mean_similarity(1 - js_divergence(stack[:, None], stack[None]).mean((2, 3)))
    return found


def page(args: StudyArguments, parts: Sections, figures: Sequence[Drawn], facts: dict[str, Any]) -> str:
    """Return the self-contained page."""
    title = f"Study: {', '.join(args.all_arms)} at scale {args.scale}"
    cards = "".join(
        f'<div class="card plot"><h3>{escape(d.title)}</h3><div>{to_svg(d.figure, d.title)}</div></div>'
        for d in figures
    )
    return document(
        title,
        f"<h1>{escape(title)}</h1>\n"
        f'<p class="soft">{len(args.all_seeds)} seeds, {facts["steps"]} steps a run, {args.n} prompts. '
        f"{escape(str(facts['hardware']['processor']))}, commit {escape(str(facts['commit']))}.</p>\n"
        f'{to_html(parts)}\n<h2>Figures</h2>\n<div class="maps">{cards}</div>\n',
    )
