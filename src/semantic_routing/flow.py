"""Flow matching, and the one statement of what time means.

Time t runs from 0 (noise) to 1 (data). The path between an image x and its noise ε is the straight line
``x_t = (1 - t) ε + t x``; its velocity ``v = x - ε`` is what networks predict and samplers integrate (Lipman
et al., 2022). Other conventions (diffusers' ``sigma = 1 - t`` and its 0..1000 timesteps) live only where this
program meets other programs.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

MIN_REMAINING = 0.05
"""Least 1 - t by which a difference of images is divided: near the data that would only amplify error."""


def path(
    image: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], t: Float[Tensor, " B"]
) -> Float[Tensor, "B *shape"]:
    """The noisy image at time t."""
    t = _expand(t, image)
    return (1 - t) * noise + t * image


def velocity(image: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"]) -> Float[Tensor, "B *shape"]:
    """The path's velocity, the same at every time."""
    return image - noise


def velocity_from_image(
    image: Float[Tensor, "B *shape"], noisy: Float[Tensor, "B *shape"], t: Float[Tensor, " B"]
) -> Float[Tensor, "B *shape"]:
    """The velocity that leads from the noisy image at time t to a predicted image: (x - x_t) / (1 - t)."""
    return (image - noisy) / (1 - _expand(t, image)).clamp(min=MIN_REMAINING)


def logit_normal(uniform: Float[Tensor, " B"], mean: float = 0.0, std: float = 1.0) -> Float[Tensor, " B"]:
    """Times whose logit is normal (Esser et al., 2024), from uniform numbers in (0, 1) by the inverse CDF."""
    normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))
    return torch.sigmoid(mean + std * normal).float()


def velocity_loss(predicted: Float[Tensor, "B *shape"], target: Float[Tensor, "B *shape"]) -> Float[Tensor, ""]:
    """Mean squared error of the velocity over batch and pixels, in float32."""
    return (predicted.float() - target.float()).square().mean()


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.float().reshape(-1, *[1] * (like.ndim - 1))
