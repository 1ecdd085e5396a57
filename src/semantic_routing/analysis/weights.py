"""Figures of the routing weights of each block: Figures 1, 2, 6 and 7 of the paper.

The numbers come from ``router.weights(t)``, which training and sampling use too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from semantic_routing.analysis.figures import INK, Drawn, label_axes, new_axes, ticks
from semantic_routing.analysis.routers import CHOSEN_TIMES, TIME, TIMES, routing_weights, row_label, row_names
from semantic_routing.model.dit import Backbone

MOST_NUMBERS = 120
"""Largest number of cells for which a heat map shows the numbers."""


def plot_heatmap(
    weights: Float[np.ndarray, "K L"],
    title: str = "",
    top: float = 0.0,
    rows: Sequence[str] | None = None,
    label: str = "block",
    columns: Sequence[str] | None = None,
) -> Figure:
    """Draw a row of weights for each of K blocks, parts of blocks or times, the first on top; darker is more.

    ``top`` is the least weight of the darkest colour, for a common scale of several maps. ``rows`` are the names of
    the rows, by default their numbers, and ``columns`` those of the columns, by default the layers' numbers. Weights of
    both signs are blue and red.
    """
    count, layers = weights.shape
    figure, axes = new_axes(min(1.9 + 0.42 * layers, 7.5), min(1.4 + 0.34 * count, 5.5), title)
    # The scale ends at twice the uniform weight or above, so that near-uniform weights look pale.
    top = 100 * max(top, float(np.abs(weights).max()), 2 / layers)
    colors, bottom = ("Blues", 0.0) if weights.min() >= 0 else ("RdBu", -top)
    edges_x, edges_y = np.arange(layers + 1) + 0.5, np.arange(count + 1) - 0.5
    mesh = axes.pcolormesh(
        edges_x, edges_y, weights * 100, cmap=colors, vmin=bottom, vmax=top, edgecolors="face", linewidth=0.2
    )
    axes.invert_yaxis()
    across = ticks(1, layers)
    axes.set_xticks(across, [str(tick) if columns is None else columns[tick - 1] for tick in across])
    shown = ticks(0, count - 1)
    axes.set_yticks(shown, [str(tick) if rows is None else rows[tick] for tick in shown])
    axes.spines[:].set_visible(False)
    label_axes(axes, "language-model layer", label)
    if weights.size <= MOST_NUMBERS:
        for (row, layer), weight in np.ndenumerate(weights * 100):
            color = "white" if abs(weight) > 0.6 * top else "#08306b"
            axes.text(layer + 1, row, f"{round(weight)}", ha="center", va="center", fontsize=8.5, color=color)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label("weight (%)", fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def plot_lines(weights: Float[np.ndarray, "K L"], labels: Sequence[str], title: str = "") -> Figure:
    """Draw the weight by layer, a line for each of K blocks or times."""
    figure, axes = new_axes(6.6, 3.4, title)
    layers = weights.shape[1]
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(labels)))
    for row, label, color in zip(weights, labels, colors, strict=True):
        axes.plot(np.arange(1, layers + 1), row, "o-", color=color, markersize=3, linewidth=1.5, label=label)
    axes.axhline(1 / layers, color=INK, linewidth=0.8, linestyle=":", label="uniform")
    axes.set_xticks(ticks(1, layers))
    axes.set_ylim(bottom=0)
    label_axes(axes, "language-model layer", "weight")
    axes.legend(fontsize=9, frameon=False, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def heatmaps(
    model: Backbone, times: Sequence[float] = CHOSEN_TIMES
) -> Iterator[tuple[float | None, Float[np.ndarray, "K L"]]]:
    """Yield each time and the weights of all rows; if routing ignores time, only one pair, with None as the time."""
    times = times if model.depends_on_time else times[:1]
    for time, weights in zip(times, routing_weights(model, times), strict=True):
        yield (time if model.depends_on_time else None), weights


def weight_figures(
    model: Backbone, times: Sequence[float] = CHOSEN_TIMES, blocks: Sequence[int] = ()
) -> Iterator[Drawn]:
    """Draw Figures 1, 2, 6 and 7: heat maps by block at chosen times and by time in chosen blocks, and lines.

    Figures over an axis on which the routing does not depend are left out. The default blocks are the first, the
    middle and the last. ValueError for a block that the model does not have.
    """
    depth = model.cfg.depth
    if wrong := [block for block in blocks if not 0 <= block < depth]:
        raise ValueError(f"there is no block {wrong[0]}: this model has blocks 0 to {depth - 1}")
    chosen = list(blocks) or sorted({0, (depth - 1) // 2, depth - 1})
    # If all blocks have the same weights, one block shows them all.
    if np.ptp(routing_weights(model, TIMES), axis=1).max() == 0:
        chosen = []
    columns = [f"layer {layer}" for layer in range(1, model.cfg.text_layers + 1)]
    for name, title, figure, rows, weights in [*_maps(model, times, chosen), *_lines(model, times, chosen)]:
        yield Drawn(name=name, title=title, figure=figure, rows=rows, columns=columns, values=weights)


Part = tuple[str, str, Figure, list[str], Float[np.ndarray, "K L"]]
"""Name, title and figure, the names of its rows of numbers, and these numbers."""


def _maps(model: Backbone, times: Sequence[float], blocks: Sequence[int]) -> Iterator[Part]:
    every = routing_weights(model, TIMES)
    top = float(every.max())
    rows, names, label = list(model.cfg.rows), row_names(model.cfg), row_label(model.cfg)
    for time, weights in heatmaps(model, times) if blocks or not model.depends_on_time else ():
        name, at = ("heatmap", "") if time is None else (f"heatmap-t{time:g}", f"t = {time:g}")
        title = f"Weight of each layer in each block{at and f', {at}'}"
        yield name, title, plot_heatmap(weights, at, top, names, label), rows, weights
    for block in (blocks or [0]) if model.depends_on_time else ():
        name, where = (f"heatmap-block{block}", f"block {block}") if blocks else ("heatmap-times", "")
        names, weights = [f"{t:g}" for t in TIMES], every[:, block]
        figure = plot_heatmap(weights, where, top, names, TIME)
        title = f"Weight of each layer at each time{where and f', {where}'}"
        yield name, title, figure, [f"t = {t}" for t in names], weights


def _lines(model: Backbone, times: Sequence[float], blocks: Sequence[int]) -> Iterator[Part]:
    weights = routing_weights(model, times)
    if model.cfg.strategy.finer and blocks:
        yield from _part_lines(model, weights[0], blocks)
        return
    if not model.depends_on_time:
        rows = [f"block {block}" for block in blocks] or ["all blocks"]
        values = weights[0, list(blocks) or [0]]
        yield "lines", "Weight of each layer", plot_lines(values, rows), rows, values
        return
    rows = [f"t = {time:g}" for time in times]
    for block in blocks or [0]:
        name, where = (f"lines-block{block}", f"block {block}") if blocks else ("lines", "")
        title = f"Weight of each layer at chosen times{where and f', {where}'}"
        yield name, title, plot_lines(weights[:, block], rows, where), rows, weights[:, block]


def _part_lines(model: Backbone, weights: Float[np.ndarray, "K L"], blocks: Sequence[int]) -> Iterator[Part]:
    """Draw the lines of each chosen block that reads several mixes: one for each of them."""
    parts = list(model.cfg.strategy.parts(model.cfg.kv_heads))
    for block in blocks:
        values = weights[block * len(parts) : (block + 1) * len(parts)]
        title = f"Weight of each layer, block {block}"
        yield f"lines-block{block}", title, plot_lines(values, parts, f"block {block}"), parts, values
