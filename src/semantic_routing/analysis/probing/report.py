"""A probe's results as figures, tables, a summary of two sentences, and one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.figures import INK, Drawn, label_axes, new_axes, to_svg
from semantic_routing.analysis.probing.linear import Linear
from semantic_routing.analysis.table import Table
from semantic_routing.common.files import write_text
from semantic_routing.common.webpage import document

LAYER = "language-model layer"
MASSIVE = 1000.0
"""A channel is massive if it is this many times the layer's median magnitude (Sun et al., 2024)."""


@dataclass(frozen=True)
class Reading:
    """A task's accuracy at one position, for each layer and then the average."""

    task: str
    place: str
    chance: float
    prompts: int
    accuracy: Float[np.ndarray, " S"]
    error: Float[np.ndarray, " S"]
    """Standard errors."""

    @property
    def name(self) -> str:
        """The task and the position."""
        return f"{self.task}, at the {self.place}"


@dataclass(frozen=True)
class Norms:
    """Sizes of states before normalisation, by layer."""

    first: Float[np.ndarray, " L"]
    """Mean norm of the prompts' first tokens."""
    others: Float[np.ndarray, " L"]
    """Mean norm of all other tokens."""
    massive: Float[np.ndarray, " L"]
    """Largest magnitude of a channel, over the layer's median magnitude."""
    channel: tuple[int, ...]
    """The channel of that magnitude."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Everything that was measured of one language model."""

    encoder: str
    prompts: str
    """Where the prompts come from."""
    layers: tuple[int, ...]
    """The layers measured, counted from 1."""
    width: int
    tokens: int
    inner: Linear
    """Without the first token of each prompt."""
    every: Linear
    """With all tokens; only the average and the penultimate layer predict."""
    norms: Norms
    readings: list[Reading]

    def summary(self) -> dict[str, Any]:
        """Return the numbers in a form that JSON can hold."""
        return {
            "encoder": self.encoder,
            "prompts": self.prompts,
            "layers": list(self.layers),
            "width": self.width,
            "tokens": self.tokens,
            "verdict": verdict(self),
            "r2_from_average": self.inner.r2[-1].tolist(),
            "r2_from_penultimate": self.inner.r2[-3].tolist(),
            "r2_from_average_all_tokens": self.every.r2[-1].tolist(),
            "r2_from_penultimate_all_tokens": self.every.r2[-3].tolist(),
            "effective_rank": self.inner.rank.tolist(),
            "norm_first_token": self.norms.first.tolist(),
            "norm_other_tokens": self.norms.others.tolist(),
            "largest_channel_over_median": self.norms.massive.tolist(),
            "largest_channel": list(self.norms.channel),
            "accuracy": [
                {
                    "task": r.task, "place": r.place, "chance": r.chance, "prompts": r.prompts,
                    "layers": r.accuracy[:-1].tolist(), "average": float(r.accuracy[-1]),
                    "standard_error": r.error.tolist(),
                }
                for r in self.readings
            ],
        }  # fmt: skip


def verdict(probe: Probe) -> str:
    """Summarise in two sentences what the average and the penultimate layer lose."""
    from_average, from_penultimate = 1 - probe.inner.r2[-1], 1 - probe.inner.r2[-3]
    worst, lost = int(from_average.argmax()), int(from_penultimate.argmax())
    first = (
        f"The average of the {len(probe.layers)} layers loses up to {from_average.max():.0%} of a layer's variance "
        f"(layer {probe.layers[worst]}; {from_average.mean():.0%} on average), the penultimate layer up to "
        f"{from_penultimate.max():.0%} (layer {probe.layers[lost]}; {from_penultimate.mean():.0%})."
    )
    if not probe.readings:
        return first
    apart = max(probe.readings, key=lambda r: r.accuracy[:-1].max() - max(r.accuracy[-1], r.accuracy[-3]))
    best = int(apart.accuracy[:-1].argmax())
    second = (
        f"The task that gains most from a choice of layer is {apart.name}: layer {probe.layers[best]} answers "
        f"{apart.accuracy[best]:.2f} of the prompts, the average {apart.accuracy[-1]:.2f}, the penultimate layer "
        f"{apart.accuracy[-3]:.2f} (standard error {apart.error[best]:.2f}, chance {apart.chance:.2f})."
    )
    return f"{first} {second}"


