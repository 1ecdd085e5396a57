"""The mix of states that keeps each token's original mean and deviation, so that a frozen model can read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from semantic_routing.model.kernels.mix import LN_EPS, no_autocast
from semantic_routing.model.routing import mix


def restyled(
    change: Float[Tensor, "B_or_1 R S"],
    states: Float[Tensor, "T B N C"],
    origins: Sequence[int],
    kept: Sequence[int],
    neutral: Bool[Tensor, "B N"] | None = None,
) -> Iterator[Float[Tensor, "B N C"]]:
    """Yield U_r = H_o + σ_o Σ_l (α_rl - δ_l) LN(H_l) for each row r (Eq. 2, rescaled to the moments of H_o).

    ``change`` is α - δ over the original state and L layers, S = 1 + L. ``states[origins[r]]`` is the state H_o of row
    r, and the last ``len(kept)`` states are the layers with these numbers (1 to L); the other layers have the weight 0.
    σ_o is the deviation of each token of H_o. Because the weights sum to 1, U is the convex mix of all states after
    each was rescaled to the mean and deviation of H_o's token. Where ``change`` is 0, and at ``neutral`` tokens, U is
    bitwise H_o.
    """
    count = states.shape[0]
    own = torch.nn.functional.one_hot(torch.tensor(origins, device=change.device), count).to(change)
    layers = change[..., list(kept)]
    spread = torch.nn.functional.pad(layers, (count - len(kept), 0)) + change[..., :1] * own
    mixed = mix(spread, states)
    deviations: dict[int, Tensor] = {}
    for row, origin in enumerate(origins):
        if origin not in deviations:
            deviations[origin] = _deviation(states[origin])
        added = deviations[origin] * mixed[row].float()
        if neutral is not None:
            added = added.masked_fill(neutral[..., None], 0)
        yield (states[origin].float() + added).to(states.dtype)


def _deviation(state: Float[Tensor, "B N C"]) -> Float[Tensor, "B N 1"]:
    """Return the deviation by which ``LayerNorm`` divides."""
    with no_autocast(state.device):
        return (state.float().var(-1, keepdim=True, unbiased=False) + LN_EPS).sqrt()
