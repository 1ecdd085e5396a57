"""Statistics of routing weights: the formulas of Section 5.1 and Appendix C, and a few beyond the paper.

A weight vector over L layers is a probability distribution. Functions accept any leading axes and compute in float64.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

Weights = Float[np.ndarray, "... L"]
Values = Float[np.ndarray, "..."]


def normalized(weights: Weights) -> Weights:
    """Return weights as probabilities (Eq. 14); ValueError for negative weights and for rows that sum to 0."""
    weights = np.asarray(weights, dtype=np.float64)
    total = weights.sum(-1, keepdims=True)
    if (weights < 0).any() or not (total > 0).all():
        raise ValueError("routing weights must be non-negative, with a positive sum in every row")
    return weights / total


def support(layers: int) -> Float[np.ndarray, " L"]:
    """Return the positions of the layers, evenly spaced from 0 (shallow) to 1 (deep) (Eq. 15)."""
    return np.linspace(0, 1, layers) if layers > 1 else np.zeros(1)


def center(weights: Weights) -> Values:
    """Return the semantic centre: the mean position, 0 for the first layer and 1 for the last (Eq. 16)."""
    p = normalized(weights)
    return np.asarray(p @ support(p.shape[-1]))


def dispersion(weights: Weights) -> Values:
    """Return the semantic dispersion: the variance around the centre, at most 1/4 (Eq. 17)."""
    p = normalized(weights)
    return np.asarray((p * (support(p.shape[-1]) - center(p)[..., None]) ** 2).sum(-1))


def marginals(weights: Float[np.ndarray, "T D L"]) -> tuple[Float[np.ndarray, "T L"], Float[np.ndarray, "D L"]]:
    """Return the distributions over layers by time (mean over blocks) and by block (mean over times)."""
    p = normalized(weights)
    return p.mean(1), p.mean(0)


def entropy(weights: Weights) -> Values:
    """Return the Shannon entropy in nats: 0 for one layer, log L for the uniform average."""
    p = normalized(weights)
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1))).sum(-1))


def effective_layers(weights: Weights) -> Values:
    """Return exp(entropy), from 1 to L: the number of equally weighted layers that has the same entropy."""
    return np.asarray(np.exp(entropy(weights)))


def js_divergence(p: Weights, q: Weights) -> Values:
    """Return the Jensen-Shannon divergence to base 2: 0 for equal distributions, 1 for disjoint ones (Lin, 1991)."""
    p, q = normalized(p), normalized(q)
    return np.asarray(np.clip((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2) / np.log(2), 0, 1))


def js_similarity(weights: Float[np.ndarray, "K L"]) -> Float[np.ndarray, "K K"]:
    """Return 1 - the Jensen-Shannon divergence (base 2) of every pair of rows, as in Figure 3."""
    return 1 - js_divergence(weights[:, None], weights[None])


def wasserstein(p: Weights, q: Weights) -> Values:
    """Return the 1-Wasserstein distance on the support of Eq. 15: the area between the cumulative distributions."""
    p, q = normalized(p), normalized(q)
    gaps = np.abs(np.cumsum(p - q, -1))[..., :-1]
    return np.asarray(gaps.sum(-1) / max(p.shape[-1] - 1, 1))


def wasserstein_steps(weights: Float[np.ndarray, "T L"]) -> Float[np.ndarray, " T_minus_1"]:
    """Return the 1-Wasserstein distance of each time's weights to those of the time before, as in Figure 9."""
    return wasserstein(weights[1:], weights[:-1])


def total_variation(p: Weights, q: Weights) -> Values:
    """Return half the sum of absolute differences: the share of the weight that moved, from 0 to 1."""
    return np.asarray(np.abs(normalized(p) - normalized(q)).sum(-1) / 2)


def excess(weights: Float[np.ndarray, "K L"], layer: int) -> float:
    """Return a layer's mean weight divided by the uniform share, minus 1: -1 for a layer without weight."""
    return float(normalized(weights)[:, layer].mean() * weights.shape[1] - 1)


def neighbour_correlation(weights: Float[np.ndarray, "K L"]) -> float:
    """Return the mean over rows of the correlation of neighbouring inner layers' logits, above that of random order.

    In random order n logits have the expected correlation -1 / (n - 1). nan without rows that ``_inner_logits`` keeps.
    """
    logits = _inner_logits(weights)
    if not len(logits):
        return float("nan")
    logits = logits - logits.mean(1, keepdims=True)
    by_row = (logits[:, 1:] * logits[:, :-1]).mean(1) / (logits**2).mean(1)
    return float(by_row.mean() + 1 / (logits.shape[1] - 1))


def turning_points(weights: Float[np.ndarray, "K L"]) -> float:
    """Return the share of inner layers above both neighbours or below both, minus that of random order, 2/3.

    Unlike the correlation, it ignores a preference that changes slowly from layer to layer. nan as there.
    """
    steps = np.diff(_inner_logits(weights))
    return float((steps[:, 1:] * steps[:, :-1] < 0).mean() - 2 / 3) if len(steps) else float("nan")


def _inner_logits(weights: Float[np.ndarray, "K L"]) -> Float[np.ndarray, "M N"]:
    """Return the logits without the first and last layer, of the rows in which they differ; none for fewer than 3."""
    logits = np.log(np.maximum(normalized(weights), np.finfo(np.float32).tiny))[:, 1:-1]
    return logits[np.ptp(logits, axis=1) > 0] if logits.shape[1] > 2 else logits[:0]


def smoothness(weights: Float[np.ndarray, "K L"]) -> float:
    """Return the mean Jensen-Shannon similarity of adjacent rows minus that of all others; nan for fewer than 3."""
    if len(weights) < 3:
        return float("nan")
    similarity = js_similarity(weights)
    return float(np.diag(similarity, 1).mean() - similarity[np.triu_indices(len(weights), 2)].mean())
