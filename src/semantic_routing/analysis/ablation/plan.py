"""The ablations of a model's routing, each as an edit of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from semantic_routing.model.dit import DiTConfig

Kind = Literal["without", "alone", "swap"]
KINDS: dict[Kind, str] = {
    "without": "a row reads every layer but one, its other weights scaled up to a sum of 1",
    "alone": "a row reads one layer alone",
    "swap": "two blocks exchange their weights",
}
"""Kinds of ablations, and what they do."""


@dataclass(frozen=True)
class Ablation:
    """One change of the routing; everything else is unchanged."""

    kind: Kind
    row: int
    """Row of the weights; for a swap a block."""
    other: int
    """Layer, counted from 0; for a swap the other block."""

    def names(self, cfg: DiTConfig) -> tuple[str, str]:
        """Return the names of row and layer, or of both blocks."""
        if self.kind == "swap":
            return f"block {self.row}", f"block {self.other}"
        return cfg.rows[self.row], f"layer {self.other + 1}"

    def edit(self, weights: Float[Tensor, "B K L"], depth: int) -> Float[Tensor, "B K L"]:
        """Return the changed weights of all rows, at all times; the argument is changed in place."""
        if self.kind == "swap":
            blocks = weights.unflatten(1, (depth, -1)).clone()
            blocks[:, [self.row, self.other]] = blocks[:, [self.other, self.row]]
            return blocks.flatten(1, 2)
        row = weights[:, self.row]
        if self.kind == "alone":
            row.zero_()
            row[:, self.other] = 1
        else:
            row[:, self.other] = 0
            row /= row.sum(-1, keepdim=True)
        return weights


def plan(cfg: DiTConfig, weights: Float[np.ndarray, "T K L"], kinds: Sequence[Kind]) -> list[Ablation]:
    """Return the ablations of these kinds for a model with these weights at some times.

    Ablations that would leave nothing to read are left out, and so are swaps of blocks with equal weights.
    """
    rows, layers = range(len(cfg.rows)), range(cfg.text_layers)
    found: list[Ablation] = []
    if "without" in kinds:
        all_of_it = weights.max(0) > 1 - 1e-6
        found += [Ablation("without", row, layer) for row in rows for layer in layers if not all_of_it[row, layer]]
    if "alone" in kinds:
        found += [Ablation("alone", row, layer) for row in rows for layer in layers]
    if "swap" in kinds:
        blocks = weights.reshape(len(weights), cfg.depth, -1).swapaxes(0, 1)
        pairs = [(one, other) for one in range(cfg.depth) for other in range(one + 1, cfg.depth)]
        found += [Ablation("swap", *pair) for pair in pairs if not np.array_equal(blocks[pair[0]], blocks[pair[1]])]
    return found
