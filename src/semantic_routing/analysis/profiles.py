"""Routing by block and by time: Figures 3, 8 and 9 of the paper, and the effective number of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from semantic_routing.analysis.figures import INK, Curve, Drawn, label_axes, new_axes, plot_curves, ticks
from semantic_routing.analysis.parts import part_figures
from semantic_routing.analysis.routers import TIME, TIMES, routing_weights, row_label, row_names
from semantic_routing.analysis.statistics import (
    center,
    dispersion,
    effective_layers,
    entropy,
    js_similarity,
    marginals,
    wasserstein_steps,
)
from semantic_routing.model.dit import Backbone

SIMILARITY = "similarity: 1 - JS divergence (base 2)"
ALIKE = 0.99
"""The colour scale of similarities starts here or lower: smaller differences do not show."""


@dataclass(frozen=True)
class Profiles:
    """Weights of a model by time and by block, or part of a block; None for an axis on which they do not depend.

    If they depend on both axes, these are the marginals: means over the other axis.
    """

    by_time: Float[np.ndarray, "T L"] | None
    by_block: Float[np.ndarray, "K L"] | None
    effective: Float[np.ndarray, "T K"]
    """Effective number of layers of each block at each time."""


def profiles(model: Backbone) -> Profiles:
    """Return the weights of a model by time (at ``TIMES``) and by block."""
    weights = routing_weights(model, TIMES)
    by_time, by_block = marginals(weights)
    varies = np.ptp(by_block, axis=0).max() > 0
    return Profiles(
        by_time=by_time if model.depends_on_time else None,
        by_block=by_block if varies else None,
        effective=effective_layers(weights),
    )


def routing_figures(model: Backbone) -> Iterator[Drawn]:
    """Draw Figures 3, 8 and 9 and the effective number of layers, for each axis on which the routing depends."""
    found = profiles(model)
    if found.by_block is not None:
        names, label = row_names(model.cfg), row_label(model.cfg)
        axis, places = "parts" if model.cfg.strategy.finer else "blocks", np.arange(len(names), dtype=float)
        yield from _axis_figures(axis, label, names, places, found.by_block, found.effective.mean(0))
        if model.cfg.strategy.finer:
            yield from part_figures(found.by_block, model.cfg)
    if found.by_time is not None:
        names = [f"{t:g}" for t in TIMES]
        yield from _axis_figures("times", TIME, names, np.array(TIMES), found.by_time, found.effective.mean(1))
        yield _wasserstein_figure(found.by_time)


def _axis_figures(
    axis: str,
    label: str,
    names: list[str],
    places: Float[np.ndarray, " K"],
    weights: Float[np.ndarray, "K L"],
    effective: Float[np.ndarray, " K"],
) -> Iterator[Drawn]:
    """Draw the figures of one axis from its marginal weights and its mean effective numbers of layers."""
    similarity = js_similarity(weights)
    yield Drawn(
        name=f"similarity-{axis}",
        title=f"Jensen-Shannon similarity of {axis} (1 - divergence to base 2)",
        figure=plot_similarity(similarity, places, label, names=names if axis == "parts" else None),
        rows=names,
        columns=names,
        values=similarity,
    )
    mean, variance = center(weights), dispersion(weights)
    yield Drawn(
        name=f"trend-{axis}",
        title=f"Semantic centre (line) and dispersion (band of one deviation) by {axis[:-1]}",
        figure=plot_trend(places, mean, variance, label),
        rows=names,
        columns=["centre", "dispersion", "entropy (nats)", "effective layers"],
        values=np.stack([mean, variance, entropy(weights), effective_layers(weights)], axis=1),
    )
    layers = weights.shape[1]
    curves = _effective_curves(weights, effective)
    uniform = ("uniform", np.full(len(places), float(layers)), ":")
    yield Drawn(
        name=f"effective-layers-{axis}",
        title=f"Effective number of layers (exp of the entropy) by {axis[:-1]}",
        figure=plot_curves(places, [*curves, uniform], label, f"effective layers of {layers}", bottom=0.0),
        rows=names,
        columns=[name for name, _, _ in curves],
        values=np.stack([values for _, values, _ in curves], axis=1),
    )


def _effective_curves(weights: Float[np.ndarray, "K L"], effective: Float[np.ndarray, " K"]) -> list[Curve]:
    """Return the mean of the effective numbers and the number of the mean weights; one curve if they are equal."""
    of_mean = effective_layers(weights)
    if np.abs(effective - of_mean).max() <= 1e-6:
        return [("effective layers", effective, "-")]
    return [("of each block and time, on average", effective, "-"), ("of the mean weights", of_mean, "--")]


def _wasserstein_figure(weights: Float[np.ndarray, "T L"]) -> Drawn:
    steps = wasserstein_steps(weights)
    figure, axes = new_axes(5.6, 3.0)
    axes.bar(TIMES[1:], steps, width=0.035, color="#4477aa")
    label_axes(axes, TIME, "1-Wasserstein distance\nto the time before")
    return Drawn(
        name="wasserstein-times",
        title="1-Wasserstein distance between consecutive times",
        figure=figure,
        rows=[f"{t:g}" for t in TIMES[1:]],
        columns=["distance"],
        values=steps[:, None],
    )


def plot_similarity(
    similarity: Float[np.ndarray, "K K"],
    places: Float[np.ndarray, " K"],
    label: str,
    *,
    names: Sequence[str] | None = None,
    measure: str = SIMILARITY,
) -> Figure:
    """Draw a matrix of similarities, first row at the top. The colours run from the smallest, at most 0.99, to 1.

    The axes show ``names``, or the indices if there are no names.
    """
    figure, axes = new_axes(5.4, 4.2) if names is None else new_axes(6.0, 4.8)
    step = places[1] - places[0] if len(places) > 1 else 1.0
    edges = np.append(places - step / 2, places[-1] + step / 2)
    low = min(float(similarity.min()), ALIKE)
    mesh = axes.pcolormesh(edges, edges, similarity, cmap="viridis", vmin=low, vmax=1, edgecolors="face")
    axes.invert_yaxis()
    axes.set_box_aspect(1)
    axes.spines[:].set_visible(False)
    label_axes(axes, label, label)
    if names is not None:
        shown = ticks(0, len(names) - 1)
        axes.set_xticks(places[shown], [names[i] for i in shown], rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(places[shown], [names[i] for i in shown])
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.05)
    bar.set_label(measure, fontsize=10, color=INK)
    bar.ax.tick_params(labelsize=9, color=INK, labelcolor=INK)
    bar.outline.set_visible(False)
    return figure


def plot_trend(
    places: Float[np.ndarray, " K"],
    mean: Float[np.ndarray, " K"],
    variance: Float[np.ndarray, " K"],
    label: str,
) -> Figure:
    """Draw the centre in a band of one standard deviation to both sides; 0 is the first layer, 1 the last."""
    figure, axes = new_axes(5.6, 3.0)
    deviation = np.sqrt(variance)
    axes.fill_between(places, mean - deviation, mean + deviation, color="#4477aa", alpha=0.2, linewidth=0)
    axes.plot(places, mean, "o-", color="#4477aa", markersize=3, linewidth=1.5)
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1)
    label_axes(axes, label, "centre and deviation\n(0 first layer, 1 last)")
    return figure
