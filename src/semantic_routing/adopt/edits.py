"""Edits of an adopted routing: rows of weights, gains of layers and the scale, as ``semroute explore`` saves them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from semantic_routing.adopt.facts import Facts
from semantic_routing.adopt.file import read_routing
from semantic_routing.adopt.routing import Routing
from semantic_routing.adopt.table import row_names
from semantic_routing.adopt.weights import REINJECT
from semantic_routing.common.config import nearest
from semantic_routing.common.files import read_json
from semantic_routing.model.override import Edit, RoutingOverride

KEYS = ("rows", "weights", "gains", "scale")


@dataclass(frozen=True, kw_only=True)
class RoutingEdits:
    """Edits of an adopted routing; first rows are replaced, then layers get their gains, then all is scaled.

    edits = RoutingEdits(gains=((3, 0.0),))  # no block reads layer 3
    with edits.on(routing):
        image = pipe("three red apples").images[0]
    """

    override: RoutingOverride | None = None
    """Rows of weights over the 1 + L states, the original one first, that replace those of the routing."""
    gains: tuple[tuple[int, float], ...] = ()
    """Layers, from 1 to L, and the factor on the weights of each; the weight of the original state is the rest."""
    scale: float = 1.0
    """Factor on the strength of the routing."""

    def __post_init__(self) -> None:
        layers = [layer for layer, _ in self.gains]
        if any(layer < 1 for layer in layers) or len(set(layers)) < len(layers):
            raise ValueError("gains are for layers from 1 on; give each layer once")
        if not all(math.isfinite(gain) and gain >= 0 for _, gain in self.gains):
            raise ValueError("gains must be finite numbers of at least 0")
        if not math.isfinite(self.scale):
            raise ValueError(f"the scale is {self.scale:g}; it must be a finite number")

    @classmethod
    def from_json(cls, data: Any) -> RoutingEdits:
        """Return the edits of a JSON object, in which each of ``KEYS`` may be missing; ValueError if it is not one."""
        if not isinstance(data, dict):
            raise ValueError('expected an object such as {"gains": {"3": 0.0}, "scale": 0.5}')
        if unknown := [name for name in data if name not in KEYS]:
            raise ValueError(f"unknown key {unknown[0]!r}; {nearest(unknown[0], list(KEYS))}")
        rows = {name: data[name] for name in ("rows", "weights") if name in data}
        gains, scale = data.get("gains", {}), data.get("scale", 1.0)
        if not isinstance(gains, dict) or not all(key.isdecimal() for key in gains):
            raise ValueError('"gains" must be an object of layers and factors, such as {"3": 0.5}')
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in [*gains.values(), scale]):
            raise ValueError('"scale" and all "gains" must be numbers')
        return cls(
            override=RoutingOverride.from_json(rows) if rows else None,
            gains=tuple(sorted((int(layer), float(gain)) for layer, gain in gains.items())),
            scale=float(scale),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads, without what is not edited."""
        found: dict[str, Any] = {} if self.override is None else self.override.to_json()
        if self.gains:
            found["gains"] = {str(layer): gain for layer, gain in self.gains}
        return found if self.scale == 1 else found | {"scale": self.scale}

    def check(self, facts: Facts) -> None:
        """Raise ValueError unless a routing has these rows, states and layers."""
        if (self.override is not None or self.gains) and facts.arm == REINJECT:
            raise ValueError(f"arm {REINJECT!r} has no weights to edit, only a scale")
        known, states = row_names(facts), 1 + facts.layers
        if self.override is not None:
            for name in self.override.rows:
                if name not in known:
                    raise ValueError(f"the routing has no row {name!r}; {nearest(name, known)}")
            if (found := len(self.override.weights[0])) != states:
                raise ValueError(
                    f"rows have {found} weights, but the routing mixes {states} states: the original one and "
                    f"{facts.layers} layers"
                )
        for layer, _ in self.gains:
            if layer > facts.layers:
                raise ValueError(f"there is a gain of layer {layer}, but the routing has {facts.layers} layers")

    def of_weights(self, rows: Sequence[str]) -> Edit:
        """Return the function that edits the weights of all rows, whose names are ``rows``."""
        replace = None if self.override is None else self.override.of_weights(rows)

        def edit(weights: Tensor) -> Tensor:
            if replace is not None:
                weights = replace(weights)
            for layer, gain in self.gains:
                weights[..., layer] *= gain
            if self.gains:
                weights[..., 0] = 1 - weights[..., 1:].sum(-1)
            return weights

        return edit

    @contextmanager
    def on(self, routing: Routing) -> Iterator[None]:
        """Edit a routing while the context lasts; ValueError if it has other rows, states or layers."""
        self.check(routing.facts)
        own, rows = routing.scale, row_names(routing.facts)
        plain = self.override is None and not self.gains
        routing.scale = own * self.scale
        try:
            with nullcontext() if plain else routing.edited(self.of_weights(rows)):
                yield
        finally:
            routing.scale = own


NO_EDITS = RoutingEdits()


def read_edits(path: Path, routing: str | Path) -> RoutingEdits:
    """Read a file of edits; raise ValueError, which names the file, if they do not fit a routing's file."""
    data = read_json(path, "a file of edits")
    facts, _ = read_routing(routing)
    try:
        edits = RoutingEdits.from_json(data)
        edits.check(facts)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return edits
