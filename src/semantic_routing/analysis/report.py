"""The report of a run: one self-contained HTML page, and ``metrics.json`` with its numbers."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from semantic_routing.analysis.figures import INK, label_axes, new_axes, to_svg
from semantic_routing.analysis.report_data import Results, numbers, read_results, smoothed
from semantic_routing.analysis.routers import row_label, row_names
from semantic_routing.analysis.weights import heatmaps, plot_heatmap
from semantic_routing.common.files import write_text, written_whole
from semantic_routing.common.webpage import document
from semantic_routing.evaluation.records import Record
from semantic_routing.model.arms import DEFAULT_ARM, PAPER_ARMS
from semantic_routing.model.dit import Backbone
from semantic_routing.toy.captions import GENEVAL_TAGS
from semantic_routing.toy.words.captions import TAGS, UNSEEN_TAGS
from semantic_routing.toy.worlds import SHAPES, WORDS

SHOWN = 3
"""Images of each tag in the sample grid."""
MEANS = {
    "overall": "all images",
    "geneval": "mean of the six GenEval tags",
    "toy_tags": "mean of the toy world's eleven tags",
    "unseen": "mean of the tags with held-out words",
}
"""Labels of the columns that are not tags."""


def write_report(run: Path, evaluation: Path, out: Path, timings: dict[str, float]) -> Path:
    """Write ``report.html``, ``samples.png`` and ``metrics.json`` into the folder ``out``; returns the page.

    ``run`` is the folder of a run and ``evaluation`` that of its evaluation by ``evaluate shapes``. ``timings`` maps
    the names of stages to seconds: "train" is required, "total" defaults to their sum. ValueError for unfinished
    folders.
    """
    results = read_results(run, evaluation, timings)
    write_text(out / "metrics.json", json.dumps(numbers(results), indent=2) + "\n")
    with written_whole(out / "samples.png") as scratch:
        plot_samples(results).savefig(scratch, format="png", dpi=130)
    write_text(out / "report.html", page(results))
    return out / "report.html"


def page(r: Results) -> str:
    """Return the complete HTML page."""
    title = f"Semantic routing: {r.arm.title} after {r.steps:,} steps"
    sections = (
        _header(r, title),
        _section("Training loss", _plot(plot_loss(r.metrics), "training loss by step")),
        _section("Samples", _samples(r)),
        _section("Accuracy", _accuracy(r.summary)),
        _section("What the blocks read", _routing(r.model)),
        _section("Time", _timings(r)),
        _section("Next steps", _go_on(r)),
        _section("How this was made", _provenance(r)),
    )
    return document(title, "".join(sections))


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _header(r: Results, title: str) -> str:
    accuracy, cfg = r.summary["accuracy"], r.model.cfg
    tiles = {"accuracy over all images": _percent(accuracy["overall"])}
    if "geneval" in accuracy:
        tiles[MEANS["geneval"]] = _percent(accuracy["geneval"])
    if "single_object" in accuracy:
        tiles["single object"] = _percent(accuracy["single_object"])
    tiles |= {"training": duration(r.timings["train"]), "in all": duration(r.total_seconds)}
    paths = r.config["data"]["paths"]
    worlds = {SHAPES: "the generated toy world of shapes", WORDS: "the generated world of words"}
    data = worlds.get(" ".join(paths), f"the images of {', '.join(paths)}")
    name = r.config["text"]["name_or_path"]
    encoder = "a tiny language model, trained for this run," if name == "tiny" else name
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n"
        + '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in tiles.items())
        + f"</div>\n<p>A diffusion transformer of {r.parameters:,} parameters ({cfg.depth} blocks of width "
        f"{cfg.width}) learned to draw {r.config['image_size']}x{r.config['image_size']} images of "
        f"{escape(data)}: {r.steps:,} steps of {r.config['batch']} images, {r.images_seen:,} images in all. "
        f"Its text comes from {escape(encoder)} with {cfg.text_layers} layers of width {cfg.text_width}. "
        f"Strategy {escape(r.arm.title)}: {escape(r.arm.reads)}.</p>\n</header>\n"
    )


def plot_loss(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the loss of every logged step and its running mean on a logarithmic axis."""
    steps = np.array([row["step"] for row in metrics])
    loss = np.array([row["loss"] for row in metrics])
    figure, axes = new_axes(7.2, 2.9)
    axes.plot(steps, loss, color="#6f9fd4", linewidth=0.8, alpha=0.55, label="as logged")
    axes.plot(steps, smoothed(loss), color="#3d85d1", linewidth=2, label="running mean")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(axis="y", color="#8a93a0", alpha=0.25, linewidth=0.7)
    label_axes(axes, "step", "velocity loss")
    axes.legend(fontsize=9.5, frameon=False, labelcolor=INK)
    return figure


