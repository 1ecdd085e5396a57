"""The header and the weights of a routing's file, without its model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.adopt.facts import Facts
from semantic_routing.adopt.file import check_shapes, read_routing
from semantic_routing.adopt.routing import Routing

SHOWN = 5
"""States that a row of the table names."""


def open_routing(source: str | Path) -> Routing:
    """Return the routing of a file, a folder or a name on the hub, without a model; ValueError if there is none."""
    facts, numbers = read_routing(source)
    routing = Routing(facts)
    check_shapes(routing.state_dict(), numbers, source)
    routing.load_state_dict(numbers)
    return routing.eval().requires_grad_(False)


def row_names(facts: Facts) -> list[str]:
    """Return the names of the rows of weights: blocks, and their slots if they have several."""
    if facts.slots == 1:
        return [f"block {block}" for block in range(facts.blocks)]
    return [f"block {block}, slot {slot}" for block in range(facts.blocks) for slot in range(facts.slots)]


def state_names(facts: Facts) -> list[str]:
    """Return the names of the states: the original one, then the layers."""
    return ["origin", *(f"layer {layer}" for layer in range(1, facts.layers + 1))]


def weights_at(routing: Routing, times: Sequence[float]) -> Float[Tensor, "T R S"]:
    """Return the weights of all rows at each time; at one time if they do not depend on it."""
    chosen = torch.tensor(list(times)[: None if routing.depends_on_time else 1])
    return routing.weights(chosen).expand(len(chosen), routing.facts.rows, -1)


def routing_table(source: str | Path, times: Sequence[float], *, as_json: bool = False) -> str:
    """Return header and weights as text, with the largest weights of each row in percent."""
    routing = open_routing(source)
    facts, weights = routing.facts, weights_at(routing, times)
    if as_json:
        shown = list(times) if routing.depends_on_time else [None]
        rows = [{"time": time, "weights": part.tolist()} for time, part in zip(shown, weights, strict=True)]
        return json.dumps({"header": asdict(facts), "rows": row_names(facts), "at": rows}, indent=2)
    width = max(map(len, asdict(facts)))
    lines = [f"{name:<{width}}  {value}" for name, value in asdict(facts).items() if value != ""]
    lines.append(f"{'parameters':<{width}}  {sum(p.numel() for p in routing.state_dict().values())}")
    for time, part in zip(times, weights, strict=False):
        lines += ["", f"weights in percent, t = {time:g}" if routing.depends_on_time else "weights in percent"]
        lines += _rows(facts, part)
    return "\n".join(lines)


def _rows(facts: Facts, weights: Float[Tensor, "R S"]) -> list[str]:
    """Return a line for each row, with its largest weights; rows with equal weights share a line."""
    names, states = row_names(facts), state_names(facts)
    if bool((weights == weights[:1]).all()):
        names, weights = ["all blocks"], weights[:1]
    width, lines = max(map(len, names)), []
    for name, row in zip(names, weights, strict=True):
        order = row.abs().argsort(descending=True, stable=True).tolist()
        found = [f"{states[i]} {100 * float(row[i]):.1f}" for i in order[:SHOWN] if row[i] != 0]
        rest = int((row != 0).sum()) - len(found)
        lines.append(f"{name:<{width}}  {', '.join(found)}" + (f", and {rest} more" if rest else ""))
    return lines
