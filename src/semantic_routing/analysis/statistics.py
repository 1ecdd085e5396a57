"""What routing weights say as numbers: the formulas of Section 5.1 and Appendix C, and a few beyond the paper.

A weight vector over L layers is a probability distribution; functions take any number of them in the leading axes.
Everything is float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Weights = Float[np.ndarray, "... L"]
Values = Float[np.ndarray, "..."]


def normalized(weights: Weights) -> Weights:
    """Weights as probabilities (Eq. 14); ValueError for negative ones or rows without any."""
    weights = np.asarray(weights, dtype=np.float64)
    total = weights.sum(-1, keepdims=True)
    if (weights < 0).any() or not (total > 0).all():
        raise ValueError("routing weights must be non-negative, with a positive sum in every row")
    return weights / total


def support(layers: int) -> Float[np.ndarray, " L"]:
    """Where the layers stand on the axis from shallow to deep: evenly from 0 to 1 (Eq. 15)."""
    return np.linspace(0, 1, layers) if layers > 1 else np.zeros(1)


def center(weights: Weights) -> Values:
    """Semantic centre: the mean layer, 0 the first and 1 the last (Eq. 16)."""
    p = normalized(weights)
    return np.asarray(p @ support(p.shape[-1]))


def dispersion(weights: Weights) -> Values:
    """Semantic dispersion: the variance around the centre (Eq. 17), at most 1/4."""
    p = normalized(weights)
    return np.asarray((p * (support(p.shape[-1]) - center(p)[..., None]) ** 2).sum(-1))


def marginals(weights: Float[np.ndarray, "T D L"]) -> tuple[Float[np.ndarray, "T L"], Float[np.ndarray, "D L"]]:
    """The joint strategy's distributions over layers by time (mean over blocks) and by block (mean over times)."""
    p = normalized(weights)
    return p.mean(1), p.mean(0)


def entropy(weights: Weights) -> Values:
    """Shannon entropy in nats: 0 for one layer, log L for the uniform average."""
    p = normalized(weights)
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1))).sum(-1))


def effective_layers(weights: Weights) -> Values:
    """How many layers, weighed alike, would have the same entropy: exp(entropy), from 1 to L."""
    return np.asarray(np.exp(entropy(weights)))


def js_divergence(p: Weights, q: Weights) -> Values:
    """Jensen-Shannon divergence to base 2: 0 for equal distributions, 1 for disjoint ones (Lin, 1991)."""
    p, q = normalized(p), normalized(q)
    return np.asarray(np.clip((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2) / np.log(2), 0, 1))


def js_similarity(weights: Float[np.ndarray, "K L"]) -> Float[np.ndarray, "K K"]:
    """One minus the Jensen-Shannon divergence (base 2) of every pair of rows, as in Figure 3."""
    return 1 - js_divergence(weights[:, None], weights[None])


def wasserstein(p: Weights, q: Weights) -> Values:
    """1-Wasserstein distance on the support of Eq. 15: the area between the two cumulative distributions."""
    p, q = normalized(p), normalized(q)
    gaps = np.abs(np.cumsum(p - q, -1))[..., :-1]
    return np.asarray(gaps.sum(-1) / max(p.shape[-1] - 1, 1))


def wasserstein_steps(weights: Float[np.ndarray, "T L"]) -> Float[np.ndarray, " T_minus_1"]:
    """1-Wasserstein distance of each time's weights to those of the time before, as in Figure 9."""
    return wasserstein(weights[1:], weights[:-1])


def total_variation(p: Weights, q: Weights) -> Values:
    """Half the sum of absolute differences: the share of the weight that moved, from 0 to 1."""
    return np.asarray(np.abs(normalized(p) - normalized(q)).sum(-1) / 2)
