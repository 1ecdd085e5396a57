"""Edits of routing weights on the page: presets, one cell, one row. An edit is a ``RoutingOverride``, None if empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from semantic_routing.common.config import nearest
from semantic_routing.model.override import RoutingOverride

LEARNED, PENULTIMATE, UNIFORM = "as learned", "B1: last layer but one", "B2: average of all layers"
ONE_LAYER, ONE_BLOCK = "one layer for all blocks", "one layer for this block"
PRESETS = (LEARNED, PENULTIMATE, UNIFORM, ONE_LAYER, ONE_BLOCK)
"""The last two need a chosen layer, the last one a chosen block."""
DIGITS = 4
"""Decimals of edited weights: a link then gives exactly the weights that it was made from."""
MOST_GAIN = 3
"""Largest factor on the weights of a layer."""

Row = tuple[float, ...]


def preset(
    name: str, edit: RoutingOverride | None, rows: Sequence[str], layers: int, *, row: int, layer: int
) -> RoutingOverride | None:
    """Return the edit of a preset; ``row`` and ``layer`` count from 0. ValueError for an unknown name.

    ``ONE_BLOCK`` changes only this row of ``edit``; the other presets replace it. ``layers`` is the number of columns,
    of which B1 reads the last but one and B2 all.
    """
    if name == LEARNED:
        return None
    if name == ONE_BLOCK:
        return with_row(edit, rows, row, one_hot(layers, layer))
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {nearest(name, list(PRESETS))}")
    weights = (round(1 / layers, DIGITS),) * layers
    if name != UNIFORM:
        weights = one_hot(layers, max(0, layers - 2) if name == PENULTIMATE else layer)
    return RoutingOverride(tuple(rows), (weights,) * len(rows))


def preset_name(edit: RoutingOverride | None, rows: Sequence[str], layers: int) -> str | None:
    """Return the preset that gives an edit; None for edits by hand and for presets of a chosen layer."""
    named = (LEARNED, PENULTIMATE, UNIFORM)
    return next((name for name in named if preset(name, None, rows, layers, row=0, layer=0) == edit), None)


def one_hot(layers: int, layer: int) -> Row:
    """Return a row that reads one layer."""
    return tuple(float(place == layer) for place in range(layers))


def with_row(edit: RoutingOverride | None, rows: Sequence[str], row: int, weights: Row) -> RoutingOverride:
    """Return an edit with one more row, or another one in its place; rows keep their order of ``rows``."""
    held = as_mapping(edit) | {rows[row]: weights}
    kept = [name for name in rows if name in held]
    return RoutingOverride(tuple(kept), tuple(held[name] for name in kept))


def with_cell(
    edit: RoutingOverride | None,
    rows: Sequence[str],
    table: Float[np.ndarray, "K L"],
    *,
    row: int,
    layer: int,
    weight: float,
) -> RoutingOverride:
    """Return an edit in which one weight of a row is set, and the others keep their proportions.

    ``table`` holds the weights that are shown. If the others are all 0, they share the rest equally. Weights below 0,
    which only some adopted models have, become 0.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"the weight is {weight:g}; it must be from 0 to 1")
    others = np.clip(np.asarray(table[row], dtype=np.float64), 0, None)
    others[layer] = 0
    if others.sum() == 0:
        others = np.ones_like(others)
        others[layer] = 0
    if others.sum() == 0:  # the only layer
        return with_row(edit, rows, row, (1.0,))
    changed = others / others.sum() * (1 - weight)
    changed[layer] = weight
    return with_row(edit, rows, row, tuple(round(float(x), DIGITS) for x in changed))


def applied(edit: RoutingOverride | None, rows: Sequence[str], table: Float[np.ndarray, "K L"]) -> np.ndarray:
    """Return the weights with an edit: what the network reads."""
    changed = np.array(table)
    for name, weights in as_mapping(edit).items():
        changed[rows.index(name)] = np.array(weights) / sum(weights)
    return changed


def as_mapping(edit: RoutingOverride | None) -> dict[str, Row]:
    """Return the edited rows by name."""
    return {} if edit is None else dict(zip(edit.rows, edit.weights, strict=True))


def with_gain(gains: Mapping[int, float], layer: int, gain: float) -> dict[int, float]:
    """Return gains by layer with one of them set; a gain of 1 is left out."""
    if not 0 <= gain <= MOST_GAIN:
        raise ValueError(f"the gain is {gain:g}; it must be from 0 to {MOST_GAIN}")
    held = {**gains, layer: gain}
    return {place: value for place, value in sorted(held.items()) if value != 1}