def plot_samples(r: Results, tags: Sequence[str] = (), columns: int = 3) -> Figure:
    """Draw a row of images for every tag, each under its caption and the checker's verdict.

    By default they are the tags that the evaluation has.
    """
    tags = tags or [tag for tag in TAGS if any(record.tag == tag for record in r.records)]
    figure = Figure(figsize=(2.1 * columns * 2, 1.9 * -(-len(tags) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(-(-len(tags) // 2), 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for place, tag in enumerate(tags):
        shown = [record for record in r.records if record.tag == tag][:columns]
        for column, record in enumerate(shown):
            axes = grid[place // 2, place % 2 * columns + column]
            axes.imshow(np.asarray(Image.open(r.evaluation / record.file)), interpolation="nearest")
            mark, color = ("✓", "#1a7f37") if record.correct else ("✗", "#c62828")
            axes.set_title(f"{mark} " + "\n".join(wrap(record.caption, 24)), fontsize=7.5, color=color)
    return figure


def _plot(figure: Figure, description: str) -> str:
    return f'<div class="card plot"><div style="max-width:900px">{to_svg(figure, description)}</div></div>'


def _samples(r: Results) -> str:
    cards = []
    for tag in (name for name in r.summary["n"] if name not in MEANS):
        shown = [record for record in r.records if record.tag == tag][:SHOWN]
        figures = "".join(_figure(r.evaluation, record) for record in shown)
        share = f"{_percent(r.summary['accuracy'][tag])} of {r.summary['n'][tag]}"
        cards.append(
            f'<div class="tag"><h3>{escape(words(tag))} <span>{share}</span></h3>'
            f'<div class="three">{figures}</div></div>'
        )
    return (
        f"<p>The first {SHOWN} prompts of every tag, without selection. None of these captions was used in "
        'training. A <span class="yes">✓</span> or <span class="no">✗</span> is the exact checker\'s verdict, '
        f'from the pixels alone.</p>\n<div class="tags">{"".join(cards)}</div>'
    )


def _figure(evaluation: Path, record: Record) -> str:
    data = base64.b64encode((evaluation / record.file).read_bytes()).decode()
    mark = '<span class="yes">✓</span>' if record.correct else '<span class="no">✗</span>'
    caption, reason = escape(record.caption), escape(record.reason)
    return (
        f'<figure title="{reason}"><img src="data:image/png;base64,{data}" alt="{caption}">'
        f"<figcaption>{mark} {caption}"
        + ("" if record.correct else f"<small>{reason}</small>")
        + "</figcaption></figure>"
    )


def _accuracy(summary: dict[str, Any]) -> str:
    tags = [name for name in summary["n"] if name not in MEANS]
    groups = {
        "": [name for name in MEANS if name in summary["n"]],
        "GenEval's tags": [tag for tag in tags if tag in GENEVAL_TAGS],
        "Harder skills": [tag for tag in tags if tag not in (*GENEVAL_TAGS, *UNSEEN_TAGS)],
        "Held-out words": [tag for tag in tags if tag in UNSEEN_TAGS],
    }
    rows = []
    for group, names in groups.items():
        if group and names:
            rows.append(f'<tr class="group"><th colspan="5">{escape(group)}</th></tr>')
        rows += [_accuracy_row(name, summary) for name in names]
    head = (
        '<tr><th>tag</th><th class="number">accuracy</th><th class="bar"></th><th class="number">95 % interval</th>'
        '<th class="number">images</th></tr>'
    )
    return f'<div class="card"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _accuracy_row(name: str, summary: dict[str, Any]) -> str:
    accuracy, (low, high) = summary["accuracy"][name], summary["interval"][name]
    label = MEANS.get(name, words(name))
    strong = ' class="strong"' if name in MEANS else ""
    bar = (
        '<svg viewBox="0 0 100 14" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" y="3" width="100" height="8"/>'
        f'<rect class="fill" y="3" width="{100 * accuracy:.1f}" height="8"/>'
        f'<path class="range" d="M{100 * low:.1f} 7H{100 * high:.1f}"/></svg>'
    )
    return (
        f'<tr{strong}><th>{escape(label)}</th><td class="number">{accuracy:.3f}</td><td class="bar">{bar}</td>'
        f'<td class="number">{low:.3f} – {high:.3f}</td><td class="number">{summary["n"][name]:,}</td></tr>'
    )


def _routing(model: Backbone) -> str:
    arm = model.cfg.strategy
    if arm.by_token:
        return "<p>The weights differ from token to token, so they cannot be shown without a prompt.</p>"
    if arm.reads_keys:
        first, last = model.cfg.fusedit_first_layer + 1, model.cfg.fusedit_first_layer + model.cfg.depth
        return (
            "<p>FuseDiT has no routing weights: its blocks read the keys and values of the language model's layers "
            f"{first} to {last}, one each.</p>"
        )
    drawn = list(heatmaps(model))
    top = max(float(weights.max()) for _, weights in drawn)
    maps = []
    for time, weights in drawn:
        when = "" if time is None else f"t = {time:g}"
        figure = plot_heatmap(weights, when, top, row_names(model.cfg), row_label(model.cfg))
        # No wider than it was drawn: its text keeps its size.
        width = 96 * figure.get_figwidth()
        svg = to_svg(figure, f"weight of every language-model layer in every block {when}".rstrip())
        maps.append(f'<div style="max-width:{width:.0f}px">{svg}</div>')
    grid = "maps" if len(maps) > 1 else ""
    return (
        f"<p>Each row is {_row(model)} of the transformer and each column a layer of the language model, both from "
        "first to last; the darker a cell, the more of that layer the block reads. A row adds up to 100 %, and "
        f"{100 / model.cfg.text_layers:.3g} % everywhere would be the plain average"
        + ("; t goes from 0 (noise) to 1 (image)" if model.depends_on_time else "")
        + f'.</p>\n<div class="card plot {grid}">{"".join(maps)}</div>'
    )


def _row(model: Backbone) -> str:
    """Return in words what a row of routing weights belongs to."""
    arm = model.cfg.strategy
    reader = "the keys or the values" if arm.by_side else "the keys and values"
    return f"{reader} of {'a head in ' if arm.by_head else ''}a block" if arm.finer else "a block"


def _timings(r: Results) -> str:
    stages = [(words(name), duration(s)) for name, s in r.timings.items() if name != "total"]
    speed = f"{r.images_per_second:,.0f} images/s"
    return _table([*stages, ("in all", duration(r.total_seconds)), ("speed of training (median)", speed)])


def _go_on(r: Results) -> str:
    run = shlex.quote(str(r.run))
    other = PAPER_ARMS[0] if r.arm.name == DEFAULT_ARM else DEFAULT_ARM
    commands = [
        "# another strategy, then the same questions to it",
        f"semroute train toy --arm {other} --out runs/{other}",
        f"semroute evaluate shapes --model runs/{other} --out runs/{other}/evaluation",
        "",
        "# your own prompts",
        f'semroute sample {run} --prompt "a red circle above a blue square" --out samples',
    ]
    if r.arm.has_weights:
        commands += ["", "# the routing weights as figures and tables", f"semroute analyze {run} --out figures"]
    return f"<pre>{escape(chr(10).join(commands))}</pre>"


def _provenance(r: Results) -> str:
    trained, evaluated = r.manifests
    commands = dict.fromkeys((trained["command"], evaluated["command"]))
    sampler, asked = evaluated["sampler"], evaluated["prompts"]
    facts = [
        ("commit", trained["commit"] or "installed package"),
        ("trained", trained["date"]),
        ("hardware", ", ".join(f"{k} {v}" for k, v in trained["hardware"].items())),
        ("seed of the run", r.config["seed"]),
        ("prompts", f"{asked['n']} of seed {evaluated['prompt_seed']}, SHA-256 {asked['sha256']}"),
        ("sampler", ", ".join(f"{k} {v}" for k, v in sampler.items())),
        ("weights", f"SHA-256 {evaluated['weights_sha256']}"),
        *trained["versions"].items(),
    ]
    return f"<pre>{escape(chr(10).join(commands))}</pre>\n" + _table([(k, str(v)) for k, v in facts], code=True)


def _table(rows: Iterable[tuple[str, str]], *, code: bool = False) -> str:
    cell = "<td><code>{}</code></td>" if code else '<td class="number">{}</td>'
    lines = (f"<tr><th>{escape(name)}</th>{cell.format(escape(value))}</tr>" for name, value in rows)
    return f'<div class="card"><table><tbody>{"".join(lines)}</tbody></table></div>'


def words(name: str) -> str:
    """Return an identifier as words: "single object" for ``single_object``."""
    return name.replace("_", " ")


def duration(seconds: float | int) -> str:
    """Return seconds in words: ``8.2 s``, ``7 min 05 s``, ``2 h 10 min``."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
