"""Edited routing: weights that replace or change those of a router, with the same interface.

A ``RoutingOverride`` replaces the weights of some rows, as in a file ``{"rows": [...], "weights": [[...]]}``.
``rerouted`` installs any edit of ``weights(t)`` in a network; ablations use it, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from semantic_routing.common.config import nearest
from semantic_routing.model.dit import Backbone, DiT, DiTConfig
from semantic_routing.model.routing import Router, mix

Edit = Callable[[Float[Tensor, "B K L"]], Float[Tensor, "B K L"]]
"""Function from the weights of all rows at some times to the weights that are used; it may change its argument in
place."""
TOLERANCE = 0.011
"""Largest distance of a row's sum from 1, because the weights of a file may be rounded to percents."""


@dataclass(frozen=True)
class RoutingOverride:
    """Routing weights for some rows of a network; other rows keep their own.

    override = RoutingOverride(rows=("block 0",), weights=((0.0, 1.0),))  # block 0 reads only the second of 2 layers
    with overridden(model.model, override):
        images = model.sample(["a red circle"])
    """

    rows: tuple[str, ...]
    """Names of rows of ``DiTConfig.rows``: "block 3", or "block 3, head 1, values" if a block reads several mixes."""
    weights: tuple[tuple[float, ...], ...]
    """For each of these rows a weight per layer, first to last: at least 0, with the sum 1."""

    def __post_init__(self) -> None:
        if not self.rows or len(self.rows) != len(self.weights):
            raise ValueError(
                f"there are {len(self.rows)} rows, but {len(self.weights)} rows of weights: give one for each"
            )
        if len(set(self.rows)) < len(self.rows):
            raise ValueError("a row is given twice; give each once")
        for name, row in zip(self.rows, self.weights, strict=True):
            if len(row) != len(self.weights[0]):
                raise ValueError(
                    f"{self.rows[0]!r} has {len(self.weights[0])} weights, but {name!r} {len(row)}: give one a layer"
                )
            if not all(math.isfinite(x) and x >= 0 for x in row) or abs(sum(row) - 1) > TOLERANCE:
                raise ValueError(f"the weights of {name!r} must be at least 0 and add up to 1, not {sum(row):g}")

    @classmethod
    def from_json(cls, data: Any) -> RoutingOverride:
        """Return the override of a JSON object with ``rows`` and ``weights``; ValueError if it is not one."""
        if not isinstance(data, dict) or set(data) != {"rows", "weights"}:
            raise ValueError('expected {"rows": ["block 0", ...], "weights": [[0.5, 0.5, ...], ...]}')
        rows, weights = data["rows"], data["weights"]
        if not isinstance(rows, list) or not all(isinstance(name, str) for name in rows):
            raise ValueError('"rows" must be a list of names, such as "block 0"')
        if not isinstance(weights, list) or not all(map(_is_row, weights)):
            raise ValueError('"weights" must be a list with a list of numbers for each row')
        return cls(tuple(rows), tuple(tuple(float(x) for x in row) for row in weights))

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return {"rows": list(self.rows), "weights": [list(row) for row in self.weights]}

    def check(self, cfg: DiTConfig) -> None:
        """Raise ValueError unless a network of this configuration has these rows and layers."""
        if cfg.strategy.reads_keys:
            raise ValueError(f"arm {cfg.arm!r} has no routing weights to override")
        for name in self.rows:
            if name not in cfg.rows:
                raise ValueError(f"arm {cfg.arm!r} has no row {name!r}; {nearest(name, list(cfg.rows))}")
        if len(self.weights[0]) != cfg.text_layers:
            raise ValueError(f"rows have {len(self.weights[0])} weights, but the model reads {cfg.text_layers} layers")
        if cfg.strategy.by_token and len(self.rows) < len(cfg.rows):
            raise ValueError(f"the weights of arm {cfg.arm!r} depend on the text: give all rows, {', '.join(cfg.rows)}")

    def router(self, cfg: DiTConfig, own: Router) -> EditedRouter:
        """Return ``own`` with the weights of these rows replaced; raise ValueError if rows or layers do not match."""
        self.check(cfg)
        shape = (len(cfg.rows), cfg.text_layers)
        return EditedRouter(own, shape, self.of_weights(cfg.rows), constant=len(self.rows) == len(cfg.rows))

    def of_weights(self, rows: Sequence[str]) -> Edit:
        """Return the function that replaces these rows in the weights of all rows, whose names are ``rows``."""
        places = torch.tensor([rows.index(name) for name in self.rows])
        table = torch.tensor(self.weights, dtype=torch.float64)
        table = (table / table.sum(-1, keepdim=True)).float()

        def edit(weights: Tensor) -> Tensor:
            weights[:, places.to(weights.device)] = table.to(weights)
            return weights

        return edit


class EditedRouter(Router):
    """A router whose weights are edited after it has computed them."""

    def __init__(self, own: Router, shape: tuple[int, int], edit: Edit, *, constant: bool = False) -> None:
        """``shape`` is the number of rows and columns that the edit sees.

        ``constant`` says that the edit replaces all of the router's weights, which are then not computed.
        """
        super().__init__()
        self.own, self.edit = own, edit
        self.shape = shape
        self.constant = constant
        self.depends_on_time = own.depends_on_time and not constant

    def weights(self, t: Float[Tensor, " T"] | None = None) -> Float[Tensor, "B_or_1 D_or_1 L"]:
        if self.constant:
            device = next((p.device for p in self.own.parameters()), None if t is None else t.device)
            return self.edit(torch.zeros(1, *self.shape, device=device))
        return self.edit(self.own.weights(t).expand(-1, *self.shape).clone())

    def forward(
        self, hidden: Float[Tensor, "L B N C"], t: Float[Tensor, " T"] | None = None
    ) -> Float[Tensor, "D_or_1 B N C"]:
        return mix(self.weights(t).to(hidden.device), hidden)  # weights of fixed routers have no device of their own


@contextmanager
def rerouted(model: Backbone, router: Router) -> Iterator[None]:
    """Replace a network's router within the context; raise ValueError if the network has none."""
    if not isinstance(model, DiT):
        raise ValueError(f"arm {model.cfg.arm!r} has no routing weights to override")
    own = model.router
    model.router = router
    try:
        yield
    finally:
        model.router = own


def _is_row(row: Any) -> bool:
    return isinstance(row, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in row)
