"""Flow matching: the path from noise to data, its velocity, training times and the loss. Defines what time means.

Time t runs from 0 (noise) to 1 (data). The path between an image x and its noise ε is the straight line
``x_t = (1 - t) ε + t x``; its velocity ``v = x - ε`` is what networks predict and samplers integrate (Lipman
et al., 2022). Other conventions (diffusers' ``sigma = 1 - t`` and its 0..1000 timesteps) are converted in ``interop/``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

MIN_REMAINING = 0.05
"""Smallest 1 - t that an image error is divided by: nearer to the data the division would only amplify it."""
MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Range in which the map of mode sampling is monotonic."""
FIXED_TIMES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Times at which validation loss and routing are reported."""


@dataclass(frozen=True, kw_only=True)
class TimeConfig:
    """Density of the training times and weight of the loss at each time (Esser et al., 2024, Section 3.1).

    That paper's time is 1 - t here, so its mean m is -m here. The other densities are symmetric.
    """

    density: Literal["logit_normal", "uniform", "mode", "cosmap"] = "logit_normal"
    """Density of the times before the shift."""
    mean: float = 0.0
    """logit_normal: mean of the logit of times; below 0 prefers noise."""
    std: float = 1.0
    """logit_normal: standard deviation of the logit of times."""
    mode_scale: float = 1.29
    """mode: above 0 prefers the middle of the path, below 0 its ends. 0 is uniform."""
    shift: float = 1.0
    """Above 1 moves times towards the noise, as the sampler's shift does."""
    shift_size: int = 0
    """Side in pixels of the pictures that ``shift`` is meant for; it grows in proportion to the side. 0: the same shift
    at every size."""
    weighting: Literal["uniform", "sigma", "cosmap", "min_snr"] = "uniform"
    """Weight of the velocity's squared error at each time."""
    snr_limit: float = 5.0
    """min_snr: largest weight of the image's squared error, as a signal-to-noise ratio."""

    def __post_init__(self) -> None:
        if not (self.std >= 0 and math.isfinite(self.std) and math.isfinite(self.mean)):
            raise ValueError(f"std is {self.std} and mean {self.mean}; use finite numbers, and a std of at least 0")
        if not MODE_SCALES[0] <= self.mode_scale <= MODE_SCALES[1]:
            raise ValueError(f"mode_scale is {self.mode_scale}; use a number from -1 to {MODE_SCALES[1]:.3f}")
        if not (0 < self.shift < math.inf and 0 < self.snr_limit < math.inf):
            raise ValueError(f"shift is {self.shift} and snr_limit {self.snr_limit}; use finite numbers above 0")
        if self.shift_size < 0:
            raise ValueError(f"shift_size is {self.shift_size}; use 0 for the same shift at every size")

    def shift_for(self, pixels: int) -> float:
        """Return the shift for pictures of ``pixels`` = m pixels: sqrt(m/n) times that of n pixels (Eq. 23)."""
        return self.shift * (math.sqrt(pixels) / self.shift_size if self.shift_size else 1.0)


def path(
    image: Float[Tensor, " B *shape"], noise: Float[Tensor, " B *shape"], t: Float[Tensor, " T"]
) -> Float[Tensor, " B *shape"]:
    """Return the noisy image at time t."""
    t = _expand(t, image)
    return (1 - t) * noise + t * image


def velocity(image: Float[Tensor, " B *shape"], noise: Float[Tensor, " B *shape"]) -> Float[Tensor, " B *shape"]:
    """Return the path's velocity, which is the same at every time."""
    return image - noise


def guided_velocity(
    prompt: Float[Tensor, " B *shape"], null: Float[Tensor, " B *shape"], scale: float
) -> Float[Tensor, " B *shape"]:
    """Extrapolate from the velocity of the null prompt through that of the prompt (Ho & Salimans, 2022)."""
    return null + scale * (prompt - null)


def velocity_from_image(
    image: Float[Tensor, " B *shape"], noisy: Float[Tensor, " B *shape"], t: Float[Tensor, " T"]
) -> Float[Tensor, " B *shape"]:
    """Return the velocity from the noisy image at time t to a predicted image: (x - x_t) / (1 - t)."""
    return (image - noisy) / (1 - _expand(t, image)).clamp(min=MIN_REMAINING)


def logit_normal(uniform: Float[Tensor, " B"], mean: float = 0.0, std: float = 1.0) -> Float[Tensor, " B"]:
    """Map uniform numbers in (0, 1) to times whose logit is normal (Esser et al., 2024), by the inverse CDF."""
    normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7))
    return torch.sigmoid(mean + std * normal).float()


def mode(uniform: Float[Tensor, " B"], scale: float) -> Float[Tensor, " B"]:
    """Map uniform numbers in [0, 1] to times around the middle of the path with heavy tails (Eq. 20)."""
    u = uniform.double()
    return (u + scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)).float()


def cosmap(uniform: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Map uniform numbers in [0, 1] to times with the signal-to-noise ratios of the cosine schedule (Eq. 21)."""
    angle = math.pi / 2 * uniform.double()
    return (torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))).float()


def shifted(t: Float[Tensor, " B"], shift: float) -> Float[Tensor, " B"]:
    """Move times towards the noise: the noise level s = 1 - t becomes a s / (1 + (a - 1) s) for shift a (Eq. 23)."""
    t = t.double()
    return (t / (shift - (shift - 1) * t)).float()


def training_times(uniform: Float[Tensor, " B"], cfg: TimeConfig, pixels: int) -> Float[Tensor, " B"]:
    """Map uniform numbers in [0, 1] to training times of pictures of ``pixels`` pixels, in increasing order."""
    if cfg.density == "logit_normal":
        t = logit_normal(uniform, cfg.mean, cfg.std)
    elif cfg.density == "mode":
        t = mode(uniform, cfg.mode_scale)
    else:
        t = cosmap(uniform) if cfg.density == "cosmap" else uniform
    return shifted(t, cfg.shift_for(pixels))


def time_weights(t: Float[Tensor, " B"], cfg: TimeConfig) -> Float[Tensor, " B"]:
    """Return the weight of the velocity's squared error at each time.

    The velocity's squared error is the image's over (1 - t)^2 and the noise's over t^2. "sigma" is (1 - t)^-2, capped
    near the data; "cosmap" is the density of ``cosmap`` (Eq. 22); "min_snr" weighs the image's error with
    min(SNR, limit), the SNR being (t / (1 - t))^2 (Hang et al., 2023).
    """
    if cfg.weighting == "sigma":
        return (1 - t).clamp(min=MIN_REMAINING) ** -2
    if cfg.weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * t + 2 * t.square()))
    if cfg.weighting == "min_snr":
        return torch.minimum(t.square(), cfg.snr_limit * (1 - t).square())
    return torch.ones_like(t)


def velocity_loss(
    predicted: Float[Tensor, " B *shape"],
    target: Float[Tensor, " B *shape"],
    weights: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, ""]:
    """Return the velocity's mean squared error over batch and pixels, in float32, each sample's times its weight."""
    error = (predicted.float() - target.float()).square()
    return (error if weights is None else error * _expand(weights, error)).mean()


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.float().reshape(-1, *[1] * (like.ndim - 1))
