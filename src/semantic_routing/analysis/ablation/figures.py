"""Figures of ablations beside the weights, and where weight and need disagree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from semantic_routing.analysis.ablation.run import OVERALL, Measured
from semantic_routing.analysis.figures import INK, Drawn, label_axes, ticks
from semantic_routing.analysis.routers import row_label, row_names
from semantic_routing.model.dit import DiTConfig

TITLES = {
    "without": "Need of each layer: what is lost without it",
    "alone": "What is lost with only one layer",
    "swap": "What is lost when two blocks exchange their weights",
}
LISTED = 12
"""Largest number of disagreements in the list."""


def ablation_figures(
    cfg: DiTConfig, weights: Float[np.ndarray, "K L"], measured: Sequence[Measured], name: str
) -> Iterator[Drawn]:
    """Draw a heat map of need for each kind and tag; those of layers are beside the weights.

    ``name`` is what was measured. A dot marks cells whose 95 % interval excludes 0. Cells without a number are empty.
    """
    layers = [f"layer {layer + 1}" for layer in range(cfg.text_layers)]
    blocks = [f"block {block}" for block in range(cfg.depth)]
    for kind in dict.fromkeys(row.kind for row in measured):
        for tag in dict.fromkeys(row.tag for row in measured):
            chosen = [row for row in measured if (row.kind, row.tag) == (kind, tag)]
            rows, columns = (blocks, blocks) if kind == "swap" else (list(cfg.rows), layers)
            need, sure = grid(chosen, rows, columns, mirrored=kind == "swap")
            what = f"{'added' if 'loss' in name else 'lost'} {name}"
            where = "" if tag == OVERALL else f"-{tag.replace('_', '-')}"
            yield Drawn(
                name=f"ablation-{kind}{where}",
                title=TITLES[kind] + ("" if tag == OVERALL else f", {tag.replace('_', ' ')}"),
                figure=plot_need(need, sure, cfg, what, None if kind == "swap" else weights),
                rows=rows, columns=columns, values=need,
            )  # fmt: skip


def grid(
    measured: Sequence[Measured], rows: Sequence[str], columns: Sequence[str], *, mirrored: bool = False
) -> tuple[Float[np.ndarray, "R C"], Bool[np.ndarray, "R C"]]:
    """Arrange needs by row and column, nan where there is none, and whether their intervals exclude 0."""
    need, sure = np.full((len(rows), len(columns)), np.nan), np.zeros((len(rows), len(columns)), dtype=bool)
    for one in measured:
        place = rows.index(one.row), columns.index(one.other)
        for cell in (place, place[::-1]) if mirrored else (place,):
            need[cell], sure[cell] = one.need, one.low > 0 or one.high < 0
    return need, sure


def plot_need(
    need: Float[np.ndarray, "R C"],
    sure: Bool[np.ndarray, "R C"],
    cfg: DiTConfig,
    what: str,
    weights: Float[np.ndarray, "R C"] | None,
) -> Figure:
    """Draw needs, red for a loss and blue for a gain, with the weights on their left if there are any."""
    rows, columns = need.shape
    size = min(1.9 + 0.42 * columns, 6.0)
    figure = Figure(figsize=(size if weights is None else 2 * size, min(1.4 + 0.34 * rows, 5.5)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 if weights is None else 2, squeeze=False)[0]
    names, label = row_names(cfg), row_label(cfg)
    if weights is None:
        names, label = [str(block) for block in range(rows)], "block"
    else:
        top = 100 * max(float(weights.max()), 2 / columns)
        _map(figure, panels[0], 100 * weights, "Blues", (0.0, top), "weight (%)")
        _axes(panels[0], columns, names, "language-model layer", label)
    reach = max(float(np.nanmax(np.abs(need), initial=0)), 1e-12)
    _map(figure, panels[-1], need, "RdBu_r", (-reach, reach), what)
    _axes(panels[-1], columns, names, "block" if weights is None else "language-model layer", label)
    if weights is None:
        panels[-1].set_xticks([place + 1 for place in ticks(0, columns - 1)], list(map(str, ticks(0, columns - 1))))
    places = np.argwhere(sure)
    panels[-1].plot(places[:, 1] + 1, places[:, 0], ".", color=INK, markersize=3)
    return figure


def _map(
    figure: Figure, axes: Axes, values: Float[np.ndarray, "R C"], colors: str, limits: tuple[float, float], label: str
) -> None:
    x, y = np.arange(values.shape[1] + 1) + 0.5, np.arange(len(values) + 1) - 0.5
    mesh = axes.pcolormesh(x, y, values, cmap=colors, vmin=limits[0], vmax=limits[1], edgecolors="face", linewidth=0.2)
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06)
    bar.set_label(label, fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)


def _axes(axes: Axes, columns: int, names: Sequence[str], x_label: str, y_label: str) -> None:
    axes.invert_yaxis()
    axes.set_xticks(ticks(1, columns))
    axes.set_yticks(ticks(0, len(names) - 1), [names[row] for row in ticks(0, len(names) - 1)])
    axes.tick_params(labelsize=9.5, color=INK, labelcolor=INK)
    axes.spines[:].set_visible(False)
    label_axes(axes, x_label, y_label)


def disagreement(
    cfg: DiTConfig, weights: Float[np.ndarray, "K L"], measured: Sequence[Measured]
) -> dict[str, Any] | None:
    """Compare the weights with the need of each layer over all prompts; None if layers were not taken out.

    ``rank_correlation`` is Spearman's over all rows and layers, None if one side is constant; ``of_rows`` that of each
    row. ``largest`` lists the cells whose ranks are furthest apart, as shares of the number of cells.
    """
    chosen = [row for row in measured if (row.kind, row.tag) == ("without", OVERALL)]
    if not chosen:
        return None
    layers = [f"layer {layer + 1}" for layer in range(cfg.text_layers)]
    pairs = np.array([[weights[cfg.rows.index(one.row), layers.index(one.other)], one.need] for one in chosen])
    own = {name: [place for place, one in enumerate(chosen) if one.row == name] for name in cfg.rows}
    apart = (ranks(pairs[:, 0]) - ranks(pairs[:, 1])) / max(len(chosen) - 1, 1)
    largest = [
        {
            "row": chosen[i].row,
            "layer": layers.index(chosen[i].other) + 1,
            "weight": float(pairs[i, 0]),
            "need": chosen[i].need,
            "interval": [chosen[i].low, chosen[i].high],
            "ranks_apart": float(apart[i]),
            "reading": "read more than needed" if apart[i] > 0 else "needed more than read",
        }
        for i in np.argsort(-np.abs(apart), kind="stable")[:LISTED]
    ]
    return {
        "rank_correlation": spearman(pairs[:, 0], pairs[:, 1]),
        "of_rows": {name: spearman(pairs[places, 0], pairs[places, 1]) for name, places in own.items() if places},
        "largest": largest,
    }


def ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Return the rank of each value from 0; equal values share the mean of their ranks."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count + 1) / 2)[place]


def spearman(a: Float[np.ndarray, " N"], b: Float[np.ndarray, " N"]) -> float | None:
    """Return Spearman's rank correlation; None if one side is constant."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else None