def figures(probe: Probe) -> Iterator[Drawn]:
    """Plot the measurements by layer."""
    names = [f"layer {layer}" for layer in probe.layers]
    lines = {
        "average, without first tokens": probe.inner.r2[-1],
        "penultimate, without first tokens": probe.inner.r2[-3],
        "average, all tokens": probe.every.r2[-1],
        "penultimate, all tokens": probe.every.r2[-3],
    }
    yield _lines(
        "lost", "How well the average and the penultimate layer predict each layer", "R²", lines, probe, (0.0, 1.0)
    )
    yield _map("predicted", "How well each layer predicts each layer (R²)", probe.inner.r2, names)
    yield _map("similarity", "Similarity of layers (CKA)", probe.inner.cka[:-1], names)
    sizes = {"first token": probe.norms.first, "other tokens": probe.norms.others}
    yield _lines("norms", "Norm of states before normalisation", "mean norm", sizes, probe, log=True)
    massive = {"largest channel": probe.norms.massive, "massive": np.full(len(names), MASSIVE)}
    yield _lines("massive", "Largest channel over the median channel", "ratio", massive, probe, log=True)
    rank = {"layer": probe.inner.rank[:-1], "average": np.full(len(names), probe.inner.rank[-1])}
    yield _lines("rank", "Effective rank of states", "dimensions", rank, probe)
    for task in dict.fromkeys(reading.task for reading in probe.readings):
        yield _task_figure(task, [reading for reading in probe.readings if reading.task == task], probe)


def _task_figure(task: str, readings: Sequence[Reading], probe: Probe) -> Drawn:
    lines = {f"at the {reading.place}": reading.accuracy[:-1] for reading in readings}
    lines |= {f"average, at the {r.place}": np.full(len(probe.layers), r.accuracy[-1]) for r in readings}
    lines["chance"] = np.full(len(probe.layers), readings[0].chance)
    name = "task-" + task.replace(" ", "-")
    title = f"Linear probe: {task} ({readings[0].prompts} prompts)"
    return _lines(name, title, "accuracy", lines, probe, (0.0, 1.02))


def _lines(
    name: str, title: str, label: str, lines: dict[str, Float[np.ndarray, " L"]], probe: Probe,
    limits: tuple[float, float] | None = None, *, log: bool = False,
) -> Drawn:  # fmt: skip
    """Plot values by layer; constant ones as dashes."""
    figure, axes = new_axes(7.2, 3.4, title)
    colors = iter(matplotlib.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    for legend, values in lines.items():
        style = "--" if np.ptp(values) == 0 else "-"
        color = INK if legend in ("chance", "massive") else next(colors)
        axes.plot(probe.layers, values, style, color=color, linewidth=1.5, label=legend)
    if limits is not None:
        axes.set_ylim(min(limits[0], *(float(v.min()) for v in lines.values())), limits[1])
    if log:
        axes.set_yscale("log")
    label_axes(axes, LAYER, label)
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    columns = [f"layer {layer}" for layer in probe.layers]
    return Drawn(
        name=name, title=title, figure=figure, rows=[*lines], columns=columns, values=np.stack([*lines.values()])
    )


def _map(name: str, title: str, values: Float[np.ndarray, "S L"], names: Sequence[str]) -> Drawn:
    """Plot a matrix with a source in each row and a target in each column."""
    rows = [*names, "average"][: len(values)]
    figure, axes = new_axes(6.2, 5.2, title)
    low = max(0.0, float(np.nanmin(values)))
    mesh = axes.imshow(values, cmap="Blues", vmin=low, vmax=1, aspect="auto", interpolation="nearest")
    step = -(-len(names) // 12)
    places = range(0, len(names), step)
    axes.set_xticks(places, [names[i].removeprefix("layer ") for i in places])
    more = [len(names)] if len(values) > len(names) else []
    axes.set_yticks(
        [*places, *more], [*(names[i].removeprefix("layer ") for i in places), *(["average"] if more else [])]
    )
    label_axes(axes, LAYER, "from layer")
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    return Drawn(name=name, title=title, figure=figure, rows=rows, columns=list(names), values=values)


def write_page(path: Path, probe: Probe, drawn: Sequence[Drawn]) -> Path:
    """Write the page and return its path."""
    cards = "".join(
        f'<div class="card plot"><h3>{escape(one.title)}</h3><div>{to_svg(one.figure, one.title)}</div></div>'
        for one in drawn
    )
    about = (
        f"{len(probe.layers)} layers of width {probe.width}; {probe.tokens:,} tokens of {probe.prompts}, 70 % of "
        "the prompts to fit, 15 % to choose the ridge, 15 % to report."
    )
    body = (
        f'<h1>What the layers of {escape(probe.encoder)} encode</h1>\n<p class="soft">{escape(about)}</p>\n'
        f"<p>{escape(verdict(probe))}</p>\n{_table(probe)}\n"
        f'<h2>By layer</h2>\n<div class="maps">{cards}</div>\n'
    )
    write_text(path, document(f"Layers of {probe.encoder}", body))
    return path


def _table(probe: Probe) -> str:
    """Return the tasks' accuracies as an HTML table."""
    if not probe.readings:
        return ""
    rows = []
    for r in probe.readings:
        best = int(r.accuracy[:-1].argmax())
        cells = [f"{r.chance:.2f}", f"{r.accuracy[best]:.2f} (layer {probe.layers[best]})"]
        rows.append([r.name, *cells, *(f"{r.accuracy[i]:.2f} ± {r.error[i]:.2f}" for i in (-1, -3, -2))])
    table = Table(("task", "chance", "best layer", "average", "penultimate", "last"), rows)
    return f"<h2>Linear probes on held-out prompts</h2>\n{table.html()}"
