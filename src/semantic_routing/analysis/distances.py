"""Similarity of the routing of several models: over training, and across seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.figures import Drawn
from semantic_routing.analysis.profiles import SIMILARITY, plot_similarity
from semantic_routing.analysis.routers import TIMES, routing_weights
from semantic_routing.analysis.statistics import js_divergence, total_variation
from semantic_routing.model.dit import Backbone


def compare_routers(names: Sequence[str], models: Sequence[Backbone]) -> Iterator[Drawn]:
    """Draw the similarity of every pair of models: 1 - distance, averaged over blocks (or their parts) and 21 times.

    The distances are the Jensen-Shannon divergence (base 2) and the total variation. ValueError if the models differ
    in their numbers of layers, blocks or parts.
    """
    weights = [routing_weights(model, TIMES) for model in models]
    for name, model, found in zip(names, models, weights, strict=True):
        if found.shape != weights[0].shape or model.cfg.rows != models[0].cfg.rows:
            raise ValueError(
                f"{name} has {model.cfg.depth} blocks{_parts(model)} reading {found.shape[2]} layers, {names[0]} has "
                f"{models[0].cfg.depth}{_parts(models[0])} reading {weights[0].shape[2]}: only models with equal "
                "numbers of blocks and layers can be compared"
            )
    stack = np.stack(weights)
    kinds = (
        ("jensen-shannon", js_divergence, SIMILARITY),
        ("total-variation", total_variation, "similarity: 1 - total variation"),
    )
    for kind, distance, measure in kinds:
        values = 1 - distance(stack[:, None], stack[None]).mean((2, 3))
        places = np.arange(len(names), dtype=float)
        yield Drawn(
            name=f"models-{kind}",
            title=f"Routing of the models, {measure}: {mean_similarity(values):.4f} on average over pairs",
            figure=plot_similarity(values, places, "", names=names, measure=measure),
            rows=names,
            columns=names,
            values=values,
        )


def _parts(model: Backbone) -> str:
    parts = len(model.cfg.rows) // model.cfg.depth
    return f" of {parts} parts" if parts > 1 else ""


def mean_similarity(values: Float[np.ndarray, "K K"]) -> float:
    """Return the mean over all pairs of different models: the stability of routing across seeds."""
    count = len(values)
    return float((values.sum() - np.trace(values)) / (count * (count - 1)))
