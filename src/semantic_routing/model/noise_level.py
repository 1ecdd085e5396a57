"""Estimates the time t of a noisy latent from the latent itself, for state-aware gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from semantic_routing.model.layers import linear

SCALES = (1, 2, 4)
"""Sides of the squares averaged before neighbours are compared."""


class NoiseLevel(nn.Module):
    """Estimator of the time t (0 noise, 1 data) of x_t from the differences of neighbouring values at several scales.

    White noise has the same differences at every distance and averages out over squares; images do neither. Seven
    energies and a hidden layer of 64 suffice for any number of channels and any size from 8 x 8 on. Sums are in
    float64, so that an estimate does not depend on the batch.
    """

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.fc1 = linear(1 + 2 * len(SCALES), hidden, bias=True)
        self.fc2 = linear(hidden, 1, bias=True)

    def forward(self, x: Float[Tensor, "B Ch h w"]) -> Float[Tensor, " B"]:
        with torch.autocast(x.device.type, enabled=False):
            h = F.silu(F.linear(energies(x.double()).log(), self.fc1.weight.double(), self.fc1.bias.double()))
            return F.linear(h, self.fc2.weight.double(), self.fc2.bias.double()).sigmoid()[:, 0].float()


def energies(x: Float[Tensor, "B Ch h w"]) -> Float[Tensor, "B E"]:
    """Return the mean squares of the latent and of its vertical and horizontal differences at each scale."""
    found = [x.square().mean((1, 2, 3))]
    for scale in SCALES:
        y = F.avg_pool2d(x, scale)
        found += [y.diff(dim=dim).square().mean((1, 2, 3)) for dim in (2, 3)]
    return torch.stack(found, dim=-1).clamp(min=1e-8)
