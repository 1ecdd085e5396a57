"""How the mixes of a block differ: keys from values, and heads from each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from semantic_routing.analysis.figures import Curve, Drawn, plot_curves
from semantic_routing.analysis.statistics import center, entropy, js_divergence, normalized
from semantic_routing.model.dit import DiTConfig


def part_figures(weights: Float[np.ndarray, "K L"], cfg: DiTConfig) -> Iterator[Drawn]:
    """Plot, by block, the semantic centres of keys and values, and the divergences between them and among heads."""
    sides, heads = cfg.strategy.split(cfg.kv_heads)
    parts = weights.reshape(cfg.depth, sides, heads, -1)
    names = ["keys", "values"] if sides == 2 else ["keys and values"]
    centres = center(parts).mean(2)
    yield _drawn(
        "centre-parts",
        "Semantic centre of keys and values by block (0 first layer, 1 last), the mean over heads",
        [(name, centres[:, side], "-") for side, name in enumerate(names)],
        "semantic centre",
    )
    curves: list[Curve] = []
    if sides == 2:
        curves.append(("keys from values", js_divergence(parts[:, 0], parts[:, 1]).mean(1), "-"))
    if heads > 1:
        curves += [(f"heads, {name}", head_divergence(parts[:, side]), "-") for side, name in enumerate(names)]
    if curves:
        title = "Jensen-Shannon divergence (base 2) between the parts of a block"
        yield _drawn("divergence-parts", title, curves, "divergence (bits)")


def head_divergence(weights: Float[np.ndarray, "D H L"]) -> Float[np.ndarray, " D"]:
    """Return the Jensen-Shannon divergence of H equally weighted heads in bits: 0 if all are equal, at most log2 H."""
    p = normalized(weights)
    return np.maximum(entropy(p.mean(1)) - entropy(p).mean(1), 0) / np.log(2)


def _drawn(name: str, title: str, curves: list[Curve], label: str) -> Drawn:
    values = np.stack([values for _, values, _ in curves], axis=1)
    blocks = np.arange(len(values), dtype=float)
    return Drawn(
        name=name, title=title, figure=plot_curves(blocks, curves, "block", label),
        rows=[str(block) for block in range(len(values))], columns=[name for name, _, _ in curves], values=values,
    )  # fmt: skip
