"""Figures of an adopted routing: the weights of the original state and of each layer in each block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from semantic_routing.adopt.file import FILE
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.table import row_names, state_names, weights_at
from semantic_routing.analysis.figures import Drawn
from semantic_routing.analysis.weights import plot_heatmap


def is_routing(path: Path) -> bool:
    """Return whether a path is a routing's file, or a folder that holds one."""
    return (path.is_file() and path.suffix == ".safetensors") or (path / FILE).is_file()


def adopted_figures(routing: Routing, times: Sequence[float]) -> Iterator[Drawn]:
    """Draw a heat map of the weights of all rows over all states, at each time if they depend on it."""
    facts = routing.facts
    rows, columns = row_names(facts), state_names(facts)
    label = "block" if facts.slots == 1 else "block and slot"
    weights = weights_at(routing, times).numpy(force=True)
    top = float(np.abs(weights).max())
    for time, part in zip(times, weights, strict=False):
        name, at = (f"heatmap-t{time:g}", f"t = {time:g}") if routing.depends_on_time else ("heatmap", "")
        title = f"Weight of the original state and of each layer in each block{at and f', {at}'}"
        short = [row.removeprefix("block ") for row in rows]
        figure = plot_heatmap(part, at, top, short, label, columns=["origin", *map(str, range(1, facts.layers + 1))])
        yield Drawn(name=name, title=title, figure=figure, rows=rows, columns=columns, values=part)
